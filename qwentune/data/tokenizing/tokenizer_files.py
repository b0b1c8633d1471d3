"""A checkpoint's tokenizer files, each key of the kind that its readers take it for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt, MinLen
from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter

from qwentune.errors import Problem, UsageError
from qwentune.facts.documents import (
    LARGEST_TEMPLATE_BYTES,
    LARGEST_TOKENIZER_BYTES,
    MEND,
    checked,
    read_object,
    read_text,
)

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
COPIED = ("vocab.json", "merges.txt")  # into what is published, and not read
_Id = Annotated[int, Ge(0), Lt(2**24)]
_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Token(BaseModel):
    model_config = _STRICT

    content: Annotated[str, MinLen(1)]
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _ListedToken(_Token):
    id: _Id


class _Model(BaseModel):
    model_config = _STRICT

    type: Literal["BPE"] = "BPE"
    vocab: Annotated[dict[str, _Id], MinLen(1)]
    merges: list[str] | list[list[str]]


class _Definition(BaseModel):
    model_config = _STRICT

    added_tokens: list[_ListedToken]
    model: _Model


class _Named(BaseModel):
    model_config = _STRICT

    name: str
    template: str


class _Content(BaseModel):
    model_config = _STRICT

    content: str


_SpecialToken = str | _Content | None


class _Settings(BaseModel):
    model_config = _STRICT

    added_tokens_decoder: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,8}$")], _Token] = {}
    chat_template: str | list[_Named] | None = None
    tokenizer_class: str | None = None
    bos_token: _SpecialToken = None
    eos_token: _SpecialToken = None
    pad_token: _SpecialToken = None
    unk_token: _SpecialToken = None


_DEFINITION, _SETTINGS = TypeAdapter(_Definition), TypeAdapter(_Settings)


def read_tokenizer(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """The contents of tokenizer.json and tokenizer_config.json, and the text of chat_template.jinja, None without one.

    Raises UsageError with file and key: a file that is missing, damaged, no file, or of other content than is read.
    """
    document = read_object(folder / TOKENIZER, largest_bytes=LARGEST_TOKENIZER_BYTES)
    config = read_object(folder / TOKENIZER_CONFIG, optional=True, largest_bytes=LARGEST_TOKENIZER_BYTES)
    checked(document, _DEFINITION, folder / TOKENIZER)
    checked(config, _SETTINGS, folder / TOKENIZER_CONFIG)
    for path in (folder / name for name in COPIED):
        if path.exists() and not (path.is_file() and os.access(path, os.R_OK)):
            raise UsageError(Problem(str(path), "The file cannot be read.", MEND))
    template = folder / TEMPLATE
    text = read_text(template, LARGEST_TEMPLATE_BYTES) if os.path.lexists(template) else None
    return document, config, text
