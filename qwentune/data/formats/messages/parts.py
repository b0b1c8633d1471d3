"""The parts of a message's content: texts, and the pictures, videos and sounds that stand between them.

Read are Qwen's own parts, OpenAI's and vLLM's, transformers' and Anthropic's, with or without `type`, and the texts of
JSON that `datasets` writes where contents or parts differ. A part that names no source takes one of the row's columns.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.reading.strict_json import JsonFaultError, parse_json
from qwentune.data.sample import Json, MediaKind, Medium
from qwentune.shipped import shipped

Content = Path | bytes | tuple[Path | bytes, ...]

UNNAMED = ()  # the content of a medium that takes the next item of the row's columns
KINDS: Mapping[str, MediaKind] = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url"), "video"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
}
LIMITS = ("max_pixels", "min_pixels", "fps", "max_frames")
# Qwen's other keys of a part: they would change what is seen.
UNCARRIED = (
    *("resized_height", "resized_width", "total_pixels", "nframes", "num_frames", "min_frames"),
    *("video_start", "video_end", "sample_fps", "raw_fps"),
)
_SAY_NOTHING = ("detail", "cache_control", "uuid")
_SOURCES = ("url", "path", "base64", "bytes", "source", "data")
_TEXT = frozenset(("type", "text"))
_ARTICLE = {"image": "an image", "video": "a video", "audio": "audio"}
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{1024,}={0,2}\s*")  # a path is never so long
_A_PART = 'A part is an object such as {"type": "text", "text": …}.'


def read_parts(content: list[Json], path: str, role: str, reader: RowReader) -> tuple[list[str], tuple[Medium, ...]]:
    """The texts of the parts, and the media between them."""
    texts: list[str] = []
    media: list[Medium] = []
    for i, given in enumerate(content):
        place = f"{path}[{i}]"
        part = reader.read_json(given, place) if isinstance(given, str) and given.lstrip().startswith("{") else given
        if not isinstance(part, dict):
            if part is given:
                reader.refuse(f"{place} is {described(part)}", _A_PART)
            continue
        part = {key: item for key, item in part.items() if item is not None} if None in part.values() else part
        kind = part.get("type") or _kind_by_keys(part)
        if not isinstance(kind, str):
            reader.refuse(f"{place} has no type", _A_PART)
        elif kind in KINDS and role == "assistant":
            fix = "A model of this kind writes text only: leave the row out."
            reader.refuse(f"{place} is {_ARTICLE[KINDS[kind]]} in what the assistant says", fix)
        elif kind in KINDS:
            at = sum(map(len, texts))
            content_of_part = _read_source_of(part, KINDS[kind], place, reader)
            limits = _read_limits(part, KINDS[kind], place, reader)
            if content_of_part is not None:
                media.append(Medium(KINDS[kind], content_of_part, at, place, limits))
        elif kind != "text":
            fix = "Texts, images, videos and audio are read: leave the row out."
            reader.refuse(f"{place} is of the type {kind!r}", fix)
        elif isinstance(text := part.get("text"), str):
            texts.append(text)
            if others := part.keys() - _TEXT:
                reader.leave_unread(sorted(others), place)
        else:
            reader.refuse(f"{place}.text is {described(text)}", "A text is needed.")
    return texts, tuple(media)


def packed_parts(content: Json) -> list[Json] | None:
    """The parts, a medium among them, of which a content is the text of JSON; None where it is another text."""
    listed = _parts_of(content)
    return listed if listed and any(_kind(part) in KINDS for part in listed) else None


def with_unpacked_contents(messages: Sequence[Json]) -> Sequence[Json]:
    """The messages of a row with what their contents hold, where all are texts of JSON, and one of parts with a medium.

    So `datasets` stores contents of which some are texts and some are parts.
    """
    contents = [(one.get("content", one.get("value")) if isinstance(one, dict) else None) for one in messages]
    if not any(packed_parts(content) for content in contents):
        return messages
    held = [(_held(content) if isinstance(content, str) else content) for content in contents]
    if any(isinstance(content, str) and one is None for content, one in zip(contents, held, strict=True)):
        return messages  # some are plain texts, and so is what looks like JSON
    found: list[Json] = []
    for message, content in zip(messages, held, strict=True):
        if isinstance(message, dict):
            message = {**message, "content" if "content" in message else "value": content}
        found.append(message)
    return found


def _held(content: str) -> Json:
    text = unpacked(content)
    return text if isinstance(text, str) else _parts_of(content)


def _parts_of(content: Json) -> list[Json] | None:
    """The parts in a text of JSON; None where it is no list of nothing but these."""
    if not isinstance(content, str) or not content.lstrip().startswith("["):
        return None
    listed = unpacked(content)
    is_of_parts = isinstance(listed, list) and all(_kind(part) in ("text", *KINDS) for part in listed)
    return listed if isinstance(listed, list) and is_of_parts else None


def _kind(part: Json) -> Json:
    return (part.get("type") or _kind_by_keys(part)) if isinstance(part, dict) else None


def unpacked(text: str) -> Json:
    """What a text of JSON holds, of texts, lists and objects; None where it is none."""
    try:
        value = parse_json(text) if text.lstrip()[:1] in ("[", "{", '"') else None
    except JsonFaultError:
        return None
    return value if isinstance(value, str | list | dict) else None


def read_source(value: Json, kind: MediaKind, path: str, reader: RowReader) -> Content | None:
    """What a row gives as a medium: a path, a text of base64, an object with one of them; of a video also its frames.

    None where it is none of these, which is refused.
    """
    match value:
        case str() if (held := unpacked(value)) is not None:
            return read_source(held, kind, path, reader)
        case str() if value.strip():
            return _read_text(value.strip(), kind, path, reader)
        case list() if kind == "video" and value:
            frames = [read_source(item, "image", f"{path}[{i}]", reader) for i, item in enumerate(value)]
            return tuple(frame for frame in frames if isinstance(frame, Path | bytes))
        case {"bytes": str() as data} | {"base64": str() as data} | {"data": str() as data} if data:
            return _read_text(data, kind, path, reader) if data.startswith("data:") else _decoded(data, path, reader)
        case {"url": str() as text} | {"path": str() as text}:
            return read_source(text, kind, path, reader)
        case _:
            wanted = "Give its path, its bytes in base64, or an object with bytes and path."
            reader.refuse(f"{path} is {described(value)}", wanted)
            return None


def _kind_by_keys(part: Mapping[str, Json]) -> Json:
    """The type of a part that names none: that of its one key which is the name of one."""
    kinds = [key for key in part if key == "text" or key in KINDS]
    return kinds[0] if len(kinds) == 1 else None


def _read_source_of(part: Mapping[str, Json], kind: MediaKind, path: str, reader: RowReader) -> Content | None:
    keys = [key for key in (*KINDS, *_SOURCES) if part.get(key) not in (None, "")]
    known = {"type", *keys, *LIMITS, *UNCARRIED, *_SAY_NOTHING}
    reader.leave_unread((key for key in part if key not in known), path)
    if uncarried := [key for key in UNCARRIED if key in part]:
        fix = "Only max_pixels, min_pixels, fps and max_frames are carried out: cut or scale the file itself."
        reader.refuse(f"{path} has {', '.join(uncarried)}", fix)
    match keys:
        case []:
            return UNNAMED
        case ["path", "bytes"]:
            return read_source({"bytes": part["bytes"]}, kind, path, reader)
        case [key]:
            value = {key: part[key]} if key in _SOURCES and key != "source" else part[key]
            return read_source(value, kind, f"{path}.{key}", reader)
        case _:
            reader.refuse(f"{path} has {' and '.join(keys)}", "Keep the one that is meant.")
            return None


def _read_limits(part: Mapping[str, Json], kind: MediaKind, path: str, reader: RowReader) -> dict[str, float]:
    limits: dict[str, float] = {}
    for key in LIMITS if kind == "video" else LIMITS[:2] if kind == "image" else ():
        value = part.get(key)
        least = 0.001 if key == "fps" else 1
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value < 2**40:
            limits[key] = value
        elif value is not None:
            reader.refuse(f"{path}.{key} is {described(value)}", f"A number from {least} on is needed.")
    return limits


def _read_text(text: str, kind: MediaKind, path: str, reader: RowReader) -> Path | bytes | None:
    scheme = text[:12].partition(":")[0].lower()
    if scheme == "data":
        head, _, data = text.partition(",")
        if head.endswith(";base64"):
            return _decoded(data, path, reader)
        reader.refuse(f"{path} is {described(text)}", "Write data:;base64, and behind it the bytes in base64.")
        return None
    if "://" in text[:12] and scheme != "file":
        name = os.path.basename(unquote(text.partition("?")[0])) or kind
        command = f"curl -fL --create-dirs -o {shlex.quote(f'media/{name}')} {shlex.quote(text)}"
        fix = "Nothing is fetched while training: put the file beside the rows and write its path."
        fix = f"Fetch it, and write its path: {command}" if scheme in ("http", "https") else fix
        reader.refuse(f"{path} is an address: {described(text)}", fix)
        return None
    if _BASE64.fullmatch(text):
        return _decoded(text, path, reader)
    return found(unquote(text[len("file://") :]) if text[:7].lower() == "file://" else text, reader.source.file)


def found(name: str, rows: str) -> Path:
    """The file that a row of the file `rows` means: the one beside it, else the one from where the command started."""
    beside = shipped(rows).parent / name
    return beside if os.path.exists(beside) or not os.path.exists(name) else Path(name)


def _decoded(text: str, path: str, reader: RowReader) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        reader.refuse(f"{path} is no base64", "Write the bytes with base64.b64encode.")
        return None
