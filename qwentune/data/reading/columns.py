"""Rows whose columns, message fields and roles bear other names, as a source's `columns` and `tags` say them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from qwentune.data.reading.strict_json import JsonFaultError, parse_json
from qwentune.data.sample import Json
from qwentune.recipe import DataSource
from qwentune.row_formats import MESSAGES, ROLE_TAGS, SPEAKERS


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of a source: `columns` and the `fields` of its messages by our names, our `roles` by its names."""

    columns: Mapping[str, str]
    fields: Mapping[str, str]
    roles: Mapping[str, str]

    @classmethod
    def of(cls, source: DataSource) -> Columns | None:
        """The names of a source; None where it has those of the formats."""
        if not source.columns and not source.tags:
            return None
        fields: dict[str, str] = {}
        roles = {name: role for name, role in SPEAKERS.items() if role != "assistant" or not name.endswith("_call")}
        for ours, theirs in source.tags.items():
            names = theirs if isinstance(theirs, list) else [theirs]
            if ours in ROLE_TAGS:
                roles |= dict.fromkeys(names, ours)
            else:
                fields[ours] = names[0]
        return cls(dict(source.columns), fields, roles if source.tags else {})

    def renamed(self, row: Mapping[str, Json]) -> tuple[dict[str, Json], list[str]]:
        """The row with our names, and the columns that give way to those that bear them now."""
        named, displaced = _renamed(row, self.columns)
        if self.roles:
            for key in named.keys() & MESSAGES:
                named[key] = self._messages(named[key])
        return named, displaced

    def _messages(self, value: Json) -> Json:
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")):  # as tables store a list
            with suppress(JsonFaultError):  # said where it is read
                value = parse_json(value)
        if isinstance(value, list):
            return [self._messages(item) if isinstance(item, dict) else item for item in value]
        if not isinstance(value, dict):
            return value
        message, _ = _renamed(value, self.fields)
        for key in ("role", "from"):
            role = message.get(key)
            if isinstance(role, str):
                message[key] = self.roles.get(role, role)
        return message


def _renamed(fields: Mapping[str, Json], names: Mapping[str, str]) -> tuple[dict[str, Json], list[str]]:
    """The fields under our names, and those whose places they take."""
    theirs = {name for name in names.values() if name in fields}
    taken = {ours for ours, name in names.items() if name in fields}
    kept = {key: value for key, value in fields.items() if key not in theirs and key not in taken}
    displaced = [key for key, value in fields.items() if key in taken and key not in theirs and value is not None]
    return {**kept, **{ours: fields[name] for ours, name in names.items() if name in fields}}, displaced
