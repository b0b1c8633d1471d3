"""Media that stand in columns beside the messages: the k-th tag or unnamed part of a kind takes the k-th item."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace

from qwentune.data.formats.messages.parts import UNNAMED, Content, read_source, unpacked
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Json, MediaKind, Medium, Message
from qwentune.row_formats import MEDIA

COLUMNS: Mapping[MediaKind, tuple[str, ...]] = {
    "image": ("images", "image"),
    "video": ("videos", "video"),
    "audio": ("audios", "audio"),
}

_MEDIA = frozenset(MEDIA)


def with_media(row: Mapping[str, Json], messages: list[Message], reader: RowReader) -> list[Message]:
    """The messages with the media of the row's columns at their places.

    `<image>`, `<video>` and `<audio>` in texts are tags where the row has a column of media, be it empty or of another
    kind (in what the assistant says, only beside items of the kind); elsewhere they are text, as they are where the
    messages have parts of the kind. Refused are numbers that differ.
    """
    if _MEDIA.isdisjoint(row) and not any(message.media for message in messages):  # as nearly always
        return messages
    unnamed = {medium.kind for message in messages for medium in message.media if medium.content == UNNAMED}
    named = {medium.kind for message in messages for medium in message.media if medium.content != UNNAMED}
    is_tagged = not _MEDIA.isdisjoint(row)
    items: dict[MediaKind, deque[tuple[str, Content]]] = {}
    tags: dict[str, MediaKind] = {}
    for kind, columns in COLUMNS.items():
        given = _items(row, kind, columns, reader)
        if not given and kind not in unnamed:
            asked = [one for one in messages if one.role != "assistant" and f"<{kind}>" in one.content]
            if is_tagged and asked and kind not in named:
                fix = f"Give its items in {columns[0]}, one for each tag. Where text is meant, write <{kind}/>."
                count = _count(asked, kind)
                reader.refuse(f"the row has 0 {kind} items and {count} <{kind}>{'s' * (count != 1)}", fix)
            continue
        items[kind] = deque(given)
        if kind in unnamed:
            count = sum(medium.content == UNNAMED for one in messages for medium in one.media if medium.kind == kind)
            what = "unnamed part"
        else:
            tags[f"<{kind}>"] = kind
            count, what = _count(messages, kind), f"<{kind}>"
        if count != len(given):
            fix = f"Write one <{kind}> in a text for each item of {columns[0]}, where it stands, in their order."
            fix = f"Name each in its part, or give as many items in {columns[0]}." if kind in unnamed else fix
            reader.refuse(f"the row has {len(given)} {kind} items and {count} {what}{'s' * (count != 1)}", fix)
    if not items or reader.problems:
        return messages
    pattern = re.compile("|".join(map(re.escape, tags))) if tags else None
    return [_placed(message, pattern, tags, items, reader) for message in messages]


def _count(messages: Iterable[Message], kind: MediaKind) -> int:
    return sum(message.content.count(f"<{kind}>") for message in messages)


def _items(
    row: Mapping[str, Json], kind: MediaKind, columns: tuple[str, ...], reader: RowReader
) -> list[tuple[str, Content]]:
    """The media of the row's columns of a kind, with their names."""
    given = [column for column in columns if row.get(column)]
    if len(given) > 1:
        reader.refuse(f"the row has {' and '.join(given)}", "Keep one of them.")
    found: list[tuple[str, Content]] = []
    for column in given[:1]:
        value = row[column]
        held = unpacked(value) if isinstance(value, str) else None
        listed = held if isinstance(held, list) else value
        for i, item in enumerate(listed if isinstance(listed, list) else [listed]):
            where = f"{column}[{i}]" if isinstance(listed, list) else column
            content = read_source(item, kind, where, reader)
            if content is not None:
                found.append((where, content))
    return found


def _placed(
    message: Message,
    pattern: re.Pattern[str] | None,
    tags: Mapping[str, MediaKind],
    items: Mapping[MediaKind, deque[tuple[str, Content]]],
    reader: RowReader,
) -> Message:
    """The message without tags, with the media that they and its unnamed parts stand for."""
    matches = list(pattern.finditer(message.content)) if pattern else []
    if matches and message.role == "assistant":
        fix = "A model of this kind writes text only: leave the row out."
        reader.refuse(f"the assistant says {matches[0][0]}, for which the row has a column", fix)
        return message
    media: list[Medium] = []
    for medium in message.media:
        if medium.content == UNNAMED:
            where, content = items[medium.kind].popleft()
            medium = replace(medium, content=content, where=where)
        media.append(medium)
    for match in matches:
        where, content = items[tags[match[0]]].popleft()
        media.append(Medium(tags[match[0]], content, match.start(), where))
    media.sort(key=lambda medium: medium.at)
    ends = [(match.end(), len(match[0])) for match in matches]
    media = [replace(one, at=one.at - sum(size for end, size in ends if end <= one.at)) for one in media]
    return replace(
        message, content=pattern.sub("", message.content) if pattern else message.content, media=tuple(media)
    )
