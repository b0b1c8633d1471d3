"""What a chat template may use while it renders: time, memory, and the size of what it makes of texts and lists.

A template is a program of strangers. What it makes is bounded before it is made, for one operation may ask for more
than the machine has; and loops, calls and large results look at the clock and at the memory now and then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from functools import wraps
from os import sysconf
from pathlib import Path
from time import thread_time
from types import BuiltinMethodType, FunctionType, GeneratorType
from typing import Any, cast

import jinja2
from jinja2.runtime import Macro
from jinja2.utils import Namespace, generate_lorem_ipsum

LONGEST_TEXT = 2**25  # characters of a text or a rendering: more than any row has that is trained
LONGEST_LIST = 2**20  # items, those of lists within it counted wherever they stand
LARGEST_NUMBER = 100_000  # columns or items asked for; the longest range of Jinja's own sandbox
LARGEST_INTEGER = 2**16  # bits
MOST_SECONDS = 5.0  # of the processor
MOST_BYTES = 2**31
_NUM_STEPS = 4096  # between two looks
LARGE = 2**16  # characters or items
_MOST_WORDS = 1000
_STATISTICS = Path("/proc/self/statm")
_DIGITS = re.compile(r"\d{6,}|\{[^{}]*\{")  # a width that is large, or one that is given as an argument
_MANY: tuple[type[Any], ...] = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)

# Methods that make more than they are given, or compare it.
GROWING_METHODS = frozenset(
    (
        *("center", "count", "expandtabs", "format", "format_map", "index", "join", "ljust", "replace", "rjust"),
        *("to_bytes", "translate", "zfill"),
    )
)
# Filters that write their value out, those that ask for columns or items by number, those that are slow on long texts,
# and those that only look at their value.
_WRITING = frozenset(("capitalize", "e", "escape", "forceescape", "lower", "safe", "string", "trim", "upper"))
_NUMBERED = frozenset(("batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap"))
_SLOW = frozenset(
    ("pprint", "striptags", "title", "truncate", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr")
)
_FREE = frozenset(("abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length"))
_COMPARING_TESTS = frozenset(
    (
        *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan"),
        *("lt", "ne"),
    )
)


class BoundError(jinja2.TemplateError):
    """The template wants more than it may have."""


class Meter:
    """What one rendering uses; its methods stand in for operations of the template."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Another rendering begins."""
        self.left = _NUM_STEPS
        self.deadline: float | None = None
        self.memory = 0
        self.builds = False  # lists of lists, which may be far longer than they look

    def look(self) -> None:
        """BoundError where the time or the memory is used up; the first look is where both are counted from."""
        self.left = _NUM_STEPS
        now, memory = thread_time(), _memory()
        if self.deadline is None:
            self.deadline, self.memory = now + MOST_SECONDS, memory
        elif now > self.deadline:
            raise BoundError(f"it computes for more than {MOST_SECONDS:g} seconds")
        elif memory > self.memory + MOST_BYTES:
            raise BoundError(f"it uses more than {MOST_BYTES / 2**30:g} GiB of memory")

    def step(self, count: int = 1) -> None:
        """Counts some steps of work."""
        self.left -= count
        if self.left < 0:
            self.look()

    def iterated(self, items: Any) -> Iterable[Any]:
        """The items of a loop, each counted."""
        if type(items) is not list or len(cast(list[Any], items)) > _NUM_STEPS:
            return self._counted(cast(Any, items))
        self.step(1 + len(cast(list[Any], items)))
        return cast(list[Any], items)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def made(self, value: Any) -> Any:
        """The value, if it is not too long."""
        size = len(cast(Sequence[Any], value)) if isinstance(value, str | list | tuple) else 0
        if size >= LARGE:
            bound(size)
            if not isinstance(value, str):
                _bound_items(size)
            self.step(size >> 6)
        return cast(Any, value)

    def built(self, value: Any) -> Any:
        """A list, tuple or dict that holds what may be another one."""
        self.builds = True
        return value

    def weight(self, value: Any) -> tuple[int, int]:
        """How many items and characters a value has, written out: what stands in it twice counts twice."""
        if isinstance(value, str | bytes):
            return 1, len(value)
        waiting, items, characters = [value], 0, 0
        while waiting:
            one = waiting.pop()
            items += 1
            if isinstance(one, str | bytes):
                characters += len(one)
            elif isinstance(one, dict):
                waiting += [*cast(dict[Any, Any], one).keys(), *cast(dict[Any, Any], one).values()]
            elif isinstance(one, _MANY):
                waiting += cast(Iterable[Any], one)
            elif isinstance(one, range):
                items += len(one)
            elif isinstance(one, Namespace):
                waiting.append(getattr(one, "_Namespace__attrs"))  # noqa: B009 - a name of its own class
            _bound_items(items + len(waiting))
        bound(characters)
        self.step(items)
        return items, characters

    def compared(self, value: Any) -> Any:
        """A value that is compared with another one."""
        if self.builds and not isinstance(value, str | int):
            self.weight(value)
        return value

    def text(self, value: Any) -> str:
        """What is written of a value."""
        if isinstance(value, str):
            return value
        self.weight(value)
        return str(value)

    def joined(self, values: Sequence[Any]) -> str:
        """What is written of some values, one after the other."""
        texts = list(map(self.text, values))
        bound(sum(map(len, texts)))
        return self.made("".join(texts))

    def combined(self, operator: str, left: Any, right: Any, operation: Callable[[Any, Any], Any]) -> Any:
        """What a binary operator makes of two values."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bound_bits(left.bit_length() * max(right, 0))
        elif operator == "*":
            self._times(left, right)
        elif operator == "%" and isinstance(left, str | bytes):
            self._filled(left, (right,), left.count("%") if isinstance(left, str) else left.count(b"%"))
            if "*" in str(left):
                _bound_numbers(cast(tuple[Any, ...], right) if isinstance(right, tuple) else (right,))
        elif operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
            self.builds = True
            _bound_items(len(cast(Sequence[Any], left)) + len(cast(Sequence[Any], right)))
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            bound(len(left) + len(right))
        return self.made(operation(left, right))

    def _times(self, left: Any, right: Any) -> None:
        if isinstance(right, str | bytes | list | tuple):
            left, right = cast(Any, right), left
        if not isinstance(right, int):
            return
        if isinstance(left, str | bytes):
            bound(len(left) * right)
        elif isinstance(left, list | tuple):
            self.builds = True
            _bound_items(len(cast(Sequence[Any], left)) * right)
        elif isinstance(left, int):
            _bound_bits(left.bit_length() + right.bit_length())

    def _filled(self, form: str | bytes, given: Any, num_places: int) -> None:
        """A form whose places are filled, each with no more than all that is given."""
        if _DIGITS.search(str(form)):
            raise BoundError(f"it asks for a width of more than {LARGEST_NUMBER}")
        items, characters = self.weight(given)
        bound(len(form) + num_places * (characters + 32 * items))

    def before_call(self, called: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Looks at what a call is given; its arguments, those that are made one by one made."""
        self.left -= 1
        if self.left < 0:
            self.look()
        if isinstance(called, BuiltinMethodType | FunctionType):
            name, owner = called.__name__, getattr(called, "__self__", None)
            if name in GROWING_METHODS:
                args = tuple(self._listed(cast(Any, one)) if isinstance(one, GeneratorType) else one for one in args)
                # The sandbox wraps `format`.
                owner = getattr(getattr(called, "__wrapped__", None), "__self__", owner)
                if isinstance(owner, str | bytes | int):
                    self._method(name, owner, [*args, *_given(kwargs)])
                else:
                    self.compared(args)
            elif called is generate_lorem_ipsum:
                self.look()
                if any(isinstance(one, int) and one > _MOST_WORDS for one in [*args, *_given(kwargs)]):
                    raise BoundError(f"it asks for more than {_MOST_WORDS} paragraphs or words")
        elif isinstance(called, Macro):
            self.builds |= called.catch_varargs or called.catch_kwargs
        elif not all(isinstance(one, str | int) for one in [*args, *_given(kwargs)]):
            self.builds = True  # a dict or a namespace of others
            self.weight([*args, *_given(kwargs)])
        return args

    def _method(self, name: str, owner: Any, given: list[Any]) -> None:
        if name in ("count", "index"):
            return
        if name in ("format", "format_map"):
            self._filled(owner, tuple(given), owner.count("{"))
            return
        _bound_numbers(given)
        if name == "expandtabs":
            bound(len(owner) + len(owner) * max([8, *(one for one in given if isinstance(one, int))]))
        elif name == "join" and given:
            self._joins(owner, given[0])
        elif name == "replace" and len(given) > 1:
            _bound_replaced(owner, *given[:2])
        elif name == "translate" and given:
            bound(len(owner) * (1 + self.weight(given[0])[1]))

    def _joins(self, separator: Any, values: Any) -> None:
        if isinstance(values, str):
            items, characters = len(values), len(values)
        else:
            items, characters = self.weight(values)
        bound(characters + items * (len(separator) if isinstance(separator, str | bytes) else 0))

    def bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, bounded in what it is given and in what comes of it."""
        if name in _FREE:
            return function
        num_passed = int(hasattr(function, "jinja_pass_arg"))  # the environment or the like, before the value

        is_writing, is_json = name in _WRITING, name == "tojson"

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and not kwargs and (is_writing or is_json):  # mostly, and quickly
                value = args[0]
                if (type(value) is str and len(value) < LARGE) or (is_json and not self.builds):
                    return self.made(function(value))
            return self.made(function(*self._before_filter(name, args, num_passed, kwargs), **kwargs))

        return bounded

    def _before_filter(
        self, name: str, args: tuple[Any, ...], num_passed: int, kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        self.step()
        passed, values = args[:num_passed], list(args[num_passed:])
        if values and isinstance(values[0], GeneratorType):
            made = cast(Iterator[Any], values[0])
            values[0] = self._listed(made) if name == "join" else self.iterated(made)
        given = [*values[1:], *kwargs.values()]
        if name in _NUMBERED:
            _bound_numbers(given)
        if name == "tojson":
            if self.builds or given:
                items, characters = self.weight(values[0] if values else None)
                widths = [len(one) if isinstance(one, str) else one for one in given if isinstance(one, str | int)]
                bound(characters + items * max([0, *widths]) * (2 if self.builds else 1))
            return args
        if name not in ("indent", "replace", "reverse", "list", *_WRITING):
            self.builds = True
        if name in _SLOW and values and isinstance(values[0], str) and len(values[0]) > LARGE:
            raise BoundError(f"it gives {name} a text of more than {LARGE} characters")
        for value in (*values, *kwargs.values()):
            self.weight(value)
        if name == "join" and values:
            self._joins(given[0] if given else "", values[0])
        elif name == "replace" and len(values) + len(kwargs) > 2:
            old, new = (kwargs.get(key, values[k] if k < len(values) else "") for k, key in ((1, "old"), (2, "new")))
            _bound_replaced(str(values[0]), str(old), str(new))
        elif name == "indent":
            width = max(
                [4, *(one if isinstance(one, int) else len(one) for one in given if isinstance(one, int | str))]
            )
            text = str(values[0]) if values else ""
            bound(len(text) + (text.count("\n") + 2) * width)
        elif name == "format" and values:
            self._filled(str(values[0]), tuple(given), str(values[0]).count("%"))
            if "*" in str(values[0]):
                _bound_numbers(given)
        elif name in ("list", "sort", "unique", "batch", "slice", "map") and values and isinstance(values[0], str):
            _bound_items(len(values[0]))
        return (*passed, *values)

    def _listed(self, values: Iterable[Any]) -> list[Any]:
        listed: list[Any] = []
        characters = 0
        for value in self.iterated(values):
            listed.append(value)
            characters += len(value) if isinstance(value, str) else 0
            bound(characters)
        return listed

    def bounded_test(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The test, of which what it compares is bounded."""
        if name not in _COMPARING_TESTS:
            return function

        def bounded(*args: Any) -> Any:
            return function(*map(self.compared, args))

        return bounded


def _memory() -> int:
    """Bytes of this process in memory; 0 where it cannot be told."""
    try:
        return int(_STATISTICS.read_text().split()[1]) * sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def bound(size: int) -> None:
    """BoundError where a text is longer than the longest."""
    if size > LONGEST_TEXT:
        raise BoundError(f"it writes more than {LONGEST_TEXT} characters")


def _given(kwargs: Mapping[str, Any]) -> list[Any]:
    """What the template gives by name; what begins with an underscore is Jinja's own."""
    return [value for name, value in kwargs.items() if not name.startswith("_")]


def _bound_items(count: int) -> None:
    if count > LONGEST_LIST:
        raise BoundError(f"it makes or looks through a list of more than {LONGEST_LIST} items")


def _bound_bits(count: int) -> None:
    if count > LARGEST_INTEGER:
        raise BoundError(f"it computes a number of more than {LARGEST_INTEGER} bits")


def _bound_numbers(given: Iterable[Any]) -> None:
    if any(isinstance(one, int) and abs(one) > LARGEST_NUMBER for one in given):
        raise BoundError(f"it asks for more than {LARGEST_NUMBER} columns or items")


def _bound_replaced(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
        bound(len(text) + text.count(old) * (len(new) - len(old)))
