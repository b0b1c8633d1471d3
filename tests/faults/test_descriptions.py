"""What describes a model is read by kind: a damaged file is named with its key or place, before anything is started."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwentune.data.dataset import chat_template
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import UsageError, UserError
from qwentune.facts.documents import DEEPEST_NESTING, read_object
from qwentune.facts.generation_config import read_generation_config
from qwentune.facts.models import model_spec
from qwentune.recipe import load_recipe
from tests.model_folders import put
from tests.runs import write_recipe

REMOVED = ...
DEEP = '{"a":' * 100_000
TOKENIZER = {
    "added_tokens.0.id": ("151643", None, -1, 1.5, 2**40),
    "added_tokens.0.content": ("", None, 5, REMOVED),
    "added_tokens.0.special": ("yes",),
    "added_tokens.0": (None, [], "x"),
    "added_tokens": (None, {}, REMOVED),
    "model.vocab": (None, [], {}, REMOVED),
    "model.vocab.a": ("64", -1, None),
    "model.merges": (None, {}, [1], "a b", REMOVED),
    "model.type": ("WordPiece", 3),
    "model": (None, [], REMOVED),
}
SETTINGS = {
    "added_tokens_decoder": ([], "x"),
    "added_tokens_decoder.x": ({"content": "<x>"},),
    "eos_token": (5, [], {"text": "<|im_end|>"}),
    "chat_template": (5, {}, [{"name": "default"}], ["x"]),
}
CONFIG = {
    "num_hidden_layers": (0, -1, "2", 10**9, 2.5, None, []),
    "hidden_size": (0, 10**30),
    "vocab_size": (REMOVED,),
    "num_key_value_heads": (3,),
    "tie_word_embeddings": ("true", 1),
    "rope_theta": ("1e6", -1, 0),
    "rms_norm_eps": (-1e-6, "small"),
    "torch_dtype": ("int8", 4),
    "rope_scaling": (4, [], {"factor": "x"}, {"factor": 1e300}),
}


def damaged(folder: Path, source: Path, name: str, key: str, value: Any) -> Path:
    """A copy of the checkpoint in which a key of a file has another value."""
    shutil.copytree(source, folder)
    content = json.loads((source / name).read_text())
    at: list[Any] = [int(part) if part.isdigit() else part for part in key.split(".")]
    if key == "added_tokens_decoder.x":
        content["added_tokens_decoder"]["x"] = None
    (folder / name).write_text(json.dumps(put(content, tuple(at), value)))
    return folder


def cases(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(key, value, id=f"{key}={value!r:.20}") for key, values in table.items() for value in values]


@pytest.mark.fault("L86", "tokenizer.json, tokenizer_config.json: the file, the key, its value and what is needed")
@pytest.mark.parametrize(("key", "value"), cases(TOKENIZER))
def test_every_key_of_a_tokenizer_is_read_by_kind(tmp_path: Path, qwen3_folder: Path, key: str, value: Any) -> None:
    folder = damaged(tmp_path / "m", qwen3_folder, "tokenizer.json", key, value)
    with pytest.raises(UsageError, match=f"tokenizer.json: {key}"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("key", "value"), cases(SETTINGS))
def test_every_key_of_a_tokenizer_s_settings_is_read_by_kind(
    tmp_path: Path, qwen3_folder: Path, key: str, value: Any
) -> None:
    folder = damaged(tmp_path / "m", qwen3_folder, "tokenizer_config.json", key, value)
    with pytest.raises(UsageError, match=f"tokenizer_config.json: {key}"):
        load_tokenizer(folder)


@pytest.mark.fault("L86", "config.json: the file, the key, its value and what is needed")
@pytest.mark.parametrize(("key", "value"), cases(CONFIG))
def test_every_key_of_a_config_that_is_read_is_read_by_kind(
    tmp_path: Path, qwen3_folder: Path, key: str, value: Any
) -> None:
    folder = damaged(tmp_path / "m", qwen3_folder, "config.json", key, value if value is not REMOVED else None)
    with pytest.raises(UsageError, match=f"config.json: {key}"):
        model_spec(str(folder))


@pytest.mark.parametrize(
    ("content", "key"),
    [({"eos_token_id": "x"}, "eos_token_id"), ({"pad_token_id": []}, "pad_token_id"), ({"top_p": 7}, "top_p")],
)
def test_a_generation_config_is_read_by_kind(tmp_path: Path, content: dict[str, Any], key: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=f"generation_config.json: {key}"):
        read_generation_config(tmp_path)


@pytest.mark.fault("L86", "files that are cut, empty, binary, nested without end, no files: the file, line and column")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", r":1:1  The file is empty"),
        ("{", r":1:2  The file cannot be read: Expecting property name"),
        ("[]", "holds no JSON object"),
        ("\ufffe\0{}", "cannot be read"),
        (b"\xff\xfe{\0", "no UTF-8: byte 0"),
        (DEEP, f"more than {DEEPEST_NESTING} deep"),
        ('{"a":' * 80 + "1" + "}" * 80, f"more than {DEEPEST_NESTING} deep"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"a": "\\ud800"}', "half a character"),
        (None, "is a folder, no regular file"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(
    tmp_path: Path, qwen3_folder: Path, name: str, content: str | bytes | None, what: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(qwen3_folder, folder)
    if content is None:
        (folder / name).unlink()
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    read = model_spec if name == "config.json" else lambda folder: load_tokenizer(Path(folder))
    with pytest.raises(UsageError, match=what) as caught:
        read(str(folder))
    assert caught.value.problems[0].where.startswith(str(folder / name))


@pytest.mark.fault("L86", "a special file or an endless one in a file's place is refused unread, with the limit")
def test_special_and_endless_files_are_refused(tmp_path: Path, qwen3_folder: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(qwen3_folder, folder)
    (folder / "chat_template.jinja").unlink()
    os.mkfifo(folder / "chat_template.jinja")  # opening it would wait for a writer
    with pytest.raises(UsageError, match=r"chat_template\.jinja  This is a .*, no regular file"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"chat_template\.jinja  This is a .*, no regular file"):
        model_spec(str(folder))
    (folder / "config.json").write_bytes(b" " * (17 * 2**20))
    with pytest.raises(UsageError, match=r"config\.json  .* bytes are too many; such a file has at most 16,777,216"):
        read_object(folder / "config.json")


@pytest.mark.fault("L86", "a chat template that is cut: file and line")
def test_a_template_that_is_cut_is_named_with_its_line(tmp_path: Path, qwen3_folder: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(qwen3_folder, folder)
    (folder / "chat_template.jinja").write_text("{%- for message in messages %}\n{{ message.content }\n")
    recipe = load_recipe(write_recipe(tmp_path, folder)).recipe
    with pytest.raises(UserError, match=r"chat_template\.jinja:2  "):
        chat_template(recipe.data, load_tokenizer(folder))


def test_a_vocabulary_of_which_the_library_makes_nothing_is_named(tmp_path: Path, qwen3_folder: Path) -> None:
    folder = damaged(tmp_path / "m", qwen3_folder, "tokenizer.json", "pre_tokenizer", {"type": "Unheard"})
    tokenizer = load_tokenizer(folder)
    with pytest.raises(UsageError, match=r"tokenizer\.json  makes no tokenizer"):
        tokenizer.encode(["x"])
