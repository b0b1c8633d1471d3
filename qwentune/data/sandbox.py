"""transformers' sandbox for chat templates, with a bound on what it writes and quicker at looking fields up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    render_jinja_template,  # pyright: ignore[reportUnknownVariableType]
)

LONGEST_RENDERING = 2**27  # characters: more than any row has, less than memory
_NUM_JOINED = 4096  # pieces of a rendering between two looks at its size
_DICT_ATTRIBUTES = frozenset(dir(dict))

# Of the template's own `raise_exception`, of operations that its values do not take, and of the sandbox's bounds.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


def rendered(template: str, **arguments: Any) -> list[str]:
    """What `apply_chat_template` renders with these arguments; raises one of TEMPLATE_ERRORS."""
    _environment(template)
    return list(cast(Any, render_jinja_template)(chat_template=template, **arguments)[0])


def parsed(template: str) -> nodes.Template:
    """The syntax tree of a chat template."""
    return _environment(template).parse(template)


def _environment(template: str) -> jinja2.Environment:
    """The environment in which transformers renders the template, which it keeps for a while, adjusted."""
    environment: Any = cast(Any, _compile_jinja_template)(template).environment
    if environment.concat is not _joined:
        environment.concat = _joined
        if type(environment) is ImmutableSandboxedEnvironment:
            quick = {"is_safe_attribute": _remembering(environment.is_safe_attribute), "getattr": _look_up(environment)}
            vars(environment).update(quick)
    return environment


def _joined(pieces: Iterable[str]) -> str:
    """What Jinja joins a rendering with, but for its bound."""
    rest, parts, size = iter(pieces), list[str](), 0
    while some := list(islice(rest, _NUM_JOINED)):
        parts.append("".join(some))
        size += len(parts[-1])
        if size > LONGEST_RENDERING:
            raise jinja2.TemplateError(f"it writes more than {LONGEST_RENDERING} characters")
    return "".join(parts)


def _remembering(is_safe: Callable[[object, str, object], bool]) -> Callable[[object, str, object], bool]:
    """The sandbox's judgement of an attribute, asked once for each type and name: it looks at nothing else."""
    known: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(obj: object, attr: str, value: object) -> bool:
        key = type(obj), attr
        if key not in known:
            known[key] = is_safe(obj, attr, value)
        return known[key]

    return is_safe_attribute


def _look_up(environment: jinja2.Environment) -> Callable[[Any, str], Any]:
    """The sandbox's look-up, without its try for an attribute where a dict can only have a key."""
    undefined, look_up_any = environment.undefined, environment.getattr

    def look_up(obj: Any, attribute: str) -> Any:
        if type(obj) is not dict or attribute in _DICT_ATTRIBUTES:
            return look_up_any(obj, attribute)
        fields = cast(dict[str, Any], obj)
        return fields[attribute] if attribute in fields else undefined(obj=fields, name=attribute)

    return look_up
