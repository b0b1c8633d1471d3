"""Messages and tools of a row as inference servers pass them to a chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qwentune.data.formats.anthropic import read_tool, unfolded
from qwentune.data.reading.faults import Faults, described
from qwentune.data.sample import Json, Message, ToolCall
from qwentune.errors import nearest

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
    "tool_call": "assistant",  # ms-swift: its content is the JSON of the call
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = ("role", "content", *REASONING_KEYS, "tool_calls", "train", "weight")
EXTRA_KEYS = ("name", "tool_call_id", "function_call", "refusal")  # close to known keys, but no mistakes
# Of other toolkits: swallowed, they would train the wrong turns.
MASK_KEYS = {"loss_weight": "weight", "loss_scale": "weight"}
OTHER_ROLES = {"human": "user", "gpt": "assistant", "ai": "assistant", "model": "assistant", "bot": "assistant"}
CALL_KEYS = ("name", "arguments")
CALLERS = ("tool_call", "function_call")  # a message of theirs is nothing but calls: of ms-swift, LLaMA-Factory
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")  # beside a function they would be lost
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6  # losses are 32-bit floats


def read_message(value: Json, path: str, faults: Faults) -> Message | None:
    """One message in the form of the `chat` format; None where something is wrong with it."""
    if not isinstance(value, dict):
        faults.add(f"{path} is {described(value)}", "A message is an object with role and content.")
        return None
    num_problems = len(faults.problems)
    value = _with_refusal_as_content(value, path, faults)
    fields = _without_nulls(value)
    if fields.get("role") == "tool_call" and fields.get("content") not in (None, "", []):
        value = {**value, "role": "assistant", "content": "", "tool_calls": fields["content"]}
        fields = _without_nulls(value)
    if isinstance(fields.get("loss"), bool):  # ms-swift's name
        fields.setdefault("train", fields.pop("loss"))
    role = _role(fields, path, faults)
    is_assistant = role == "assistant"
    calls = _tool_calls(fields, path, faults)
    gives_calls = any(fields.get(key) for key in ("tool_calls", "function_call"))
    content = _contents(value, path, faults, may_be_null=gives_calls and role in ("assistant", ""))
    reasoning = _reasoning(fields, path, faults)
    if fields.get("role") == "tool_call":
        faults.add(f"{path} holds no call", "Its content is the call, with name and arguments, as JSON.")
    if role and not is_assistant:
        for key in (*REASONING_KEYS, "tool_calls", "function_call", "train", "weight"):
            if key == "train" and fields.get(key) is False:  # as it is
                continue
            if fields.get(key) not in (None, "", []):
                faults.add(f"{path} has {key}, but its role is {fields['role']!r}", "Only the assistant has it.")
    weight = _weight(fields, path, faults)
    for key, ours in MASK_KEYS.items():
        if key in fields:
            faults.add(f"{path} has the unknown key {key!r}", f"Use {ours!r}.")
    faults.misspelt(fields, MESSAGE_KEYS, EXTRA_KEYS, f"{path} has ")
    if len(faults.problems) > num_problems:
        return None
    extra = {key: item for key, item in fields.items() if key not in {*MESSAGE_KEYS, "function_call"}}
    return Message(role, "".join(content), reasoning, tuple(calls), weight, extra, len(content))


def read_messages(
    values: Sequence[Json], key: str, read: Callable[[Json, str, Faults], Message | None], faults: Faults
) -> tuple[list[Message | None], list[int]]:
    """The messages of the list under `key`, each as `read` takes it, and their places in it.

    Calls in messages of their own belong to the assistant's message before them, as ms-swift joins them.
    """
    messages: list[Message | None] = []
    places: list[int] = []
    unfolded_values = [(i, one) for i, value in enumerate(values) for one in unfolded(value, f"{key}[{i}]", faults)]
    for i, value in unfolded_values:
        message = read(value, f"{key}[{i}]", faults)
        before = messages[-1] if messages else None
        if message and before and _is_call_alone(value) and _goes_on(before, message):
            calls, extra = before.tool_calls + message.tool_calls, {**message.extra, **before.extra}
            messages[-1] = replace(before, tool_calls=calls, extra=extra)
        else:
            messages.append(message)
            places.append(i)
    return messages, places


def as_context(message: Message) -> Message:
    """The message without loss."""
    return replace(message, weight=0.0) if message.role == "assistant" else message


def _is_call_alone(value: Json) -> bool:
    return isinstance(value, dict) and (value.get("role") in CALLERS or value.get("from") in CALLERS)


def _goes_on(before: Message, message: Message) -> bool:
    """Whether a message of calls is of the same turn as the one before it."""
    return before.role == "assistant" and before.weight == message.weight and message.reasoning is None


def check_dialogue(messages: list[Message | None], path: str, faults: Faults) -> None:
    """Note that there is nothing to train; silent where a message is wrong, for it might have been the answer."""
    if faults.problems:
        return
    if not messages:
        faults.add(f"{path} is empty", "Give at least a user and an assistant message.")
    elif not any(message and message.role == "assistant" for message in messages):
        faults.add(f"{path} has no assistant message", "Only what the assistant says is trained.")


def read_tools(row: Mapping[str, Json], faults: Faults) -> list[dict[str, Json]]:
    """The tools of a row, each as the row gives it; the list may be a text of JSON.

    `functions`, what tools were called before, are tools of that type.
    """
    if row.get("functions") and not row.get("tools"):
        functions = faults.listed(row, "functions", "functions")
        row = {"tools": [{"type": "function", "function": function} for function in functions]}
    tools: list[dict[str, Json]] = []
    for i, tool in enumerate(faults.listed(row, "tools", "tools")):
        if isinstance(tool, dict):
            tools.append(read_tool(tool, f"tools[{i}]", faults))
        else:
            faults.add(f"tools[{i}] is {described(tool)}", "A tool is an object with type and function.")
    return tools


def read_call(value: Json, path: str, faults: Faults) -> ToolCall | None:
    """One tool call, `{"function": {"name", "arguments"}}` or the inner object alone; None where it is wrong."""
    if not isinstance(value, dict):
        faults.add(f"{path} is {described(value)}", "A tool call is an object with name and arguments.")
        return None
    outer = _without_nulls(value)
    function = outer.pop("function", None)
    if function is None:
        function = {key: outer.pop(key) for key in CALL_KEYS if key in outer}
    else:
        path = f"{path}.function"
    if not isinstance(function, dict):
        faults.add(f"{path} is {described(function)}", "It is an object with name and arguments.")
        return None
    unknown = [key for key in _without_nulls(function) if key not in CALL_KEYS]
    for key in (*unknown, *(key for key in ARGUMENT_KEYS if key in outer)):
        faults.add(f"{path} has the unknown key {key!r}", "A tool call has a name and arguments.")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        faults.add(f"{path} has no name" if not name else f"{path}.name is {described(name)}", "Name the tool called.")
    arguments = _arguments(function.get("arguments"), f"{path}.arguments", faults)
    return ToolCall(name, arguments, outer) if isinstance(name, str) else None


def _without_nulls(fields: Mapping[str, Json]) -> dict[str, Json]:
    return {key: value for key, value in fields.items() if value is not None}


def _role(fields: Mapping[str, Json], path: str, faults: Faults) -> str:
    role = fields.get("role")
    if isinstance(role, str) and role in ROLES:
        return ROLES[role]
    if role is None:
        faults.add(f"{path} has no role", f"Roles are {', '.join(ROLES)}.")
    elif isinstance(role, str):
        meant = OTHER_ROLES.get(role.lower(), role.lower())
        hint = nearest(meant, ROLES).strip() or f"Roles are {', '.join(ROLES)}."
        faults.add(f"{path} has the unknown role {role!r}", hint)
    else:
        faults.add(f"{path}.role is {described(role)}", f"Roles are {', '.join(ROLES)}.")
    return ""


def _contents(value: Mapping[str, Json], path: str, faults: Faults, *, may_be_null: bool) -> list[str]:
    """The text of a content, or the texts of its parts."""
    content = value.get("content")
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return _parts(content, f"{path}.content", faults)
    if content is not None:
        faults.add(f"{path}.content is {described(content)}", "A text or a list of parts is needed.")
    elif not may_be_null:
        fix = "Give its text; only an assistant message with tool_calls goes without."
        faults.add(f"{path}.content is null" if "content" in value else f"{path} has no content", fix)
    return [""]


def _with_refusal_as_content(value: dict[str, Json], path: str, faults: Faults) -> dict[str, Json]:
    """The message of which OpenAI's `refusal`, beside the content or as a part of it, is what was said."""
    content, refusal = value.get("content"), value.get("refusal")
    if isinstance(content, list):
        refusals = [part.get("refusal") for part in content if isinstance(part, dict) and part.get("type") == "refusal"]
        if refusals and len(refusals) == len(content) == 1:
            content, refusal = None, refusals[0]
    if not refusal or not isinstance(refusal, str):
        return value
    if content:
        faults.add(f"{path} has both content and refusal", "Keep what was said.")
    return {**value, "content": refusal, "refusal": refusal}


def _parts(content: list[Json], path: str, faults: Faults) -> list[str]:
    texts: list[str] = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            faults.add(f"{path}[{i}] is {described(part)}", 'A part is an object such as {"type": "text", "text": …}.')
            continue
        kind, text = part.get("type"), part.get("text")
        if not isinstance(kind, str):
            faults.add(f"{path}[{i}] has no type", 'A part is an object such as {"type": "text", "text": …}.')
        elif kind != "text":
            faults.add(f"{path}[{i}] is of the type {kind!r}", "Only text is trained on: leave the row out.")
        elif isinstance(text, str):
            texts.append(text)
        else:
            faults.add(f"{path}[{i}].text is {described(text)}", "A text is needed.")
    return texts


def _reasoning(fields: Mapping[str, Json], path: str, faults: Faults) -> str | None:
    given = {key: faults.text(fields, key, f"{path}.{key}") for key in REASONING_KEYS if key in fields}
    texts = {key: text for key, text in given.items() if text and text.strip()}
    if len(set(texts.values())) > 1:
        faults.add(f"{path} has different texts in {' and '.join(texts)}", "Keep one of them.")
    return next(iter(texts.values()), None)


def _weight(fields: Mapping[str, Json], path: str, faults: Faults) -> float:
    train, weight = fields.get("train", True), fields.get("weight", 1.0)
    if not isinstance(train, bool):
        faults.add(f"{path}.train is {described(train)}", "It is true or false.")
        return 0.0
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not (weight == 0 or SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT)
    ):
        fix = f"It is 0, or a number from {SMALLEST_WEIGHT:f} to {LARGEST_WEIGHT:.0f}."
        faults.add(f"{path}.weight is {described(weight)}", fix)
        return 0.0
    if not train and fields.get("weight"):
        faults.add(f"{path} has train false and weight {weight}", "Remove one of them.")
    return float(weight) if train else 0.0


def _tool_calls(fields: Mapping[str, Json], path: str, faults: Faults) -> list[ToolCall]:
    calls: list[ToolCall | None] = []
    for i, value in enumerate(_listed_calls(fields, f"{path}.tool_calls", faults)):
        calls.append(read_call(value, f"{path}.tool_calls[{i}]", faults))
    if "function_call" in fields:  # what tool_calls were called before there could be several
        calls.append(read_call(fields["function_call"], f"{path}.function_call", faults))
    return [call for call in calls if call]


def _listed_calls(fields: Mapping[str, Json], path: str, faults: Faults) -> list[Json]:
    """The calls as values; one may stand alone, in place of a list, and all be a text of JSON, as in table files."""
    value = fields.get("tool_calls")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return [parsed] if (parsed := faults.parsed(value, path)) is not None else []
    if isinstance(value, dict):
        return [value]
    return faults.listed(fields, "tool_calls", path)


def _arguments(value: Json, path: str, faults: Faults) -> dict[str, Json]:
    if value is None or value == "":  # a tool without parameters, as vLLM reads it
        return {}
    if isinstance(value, str):
        parsed = faults.parsed(value, path)
        if parsed is None:
            return {}
        value = parsed
    if isinstance(value, dict):
        return value
    faults.add(f"{path} is {described(value)}", "Arguments are an object by parameter name.")
    return {}
