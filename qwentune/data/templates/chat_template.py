"""The checkpoint's own chat template, and what a probe shows it to do with reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jinja2

from qwentune.data.sample import Json, Message, Offered
from qwentune.data.templates import sandbox
from qwentune.data.templates.bars import ignores_bars
from qwentune.data.templates.particulars import Particulars, particulars
from qwentune.data.templates.reads import reads_argument, reads_key
from qwentune.errors import Problem, RecipeError

Mode = Literal["thinking", "non_thinking", "default"]
ReasoningForm = Literal["field", "inline"]
TemplateMessage = dict[str, Json]


_TOOL: dict[str, Json] = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}


class TemplateRefusalError(Exception):
    """The template raised: it does not take these messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the arguments that this run gives it.

    Rendering goes through transformers' sandbox, the code that `apply_chat_template` runs, so that every filter and
    global is the one a server has.
    """

    text: str
    special_tokens: Mapping[str, str]
    args: Mapping[str, Json]

    def render(
        self,
        conversations: Sequence[Sequence[TemplateMessage]],
        tools: Sequence[Mapping[str, Json]] = (),
        *,
        mode: Mode = "default",
        generation_prompt: bool = False,
    ) -> list[str]:
        """One text per conversation; TemplateRefusalError with the template's words where it raises."""
        args: dict[str, Any] = {**self.special_tokens, **self.args}
        if mode != "default":
            args["enable_thinking"] = mode == "thinking"
        try:
            return sandbox.rendered(
                self.text,
                conversations=[list(messages) for messages in conversations],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=generation_prompt,
                **args,
            )
        except sandbox.TEMPLATE_ERRORS as error:
            raise TemplateRefusalError(str(error) or type(error).__name__) from None

    @cached_property
    def has_thinking_switch(self) -> bool:
        """Whether `enable_thinking` changes the prompt."""
        return self._prompts("thinking") != self._prompts("non_thinking")

    @cached_property
    def default_mode(self) -> Mode:
        """The mode of a request that says nothing about thinking."""
        if not self.has_thinking_switch:
            return "default"
        return "thinking" if self._prompts("default") == self._prompts("thinking") else "non_thinking"

    @cached_property
    def reasoning_form(self) -> ReasoningForm | None:
        """How reasoning must be handed over to be treated as reasoning; None: the template has no notion of it."""
        question: TemplateMessage = {"role": "user", "content": "question"}
        field: TemplateMessage = {"role": "assistant", "content": "answer", "reasoning_content": "because"}
        inline: TemplateMessage = {"role": "assistant", "content": inline_reasoning("because", "answer")}
        mode: Mode = "thinking" if self.has_thinking_switch else "default"
        try:
            as_field, as_inline, past_inline = self.render(
                [[question, field], [question, inline], [question, inline, question]], mode=mode
            )
        except TemplateRefusalError:
            return None
        if "because" in as_field:
            return "field"
        return "inline" if "because" in as_inline and "because" not in past_inline else None

    @cached_property
    def particulars(self) -> Particulars | None:
        """The words that the template looks for in texts; None where it counts what a probe cannot show."""
        return particulars(sandbox.parsed(self.text))

    @cached_property
    def ignores_bars(self) -> bool:
        """Whether it can be seen that a "|" in a text is to the template a character like any other."""
        given = {**self.special_tokens, **self.args}
        return ignores_bars(sandbox.parsed(self.text), [name for name, value in given.items() if "|" in str(value)])

    @cached_property
    def takes_parts(self) -> bool:
        """Whether a content in text parts is rendered as the texts one after the other."""
        parts: list[Json] = [{"type": "text", "text": "quest"}, {"type": "text", "text": "ion"}]
        try:
            return "question" in self.render([[{"role": "user", "content": parts}]])[0]
        except TemplateRefusalError:
            return False

    def reads(self, offered: Offered) -> bool:
        """Whether the template reads a key that rows give it; each is tried once."""
        asked = (offered.reader, offered.key)
        if asked not in self._reads:
            self._reads[asked] = (
                reads_argument(self.text, offered.key)
                if offered.reader == "argument"
                else reads_key(self.render, TemplateRefusalError, *asked)
            )
        return self._reads[asked]

    @cached_property
    def _reads(self) -> dict[tuple[str, str], bool]:
        return {}

    @cached_property
    def thinks_by_default(self) -> bool:
        """Whether a request that says nothing about thinking is expected to be answered with reasoning."""
        return self.reasoning_form is not None and self.default_mode != "non_thinking"

    def mode_of(self, thinking: Literal["auto", "on", "off"], reasons: bool) -> Mode:
        """The prompt under which a turn is trained: `auto` follows the turn, `on` and `off` force one."""
        if not self.has_thinking_switch:
            return "default"
        return "thinking" if thinking == "on" or (thinking == "auto" and reasons) else "non_thinking"

    def _prompts(self, mode: Mode) -> list[str]:
        """The prompt after a question, without and with a tool; empty where the template refuses it."""
        question: TemplateMessage = {"role": "user", "content": "question"}
        prompts: list[str] = []
        for tools in ((), (_TOOL,)):
            try:
                prompts += self.render([[question]], tools, mode=mode, generation_prompt=True)
            except TemplateRefusalError:
                prompts.append("")
        return prompts


def refuse_broken_template(text: str, where: str) -> None:
    """Raises RecipeError with file and line where the text is no template."""
    try:
        sandbox.parsed(text)
    except (*sandbox.TEMPLATE_ERRORS, SyntaxError) as error:
        line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        what = f"the chat template cannot be read: {str(error)[:200] or type(error).__name__}"
        raise RecipeError(Problem(f"{where}{line}", what, "Mend it, or name another as data.chat_template.")) from None


def inline_reasoning(reasoning: str, answer: str) -> str:
    """Reasoning and answer as one text, in the layout that Qwen's models write."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def template_message(message: Message, form: ReasoningForm | None) -> TemplateMessage:
    """The message as a template reads it, its reasoning in the given form; its content in parts where it has media."""
    content: Json = message.content
    fields: TemplateMessage = {}
    if message.reasoning is not None:
        if form == "field":
            fields["reasoning_content"] = message.reasoning
        elif form == "inline" and message.reasoning:
            content = inline_reasoning(message.reasoning, message.content)
    if message.media:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind, part.kind: part.kind}
            for part in message.parts
        ]
    if message.tool_calls:
        fields["tool_calls"] = [
            {"type": "function", **call.extra, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return {"role": message.role, "content": content, **fields, **message.extra}
