"""Tools that a row defines, and their calls by the assistant."""

from __future__ import annotations

from collections.abc import Mapping

from qwentune.data.formats.apis.anthropic import read_tool
from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Json, ToolCall
from qwentune.row_formats import TOOLS

CALLERS = ("tool_call", "function_call")  # a message of theirs is nothing but calls: of ms-swift, LLaMA-Factory
_CALL_KEYS = ("name", "arguments")
_MEND = "It is JSON, one call or a list of them, before which only <think>…</think> may stand."
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")  # beside a function they would be lost


def read_tools(row: Mapping[str, Json], reader: RowReader) -> tuple[list[dict[str, Json]], int]:
    """The tools of a row, and how many under `tools` lacked OpenAI's wrapper; the list may be a text of JSON.

    A function gets the wrapper where it has none: servers take no tool without, and show it to the template. Under the
    other names none is expected.
    """
    given = {key: reader.read_list(row, key) for key in TOOLS if row.get(key)}
    lists = {key: _objects(values, key, reader) for key, values in given.items() if values}
    num_bare = sum("function" not in tool for tool in lists.get("tools", ()))
    for key, tools in lists.items():
        lists[key] = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    first, *others = lists.values() if lists else [[]]
    if any(other != first for other in others):
        reader.refuse(f"the row has different tools in {' and '.join(lists)}", "Keep one of them.")
    return first, num_bare


def _objects(values: list[Json], key: str, reader: RowReader) -> list[dict[str, Json]]:
    objects: list[dict[str, Json]] = []
    for i, tool in enumerate(values):
        if isinstance(tool, dict):
            objects.append(read_tool(tool, f"{key}[{i}]", reader))
        else:
            reader.refuse(f"{key}[{i}] is {described(tool)}", "A tool is an object with type and function.")
    return objects


def read_calls(fields: Mapping[str, Json], path: str, reader: RowReader) -> tuple[ToolCall, ...]:
    """The calls of a message; one may stand alone, in place of a list, and all be a text of JSON, as in table files."""
    if "tool_calls" not in fields and "function_call" not in fields:
        return ()
    calls = [
        _read_call(value, f"{path}.tool_calls[{i}]", reader)
        for i, value in enumerate(_listed(fields, f"{path}.tool_calls", reader))
    ]
    if "function_call" in fields:  # what tool_calls were called before there could be several
        calls.append(_read_call(fields["function_call"], f"{path}.function_call", reader))
    return tuple(call for call in calls if call)


def read_only_calls(value: Json, path: str, reader: RowReader) -> tuple[list[Json], str | None]:
    """The calls that a message is made of, one or a list of them, and the reasoning before them.

    They are a value or a text of JSON, before which `<think>…</think>` may stand. No calls where that is wrong.
    """
    reasoning = None
    if isinstance(value, str) and not value.lstrip().startswith(("{", "[")):
        before, closing, after = value.partition("</think>")
        if closing:
            reasoning, value = before.strip().removeprefix("<think>").strip("\n"), after
    if value in (None, "", []):
        reader.refuse(f"{path} is {described(value)}", "A tool call is needed: an object with name and arguments.")
        return [], reasoning
    if isinstance(value, str):
        value = reader.read_json(value, path, _MEND)
        if value is None:  # and refused
            return [], reasoning
    return value if isinstance(value, list) else [value], reasoning


def _listed(fields: Mapping[str, Json], path: str, reader: RowReader) -> list[Json]:
    value = fields.get("tool_calls")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return [parsed] if (parsed := reader.read_json(value, path)) is not None else []
    if isinstance(value, dict):
        return [value]
    return reader.read_list(fields, "tool_calls", path)


def _read_call(value: Json, path: str, reader: RowReader) -> ToolCall | None:
    """One tool call, `{"function": {"name", "arguments"}}` or the inner object alone; None where it is wrong."""
    if not isinstance(value, dict):
        reader.refuse(f"{path} is {described(value)}", "A tool call is an object with name and arguments.")
        return None
    outer = {key: item for key, item in value.items() if item is not None}
    function = outer.pop("function", None)
    if function is None:
        function = {key: outer.pop(key) for key in _CALL_KEYS if key in outer}
        path_of_function = path
    else:
        path_of_function = f"{path}.function"
    if not isinstance(function, dict):
        reader.refuse(f"{path_of_function} is {described(function)}", "It is an object with name and arguments.")
        return None
    unknown = [key for key, item in function.items() if key not in _CALL_KEYS and item is not None]
    for key in (*unknown, *(key for key in _ARGUMENT_KEYS if key in outer)):
        reader.refuse(f"{path_of_function} has the unknown key {key!r}", "A tool call has a name and arguments.")
    reader.offer(outer, "call", path)
    name = function.get("name")
    arguments = _read_arguments(function.get("arguments"), f"{path_of_function}.arguments", reader)
    if isinstance(name, str) and name:
        return ToolCall(name, arguments, outer)
    what = f"{path_of_function}.name is {described(name)}" if name else f"{path_of_function} has no name"
    reader.refuse(what, "Name the tool called.")
    return None


def _read_arguments(value: Json, path: str, reader: RowReader) -> dict[str, Json]:
    if value is None or value == "":  # a tool without parameters, as vLLM reads it
        return {}
    if isinstance(value, str):
        value = reader.read_json(value, path)
        if value is None:  # and refused
            return {}
    if isinstance(value, dict):
        return value
    reader.refuse(f"{path} is {described(value)}", "Arguments are an object by parameter name.")
    return {}
