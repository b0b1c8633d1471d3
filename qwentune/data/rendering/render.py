"""From samples to token ids with loss weights: the turns of dialogues by the checkpoint's template, documents as text.

Context and target of a turn are encoded separately, as a server does. Loss is on the target and nowhere else. Turns
whose context begins with all that came before share an example.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from qwentune.data.media.limits import MediaLimits
from qwentune.data.media.seen import Seen
from qwentune.data.reading.faults import problem_of
from qwentune.data.rendering.credentials import credentials
from qwentune.data.rendering.dialogue import Dialogue, RenderOptions
from qwentune.data.rendering.example import DialogueExamples, Example, Part, Span, TurnIds
from qwentune.data.rendering.fill_in_the_middle import FillInTheMiddle, Form
from qwentune.data.rendering.grammar import Grammar, prove
from qwentune.data.rendering.outcome import Dropped, Outcome
from qwentune.data.rendering.pieces import Encoder, Piece, ids_of
from qwentune.data.rendering.probes import learn
from qwentune.data.rendering.remarks import (
    ALWAYS_THINKS,
    CHANGED_BY_NFC,
    FILE_LEFT_OUT,
    NEVER_THINKS,
    NOT_THINKING,
    UNREACHABLE,
    WITHOUT_TEMPLATE,
    remarks,
    tags_as_text,
)
from qwentune.data.rendering.shorten import Shortening
from qwentune.data.rendering.turn import Turn, renderings
from qwentune.data.sample import (
    Code,
    Completion,
    Conversation,
    Json,
    Message,
    Pair,
    Retrieval,
    RowError,
    Sample,
    Source,
    Text,
)
from qwentune.data.templates.chat_template import ChatTemplate, Mode
from qwentune.data.templates.guard import message_texts
from qwentune.data.tokenizing.tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["RenderOptions", "Renderer"]

CHUNK_SAMPLES = 256  # encoded together
CHUNK_CHARACTERS = 2**22
MOST_RENDERERS = 16  # by the arguments that rows give to the template: each learns what it writes
CHECKED_SHARE = 256  # one dialogue of so many is rendered by the rule as well
NUM_CHECKED_FIRST = 8  # and those of so many lines at the beginning of each file
NUM_CHECKED_TURNS = (
    16  # of a longer dialogue so many, evenly spaced, for by the rule each is rendered from the beginning
)


@dataclass(slots=True)
class _Planned:
    """A sample between the template and the tokenizer."""

    sample: Sample
    outcome: Outcome
    dialogue: Dialogue | None = None
    is_checked: bool = False  # by the rule
    turns: list[Turn] = field(default_factory=list[Turn])
    forms: list[Form] = field(default_factory=list[Form])

    def pieces(self) -> Iterator[Sequence[Piece]]:
        """All pieces whose ids are needed."""
        if isinstance(self.sample, Text):
            yield (self.sample.text,)
        if isinstance(self.sample, Completion):
            yield (self.sample.prompt, self.sample.completion)
        yield from renderings(self.turns).values()
        for turn in self.turns:
            yield turn.context
            yield turn.target
        for form in self.forms:
            yield form.context
            yield form.target


@dataclass(frozen=True)
class Renderer:
    """Renders samples of one run: one tokenizer, one template, one set of options.

    `by_rule`: each turn on its own, which takes longer and leaves nothing to be checked. `limits` are what the model
    takes of media, None where it takes text alone.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    options: RenderOptions
    by_rule: bool = False
    limits: MediaLimits | None = None

    @cached_property
    def encoder(self) -> Encoder:
        """Encodes the pieces of renderings."""
        return Encoder(self.tokenizer)

    @cached_property
    def grammar(self) -> Grammar | None:
        """What lets a dialogue's turns be read off one rendering; None: each is rendered on its own."""
        return None if self.template is None or self.by_rule else learn(self.template, self.options, self.encoder)

    @cached_property
    def fill_in_the_middle(self) -> FillInTheMiddle:
        """Cuts code."""
        return FillInTheMiddle(self.tokenizer, self.options.fim, self.options.max_tokens, self.options.seed)

    def render(self, sample: Sample) -> Outcome:
        """The examples of a sample and what is to be reported of it; never raises for a fault of the row.

        Raises ReadOtherwiseError where the sample is checked and is not read off as the rule has it.
        """
        (outcome,) = self.render_all([sample])
        return outcome

    def render_all(self, samples: Iterable[Sample], source_number: int = 0) -> Iterator[Outcome]:
        """The outcome of each sample of a source in its order; texts are encoded many at a time."""
        planned: list[_Planned] = []
        size = 0
        for sample in samples:
            planned.append(self._plan(sample, source_number))
            size += sum(len(piece) for some in planned[-1].pieces() for piece in some if isinstance(piece, str))
            if len(planned) == CHUNK_SAMPLES or size > CHUNK_CHARACTERS:
                yield from self._finished(planned)
                planned, size = [], 0
        yield from self._finished(planned)

    def prompt(
        self, messages: Sequence[Message], mode: Mode, tools: Sequence[dict[str, Json]] = ()
    ) -> tuple[list[int], tuple[Seen, ...]]:
        """The ids after which the model answers `messages` in `mode`, and the media that they name.

        Raises RowError where the template refuses, or a medium cannot be shown.
        """
        assert self.template is not None
        conversation = Conversation(Source("chat", 1), tuple(messages), tuple(tools))
        dialogue = Dialogue.of(conversation, self.template, self.options, self.encoder, self.limits)
        pieces = dialogue.prompt(mode)
        return ids_of(pieces, self.encoder.encode([pieces])), dialogue.media.table if dialogue.media else ()

    def _plan(self, sample: Sample, source_number: int) -> _Planned:
        planned = _Planned(sample, Outcome(sample.source), is_checked=_is_checked(sample.source))
        if isinstance(sample, Pair):
            return planned
        planned.outcome.unread = sample.unread
        if isinstance(sample, Text | Completion | Retrieval):
            return planned
        try:
            if isinstance(sample, Code):
                planned.forms = list(self.fill_in_the_middle.forms(sample, source_number))
                return planned
            if self.template is None:
                fix = "Give one with data.chat_template, or train on rows of the format text."
                raise RowError("the checkpoint has no chat template to render messages with", fix)
            voice = self._with(sample.template_args)
            assert voice.template is not None
            offered = (one.path for one in sample.offered if not self.template.reads(one))
            planned.outcome.unread = (*sample.unread, *offered)
            asked = sample.template_args.get("enable_thinking", self.template.thinks_by_default)
            if not self.template.has_thinking_switch and asked != self.template.thinks_by_default:
                planned.outcome.remarks.append(NEVER_THINKS if asked else ALWAYS_THINKS)
            dialogue = Dialogue.of(sample, voice.template, voice.options, self.encoder, self.limits)
            dialogue.prove_guard(by_rendering=planned.is_checked)
            planned.outcome.forged_control_tokens = dialogue.count_forged()
            planned.outcome.unreachable_turns = len(dialogue.candidates) - len(dialogue.trained)
            unreachable = [UNREACHABLE] * planned.outcome.unreachable_turns
            planned.outcome.remarks += [*remarks(sample), *dialogue.remarks, *unreachable]
            if self.limits is not None:
                planned.outcome.remarks += tags_as_text(sample, self.limits.family.pads)
            planned.dialogue = dialogue
            planned.outcome.media = () if dialogue.media is None else dialogue.media.shown
            planned.outcome.answers = sample.answers
            planned.turns = voice._turns(dialogue, planned)
        except RowError as error:
            planned.outcome.problems.append(problem_of(error, str(sample.source)))
        return planned

    def _with(self, args: Mapping[str, Json]) -> Renderer:
        """The renderer of rows that give the template arguments of their own, which outweigh those of the recipe."""
        if not args or self.template is None:
            return self
        key = json.dumps(args, sort_keys=True)
        if key not in self._renderers:
            if len(self._renderers) >= MOST_RENDERERS:
                self._renderers.clear()
            template = replace(self.template, args={**self.template.args, **args})
            modes: dict[Json, Literal["on", "off"]] = {True: "on", False: "off"}
            thinking = modes[args["enable_thinking"]] if "enable_thinking" in args else self.options.thinking
            self._renderers[key] = replace(self, template=template, options=replace(self.options, thinking=thinking))
        return self._renderers[key]

    @cached_property
    def _renderers(self) -> dict[str, Renderer]:
        return {}

    def _turns(self, dialogue: Dialogue, planned: _Planned) -> list[Turn]:
        read = self.grammar.turns(dialogue) if self.grammar and dialogue.trained else None
        planned.is_checked &= read is not None
        if read is None:
            return dialogue.literal_turns()
        if planned.is_checked:
            checked = _evenly(read, NUM_CHECKED_TURNS)
            prove(dialogue, [dialogue.literal_turn(turn.index) for turn in checked], checked)
            planned.outcome.checked_turns = len(checked)
        return read

    def _finished(self, planned: Sequence[_Planned]) -> Iterator[Outcome]:
        encoded = self.encoder.encode(pieces for one in planned for pieces in one.pieces())
        for one in planned:
            if one.is_checked:
                for text in {piece for some in one.pieces() for piece in some if isinstance(piece, str)}:
                    self.tokenizer.prove(text, encoded[text], str(one.sample.source))
            try:
                self._note_credentials(one)
                if isinstance(one.sample, Text):
                    ids = [*encoded[one.sample.text], self.tokenizer.end_of_text_id]
                    self._add_text(one.sample.source, ids, one.outcome)
                elif isinstance(one.sample, Completion):
                    self._add_completion(one.sample, encoded, one.outcome)
                elif isinstance(one.sample, Code):
                    self._add_code(one.sample, one.forms, encoded, one.outcome)
                elif isinstance(one.sample, Pair):
                    self._add_pair(one.sample, one.outcome)
                elif isinstance(one.sample, Retrieval):
                    self._add_retrieval(one.sample, one.outcome, one.is_checked)
                elif one.dialogue is not None:
                    self._add_turns(one, one.dialogue, encoded)
            except RowError as error:
                one.outcome.examples.clear()
                one.outcome.problems.append(problem_of(error, str(one.sample.source)))
            if not (one.outcome.examples or one.outcome.problems or one.outcome.dropped):
                one.outcome.dropped.append(_untrained(one))
            if any(map(self.tokenizer.changes, _texts(one))):
                one.outcome.remarks.append(CHANGED_BY_NFC)
            one.outcome.identity = _identity(one.sample, one.outcome.examples)
            yield one.outcome

    def _note_credentials(self, planned: _Planned) -> None:
        """Notes the secrets in the texts of a sample; RowError where there are any and data.secrets is refuse."""
        found = planned.outcome.credentials = list(credentials("\n".join(_texts(planned))))
        if found and self.options.secrets == "refuse":
            what = ", ".join(dict.fromkeys(f"{one.kind} ({one.masked})" for one in found))
            fix = "Put a placeholder there and revoke it; data.secrets=warn trains the row as it is."
            raise RowError(f"the row holds what looks like a secret: {what}", fix)

    def _add_text(self, source: Source, ids: list[int], outcome: Outcome, version: int = -1) -> None:
        # A document longer than a row continues in the next: nothing is lost but the first token's context.
        outcome.rendering_tokens += len(ids) if version <= 0 else 0
        size = self.options.max_tokens
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            if len(piece) > 1:
                span = Span(1, len(piece), 1.0, -1)
                outcome.examples.append(Example(source, piece, (span,), version=version))

    def _add_completion(self, sample: Completion, encoded: dict[str, list[int]], outcome: Outcome) -> None:
        pattern = self.tokenizer.control_pattern
        outcome.forged_control_tokens = len(pattern.findall(f"{sample.prompt}\n{sample.completion}"))
        if self.template is not None and self.tokenizer.eos_token != END_OF_TEXT:  # it was taught to chat
            outcome.remarks.append(WITHOUT_TEMPLATE)
        context = encoded[sample.prompt]
        ids = [*context, *encoded[sample.completion], self.tokenizer.end_of_text_id]
        outcome.rendering_tokens = len(ids)
        if self._fits(sample.source, len(ids), outcome):
            span = Span(max(1, len(context)), len(ids), 1.0, -1)
            outcome.examples.append(Example(sample.source, ids, (span,)))

    def _fits(self, source: Source, num_tokens: int, outcome: Outcome) -> bool:
        """Whether a text has room as a whole; where not, it is noted as dropped, or RowError."""
        if num_tokens <= self.options.max_tokens:
            return True
        reason = f"{num_tokens} tokens, more than data.max_tokens={self.options.max_tokens}"
        if self.options.too_long == "error":
            raise RowError(f"the row needs {reason}", "Raise data.max_tokens, or set data.too_long to drop.")
        outcome.dropped.append(Dropped(source, None, reason, num_tokens, "too long"))
        return False

    def _add_code(self, sample: Code, forms: list[Form], encoded: dict[str, list[int]], outcome: Outcome) -> None:
        forged = self.tokenizer.control_pattern
        for form in forms:
            context, target = ids_of(form.context, encoded), ids_of(form.target, encoded)
            num_tokens = len(context) + len(target)
            if form.version <= 0:
                outcome.orders.append(form.order)
                outcome.remarks += [FILE_LEFT_OUT] * form.left_out
                texts = (piece for piece in (*form.context, *form.target) if isinstance(piece, str))
                outcome.forged_control_tokens += sum(len(forged.findall(text)) for text in texts)
            if form.order == "plain":
                self._add_text(sample.source, target, outcome, form.version)
            elif self._fits(sample.source, num_tokens, outcome):
                outcome.rendering_tokens += num_tokens if form.version <= 0 else 0
                start = len(context) if self.options.fim.loss == "middle" else 1
                span = Span(start, num_tokens, 1.0, -1)
                outcome.examples.append(Example(sample.source, context + target, (span,), version=form.version))

    def _add_pair(self, pair: Pair, outcome: Outcome) -> None:
        ends: tuple[tuple[Part, Conversation], ...] = (("chosen", pair.chosen), ("rejected", pair.rejected))
        for name, conversation in ends:
            end = self.render(conversation)
            outcome.unread = (*outcome.unread, *end.unread)
            outcome.problems += [replace(problem, what=f"{name}: {problem.what}") for problem in end.problems]
            outcome.dropped += end.dropped
            outcome.examples += [replace(example, part=name) for example in end.examples]
            outcome.media = (*outcome.media, *end.media)
            outcome.modes += end.modes
            outcome.turns_with_reasoning += end.turns_with_reasoning
            outcome.forged_control_tokens += end.forged_control_tokens
            outcome.rendering_tokens += end.rendering_tokens
        if outcome.problems or outcome.dropped:  # one end alone says nothing
            outcome.examples.clear()
            outcome.modes.clear()

    def _add_retrieval(self, sample: Retrieval, outcome: Outcome, is_checked: bool) -> None:
        # The layout of Qwen3-Embedding's model card; nothing carries a token loss.
        query = f"Instruct: {sample.instruction}\nQuery:{sample.query}" if sample.instruction else sample.query
        texts = (query, sample.positive, *sample.negatives)
        encoded = self.tokenizer.encode(texts)
        if is_checked:
            for text, ids in zip(texts, encoded, strict=True):
                self.tokenizer.prove(text, ids, str(sample.source))
        for number, ids in enumerate(encoded):
            part: Part = "negative" if number > 1 else "positive" if number else "query"
            tokens = [*ids, self.tokenizer.end_of_text_id][-self.options.max_tokens :]
            outcome.rendering_tokens += len(tokens)
            outcome.examples.append(Example(sample.source, tokens, (), part=part))

    def _add_turns(self, planned: _Planned, dialogue: Dialogue, encoded: dict[str, list[int]]) -> None:
        ids, outcome = TurnIds(planned.turns, self.encoder, encoded), planned.outcome
        examples, shortening = DialogueExamples(dialogue, ids), Shortening(dialogue, ids, planned.is_checked)
        for turn in planned.turns:
            num_tokens = ids.num_tokens(turn)
            outcome.rendering_tokens = max(outcome.rendering_tokens, num_tokens)
            fitting = turn if num_tokens <= self.options.max_tokens else self._shortened(shortening, turn)
            if fitting is None:
                reason = f"{num_tokens} tokens, more than data.max_tokens={self.options.max_tokens}"
                index = dialogue.message_index(turn.index)
                outcome.dropped.append(Dropped(dialogue.conversation.source, index, reason, num_tokens, "too long"))
                continue
            examples.add(fitting)
            outcome.modes.append(dialogue.mode(turn.index))
            outcome.turns_with_reasoning += dialogue.reasons(turn.index)
            outcome.remarks += [NOT_THINKING] * dialogue.teaches_not_to_think(turn.index)
        outcome.examples = examples.finished()

    def _shortened(self, shortening: Shortening, turn: Turn) -> Turn | None:
        if self.options.too_long == "error":
            index = shortening.dialogue.row_index(turn.index)
            what = f"messages[{index}] needs more than data.max_tokens={self.options.max_tokens} tokens"
            raise RowError(what, "Raise data.max_tokens, or set data.too_long to drop or drop_old_turns.")
        return shortening.of(turn) if self.options.too_long == "drop_old_turns" else None


def _is_checked(source: Source) -> bool:
    """Whether the dialogue is among those rendered by the rule as well."""
    return source.line <= NUM_CHECKED_FIRST or zlib.crc32(str(source).encode()) % CHECKED_SHARE == 0


def _untrained(planned: _Planned) -> Dropped:
    """The row of which nothing is trained, and why."""
    source = planned.sample.source
    if planned.outcome.unreachable_turns:
        return Dropped(source, None, "no user turn stands before what the assistant says", kind="nothing to train")
    if planned.dialogue is not None:
        return Dropped(source, None, "no turn is to be trained: train is false", kind="not asked for")
    return Dropped(source, None, "there is no token to predict", kind="nothing to train")


def _texts(planned: _Planned) -> Iterable[str]:
    """The texts of a sample as its row gives them."""
    match planned.sample:
        case Text(text=text):
            return (text,)
        case Completion(prompt=prompt, completion=completion):
            return (prompt, completion)
        case Code(files=files, cut=cut):
            return (*(file.text for file in files), *(cut or ()))
        case Pair(chosen=chosen, rejected=rejected):
            return (text for end in (chosen, rejected) for message in end.messages for text in message_texts(message))
        case Retrieval() as row:
            return (row.instruction, row.query, row.positive, *row.negatives)
        case _:
            return () if planned.dialogue is None else (planned.dialogue.lines,)


def _identity(sample: Sample, examples: Sequence[Example]) -> int:
    if isinstance(sample, Code):  # each row is cut at other places
        return hash((sample.repo, sample.files, sample.cut))
    return hash(
        (*(tuple(one.media) for one in examples if one.media), *((one.shared, one.back, *one.tail) for one in examples))
    )


def _evenly(turns: Sequence[Turn], count: int) -> Sequence[Turn]:
    """So many of the turns, with the first and the last; all where they are fewer."""
    return turns if len(turns) <= count else [turns[k * (len(turns) - 1) // (count - 1)] for k in range(count)]
