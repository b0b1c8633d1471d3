"""What stands around published weights: a tokenizer that everybody loads as it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwentune.exporting.package import write_package

# Qwen3.5 keeps a letter and its marks together, Qwen2 does not.
TEXTS = (
    "हिन्दी में लिखिए, क्या हाल है?",
    "กรุณาเขียนเป็นภาษาไทย",
    "السَّلَامُ عَلَيْكُمْ",
    "e\u0301 n\u0303 v\u0337o\u0337i\u0337d, 俱乐部的",
    "<|im_start|>assistant\n<think>\n12 * 34\n</think>\n\n408<|im_end|>\n",
    "<|audio_start|><|audio_pad|><tts_pad> don't DON'T  \r\n\n\t x",
    "👩‍👩‍👧‍👦 👍🏽 ﷺ ａｂｃ １２３ \ufeff\u200b\u2028",
)
CONFIGS = {
    "an adapter": None,
    "a model of text": {"model_type": "qwen3_5_text"},
    "a model of text and images": {"model_type": "qwen3_5"},
}


def ids(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return tokenizer(list(TEXTS))["input_ids"]


@pytest.fixture(scope="module")
def trained_with(real_qwen3_5_folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `tokenizer.json` and `tokenizer_config.json` describe."""
    return PreTrainedTokenizerFast.from_pretrained(real_qwen3_5_folder)


def package(base: Path, target: Path, config: dict[str, str] | None) -> Path:
    target.mkdir()
    if config is not None:
        (target / "config.json").write_text(json.dumps(config))
    write_package(target, base, chat_template="{{ messages }}", stop_token_ids=[248046], end_of_text_id=248044)
    return target


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_published_tokenizer_of_qwen3_5_splits_texts_as_it_was_trained(
    tmp_path: Path, real_qwen3_5_folder: Path, trained_with: PreTrainedTokenizerFast, kind: str
) -> None:
    folder = package(real_qwen3_5_folder, tmp_path / "package", CONFIGS[kind])
    loaded = AutoTokenizer.from_pretrained(folder)
    assert ids(loaded) == ids(trained_with)
    assert len(loaded) == len(trained_with) == 248077
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "all_special_ids"):
        assert getattr(loaded, name) == getattr(trained_with, name)
    assert loaded.chat_template == "{{ messages }}"
    again = package(folder, tmp_path / "again", None)  # an adapter is merged, an export packed from what was published
    assert (again / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()


def test_the_hub_s_files_alone_would_be_split_otherwise(
    tmp_path: Path, real_qwen3_5_folder: Path, trained_with: PreTrainedTokenizerFast
) -> None:
    """Else the tests above would prove nothing."""
    loaded = AutoTokenizer.from_pretrained(real_qwen3_5_folder)
    assert ids(loaded) != ids(trained_with)


@pytest.mark.parametrize("fixture", ["qwen2_folder", "qwen3_folder"])
def test_a_tokenizer_that_its_class_loads_right_is_copied_byte_for_byte(
    tmp_path: Path, request: pytest.FixtureRequest, fixture: str
) -> None:
    base = request.getfixturevalue(fixture)
    folder = package(base, tmp_path / "package", None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    source = PreTrainedTokenizerFast.from_pretrained(base)
    assert ids(AutoTokenizer.from_pretrained(folder)) == ids(source)
