"""A page from its template: no network, and texts that are shown and never act."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from qwentune.console import shown


def page(template: str, **values: Any) -> str:
    """The page; texts in the values stand in it without secrets, control and bidi characters written out."""
    return _environment().get_template(template).render(_shown(values))


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def _shown(value: Any) -> Any:
    """The same value with all its texts as they may be shown."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return value
