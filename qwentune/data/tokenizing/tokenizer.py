"""A checkpoint's tokenizer, loaded without torch, in which no text can become a control token."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from unicodedata import is_normalized

from tokenizers import Tokenizer as Backend

from qwentune.data.tokenizing.tokenizer_files import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, read_tokenizer
from qwentune.data.tokenizing.truth import ANOTHER, END_OF_TEXT, file_problems, lost, proof_problems
from qwentune.errors import Problem, UsageError
from qwentune.facts.documents import MEND, read_object

CONTROL_TOKEN = re.compile(r"<\|[^<>|\s]+\|>")
# In these every alternative that takes in a line feed takes in all white space up to the last one and ends there, so a
# line that is not empty begins a part of its own. A pattern that is not listed costs time, nothing else.
PATTERNS_THAT_CUT_AFTER_NEWLINE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
BATCH_SIZE = 256  # texts: enough for every core, and what they become is still in the processor's cache
LONGEST_WHOLE = 2**16  # characters; a longer text is encoded by parts where it can be cut
NUM_KEPT_WORDS = 200_000  # whose merges are remembered, in about 30 MB; the backend's own bound is 10,000
_LINE_END = re.compile(r"\n(?=[ \t]*\S)")  # before a line that is not empty
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Tokenizer:
    """Byte-level BPE of one checkpoint, as its `tokenizer.json` defines it.

    `control_ids` maps every `<|…|>` token to its id; `encode` never produces one of them. `<think>`, `<tool_call>` and
    the like are no control tokens: text that spells them becomes them, as on an inference server.
    `cuts_after_newline`: a text cut between a line feed and a line that is not empty is encoded as its two halves are.
    """

    definition: str
    control_ids: dict[str, int]
    special_tokens: dict[str, str]
    chat_template: str | None
    fingerprint: str
    cuts_after_newline: bool = False
    composes: bool = False  # characters, by Unicode's NFC
    tags: tuple[str, ...] = ()  # tokens that texts may spell
    folder: str = ""

    @property
    def _file(self) -> str:
        return str(Path(self.folder, TOKENIZER))

    @cached_property
    def backend(self) -> Backend:
        """What encodes and decodes; slow to build, and plans do without.

        Raises UsageError where its library makes none of the file, or it does not give back what it is given.
        """
        try:
            backend = Backend.from_str(self.definition)
        except BaseException as error:  # of no kind but Exception, and a panic of Rust's is not even that
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UsageError(Problem(self._file, f"makes no tokenizer: {str(error)[:300]}", MEND)) from None
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None  # it would add special tokens, and no text has any
        resize = getattr(backend.model, "_resize_cache", None)
        if resize is not None:
            resize(NUM_KEPT_WORDS)
        if problems := proof_problems(self._file, backend, self.control_ids, self.tags):
            raise UsageError(problems)
        return backend

    def prove(self, text: str, ids: Sequence[int], where: str) -> None:
        """Raises UsageError where `ids` do not decode to the text that they encode, up to NFC."""
        if what := lost(self.backend, text, list(ids)):
            raise UsageError(Problem(self._file, f"{what} (first seen at {where})", ANOTHER))

    def changes(self, text: str) -> bool:
        """Whether the text comes back in composed characters where it had others."""
        return self.composes and not text.isascii() and not is_normalized("NFC", text)

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Splits a rendering at its control tokens and keeps them."""
        return re.compile("(" + "|".join(map(re.escape, self.control_ids)) + ")")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; no control token is recognised."""
        short = [text for text in texts if len(text) <= LONGEST_WHOLE]
        batches = (short[start : start + BATCH_SIZE] for start in range(0, len(short), BATCH_SIZE))
        ids = iter([encoded for batch in batches for encoded in self._encoded(batch)])
        return [next(ids) if len(text) <= LONGEST_WHOLE else self._encoded_by_parts(text) for text in texts]

    def _encoded_by_parts(self, text: str) -> list[int]:
        """The ids of a long text: while the library encodes one, it holds some hundred bytes for each character."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            end = _LINE_END.search(text, start + LONGEST_WHOLE) if self.cuts_after_newline else None
            stop = end.end() if end else len(text)
            ids += self._encoded([text[start:stop]])[0]
            start = stop
        return ids

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens written out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @property
    def template_file(self) -> str:
        """Where the checkpoint's chat template stands."""
        file = Path(self.folder, TEMPLATE)
        return str(file) if file.exists() else f"{Path(self.folder, TOKENIZER_CONFIG)}: chat_template"

    @property
    def end_of_text_id(self) -> int:
        """The id of the token that ends a document."""
        return self.control_ids[END_OF_TEXT]

    @property
    def eos_token(self) -> str | None:
        """The token that the checkpoint itself names as its end: a base model says `<|endoftext|>`."""
        return self.special_tokens.get("eos_token")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`).

    Raises UsageError where a file is missing or damaged.
    """
    document, config, template = read_tokenizer(folder)
    listed, decoder = document["added_tokens"], config.get("added_tokens_decoder", {})
    named = [{**token, "id": int(key)} for key, token in decoder.items()]
    if problems := file_problems(str(folder / TOKENIZER), document, [*listed, *named], _num_rows(folder)):
        raise UsageError(problems)
    tokens = _added_tokens(listed, decoder)
    for token in tokens:
        # `encode_special_tokens` spares exactly the tokens flagged special, and Qwen does not flag the FIM ones.
        token["special"] = CONTROL_TOKEN.fullmatch(token["content"]) is not None
    document["added_tokens"] = tokens
    text = json.dumps(document, ensure_ascii=False)
    return Tokenizer(
        definition=text,
        control_ids={token["content"]: token["id"] for token in tokens if token["special"]},
        special_tokens=_special_tokens(config),
        chat_template=_default_template(config) if template is None else template,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        cuts_after_newline=split_pattern(document) in PATTERNS_THAT_CUT_AFTER_NEWLINE,
        composes=bool(document.get("normalizer")),
        tags=tuple(token["content"] for token in tokens if not token["special"]),
        folder=str(folder),
    )


def split_pattern(document: dict[str, Any]) -> str | None:
    """The pattern by which texts are cut before their bytes are merged, where nothing else cuts or normalises them."""
    match document:
        case {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ]
            },
        }:
            return pattern
        case _:
            return None


def _added_tokens(listed: list[dict[str, Any]], decoder: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    # Qwen3-Base lists `<think>` only in tokenizer_config.json; transformers adds such tokens at load, so do we.
    tokens = {token["id"]: dict(token) for token in listed}
    for key, token in decoder.items():
        tokens.setdefault(int(key), {"id": int(key), **token})
    return [tokens[key] for key in sorted(tokens)]


def _num_rows(folder: Path) -> int | None:
    """How many tokens the model beside the tokenizer has rows for; None where nothing says so."""
    try:
        config = read_object(folder / "config.json")
        rows = config.get("vocab_size") or config["text_config"]["vocab_size"]
    except (UsageError, LookupError, TypeError):
        return None  # what is wrong with that file is said by those who need it
    return rows if isinstance(rows, int) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        token: Any = config.get(name)
        if isinstance(token, dict):
            token = cast(dict[str, Any], token).get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _default_template(config: dict[str, Any]) -> str | None:
    template: str | list[dict[str, str]] | None = config.get("chat_template")
    if isinstance(template, list):  # several named templates: a server takes the one called default
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template
