"""A conversation on its way through the checkpoint's own chat template, and the rule of what each turn trains.

For an assistant turn, the context is what a server renders before it and the target is what the rendering with the
turn has beyond the context, through its last control token. Texts of the row are guarded while the template runs, so
that only the control tokens that the template itself wrote become control tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.pads import ShownMedia
from qwentune.data.rendering.conservation import first_lost
from qwentune.data.rendering.pieces import Encoder, Piece
from qwentune.data.rendering.reasoning import has_stray_tag, with_reasoning_apart, with_uncarried_reasoning
from qwentune.data.rendering.remarks import SEVERAL_PARTS, STRAY_TAG
from qwentune.data.rendering.turn import Turn
from qwentune.data.sample import Conversation, Json, Message, RowError
from qwentune.data.templates.chat_template import (
    ChatTemplate,
    Mode,
    TemplateMessage,
    TemplateRefusalError,
    template_message,
)
from qwentune.data.templates.guard import (
    PRIVATE_USE,
    choose_guard,
    guarded_message,
    guarded_object,
    message_texts,
    texts_of,
)
from qwentune.data.tokenizing.tokenizer import Tokenizer
from qwentune.recipe import Fim

_REFUSED = "Change the row to what this template takes, or give another one with data.chat_template."


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """The choices of `data:` that decide what is trained and under which prompt."""

    max_tokens: int
    thinking: Literal["auto", "on", "off"] = "auto"
    turns: Literal["all", "last"] = "all"
    too_long: Literal["drop", "drop_old_turns", "error"] = "drop"
    unsupported_reasoning: Literal["refuse", "drop", "inline"] = "refuse"
    system: str | None = None
    secrets: Literal["warn", "refuse"] = "warn"
    fim: Fim = field(default_factory=Fim)
    seed: int = 0


@dataclass(frozen=True)
class Dialogue:
    """One conversation, guarded, with the default system text where it has none of its own."""

    conversation: Conversation
    unguarded: tuple[Message, ...]
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Json], ...]
    num_inserted: int  # messages that the row does not have: the default system text
    lines: str  # every text of the row, each from a new line
    guard: str  # stands for "|" in every text of the row; "|" itself where no text holds one
    template: ChatTemplate
    options: RenderOptions
    encoder: Encoder
    media: ShownMedia | None = None
    remarks: tuple[str, ...] = ()  # what deserves a second look under this template

    @classmethod
    def of(
        cls,
        conversation: Conversation,
        template: ChatTemplate,
        options: RenderOptions,
        encoder: Encoder,
        limits: MediaLimits | None = None,
    ) -> Dialogue:
        """The conversation as this template takes it.

        `limits` are what the model takes of media. RowError where the template cannot carry the reasoning, or the
        model not the media.
        """
        messages = list(conversation.messages)
        if template.reasoning_form is not None:
            messages = [with_reasoning_apart(message) for message in messages]
        remarks = [STRAY_TAG for message in messages if has_stray_tag(message)]
        for message in messages:  # vLLM joins a tool's parts with line feeds, whatever the template takes
            if message.num_parts > 1 and not (template.takes_parts and message.role != "tool"):
                remarks.append(SEVERAL_PARTS)
        num_inserted = 0
        if options.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", options.system))
            num_inserted = 1
        if template.reasoning_form is None or template.mode_of(options.thinking, True) == "non_thinking":
            turns = (*[-1] * num_inserted, *(conversation.turns or range(len(messages))))
            cause = "data.thinking is off" if template.reasoning_form else "the chat template has no place for it"
            if template.reasoning_form and conversation.template_args.get("enable_thinking") is False:
                _refuse_reasoning(messages, turns)
            messages = [
                with_uncarried_reasoning(message, options.unsupported_reasoning, f"messages[{turns[i]}]", cause)
                for i, message in enumerate(messages)
            ]
        texts = [text for message in messages for text in message_texts(message)]
        lines = "\n".join([*texts, *texts_of(list(conversation.tools))])
        guard = choose_guard(lines)
        if guard is None:
            what = f"its texts hold '|' and all {len(PRIVATE_USE):,} private-use characters, of which one stands for it"
            raise RowError(what, "Leave the row out, or one of U+E000 to U+F8FF in its texts.")
        return cls(
            conversation=conversation,
            unguarded=tuple(messages),
            messages=tuple(guarded_message(message, guard) for message in messages),
            tools=tuple(guarded_object(tool, guard) for tool in conversation.tools),
            num_inserted=num_inserted,
            lines=lines,
            guard=guard,
            template=template,
            options=options,
            encoder=encoder,
            media=ShownMedia.of(messages, limits, encoder.tokenizer.control_ids),
            remarks=tuple(remarks),
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        return self.encoder.tokenizer

    @cached_property
    def rows(self) -> list[TemplateMessage]:
        """The messages as the template reads them."""
        return [template_message(message, self.template.reasoning_form) for message in self.messages]

    @cached_property
    def candidates(self) -> list[int]:
        """The turns that are to be trained, reachable or not."""
        trained = [i for i, message in enumerate(self.messages) if message.role == "assistant" and message.weight > 0]
        return trained[-1:] if self.options.turns == "last" else trained

    @cached_property
    def trained(self) -> list[int]:
        """The turns that are trained: those with a user turn before them, which a server could produce."""
        first = next((i for i, message in enumerate(self.messages) if message.role == "user"), len(self.messages))
        return [i for i in self.candidates if i > first]

    def message_index(self, i: int) -> int:
        """The index of message `i` among the messages that the row gives."""
        return i - self.num_inserted

    def row_index(self, i: int) -> int:
        """The place of message `i` among the turns of the row as the user wrote it, which people are told."""
        turns, given = self.conversation.turns, self.message_index(i)
        return turns[given] if turns and given >= 0 else given

    def reasons(self, i: int) -> bool:
        """Whether turn `i` brings reasoning of its own."""
        return bool((self.messages[i].reasoning or "").strip())

    def mode(self, i: int) -> Mode:
        """The prompt under which turn `i` is trained."""
        return self.template.mode_of(self.options.thinking, self.reasons(i))

    def teaches_not_to_think(self, i: int) -> bool:
        """Whether turn `i` does without reasoning under the prompt after which the model reasons by default."""
        is_default = self.mode(i) in ("default", self.template.default_mode)
        return is_default and not self.reasons(i) and self.template.thinks_by_default

    def literal_turns(self) -> list[Turn]:
        """Every trained turn by the rule, each rendered on its own; RowError where the rule cannot hold."""
        return [self.literal_turn(i) for i in self.trained]

    def literal_turn(self, i: int, first: int = 0) -> Turn:
        """Turn `i` by the rule; messages before `first` are left out, but a system text stays."""
        kept = [k for k in range(i + 1) if k >= first or (k == 0 and self.messages[0].role == "system")]
        context, rendering = self._render_both([self.rows[k] for k in kept], i)
        if not rendering.startswith(context):
            self._refuse_stray_tag(kept)
            raise RowError(
                f"messages[{self.row_index(i)}] cannot be trained: its rendering does not continue the prompt that a "
                f"server would build ({_difference(context, rendering, self.guard)})",
                self._mend(i),
            )
        has_reasoning = self.template.reasoning_form is not None
        messages = [self.messages[k] for k in kept]
        lost = first_lost(messages, self.tools, rendering, len(context), has_reasoning=has_reasoning)
        lost = lost or self._first_lost_medium(kept, context) or self._first_lost_medium(kept, rendering)
        if lost is not None:
            self._refuse_stray_tag(kept)
            lost = lost.replace(self.guard, "|")
            raise RowError(
                f"the chat template leaves out {lost} of the messages before and with messages[{self.row_index(i)}]",
                "Change the row, or give a template that carries it with data.chat_template.",
            )
        target = through_last_control_token(rendering[len(context) :], self.tokenizer)
        if target is None:
            raise RowError(
                f"messages[{self.row_index(i)}] does not end with a control token in the chat template's rendering, so "
                "the model would never learn to stop",
                "Give a template that closes every turn with data.chat_template.",
            )
        return Turn(i, (), self._with_media(context, kept), self.split(target))

    def _first_lost_medium(self, kept: Sequence[int], rendering: str) -> str | None:
        """The first medium that has no pad in the rendering of messages; None: each has one."""
        if self.media is None or self.media.kinds_in(rendering) == self.media.kinds_of(kept):
            return None
        for end, k in enumerate(kept, 1):
            beginning = kept[:end]
            try:
                shown = self.media.kinds_in(self.template.render([[self.rows[m] for m in beginning]], self.tools)[0])
            except TemplateRefusalError:  # a dialogue need not be one before its question
                continue
            if shown != self.media.kinds_of(beginning):
                return f"{self.messages[k].media[0].where}, which the {self.messages[k].role} shows,"
        return "a medium"

    def _mend(self, i: int) -> str:
        """What to do about turn `i`, after which every turn that is trained continues its prompt."""
        left_out, rest = {i}, self._without({i})
        while failing := {k for k in rest.trained if not rest._continues(k)}:  # with turns: last, one after the other
            left_out |= failing
            rest = self._without(left_out)
        turns = {k: f"messages[{self.row_index(k)}]" for k in sorted(left_out)}
        mends: list[str] = []
        if all(self._can_join(k) for k in turns):
            mends.append("join " + " and ".join(f"{turns[k]} to messages[{self.row_index(k - 1)}]" for k in turns))
        with_false = f'leave out {" and ".join(turns.values())} with "train": false'
        mends.append(with_false if rest.trained else "leave the row out")
        if self._continues_with_auto():
            mends.append("set data.thinking=auto")
        words = ", or ".join(mends)
        return f"{words[0].upper()}{words[1:]}."

    def _can_join(self, i: int) -> bool:
        """Whether turn `i` is text alone that goes on after another assistant message."""
        message = with_reasoning_apart(self.conversation.messages[self.message_index(i)])
        return self.messages[i - 1].role == "assistant" and not (message.reasoning or message.tool_calls)

    def _without(self, left_out: Collection[int]) -> Dialogue:
        messages = (replace(m, weight=0.0) if k in left_out else m for k, m in enumerate(self.messages))
        return replace(self, messages=tuple(messages))

    def _continues(self, i: int) -> bool:
        try:
            context, rendering = self._render_both(self.rows[: i + 1], i)
        except RowError:
            return False
        return rendering.startswith(context)

    def _continues_with_auto(self) -> bool:
        """Whether every turn continues its prompt where each has the prompt that its reasoning asks for."""
        if self.options.thinking == "auto" or not self.template.has_thinking_switch:
            return False
        options = replace(self.options, thinking="auto")
        limits = None if self.media is None else self.media.limits
        dialogue = Dialogue.of(self.conversation, self.template, options, self.encoder, limits)
        return all(map(dialogue._continues, dialogue.trained))

    def _refuse_stray_tag(self, kept: Sequence[int]) -> None:
        """RowError where an answer holds a closing think tag, which is why the template does not keep it whole."""
        for k in kept:
            if has_stray_tag(self.messages[k]) and "</think>" in self.messages[k].content:
                raise RowError(
                    f"messages[{self.row_index(k)}] holds </think>, and the chat template takes what stands before it "
                    "for reasoning",
                    "If it is reasoning, give it as reasoning_content; else write the tag in other characters.",
                )

    def prompt(self, mode: Mode) -> list[Piece]:
        """All messages and the generation prompt."""
        try:
            prompt = self.template.render([self.rows], self.tools, mode=mode, generation_prompt=True)[0]
        except TemplateRefusalError as error:
            raise RowError(f"the chat template refuses the messages: {error}", _REFUSED) from None
        everything = range(len(self.rows))
        if lost := self._first_lost_medium(everything, prompt):
            raise RowError(f"the chat template leaves out {lost}", _REFUSED)
        return self._with_media(prompt, everything)

    def count_forged(self) -> int:
        """How many control tokens the row's texts spell, also with what the template writes beside them."""
        guarded = self.rendering
        if self.guard == "|" or not (f"<{self.guard}" in guarded or f"{self.guard}>" in guarded):
            return 0
        pattern = self.tokenizer.control_pattern
        return len(pattern.findall(guarded.replace(self.guard, "|"))) - len(pattern.findall(guarded))

    def prove_guard(self, *, by_rendering: bool) -> None:
        """RowError where the guard changes more of the rendering than itself.

        Without a rendering of its own where the template cannot tell a bar from the guard.
        """
        if self.guard == "|":
            return
        escaped = ascii(self.guard)[1:-1] in self.rendering  # as JSON and Python spell it, and a bar they do not
        if not by_rendering and self.template.ignores_bars and not escaped:
            return
        form = self.template.reasoning_form
        rows = self.unguarded if not self.trained else self.unguarded[: self.trained[-1] + 1]
        plain = self._rendered([template_message(m, form) for m in rows], self.conversation.tools)
        if self.rendering.replace(self.guard, "|") != plain:
            raise RowError(
                "the chat template treats '|' in a text specially, so that its texts and its control tokens cannot be "
                "told apart",
                "Remove the '|' from the texts of this row.",
            )

    def split(self, rendering: str) -> list[Piece]:
        """The pieces of a rendering of this dialogue."""
        return self.encoder.split(rendering, self.guard)

    def _with_media(self, rendering: str, kept: Sequence[int]) -> list[Piece]:
        """The pieces of a rendering of messages, each medium with all its pads."""
        pieces = self.split(rendering)
        return pieces if self.media is None else self.media.in_place(pieces, kept)

    @cached_property
    def rendering(self) -> str:
        """The messages through the last turn that is trained, under its mode; all where none is."""
        return self._rendered(self.rows if not self.trained else self.rows[: self.trained[-1] + 1], self.tools)

    def _rendered(self, messages: Sequence[TemplateMessage], tools: Sequence[dict[str, Json]]) -> str:
        mode = self.mode(self.trained[-1]) if self.trained else "default"
        try:
            return self.template.render([messages], tools, mode=mode)[0]
        except TemplateRefusalError as error:
            raise RowError(f"the chat template refuses the messages: {error}", _REFUSED) from None

    def _render_both(self, rows: Sequence[TemplateMessage], i: int) -> tuple[str, str]:
        mode = self.mode(i)
        try:
            context = self.template.render([rows[:-1]], self.tools, mode=mode, generation_prompt=True)[0]
            rendering = self.template.render([rows], self.tools, mode=mode)[0]
        except TemplateRefusalError as error:
            what = f"the chat template refuses the messages up to messages[{self.row_index(i)}]: {error}"
            raise RowError(what.replace(self.guard, "|"), _REFUSED) from None
        return context, rendering


def _refuse_reasoning(messages: Sequence[Message], turns: Sequence[int]) -> None:
    """RowError where a message of a row that has `enable_thinking` false brings reasoning."""
    for message, turn in zip(messages, turns, strict=True):
        if message.role == "assistant" and (message.reasoning or "").strip():
            what = f"messages[{turn}] has reasoning, but the row says that enable_thinking is false"
            raise RowError(what, "Remove one of the two.")


def through_last_control_token(text: str, tokenizer: Tokenizer) -> str | None:
    """`text` up to and with its last control token; None where something else than white space follows, or none is."""
    end = 0
    for match in tokenizer.control_pattern.finditer(text):
        end = match.end()
    return text[:end] if end and not text[end:].strip() else None


def _difference(context: str, rendering: str, guard: str) -> str:
    """The first place where the rendering leaves the context, with a few characters of both."""
    shared = next(
        (k for k, (a, b) in enumerate(zip(context, rendering, strict=False)) if a != b),
        min(len(context), len(rendering)),
    )
    start = max(0, shared - 12)
    prompt, rendered = (text[start : shared + 28].replace(guard, "|") for text in (context, rendering))
    return f"prompt {prompt!r}, rendering {rendered!r}"
