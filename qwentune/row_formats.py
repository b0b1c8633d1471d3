"""The row formats that a recipe can name, and the keys of their rows. A new one is a line here and a file in
`data/formats/`."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

SWITCHES = ("train", "training", "trainable", "loss", "loss_mask")  # whether there is loss at all
LOSS = (*SWITCHES, "weight")
TOOLS = ("tools", "functions", "tool_defs")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
BESIDE = ("system", *TOOLS, "enable_thinking", "chat_template_kwargs", *MEDIA, *LOSS)  # the messages of a dialogue
MESSAGES = ("messages", "conversations", "conversation", "prompt", "chosen", "rejected")  # lists of them
INSTRUCTION = ("instruction", "input", "output", "query", "response", "history")
PREFERENCE = ("prompt", "chosen", "rejected", "rejected_response", "instruction", "input", "messages", "conversations")


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What is known of a format without reading a row.

    `signatures` are the sets of keys that its rows are recognised by, all keys of one of them; `keys` are all that are
    read. `has_turns` says whether its rows end turns; `is_trained`, whether there is an objective that trains them.
    """

    signatures: tuple[Set[str], ...]
    keys: frozenset[str]
    has_turns: bool = True
    is_trained: bool = True


# Under which names logs keep the two halves of a call.
CALLS = (
    *(("request", "response"), ("request_body", "response_body"), ("req", "resp"), ("reqPayload", "respPayload")),
    *(("input", "output"), ("inputs", "outputs"), ("body", "response"), ("params", "result"), ("messages", "response")),
)


def _keys(*keys: str) -> frozenset[str]:
    return frozenset(keys)


# By the name of its file in data/formats/. The first whose signature fits a row counts, so a format stands before the
# others whose keys its own rows may have as well: rows with a text and more keys are no plain texts.
ROW_FORMATS: dict[str, RowFormat] = {
    "preference": RowFormat(
        ({"chosen", "rejected"}, {"messages", "rejected_response"}), _keys(*PREFERENCE, *BESIDE), is_trained=False
    ),
    "request": RowFormat(tuple({*names} for names in CALLS), _keys(*(name for names in CALLS for name in names))),
    "chat": RowFormat(({"messages"},), _keys("messages", "choices", *BESIDE)),
    "sharegpt": RowFormat(({"conversations"}, {"conversation"}), _keys("conversations", "conversation", *BESIDE)),
    "instruction": RowFormat(({"instruction", "output"}, {"query", "response"}), _keys(*INSTRUCTION, *BESIDE)),
    "completion": RowFormat(({"prompt", "completion"},), _keys("prompt", "completion", *BESIDE)),
    "retrieval": RowFormat(
        ({"query", "positive"},), _keys("query", "positive", "negatives", "instruction", *LOSS), is_trained=False
    ),
    "fim": RowFormat(
        ({"prefix", "suffix", "middle"}, {"repo", "files"}),
        _keys("prefix", "suffix", "middle", "text", "path", "repo", "files", *LOSS),
        has_turns=False,
    ),
    "text": RowFormat(({"text"},), _keys("text", *LOSS), has_turns=False),
}
COLUMNS = tuple(sorted({key for format in ROW_FORMATS.values() for key in format.keys}))
MESSAGE_TAGS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", *LOSS)
ROLE_TAGS = ("system", "user", "assistant", "tool", "function_call")
SPEAKERS = {  # whom the names in `from` stand for
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
}
