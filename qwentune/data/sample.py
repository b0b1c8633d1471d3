"""What a row means, before any tokenizer: a conversation or a text, and where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """Where a sample was read: the path as the recipe gives it and the line, counted from 1.

    In files without lines (JSON arrays, Parquet) `line` is the number of the row, counted from 1.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


MediaKind: TypeAlias = Literal["image", "video", "audio"]


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture, a video or a sound as a row gives it; no file was opened yet.

    `content` is a path (found beside the data file, else from where the command was started), the bytes of a file, or
    the frames of a video, each one of both. `limits` are what the row itself says of it (`max_pixels`, `min_pixels`,
    `fps`, `max_frames`). `at` is before which character of its message's content it stands; `where` is how people are
    told of it (`messages[0].content[1]`, `images[2]`).
    """

    kind: MediaKind
    content: Path | bytes | tuple[Path | bytes, ...]
    at: int
    where: str
    limits: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool by the assistant; `arguments` is an object, never a string of JSON."""

    name: str
    arguments: dict[str, Json]
    extra: Mapping[str, Json] = field(default_factory=dict[str, "Json"])  # id and whatever else the row gives


@dataclass(frozen=True, slots=True)
class Message:
    """One message, normalised as inference servers do.

    `role` is system, user, assistant or tool. `reasoning` is None where the row gives none. `weight` scales the loss
    of an assistant turn; 0 makes it context only. `extra` holds other fields a template may read (`name`,
    `tool_call_id`). A content given in parts is joined; `num_parts` were there. `media` stand in the content at their
    places, in order.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    weight: float = 1.0
    extra: Mapping[str, Json] = field(default_factory=dict[str, "Json"])
    num_parts: int = 1
    media: tuple[Medium, ...] = ()

    @property
    def parts(self) -> list[str | Medium]:
        """The content cut at its media: these, and the texts between them that are not empty."""
        found: list[str | Medium] = []
        before = 0
        for medium in self.media:
            found += [*filter(None, [self.content[before : medium.at]]), medium]
            before = medium.at
        return [*found, *filter(None, [self.content[before:]])]


class Offered(NamedTuple):
    """A key that is given to the chat template: that of a message of the role `reader`, of a call or an argument.

    `path` is where rows have it, without the numbers of items (`messages[].note`).
    """

    reader: str
    key: str
    path: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue with the tools it may use (each an object as OpenAI's API has it, `num_wrapped_tools` by our doing).

    `turns` are the places of the messages among the turns of the row, which people are told: a system text beside the
    turns has none and is −1. Empty where they are 0, 1, 2, …. `template_args` outweigh those of the recipe. `unread`
    are the keys of the row that nothing reads, as in other samples; `offered`, those that only a template
    may read. Of a logged call `answers` are fingerprints of the dialogue up to each answer, the last one its own.
    """

    source: Source
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Json], ...] = ()
    turns: tuple[int, ...] = field(default=(), compare=False)
    template_args: Mapping[str, Json] = field(default_factory=dict[str, "Json"])
    unread: tuple[str, ...] = field(default=(), compare=False)
    offered: tuple[Offered, ...] = field(default=(), compare=False)
    answers: tuple[int, ...] = field(default=(), compare=False)
    num_wrapped_tools: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Text:
    """A document for continued pre-training: all of it is trained."""

    source: Source
    text: str
    unread: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """A text and how it goes on: only the completion is trained."""

    source: Source
    prompt: str
    completion: str
    unread: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class File:
    """A file of code; `path` is empty where the row gives none."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Code to fill in: the last of `files` is cut, or the row gives `cut` (prefix, middle, suffix) itself.

    Paths are read only where `repo` names a repository.
    """

    source: Source
    files: tuple[File, ...]
    repo: str = ""
    cut: tuple[str, str, str] | None = None
    unread: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two dialogues that differ in their end: the one preferred, and the other."""

    source: Source
    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True, slots=True)
class Retrieval:
    """A query, a text that answers it, and texts that do not; `instruction` is empty where the row gives none."""

    source: Source
    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    instruction: str = ""
    unread: tuple[str, ...] = field(default=(), compare=False)


Sample: TypeAlias = Conversation | Text | Completion | Code | Pair | Retrieval


class RowError(Exception):
    """A row that cannot be trained as it is: what is wrong with it, and how to mend it.

    `waits_for` are absolute paths of files, and names of modules, by which it may be mended as it stands.
    """

    def __init__(self, what: str, fix: str = "", *, waits_for: Iterable[str] = ()) -> None:
        self.what, self.fix, self.waits_for = what, fix, tuple(waits_for)
        super().__init__(what)
