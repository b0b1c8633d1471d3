"""What rendered examples ask of a model: each trained piece after the very ids that it is trained after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qwentune.answering.answer import CLOSING, Answer, most_answered
from qwentune.answering.speaker import Prompt, ending, opens
from qwentune.data.dataset import Dataset
from qwentune.data.rendering.example import Example, Span
from qwentune.data.rendering.fill_in_the_middle import MIDDLE
from qwentune.data.sample import Source
from qwentune.data.tokenizing.tokenizer import Tokenizer
from qwentune.scores.case import Kind


@dataclass(frozen=True)
class Question:
    """One trained piece of an example; `start` to `stop` are its tokens, `turn` the message, -1 in a text."""

    source: Source
    turn: int
    kind: Kind
    example: int  # its index in the dataset
    start: int
    stop: int
    taught: Answer
    asked_to_reason: bool | None

    def prompt(self, dataset: Dataset, most_tokens: int | None) -> Prompt:
        """What the answer goes on from; it may have `most_tokens`, or what the taught one suggests."""
        ids = dataset.examples.ids(self.example)[: self.start].tolist()
        shows = any(token < 0 for token in ids)
        most = most_answered(self.taught.tokens) if most_tokens is None else most_tokens
        return Prompt(ids, most, dataset.media if shows else None)


def questions(
    dataset: Dataset, chosen: Iterable[int], tokenizer: Tokenizer, *, has_reasoning: bool
) -> Iterator[Question]:
    """The questions of some examples; `has_reasoning`: whether the template has a notion of it."""
    for i in chosen:
        example = dataset.examples.example(i)
        ids = example.input_ids
        for span in example.spans:
            kind, start = _kind(example, span, ids, tokenizer)
            taught = _taught(ids[start : span.stop], ids[:start], tokenizer)
            asked = None
            if kind == "turn" and has_reasoning:
                asked = not ending(ids[:start], tokenizer).rstrip().endswith(CLOSING)
            yield Question(example.source, span.turn, kind, i, start, span.stop, taught, asked)


def first_rows(chosen: Sequence[int], dataset: Dataset, limit: int) -> list[int]:
    """The examples of the first so many rows of each source."""
    rows: dict[str, set[int]] = {}
    kept: list[int] = []
    for i in chosen:
        source = dataset.examples.source(i)
        lines = rows.setdefault(source.file, set())
        if len(lines) < limit or source.line in lines:
            lines.add(source.line)
            kept.append(i)
    return kept


def _kind(example: Example, span: Span, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[Kind, int]:
    """What a trained piece is, and where what is asked for begins: with all of a cut code trained, behind its cut."""
    if span.turn >= 0:
        return "turn", span.start
    marker = tokenizer.control_ids.get(MIDDLE)
    if marker in ids:  # no text can spell it
        return "middle", ids.index(marker) + 1
    return ("completion", span.start) if span.start > 1 else ("text", span.start)


def _taught(target: list[int], prompt: Sequence[int], tokenizer: Tokenizer) -> Answer:
    stops = bool(target) and target[-1] in tokenizer.control_ids.values()
    text = tokenizer.decode(target[:-1] if stops else target)
    return Answer(text, stops, len(target), opens(prompt, tokenizer))
