"""Whether a message or a row carries loss, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping

from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Json
from qwentune.row_formats import LOSS, SWITCHES

SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6  # losses are 32-bit floats
_LOSS = frozenset(LOSS)


def read_weight(fields: Mapping[str, Json], path: str, reader: RowReader) -> float:
    """The factor of the loss, 0 for none of it, by a `weight` and the switches of other toolkits; 1 where none stands.

    `path` is the message's; empty for a row's own keys.
    """
    if _LOSS.isdisjoint(fields):
        return 1.0
    head = f"{path}." if path else ""
    switches = {key: _read_switch(fields, key, head, reader) for key in SWITCHES if fields.get(key) is not None}
    on = {key: value for key, value in switches.items() if value is not None}
    if len(set(on.values())) > 1:
        words = " and ".join(f"{key} {'true' if value else 'false'}" for key, value in on.items())
        reader.refuse(f"{path or 'the row'} has {words}", "Keep one of them.")
    weight = _read_factor(fields, head, reader)
    if False in on.values():
        if weight and fields.get("weight") is not None:
            (key, *_) = on
            reader.refuse(f"{path or 'the row'} has {key} false and weight {fields['weight']}", "Remove one of them.")
        return 0.0
    return weight


def refuse_loss(fields: Mapping[str, Json], path: str, why: str, mend: str, reader: RowReader) -> None:
    """Refuse the keys that switch loss on, or weigh it, where there is none to be switched; off is as it is."""
    if _LOSS.isdisjoint(fields):
        return
    for key in LOSS:
        if fields.get(key) not in (None, False, 0, "", []):
            reader.refuse(f"{path or 'the row'} has {key}, {why}", mend)


def refuse_other_weight(row: Mapping[str, Json], reader: RowReader) -> None:
    """Refuse a row that is trained as a whole but has another weight than 1."""
    if read_weight(row, "", reader) != 1:
        given = " and ".join(f"{key} {described(row[key])}" for key in LOSS if row.get(key) is not None)
        reader.refuse(f"the row has {given}, but is trained as a whole", "Leave the row out, or remove the key.")


def _read_switch(fields: Mapping[str, Json], key: str, head: str, reader: RowReader) -> bool | None:
    value = fields[key]
    if isinstance(value, bool):
        return value
    if value == 0 or value == 1:
        return value == 1
    fix = "It is true or false, or 1 or 0. Rename it if it means something else."
    reader.refuse(f"{head}{key} is {described(value)}", fix)
    return None


def _read_factor(fields: Mapping[str, Json], head: str, reader: RowReader) -> float:
    weight = fields.get("weight")
    if weight is None:
        return 1.0
    if (
        isinstance(weight, int | float)
        and not isinstance(weight, bool)
        and (weight == 0 or SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT)
    ):
        return float(weight)
    fix = f"It is 0, or a number from {SMALLEST_WEIGHT:f} to {LARGEST_WEIGHT:.0f}."
    reader.refuse(f"{head}weight is {described(weight)}", fix)
    return 0.0
