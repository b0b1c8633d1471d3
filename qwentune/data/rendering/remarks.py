"""What deserves a second look in a dialogue that can be trained as it is."""

from __future__ import annotations

from collections.abc import Iterator

from qwentune.data.sample import Conversation, Json

SAYS_NOTHING = "assistant turns say nothing: the model learns to end at once. Leave them out, or give their text."
NO_TOOLS = (
    "calls are in rows that define no tool: the model learns to call what no prompt offers. Give the row's tools, or "
    "leave it out."
)
UNKNOWN_TOOL = "calls are of tools that their row's tools do not have. Add those tools, or leave the rows out."
NO_CALL = "tool results follow no tool call. Give the call in the assistant's message before."
SAME_SPEAKER = "messages follow another of the same speaker. Join them, unless it is meant."
FILE_LEFT_OUT = "files of repositories do not fit before the file that is cut. Raise data.max_tokens to have them read."
STRAY_TAG = (
    "turns hold think tags that are not taken for reasoning: they are trained as written. Give reasoning in "
    "reasoning_content, or first in the content as <think>…</think>."
)
SEVERAL_PARTS = (
    "contents have several text parts, joined as they are: some servers put a line feed or a space between them. "
    "Write each content as one text."
)
CHANGED_BY_NFC = (
    "rows hold characters that the tokenizer composes, as it does when the model is served (Unicode's NFC): what is "
    "trained decodes to the composed ones."
)
WITHOUT_TEMPLATE = (
    "rows of texts named prompt and completion are trained as they are, without the chat template. For a model that is "
    "asked in chats, give their source columns: {instruction: prompt, output: completion}."
)
REFUSAL = "answers are refusals, trained as they are worded. Leave them out where the model is to answer."
AFTER_THE_LAST = (
    "messages stand after the last answer of their dialogue: they train nothing. If one of them is an answer, its role "
    "is wrong."
)
NOT_THINKING = (
    "turns without reasoning are trained under the prompt after which this model thinks by default: it will learn "
    "not to think there. Give their reasoning, or tune a checkpoint that does not think."
)
UNREACHABLE = "turns have no user turn before them: not trained. Give the question, or leave them out."


def remarks(conversation: Conversation) -> Iterator[str]:
    """A constant of this module for each place that deserves it."""
    tools = {_name(tool) for tool in conversation.tools}
    before, num_after = "", 0
    for message in conversation.messages:
        is_answer = message.role == "assistant"
        if is_answer and not message.content.strip() and not message.tool_calls and not message.reasoning:
            yield SAYS_NOTHING
        if message.extra.get("refusal") and message.weight:
            yield REFUSAL
        for call in message.tool_calls:
            if not tools:
                yield NO_TOOLS
            elif call.name not in tools:
                yield UNKNOWN_TOOL
        if message.role == "tool" and before not in ("call", "tool"):
            yield NO_CALL
        if message.role == before and message.role in ("user", "assistant"):
            yield SAME_SPEAKER
        before = "call" if message.tool_calls else message.role
        num_after = 0 if is_answer else num_after + 1
    yield from [AFTER_THE_LAST] * num_after


def _name(tool: dict[str, Json]) -> str | None:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
