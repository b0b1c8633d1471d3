"""The tokenizer files are the hub's byte for byte, and a truncated vocabulary follows the same rules."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from checkpoints import SMALL_NUM_RANKS
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qwentune.data.tokenizing.vocabulary import NUM_BYTES, byte_alphabet, rank_file, read_ranks, write_tokenizer
from qwentune.errors import UsageError

# SHA-256 of tokenizer.json in Qwen/Qwen2.5-7B-Instruct and Qwen/Qwen3-8B
PUBLISHED_QWEN2_5 = "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539"
PUBLISHED_QWEN3_5 = "5f9e4d4901a92b997e463c1f46055088b6cca5ca61a6522d1b9f64c4bb81cb42"  # Qwen/Qwen3.5-9B, and 3.6
PUBLISHED_QWEN3 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def small(qwen3_folder: Path) -> Tokenizer:
    return load(qwen3_folder)


@functools.cache
def small_ranks() -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate(read_ranks(rank_file())[:SMALL_NUM_RANKS])}


def merged_by_rank(text: str) -> list[int]:
    """Byte-pair encoding of one word as it is defined: merge the known pair of lowest rank, and again."""
    ranks = small_ranks()
    pieces = [bytes([byte]) for byte in text.encode()]
    while pairs := [(ranks[a + b], a, b) for a, b in itertools.pairwise(pieces) if a + b in ranks]:
        _, left, right = min(pairs)
        position = list(itertools.pairwise(pieces)).index((left, right))
        pieces[position : position + 2] = [left + right]
    return [ranks[piece] for piece in pieces]


def test_the_qwen2_5_tokenizer_is_the_published_file_byte_for_byte(real_qwen2_folder: Path) -> None:
    assert file_hash(real_qwen2_folder / "tokenizer.json") == PUBLISHED_QWEN2_5


def test_the_qwen3_tokenizer_is_the_published_file_byte_for_byte(real_qwen3_folder: Path) -> None:
    assert file_hash(real_qwen3_folder / "tokenizer.json") == PUBLISHED_QWEN3


def test_the_qwen3_5_tokenizer_is_the_published_file_byte_for_byte(real_qwen3_5_folder: Path) -> None:
    assert file_hash(real_qwen3_5_folder / "tokenizer.json") == PUBLISHED_QWEN3_5


def test_some_ranks_of_qwen3_5_are_made_by_no_merge(real_qwen3_5_folder: Path) -> None:
    model = json.loads((real_qwen3_5_folder / "tokenizer.json").read_text("utf-8"))["model"]
    assert len(model["vocab"]) - NUM_BYTES - len(model["merges"]) == 201
    ids = load(real_qwen3_5_folder).encode("俱乐部").ids
    assert len(ids) > 1
    assert "".join(byte_alphabet()[byte] for byte in "俱乐部".encode()) in model["vocab"]


def test_the_real_vocabulary_gives_the_published_ids(real_qwen3_folder: Path) -> None:
    real = load(real_qwen3_folder)
    assert real.encode("<|im_start|>assistant\n").ids == [151644, 77091, 198]
    assert [real.token_to_id(word) for word in ("yes", "no", "user", "system")] == [9693, 2152, 872, 8948]
    assert real.encode("<think></think>").ids == [151667, 151668]
    assert real.get_vocab_size() == 151669


@pytest.mark.parametrize(("family", "last"), [("qwen2.5", "<|file_sep|>"), ("qwen3", "</think>")])
def test_control_tokens_follow_the_last_rank(family: str, last: str, qwen2_folder: Path, qwen3_folder: Path) -> None:
    tokenizer = load(qwen2_folder if family == "qwen2.5" else qwen3_folder)
    assert tokenizer.token_to_id("<|endoftext|>") == SMALL_NUM_RANKS
    assert tokenizer.token_to_id("<|im_end|>") == SMALL_NUM_RANKS + 2
    assert tokenizer.token_to_id(last) == tokenizer.get_vocab_size() - 1


def test_both_files_name_the_same_control_tokens(qwen3_folder: Path) -> None:
    listed = json.loads((qwen3_folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    config = json.loads((qwen3_folder / "tokenizer_config.json").read_text("utf-8"))
    assert config["added_tokens_decoder"] == {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in listed
    }


def test_tool_think_and_fim_tags_survive_decoding_without_special_tokens(small: Tokenizer) -> None:
    tags = "<tool_call></tool_call><tool_response></tool_response><think></think><|fim_prefix|><|file_sep|>"
    ids = small.encode(f"<|im_start|>{tags}<|image_pad|><|im_end|><|endoftext|>").ids
    assert small.decode(ids, skip_special_tokens=True) == tags


@given(text=st.text())
def test_any_text_comes_back_in_its_composed_form(small: Tokenizer, text: str) -> None:
    ids = small.encode(text).ids
    assert small.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@given(word=st.text(alphabet="aeinorstABZ中é", min_size=1, max_size=20))
def test_a_truncated_vocabulary_still_merges_by_rank(small: Tokenizer, word: str) -> None:
    assert small.encode(word).ids == merged_by_rank(word)


def test_the_smallest_vocabulary_has_one_token_per_byte(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2.5", NUM_BYTES)
    bare = load(tmp_path)
    assert len(bare.encode("naïve 中").ids) == len("naïve 中".encode())
    with pytest.raises(ValueError, match="num_ranks is 255"):
        write_tokenizer(tmp_path, "qwen2.5", 255)


def test_the_end_of_a_base_checkpoint_is_the_end_of_the_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen3", NUM_BYTES, eos="<|endoftext|>")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["eos_token"] == "<|endoftext|>"


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'dashscope.*\n.*pip install "qwentune\[quickstart\]"'):
        write_tokenizer(tmp_path / "new", "qwen3")
    assert not (tmp_path / "new").exists()


def test_another_rank_file_is_refused_with_its_hash(tmp_path: Path) -> None:
    other = tmp_path / "qwen.tiktoken"
    other.write_bytes(rank_file().read_bytes()[:-10])
    with pytest.raises(UsageError, match=file_hash(other)):
        read_ranks(other)


def test_building_imports_neither_torch_nor_dashscope(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from qwentune.data.tokenizing.vocabulary import write_tokenizer; "
        "write_tokenizer(pathlib.Path(sys.argv[1]), 'qwen3', 300); "
        "print(sorted({'torch', 'transformers', 'dashscope'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr
