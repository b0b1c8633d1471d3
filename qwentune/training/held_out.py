"""The held-out prompts that evaluations answer: some to be read, some to be scored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from qwentune.answering.answer import Answer, most_answered_in_training
from qwentune.answering.speaker import Prompt, Speaker
from qwentune.data.dataset import Dataset
from qwentune.data.tokenizing.tokenizer import Tokenizer
from qwentune.errors import DataError, Problem, counted
from qwentune.evaluating.questions import Question, questions
from qwentune.recipe import LIKELIHOODS, OutputOptions
from qwentune.scores import SCORES
from qwentune.scores.case import Case, Score

MOST_SCORED = 64  # answers of each source
MOST_SAMPLED_TOKENS = 512  # of an answer that is only read
MOST_SHOWN = 4000  # characters of a prompt that are kept with its answer: its end


@dataclass(frozen=True)
class HeldOut:
    """What evaluations ask: `sampled` is kept to be read, of `scored` the scores are told.

    `generation` says how answers end.
    """

    dataset: Dataset
    tokenizer: Tokenizer
    generation: Mapping[str, Any]
    sampled: tuple[Question, ...]
    scored: tuple[Question, ...]

    @classmethod
    def of(
        cls, dataset: Dataset, tokenizer: Tokenizer, generation: Mapping[str, Any], output: OutputOptions
    ) -> HeldOut | None:
        """What is asked for the samples and the score that the recipe wants; None where it wants none.

        DataError where no held-out row can have the score.
        """
        if not output.answers:
            return None
        sampled = tuple(_sampled(dataset, tokenizer, output.samples))
        scored = ()
        if output.followed not in LIKELIHOODS:
            (score,) = (score for score in SCORES if score.name == output.followed)
            scored = tuple(_scored(dataset, tokenizer, score))
            if not scored:
                held = counted(len(dataset.examples.evaluation), "held-out example{|s}")
                what = f"{score.name}, which no answer to one of the {held} can have"
                fix = "Hold out rows that can with data.eval, raise data.eval_fraction, or follow another score."
                raise DataError(Problem("output.best", what, fix), "No step was taken.")
        return cls(dataset, tokenizer, generation, sampled, scored)

    @property
    def asked(self) -> list[Question]:
        """All questions, each once."""
        return list(dict.fromkeys([*self.scored, *self.sampled]))

    def prompts(self) -> list[Prompt]:
        """The prompts of all questions; an answer that is only read is cut earlier."""
        scored = {*self.scored}
        limits = ((asked, most_answered_in_training(asked.taught.tokens)) for asked in self.asked)
        return [
            asked.prompt(self.dataset, most if asked in scored else min(most, MOST_SAMPLED_TOKENS))
            for asked, most in limits
        ]

    def speaker(self, network: Any, **options: Any) -> Speaker:
        """What answers with a network."""
        return Speaker(network, self.tokenizer, self.generation, **options)

    def samples(self, step: int, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """A row for each prompt that is read, of the answers to all questions."""
        found = dict(zip(self.asked, answers, strict=True))
        return [self._sample(step, index, asked, found[asked]) for index, asked in enumerate(self.sampled)]

    def _sample(self, step: int, index: int, asked: Question, answer: Answer) -> dict[str, Any]:
        ids = [token for token in asked.prompt(self.dataset, None).ids if token >= 0]
        prompt = self.tokenizer.decode(ids)
        return {
            "step": step,
            "index": index,
            "source": {"file": asked.source.file, "line": asked.source.line},
            "prompt": prompt if len(prompt) <= MOST_SHOWN else f"…{prompt[-MOST_SHOWN:]}",
            "target": asked.taught.answer,
            "answer": answer.answer,
            **({"reasoning": answer.reasoning} if answer.reasoning else {}),
            "stopped": answer.stopped,
        }

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Every score that the scored answers have, of the answers to all questions."""
        found = dict(zip(self.asked, answers, strict=True))
        cases = [_case(question, found[question]) for question in self.scored]
        means = {score.name: score.mean(cases) for score in SCORES if score.name not in LIKELIHOODS}
        return {name: mean for name, mean in means.items() if mean is not None}


def _case(question: Question, answer: Answer) -> Case:
    """A question with an answer, whose loss nobody asks for."""
    return Case(question.kind, question.taught, math.nan, 0.0, answer, question.asked_to_reason)


def _sampled(dataset: Dataset, tokenizer: Tokenizer, count: int) -> Iterator[Question]:
    """The first question of so many held-out rows, of each source in turn."""
    rows: dict[str, dict[int, int]] = {}
    for i in dataset.examples.evaluation.tolist() if count else ():
        source = dataset.examples.source(i)
        rows.setdefault(source.file, {}).setdefault(source.line, i)
    for i in chain.from_iterable(zip_longest(*(of.values() for of in rows.values()))):
        if i is not None and count:
            for question in _asked(dataset, tokenizer, i)[:1]:
                count -= 1
                yield question


def _scored(dataset: Dataset, tokenizer: Tokenizer, score: Score) -> Iterator[Question]:
    """The first questions of each source whose answers can have the score."""
    counts: Counter[str] = Counter()
    for i in dataset.examples.evaluation.tolist():
        file = dataset.examples.source(i).file
        if counts[file] == MOST_SCORED:
            continue
        for question in _asked(dataset, tokenizer, i):
            if counts[file] < MOST_SCORED and score.of(_case(question, question.taught)) is not None:
                counts[file] += 1
                yield question


def _asked(dataset: Dataset, tokenizer: Tokenizer, example: int) -> list[Question]:
    """What an example asks; a text asks nothing."""
    template = dataset.report["template"] or {}
    has_reasoning = template.get("reasoning_form") is not None
    asked = questions(dataset, [example], tokenizer, has_reasoning=has_reasoning)
    return [question for question in asked if question.kind != "text"]
