"""What deserves a second look in a dialogue that can be trained as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwentune.data.sample import Conversation, Json

# As `errors.counted` takes them: the count stands before.
SAYS_NOTHING = (
    "assistant turn{|s} say{s|} nothing: the model learns to end at once. Leave them out, or give their text."
)
NO_TOOLS = (
    "call{|s} in a row that defines no tool: the model learns to call what no prompt offers. Give the row's tools, or "
    "leave it out."
)
UNKNOWN_TOOL = "call{|s} of a tool that the row's tools do not have. Add those tools, or leave the rows out."
WRAPPED_TOOLS = (
    'tool{|s} stand{s|} in `tools` without {"type": "function", "function": …} and get{s|} it: servers show no model '
    "a tool without."
)
NO_CALL = "tool result{|s} follow{s|} no tool call. Give the call in the assistant's message before."
SAME_SPEAKER = "message{|s} follow{s|} another of the same speaker. Join them, unless it is meant."
FILE_LEFT_OUT = (
    "file{|s} of repositories {does|do} not fit before the file that is cut. Raise data.max_tokens to have them read."
)
STRAY_TAG = (
    "turn{|s} hold{s|} think tags that are not taken for reasoning: they are trained as written. Give reasoning in "
    "reasoning_content, or first in the content as <think>…</think>."
)
SEVERAL_PARTS = (
    "content{|s} {has|have} several text parts, joined as they are: some servers put a line feed or a space between "
    "them. Write each content as one text."
)
CHANGED_BY_NFC = (
    "row{|s} hold{s|} characters that the tokenizer composes, as it does when the model is served (Unicode's NFC): "
    "what is trained decodes to the composed ones."
)
WITHOUT_TEMPLATE = (
    "row{|s} of texts named prompt and completion {is|are} trained without the chat template. For a model that is "
    "asked in chats, give their source columns: {instruction: prompt, output: completion}."
)
REFUSAL = "answer{|s} {is a refusal|are refusals}, trained as worded. Leave them out where the model is to answer."
AFTER_THE_LAST = (
    "message{|s} stand{s|} after the last answer of the dialogue and train{s|} nothing. If one is an answer, its role "
    "is wrong."
)
NOT_THINKING = (
    "turn{|s} without reasoning {is|are} trained under the prompt after which this model thinks by default: it will "
    "learn not to think there. Give their reasoning, or tune a checkpoint that does not think."
)
UNREACHABLE = "turn{|s} {has|have} no user turn before {it|them}: not trained. Give the question, or leave them out."
TAG_AS_TEXT = (
    "text{|s} hold{s|} <image>, <video> or <audio>, but the file has no column of media: trained as the text. Give the "
    "files in images, videos or audios beside the messages, unless the text is about the tag."
)
ALWAYS_THINKS = (
    "row{|s} say{s|} enable_thinking false, but this checkpoint always thinks: its template has no other prompt, and "
    "the row is trained under that one. Tune a checkpoint that can do without, or leave such rows out."
)
NEVER_THINKS = (
    "row{|s} say{s|} enable_thinking true, but this checkpoint never thinks: its template has no other prompt, and "
    "the row is trained under that one. Tune a checkpoint that thinks, or remove the key."
)


def remarks(conversation: Conversation) -> Iterator[str]:
    """A constant of this module for each place that deserves it."""
    yield from [WRAPPED_TOOLS] * conversation.num_wrapped_tools
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


def tags_as_text(conversation: Conversation, kinds: Iterable[str]) -> Iterator[str]:
    """`TAG_AS_TEXT` for each text with the tag of one of the `kinds` that the model takes, where no medium is shown."""
    if not any(message.media for message in conversation.messages):
        tags = [f"<{kind}>" for kind in kinds]
        for message in conversation.messages:
            if message.role != "assistant" and any(tag in message.content for tag in tags):
                yield TAG_AS_TEXT


def _name(tool: dict[str, Json]) -> str | None:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
