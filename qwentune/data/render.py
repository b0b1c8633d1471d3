"""From a conversation to token ids with loss weights, by running the checkpoint's own chat template.

The rule: for an assistant turn, the context is what a server renders before it and the target is what the rendering
with the turn has beyond the context, through its last control token. Loss is on the target and nowhere else. Context
and target are encoded separately, as a server does. Texts of the row are guarded while the template runs, so that only
the control tokens that the template itself wrote become control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from qwentune.data.conservation import first_lost
from qwentune.data.guard import choose_guard, guarded_message, guarded_object, message_texts, texts_of
from qwentune.data.reasoning import with_reasoning_apart, with_uncarried_reasoning
from qwentune.data.sample import Conversation, Json, Message, RowError, Source, Text
from qwentune.data.template import ChatTemplate, Mode, TemplateRefusalError, template_message
from qwentune.data.tokenizer import Tokenizer
from qwentune.errors import Problem


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """The choices of `data:` that decide what is trained and under which prompt."""

    max_tokens: int
    thinking: Literal["auto", "on", "off"] = "auto"
    turns: Literal["all", "last"] = "all"
    too_long: Literal["drop", "drop_old_turns", "error"] = "drop"
    unsupported_reasoning: Literal["refuse", "drop", "inline"] = "refuse"
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """One training example: token t is trained where `weights[t]` is not 0, predicted from what stands before it.

    `turns` are the indices of the messages trained; empty for a text.
    """

    source: Source
    turns: tuple[int, ...]
    input_ids: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A turn (None: the whole row) that is not trained, and why."""

    source: Source
    turn: int | None
    reason: str
    num_tokens: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of one sample: its examples, and everything that a report has to say about it."""

    examples: list[Rendered] = field(default_factory=list[Rendered])
    problems: list[Problem] = field(default_factory=list[Problem])
    dropped: list[Dropped] = field(default_factory=list[Dropped])
    modes: list[Mode] = field(default_factory=list[Mode])  # one per trained turn
    turns_with_reasoning: int = 0
    unreachable_turns: int = 0
    unstructured_reasoning: int = 0  # inline reasoning under a template without a notion of it
    forged_control_tokens: int = 0  # control tokens spelled by texts of the row, encoded as plain text
    rendering_tokens: int = 0  # of one rendering of the dialogue: what a naive trainer would process


@dataclass(frozen=True)
class Renderer:
    """Renders samples of one run: one tokenizer, one template, one set of options."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    options: RenderOptions

    def render(self, sample: Conversation | Text) -> Outcome:
        """The examples of a sample and what is to be reported of it; never raises for a fault of the row."""
        outcome = Outcome()
        if isinstance(sample, Text):
            self._render_text(sample, outcome)
            return outcome
        try:
            if self.template is None:
                fix = "Give one with data.chat_template, or train on rows of the format text."
                raise RowError("the checkpoint has no chat template to render messages with", fix)
            dialogue = _Dialogue.of(sample, self.tokenizer, self.template, self.options, outcome)
            self._render_turns(dialogue, outcome)
        except RowError as error:
            outcome.examples.clear()
            outcome.problems.append(Problem(str(sample.source), error.what, error.fix))
        return outcome

    def prompt(self, messages: Sequence[Message], mode: Mode) -> list[int]:
        """The ids after which the model answers `messages` in `mode`; raises RowError where the template refuses."""
        assert self.template is not None
        conversation = Conversation(Source("chat", 1), tuple(messages))
        dialogue = _Dialogue.of(conversation, self.tokenizer, self.template, self.options, Outcome())
        return dialogue.prompt(mode)

    def _render_text(self, sample: Text, outcome: Outcome) -> None:
        # A document longer than a row continues in the next: nothing is lost but the first token's context.
        ids = [*self.tokenizer.encode([sample.text])[0], self.tokenizer.end_of_text_id]
        outcome.rendering_tokens = len(ids)
        size = self.options.max_tokens
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            if len(piece) > 1:
                outcome.examples.append(Rendered(sample.source, (), piece, [0.0] + [1.0] * (len(piece) - 1)))

    def _render_turns(self, dialogue: _Dialogue, outcome: Outcome) -> None:
        trained = [
            i for i, message in enumerate(dialogue.messages) if message.role == "assistant" and message.weight > 0
        ]
        if self.options.turns == "last":
            trained = trained[-1:]
        for i in trained:
            if not any(message.role == "user" for message in dialogue.messages[:i]):
                outcome.unreachable_turns += 1
                continue
            context, target = dialogue.turn(i)
            if len(context) + len(target) > self.options.max_tokens:
                shortened = self._shortened(dialogue, i)
                if shortened is None:
                    reason = f"{len(context) + len(target)} tokens, more than data.max_tokens={self.options.max_tokens}"
                    outcome.dropped.append(
                        Dropped(dialogue.source, dialogue.row_index(i), reason, len(context) + len(target))
                    )
                    continue
                context, target = shortened
            self._add_turn(dialogue, i, context, target, outcome)
        if trained:
            outcome.rendering_tokens = max(outcome.rendering_tokens, dialogue.longest_rendering)

    def _add_turn(self, dialogue: _Dialogue, i: int, context: list[int], target: list[int], outcome: Outcome) -> None:
        weight = dialogue.messages[i].weight
        turn = dialogue.row_index(i)
        last = outcome.examples[-1] if outcome.examples else None
        if last is not None and context[: len(last.input_ids)] == last.input_ids:
            gap = len(context) - len(last.input_ids)
            outcome.examples[-1] = Rendered(
                dialogue.source,
                (*last.turns, turn),
                context + target,
                last.weights + [0.0] * gap + [weight] * len(target),
            )
        else:
            weights = [0.0] * len(context) + [weight] * len(target)
            outcome.examples.append(Rendered(dialogue.source, (turn,), context + target, weights))
        outcome.modes.append(dialogue.mode(i))
        outcome.turns_with_reasoning += dialogue.reasons(i)

    def _shortened(self, dialogue: _Dialogue, i: int) -> tuple[list[int], list[int]] | None:
        # `drop_old_turns` takes whole exchanges from the front and renders anew, so that what is left is a dialogue
        # that a server could have seen; the system text stays.
        if self.options.too_long == "error":
            what = f"messages[{dialogue.row_index(i)}] needs more than data.max_tokens={self.options.max_tokens} tokens"
            raise RowError(what, "Raise data.max_tokens, or set data.too_long to drop or drop_old_turns.")
        if self.options.too_long == "drop_old_turns":
            starts = [k for k in range(1, i) if dialogue.messages[k].role == "user"]
            for start in starts:
                context, target = dialogue.turn(i, first=start)
                if len(context) + len(target) <= self.options.max_tokens:
                    return context, target
        return None


@dataclass(slots=True)
class _Dialogue:
    """One conversation on its way through the template; texts are guarded, pieces of text encoded once."""

    source: Source
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Json], ...]
    num_inserted: int  # messages that the row does not have: the default system text
    guard: str  # stands for "|" in every text of the row; "|" itself where no text holds one
    tokenizer: Tokenizer
    template: ChatTemplate
    options: RenderOptions
    encoded: dict[str, list[int]]
    longest_rendering: int = 0

    @classmethod
    def of(
        cls,
        conversation: Conversation,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        options: RenderOptions,
        outcome: Outcome,
    ) -> _Dialogue:
        messages = [with_reasoning_apart(m) if template.reasoning_form else m for m in conversation.messages]
        if template.reasoning_form is None:
            outcome.unstructured_reasoning = sum(
                m.role == "assistant" and isinstance(m.content, str) and "</think>" in m.content for m in messages
            )
        num_inserted = 0
        if options.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", options.system))
            num_inserted = 1
        if template.reasoning_form is None or template.mode_of(options.thinking, True) == "non_thinking":
            cause = "data.thinking is off" if template.reasoning_form else "the chat template has no place for it"
            messages = [
                with_uncarried_reasoning(message, options.unsupported_reasoning, f"messages[{i - num_inserted}]", cause)
                for i, message in enumerate(messages)
            ]
        texts = [text for message in messages for text in message_texts(message)]
        guard = choose_guard([*texts, *texts_of(list(conversation.tools))])
        dialogue = cls(
            source=conversation.source,
            messages=tuple(guarded_message(message, guard) for message in messages),
            tools=tuple(guarded_object(tool, guard) for tool in conversation.tools),
            num_inserted=num_inserted,
            guard=guard,
            tokenizer=tokenizer,
            template=template,
            options=options,
            encoded={},
        )
        if guard != "|":
            outcome.forged_control_tokens = dialogue.count_forged(messages, conversation.tools)
        return dialogue

    def row_index(self, i: int) -> int:
        """The index of message `i` in the row as the user wrote it."""
        return i - self.num_inserted

    def reasons(self, i: int) -> bool:
        """Whether turn `i` brings reasoning of its own."""
        return bool((self.messages[i].reasoning or "").strip())

    def mode(self, i: int) -> Mode:
        """The prompt under which turn `i` is trained."""
        return self.template.mode_of(self.options.thinking, self.reasons(i))

    def turn(self, i: int, first: int = 0) -> tuple[list[int], list[int]]:
        """The ids of turn `i`'s context and target; messages before `first` are left out, but a system text stays."""
        kept = [m for k, m in enumerate(self.messages[: i + 1]) if k >= first or (k == 0 and m.role == "system")]
        context, rendering = self._render_both(kept, self.mode(i), i)
        if not rendering.startswith(context):
            raise RowError(
                f"messages[{self.row_index(i)}] cannot be trained: its rendering does not continue the prompt that a "
                f"server would build ({_difference(context, rendering, self.guard)})",
                'Leave the turn out with "train": false, or choose another data.thinking.',
            )
        form = self.template.reasoning_form
        lost = first_lost(kept, self.tools, rendering, len(context), has_reasoning=form is not None)
        if lost is not None:
            lost = lost.replace(self.guard, "|")
            raise RowError(
                f"the chat template leaves out {lost} of the messages before and with messages[{self.row_index(i)}]",
                "Change the row, or give a template that carries it with data.chat_template.",
            )
        target = _through_last_control_token(rendering[len(context) :], self.tokenizer)
        if target is None:
            raise RowError(
                f"messages[{self.row_index(i)}] does not end with a control token in the chat template's rendering, so "
                "the model would never learn to stop",
                "Give a template that closes every turn with data.chat_template.",
            )
        context_ids, target_ids = self._encode(context), self._encode(target)
        self.longest_rendering = max(self.longest_rendering, len(context_ids) + len(target_ids))
        return context_ids, target_ids

    def prompt(self, mode: Mode) -> list[int]:
        """The ids of all messages and the generation prompt."""
        rows = [template_message(message, self.template.reasoning_form) for message in self.messages]
        try:
            return self._encode(self.template.render([rows], self.tools, mode=mode, generation_prompt=True)[0])
        except TemplateRefusalError as error:
            raise RowError(f"the chat template refuses the messages: {error}", _REFUSED) from None

    def count_forged(self, messages: Sequence[Message], tools: Sequence[dict[str, Json]]) -> int:
        """How many control tokens the row's texts spell; proves that the guard changes nothing else."""
        form = self.template.reasoning_form
        plain, guarded = (
            self._rendered([template_message(m, form) for m in some], some_tools)
            for some, some_tools in ((messages, tools), (self.messages, self.tools))
        )
        if guarded.replace(self.guard, "|") != plain:
            raise RowError(
                "the chat template treats '|' in a text specially, so that its texts and its control tokens cannot be "
                "told apart",
                "Remove the '|' from the texts of this row.",
            )
        pattern = self.tokenizer.control_pattern
        return len(pattern.findall(plain)) - len(pattern.findall(guarded))

    def _rendered(self, messages: list[dict[str, Json]], tools: Sequence[dict[str, Json]]) -> str:
        try:
            return self.template.render([messages], tools)[0]
        except TemplateRefusalError as error:
            raise RowError(f"the chat template refuses the messages: {error}", _REFUSED) from None

    def _render_both(self, messages: Sequence[Message], mode: Mode, i: int) -> tuple[str, str]:
        rows = [template_message(message, self.template.reasoning_form) for message in messages]
        try:
            context = self.template.render([rows[:-1]], self.tools, mode=mode, generation_prompt=True)[0]
            rendering = self.template.render([rows], self.tools, mode=mode)[0]
        except TemplateRefusalError as error:
            what = f"the chat template refuses the messages up to messages[{self.row_index(i)}]: {error}"
            raise RowError(what.replace(self.guard, "|"), _REFUSED) from None
        return context, rendering

    def _encode(self, rendering: str) -> list[int]:
        control_ids = self.tokenizer.control_ids
        pieces = self.tokenizer.control_pattern.split(rendering)
        texts = {piece for piece in pieces if piece and piece not in control_ids and piece not in self.encoded}
        unknown = list(texts)
        if unknown:
            ids = self.tokenizer.encode([text.replace(self.guard, "|") for text in unknown])
            self.encoded.update(zip(unknown, ids, strict=True))
        result: list[int] = []
        for piece in pieces:
            if piece in control_ids:
                result.append(control_ids[piece])
            elif piece:
                result.extend(self.encoded[piece])
        return result


_REFUSED = "Change the row to what this template takes, or give another one with data.chat_template."


def _through_last_control_token(text: str, tokenizer: Tokenizer) -> str | None:
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
