"""Qwen's tokenizer as files, built from the rank file inside the PyPI package `dashscope`.

The product is the hub's `tokenizer.json` byte for byte; a truncated one has the same rules with fewer merges.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Literal, TypeAlias

from qwentune.errors import Problem, UsageError

Family: TypeAlias = Literal["qwen2.5", "qwen3"]

RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
NUM_BYTES = 256
MAX_TOKENS = 131072  # model_max_length of the published Instruct checkpoints

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TURN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_TOKENS = (
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
TOOL_AND_FIM_TOKENS = (
    *("<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
THINK_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")

# decode(skip_special_tokens=True) removes these and keeps the other added tokens.
SPECIAL_TOKENS = frozenset(TURN_TOKENS + VISION_TOKENS)

# Two published layouts of one content. In Qwen2.5's file each generation of tokens lists its flags in an
# order of its own and a merge is one string; Qwen3's was written by a later version of `tokenizers`.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
FLAG_ORDER_QWEN2_5 = {
    **dict.fromkeys(TURN_TOKENS, FLAGS),
    **dict.fromkeys(VISION_TOKENS, ("normalized", "lstrip", "rstrip", "single_word")),
    **dict.fromkeys(TOOL_AND_FIM_TOKENS, ("lstrip", "normalized", "rstrip", "single_word")),
}


def write_tokenizer(folder: Path, family: Family, num_ranks: int | None = None, eos: str = "<|im_end|>") -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into the folder, which is made if it is missing.

    Args:
        num_ranks: Keep the first ranks only, at least the 256 bytes; the control tokens follow the last one.
            None keeps all 151,643.
        eos: `<|im_end|>` for chat checkpoints, `<|endoftext|>` for base ones.
    Raises:
        UsageError: `dashscope` is missing or ships another rank file.
    """
    tokens = read_ranks(rank_file())[:num_ranks]
    if len(tokens) < NUM_BYTES:
        raise ValueError(f"num_ranks is {num_ranks}; the {NUM_BYTES} bytes are always in")
    files = {
        "tokenizer.json": json.dumps(tokenizer_json(tokens, family), ensure_ascii=False, indent=2),
        "tokenizer_config.json": json.dumps(tokenizer_config(len(tokens), family, eos), indent=2) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def rank_file() -> Path:
    """The path of `qwen.tiktoken` in the installed `dashscope`, which is not imported."""
    spec = importlib.util.find_spec("dashscope")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location, "resources", "qwen.tiktoken")
        if path.is_file():
            return path
    raise UsageError(
        Problem(
            "dashscope",
            "Qwen's vocabulary is built from a file of this package, and it is not installed.",
            'pip install "qwentune[quickstart]"',
        )
    )


def read_ranks(path: Path) -> list[bytes]:
    """The byte strings of the vocabulary by rank: 256 single bytes, then one string per merge."""
    raw = path.read_bytes().replace(b"\r\n", b"\n")
    digest = hashlib.sha256(raw).hexdigest()
    if digest != RANKS_SHA256:
        raise UsageError(
            Problem(
                str(path),
                f"This is not Qwen's rank file: its SHA-256 is {digest}, {RANKS_SHA256} is needed.",
                'pip install --force-reinstall "dashscope==2.0.2"',
            )
        )
    ranked = (line.split() for line in raw.splitlines())
    by_rank = {int(rank): base64.b64decode(token) for token, rank in ranked}
    return [by_rank[rank] for rank in range(len(by_rank))]


def added_tokens(family: Family) -> tuple[str, ...]:
    """The control tokens of a family in the order of their ids, which follow the last rank."""
    tokens = TURN_TOKENS + VISION_TOKENS + TOOL_AND_FIM_TOKENS
    return tokens if family == "qwen2.5" else tokens + THINK_TOKENS


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two pieces whose merge made the token of two bytes or more; None where no merge ever makes it.

    Byte-pair encoding always merges the adjacent pair of lowest rank; it is replayed on the bytes of the
    token up to the last step.
    """
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pair_ranks = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(pieces)]
        lowest = min(pair_ranks)
        if lowest == len(ranks):
            return None
        position = pair_ranks.index(lowest)
        pieces[position : position + 2] = [pieces[position] + pieces[position + 1]]
    return pieces[0], pieces[1]


def byte_alphabet() -> list[str]:
    """The visible character that stands for each byte in a byte-level vocabulary, as GPT-2 introduced it."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(0x100)
    return [chr(byte if byte in visible else next(spare)) for byte in range(NUM_BYTES)]


def tokenizer_json(tokens: list[bytes], family: Family) -> dict[str, object]:
    """The content of `tokenizer.json`, its fields in the order of the published file."""
    alphabet = byte_alphabet()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    shown = {token: "".join(alphabet[byte] for byte in token) for token in tokens}
    vocabulary = {shown[token]: rank for token, rank in ranks.items()}
    merged = (last_merge(token, ranks) for token in tokens if len(token) > 1)
    merges = [[shown[piece] for piece in pair] for pair in merged if pair is not None]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    flag_order = FLAG_ORDER_QWEN2_5 if family == "qwen2.5" else {}
    merge_layout: dict[str, object] = (
        {"vocab": vocabulary, "merges": [" ".join(pair) for pair in merges]}
        if family == "qwen2.5"
        else {"ignore_merges": False, "vocab": vocabulary, "merges": merges}
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token}
            | dict.fromkeys(flag_order.get(token, FLAGS), False)
            | {"special": token in SPECIAL_TOKENS}
            for token_id, token in enumerate(added_tokens(family), start=len(tokens))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
        }
        | merge_layout,
    }


def tokenizer_config(num_ranks: int, family: Family, eos: str) -> dict[str, object]:
    """The content of `tokenizer_config.json`, without the chat template (a file of its own)."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {"content": token} | flags | {"special": token in SPECIAL_TOKENS}
            for token_id, token in enumerate(added_tokens(family), start=num_ranks)
        },
        "additional_special_tokens": [*TURN_TOKENS[1:], *VISION_TOKENS],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "errors": "replace",
        "model_max_length": MAX_TOKENS,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
