"""The `request` format: a logged call of a model, `{"request": {...}, "response": {...}}` and the like.

The bodies are those of OpenAI's chat completions and responses and of Anthropic's messages, as objects or as texts of
JSON, also inside what HTTP or a batch wraps around them. The response is the turn that is trained; all that the request
holds is its context. Of the request's parameters those that a chat template shows are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qwentune.data.formats import chat
from qwentune.data.formats.apis.responses import chat_request, messages_of
from qwentune.data.reading.faults import described
from qwentune.data.reading.row_reader import RowReader
from qwentune.data.sample import Conversation, Json, Source
from qwentune.errors import Problem, counted
from qwentune.row_formats import CALLS

WRAPPERS = ("body", "json", "kwargs", "params", "payload", "data", "message", "response")  # one body inside another
DEEPEST_WRAPPING = 3
ANSWERS = ("choices", "content", "role", "output", "error")  # one of them has the body of a response
WHOLE = ("end_turn", "tool_use", "stop_sequence", None)  # Anthropic's reasons for an end that is one
# Parameters of a request that no chat template shows.
UNSHOWN = frozenset(
    (
        *("model", "temperature", "top_p", "top_k", "min_p", "n", "seed", "user", "metadata", "store", "timeout"),
        *("max_tokens", "max_completion_tokens", "max_output_tokens", "stop", "stop_sequences", "stop_token_ids"),
        *("stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "tool_choice", "parallel_tool_calls"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "response_format", "function_call"),
        *("guided_json", "guided_regex", "guided_choice", "output_config", "output_format", "structured_outputs"),
        *("service_tier", "reasoning_effort", "reasoning", "thinking", "verbosity", "prediction", "modalities"),
        *("betas", "anthropic_version", "anthropic_beta", "container", "context_management", "inference_geo"),
        *("safety_identifier", "prompt_cache_key", "extra_headers", "extra_query", "web_search_options"),
        *("id", "object", "created"),
    )
)


def parse(row: dict[str, Json], source: Source) -> Conversation | list[Problem]:
    """The dialogue of which the response is trained, or everything that is wrong with the row."""
    reader = RowReader(source)
    asked, answered = _names(row)
    request = _request(row, asked, reader)
    response = _body(row.get(answered), answered, ANSWERS, reader)
    if reader.problems:
        return reader.problems
    if request is None:
        reader.refuse(f"{asked} is {described(row.get(asked))}", "A request holds messages, as the APIs take them.")
        return reader.problems
    answer = _answer(response, answered, reader)
    match request.get("messages"):
        case [*_, {"role": "assistant"}]:
            fix = "Join both to one answer in messages, or leave the row out."
            reader.refuse(f"{asked} ends with words of the assistant, which the response goes on with", fix)
        case _:
            pass
    if asked != "messages":  # else they are keys of the request
        reader.leave_unread(key for key, value in row.items() if key not in (asked, answered) and value is not None)
    return reader.problems or _dialogue(request, answer, (asked, answered), reader)


def fits(row: dict[str, Json]) -> bool:
    """Whether the halves of the row are those of a call: other texts and data stand under such names too."""
    asked, answered = _names(row)
    reader = RowReader(Source("", 0))
    if asked == "messages":  # beside which anything may stand
        response = _body(row[answered], answered, ANSWERS, reader)
        return isinstance(response, dict) and any(key in response for key in ANSWERS)
    return _request(row, asked, reader) is not None


def _names(row: Mapping[str, Json]) -> tuple[str, str]:
    return next(((asked, answered) for asked, answered in CALLS if asked in row and answered in row), CALLS[0])


def _body(value: Json, path: str, keys: tuple[str, ...], reader: RowReader, depth: int = 0) -> Json:
    """The body in a half of a call: parsed where it is a text of JSON, and taken out of what is wrapped around it."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        value = reader.read_json(value, path)
    if isinstance(value, dict) and not any(key in value for key in keys) and depth < DEEPEST_WRAPPING:
        for key in WRAPPERS:
            if isinstance(value.get(key), dict | str):
                reader.leave_unread((one for one, item in value.items() if one != key and item is not None), path)
                return _body(value[key], f"{path}.{key}", keys, reader, depth + 1)
    return value


def _request(row: Mapping[str, Json], name: str, reader: RowReader) -> dict[str, Json] | None:
    """The body of the request; None where it holds no messages."""
    if name == "messages":
        return {key: value for key, value in row.items() if key not in ("response", "output")}
    body = _body(row.get(name), name, ("messages", "input"), reader)
    if isinstance(body, list) and any(isinstance(one, dict) and "role" in one for one in body):
        return {"messages": body}
    if isinstance(body, dict) and "messages" not in body and isinstance(body.get("input"), list | str):
        return chat_request(body, name, reader)
    return body if isinstance(body, dict) and isinstance(body.get("messages"), list | str) else None


def _answer(response: Json, path: str, reader: RowReader) -> Json:
    """The `choices` of a response, or what stands for them; None where there is no whole answer, which is said."""
    match response:
        case {"error": error} if error:
            kind = error.get("type") or error.get("code") if isinstance(error, dict) else error
            reader.refuse(f"{path} is an error: {described(kind)}", "Leave the row out: nothing was answered.")
        case {"choices": list() as choices}:
            _leave_unread(response, OF_COMPLETIONS, path, reader)
            return choices
        case {"output": list() as items, **rest}:
            _leave_unread(response, OF_RESPONSES, path, reader)
            status, details = rest.get("status", "completed"), rest.get("incomplete_details")
            if status != "completed":
                reason = details.get("reason") if isinstance(details, dict) else None
                what = f"{path}.status is {described(status)}" + (f", for {described(reason)}" if reason else "")
                reader.refuse(what, "The answer is not whole: leave the row out.")
            return _last(messages_of(items, f"{path}.output", reader), path, reader)
        case {"content": list() | str(), **rest} if rest.get("role", "assistant") == "assistant":
            reason = rest.get("stop_reason")
            if reason not in WHOLE:
                what = "refused" if reason == "refusal" else "cut off"
                fix = f"The answer was {what}: leave the row out, or write the whole answer."
                reader.refuse(f"{path}.stop_reason is {described(reason)}", fix)
            return _alone({key: value for key, value in response.items() if key not in _OF_A_RESPONSE})
        case {"role": "assistant"}:
            return _alone(response)
        case [{"type": _}, *_] as items:
            return _last(messages_of(items, path, reader), path, reader)
        case [{"role": "assistant"} as message]:
            return _alone(message)
        case str() if response.lstrip().startswith(("data:", "event:")):
            reader.refuse(f"{path} is a stream of events", "Join them to the response that they are parts of.")
        case str() if response.strip():
            return _alone({"content": response})
        case _:
            fix = "It is the body that the API answers with: choices, or a message with its content."
            reader.refuse(f"{path} is {described(response)}", fix)
    return None


# Keys of a response that say nothing of its answer.
OF_COMPLETIONS = frozenset(
    (
        *("choices", "error", "id", "object", "created", "model", "usage", "system_fingerprint", "service_tier"),
        *("prompt_filter_results", "prompt_logprobs", "prompt_token_ids", "kv_transfer_params", "provider"),
    )
)
OF_RESPONSES = UNSHOWN | frozenset(
    (
        *("output", "output_text", "error", "status", "incomplete_details", "usage", "created_at", "completed_at"),
        *("instructions", "tools", "previous_response_id", "truncation", "text", "background", "billing"),
        *("max_tool_calls", "prompt", "conversation", "prompt_cache_retention"),
    )
)


def _leave_unread(body: Mapping[str, Json], known: frozenset[str], path: str, reader: RowReader) -> None:
    reader.leave_unread((key for key, value in body.items() if key not in known and value is not None), path)


_OF_A_RESPONSE = frozenset(
    ("id", "type", "model", "stop_reason", "stop_sequence", "stop_details", "usage", "container")
)


def _last(messages: list[Json], path: str, reader: RowReader) -> Json:
    """The one message that the items of a response are."""
    match messages:
        case [{"role": "assistant"} as message]:
            return _alone(message)
        case _ if not reader.problems:
            reader.refuse(f"{path} holds {counted(len(messages), 'message{|s}')}", "It is one answer of the assistant.")
        case _:
            pass
    return None


def _alone(message: dict[str, Json]) -> Json:
    return [{"message": {**message, "role": "assistant"}}]


def _dialogue(
    request: dict[str, Json], choices: Json, names: tuple[str, str], reader: RowReader
) -> Conversation | list[Problem]:
    """The request with its answer, read as a row of the format chat; problems are told in the words of the log."""
    more = request.get("extra_body")
    request = {**request, **more} if isinstance(more, dict) else request
    shown = {key: value for key, value in request.items() if key not in UNSHOWN and key != "extra_body"}
    parsed = chat.parse({**shown, "choices": choices}, reader.source)
    asked, answered = (f"{name}." if name != "messages" else "" for name in names)

    def placed(words: str) -> str:
        return f"{answered if words.startswith('choices') else asked}{words}"

    if not isinstance(parsed, list):
        offered = tuple(one._replace(path=placed(one.path)) for one in parsed.offered)
        return replace(parsed, unread=(*reader.unread, *map(placed, parsed.unread)), offered=offered)
    return [Problem(one.where, placed(one.what), one.fix) for one in parsed]
