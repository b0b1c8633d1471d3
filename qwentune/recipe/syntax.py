"""YAML into a tree in which every key and value knows where it stands.

Scalars follow YAML 1.2's core schema, narrowed: `2e-4` is a number, only `true` and `false` are booleans,
only `null`, `~` and nothing are null, and dates or `12:30:45` are text. Anchors, aliases, merge keys and tags
are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import yaml
from yaml import events, reader

from qwentune.errors import Problem

MAX_DEPTH = 20
MAX_VALUES = 10_000  # keys and values of a document
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?(\.[0-9]{1,300}|[0-9]{1,300}(\.[0-9]{0,300})?)([eE][-+]?[0-9]{1,3})?")
_HALF = re.compile("[\ud800-\udfff]")  # of a character: a lone surrogate, which no file can hold
_TAB = re.compile(r"[ ]*\t[ \t]*(?=[^\s#])")

Scalar = None | bool | int | float | str


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written: `where` for a problem, `origin` for the resolved recipe."""

    where: str
    origin: str


@dataclass(slots=True)
class Node:
    """A value and its place; `keys` holds the places of a mapping's keys."""

    value: Scalar | list[Node] | dict[str, Node]
    place: Place
    keys: dict[str, Place]


class TooMuchError(Exception):
    """Nesting or a number of values beyond any recipe; `args[0]` is the problem."""


def resolve(text: str) -> Scalar:
    """What an unquoted scalar means."""
    if text in {"", "~", "null"}:
        return None
    if text in {"true", "false"}:
        return text == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        number = float(text)
        is_whole = "." not in text and number.is_integer() and abs(number) < 1e18
        return int(number) if is_whole else number  # 1e5 steps are as whole as 100000
    return text


def plain(node: Node) -> object:
    """The bare value of a tree."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def places(node: Node, key: str = "") -> Iterator[tuple[str, str]]:
    """Where each dotted key of a tree is said; items of lists are numbered from 0."""
    value = node.value
    children = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for name, child in children.items():
        inner = f"{key}.{name}" if key else str(name)
        yield inner, node.keys.get(str(name), child.place).where
        yield from places(child, inner)


def read_file_text(text: str, path: str, problems: list[Problem]) -> Node | None:
    """The tree of a recipe file, None where there is none; problems are added with `path:line:column`."""

    def place(line: int, column: int) -> Place:
        return Place(f"{path}:{line + 1}:{column + 1}", f"{path}:{line + 1}")

    return _read(text, place, problems)


def read_override_value(text: str, place: Place, problems: list[Problem]) -> Node | None:
    """The tree of an override's value: a flow mapping or list, quoted text, or a scalar as it stands."""
    text = text.strip()
    if text[:1] in {"[", "{", '"', "'"}:
        return _read(text, lambda _line, _column: place, problems)
    return Node(resolve(text), place, {})


def _read(text: str, place: Callable[[int, int], Place], problems: list[Problem]) -> Node | None:
    # PyYAML's stubs leave this function's result out.
    stream = cast("Iterator[events.Event]", yaml.parse(text, Loader=yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
    builder = _Builder(stream, place, problems)
    try:
        return builder.document()
    except TooMuchError as error:
        problems.append(error.args[0])
    except reader.ReaderError as error:
        before = text[: error.position]
        where = place(before.count("\n"), len(before) - before.rfind("\n") - 1).where
        what = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        problems.append(Problem(where, what, 'Write it as an escape in double quotes, like "\\x07".'))
    except yaml.MarkedYAMLError as error:
        problems.extend(_syntax_problems(error, text, place))
    return None


def _syntax_problems(error: yaml.MarkedYAMLError, text: str, place: Callable[[int, int], Place]) -> Iterator[Problem]:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    if "'\\t'" in (error.problem or ""):
        tabs = {number: match.start() + match.group().index("\t") for number, match in _leading_tabs(text)}
        tabs.setdefault(line, column)
        for number, start in sorted(tabs.items()):
            yield Problem(
                place(number, start).where, "a tab stands where YAML takes only spaces", "Indent with spaces."
            )
        return
    context = f" ({error.context})" if error.context else ""
    fix = "Quote the value, or check the indentation and the brackets around this place."
    yield Problem(place(line, column).where, f"this is not YAML: {error.problem}{context}", fix)


def _leading_tabs(text: str) -> Iterator[tuple[int, re.Match[str]]]:
    for number, content in enumerate(text.splitlines()):
        if match := _TAB.match(content):
            yield number, match


def half_characters(text: str, where: str) -> list[Problem]:
    """The problem of a text with a lone surrogate, as Python shows bytes that are not UTF-8; else none."""
    if (half := _HALF.search(text)) is None:
        return []
    what = f"the text holds half a character (U+{ord(half[0]):04X}, a lone surrogate)"
    return [Problem(where, what, "Write the whole character, as UTF-8.")]


class _Builder:
    """Builds the tree from the parser's events, which are flat: no input can exhaust the stack."""

    def __init__(
        self, stream: Iterator[events.Event], place: Callable[[int, int], Place], problems: list[Problem]
    ) -> None:
        self._stream = stream
        self._place_of = place
        self._problems = problems
        self._num_values = 0

    def document(self) -> Node | None:
        root: Node | None = None
        for event in self._stream:
            if isinstance(event, events.DocumentStartEvent):
                if root is not None:
                    self._refuse(event, "a second document starts here", "A recipe is one document: remove the '---'.")
                    return root
                root = self._node(next(self._stream), 0)
        return root

    def _node(self, event: events.Event, depth: int) -> Node:
        place = self._place(event)
        if depth > MAX_DEPTH:
            what = f"this is nested more than {MAX_DEPTH} levels deep"
            raise TooMuchError(Problem(place.where, what, "No recipe needs that: close the brackets before it."))
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            what = f"here are more than {MAX_VALUES:,} keys and values; a recipe has at most that many"
            raise TooMuchError(
                Problem(place.where, what, "Is it the data? The recipe names data files under data.train.")
            )
        self._check_extras(event)
        if isinstance(event, events.ScalarEvent):
            self._problems += half_characters(event.value, place.where)
            event.value = _HALF.sub("\ufffd", event.value)  # what else is wrong can then be said
        if isinstance(event, events.MappingStartEvent):
            return self._mapping(place, depth)
        if isinstance(event, events.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(event := next(self._stream), events.SequenceEndEvent):
                items.append(self._node(event, depth + 1))
            return Node(items, place, {})
        if isinstance(event, events.ScalarEvent):
            return Node(event.value if event.style else resolve(event.value), place, {})
        return Node(None, place, {})

    def _mapping(self, place: Place, depth: int) -> Node:
        entries: dict[str, Node] = {}
        keys: dict[str, Place] = {}
        while not isinstance(event := next(self._stream), events.MappingEndEvent):
            key_place = self._place(event)
            self._node(event, depth + 1)
            key = event.value if isinstance(event, events.ScalarEvent) else None
            child = self._node(next(self._stream), depth + 1)
            if key is None:
                self._refuse(event, "a key must be a word", "Quote it if it is text.")
            elif key == "<<":
                what = "'<<': merge keys are not read, so that a recipe shows every value it uses"
                self._refuse(event, what, "Write the keys out.")
            elif key in keys:
                what = f"the key '{key}' stands here again; it was given first at {keys[key].where}"
                self._refuse(event, what, "Keep one of the two.")
            else:
                entries[key], keys[key] = child, key_place
        return Node(entries, place, keys)

    def _check_extras(self, event: events.Event) -> None:
        if isinstance(event, events.AliasEvent):
            self._refuse(event, f"the alias '*{event.anchor}' is not read", "Write the value out.")
            return
        assert isinstance(event, events.NodeEvent)
        if event.anchor is not None:
            self._refuse(event, f"the anchor '&{event.anchor}' is not read", "Write the value out at each use.")
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            self._refuse(event, f"the tag '{shown}' is not read", "A recipe holds plain values: remove the tag.")

    def _refuse(self, event: events.Event, what: str, fix: str) -> None:
        self._problems.append(Problem(self._place(event).where, what, fix))

    def _place(self, event: events.Event) -> Place:
        mark = event.start_mark
        return self._place_of(mark.line, mark.column)
