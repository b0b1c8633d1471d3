"""Where tools are to be called: whether those and no others are called, and with the taught arguments, in order."""

from __future__ import annotations

from qwentune.answering.call_syntax import WrittenCall, same_json
from qwentune.scores.case import Case, Score, given


def _tool_name(case: Case) -> float | None:
    taught = _taught(case)
    return float([call.name for call in given(case).calls] == [call.name for call in taught]) if taught else None


def _tool_arguments(case: Case) -> float | None:
    taught = _taught(case)
    if not taught:
        return None
    calls = given(case).calls
    pairs = zip(calls, taught, strict=False)
    return float(len(calls) == len(taught) and all(same_json(one.arguments, other.arguments) for one, other in pairs))


def _taught(case: Case) -> tuple[WrittenCall, ...]:
    """The calls that are taught; none where one of them is in no form that is known."""
    calls = case.taught.calls if case.kind == "turn" else ()
    return calls if all(call.name and call.arguments is not None for call in calls) else ()


TOOL_NAME = Score("tool_name", _tool_name)
TOOL_ARGUMENTS = Score("tool_arguments", _tool_arguments)
