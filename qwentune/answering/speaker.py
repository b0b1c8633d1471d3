"""Prompts in, answers out: the likeliest token each time, many prompts at once; or one, told while it is made."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwentune.answering.answer import MOST_AT_ONCE, OPENING, Answer
from qwentune.answering.spoken import Spoken
from qwentune.data.layout.media_batch import as_prompt
from qwentune.data.layout.media_table import RunMedia
from qwentune.data.tokenizing.tokenizer import Tokenizer
from qwentune.facts.generation_config import end_token_ids

NUM_LAST = 8  # tokens of a prompt that show whether it opens a block of reasoning
# A checkpoint's sampling is left aside, and its penalty on repetition too: it would count the padding.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Prompt:
    """What an answer goes on from, and how many tokens it may have.

    Negative ids are pads of `media`; None: it shows none.
    """

    ids: Sequence[int]
    most_tokens: int
    media: RunMedia | None = None


@dataclass(frozen=True)
class Speaker:
    """A network that answers, as its `generation_config.json` says where answers end.

    Several prompts and their answers have `most_together` tokens, if that is given. `in_step` with the same prompts on
    ranks that share the network's weights, each of which takes part in every token.
    """

    network: Any
    tokenizer: Tokenizer
    generation: Mapping[str, Any]
    most_together: int | None = None
    in_step: bool = False

    def answer(self, prompt: Prompt) -> Answer:
        """The answer to one prompt."""
        ((_, answer),) = self.answers([prompt])
        return answer

    def tell(
        self, prompt: Prompt, tell: Callable[[str], object], choice: Mapping[str, Any] = GREEDY
    ) -> tuple[Answer, bool]:
        """The answer to one prompt, whose text is told as it is made, and whether Ctrl-C has ended it.

        `choice` are the options of transformers' `generate` by which tokens are chosen.
        """
        spoken = Spoken(self.tokenizer, end_token_ids(dict(self.generation)), tell)
        interrupted = False
        try:
            self._generate([prompt], choice, spoken)
        except KeyboardInterrupt:
            interrupted = True
        spoken.end()
        return self._answer(prompt, spoken.ids), interrupted

    def answers(self, prompts: Sequence[Prompt]) -> Generator[tuple[int, Answer]]:
        """The place of each prompt and its answer, the longest prompt first: what memory does not hold shows at once.

        In fp32 each is what it would be alone.
        """
        waiting = sorted(range(len(prompts)), key=lambda k: len(prompts[k].ids), reverse=True)
        size = MOST_AT_ONCE
        while waiting:
            batch = waiting[: self._num_together([prompts[k] for k in waiting[:size]])]
            try:
                found = self._generated([prompts[k] for k in batch])
            except torch.OutOfMemoryError:
                if len(batch) == 1 or self.in_step:  # where other ranks wait for this one
                    raise
                size = len(batch) // 2
                torch.cuda.empty_cache()
                continue
            yield from zip(batch, found, strict=True)
            waiting = waiting[len(batch) :]

    def _num_together(self, prompts: Sequence[Prompt]) -> int:
        """How many of the first prompts, of which none is longer than the one before it, are answered at once."""
        most = 0
        for count, prompt in enumerate(prompts):
            most = max(most, len(prompts[0].ids) + prompt.most_tokens)
            is_too_much = self.most_together is not None and (count + 1) * most > self.most_together
            # A prompt with media is answered alone: only then pads and patches need no second count.
            if prompt.media is not None or is_too_much:
                return max(1, count)
        return len(prompts)

    def _generated(self, prompts: Sequence[Prompt]) -> list[Answer]:
        rows: list[list[int]] = self._generate(prompts, GREEDY).tolist()
        return [self._answer(prompt, row[: prompt.most_tokens]) for prompt, row in zip(prompts, rows, strict=True)]

    def _generate(self, prompts: Sequence[Prompt], choice: Mapping[str, Any], streamer: Spoken | None = None) -> Tensor:
        """The ids that follow each prompt."""
        given = self._given(prompts)
        with torch.no_grad():
            return self.network.generate(
                **given,
                **choice,
                max_new_tokens=max(prompt.most_tokens for prompt in prompts),
                use_cache=True,
                eos_token_id=end_token_ids(dict(self.generation)) or None,
                pad_token_id=self._pad,
                synced_gpus=self.in_step,
                streamer=streamer,
            )[:, given["input_ids"].shape[1] :]

    def _answer(self, prompt: Prompt, generated: list[int]) -> Answer:
        stops = end_token_ids(dict(self.generation))
        end = next((place for place, token in enumerate(generated) if token in stops), None)
        stopped, said = end is not None, generated[:end]
        return Answer(self.tokenizer.decode(said), stopped, len(said) + stopped, opens(prompt.ids, self.tokenizer))

    @property
    def _pad(self) -> int:
        return self.generation.get("pad_token_id", self.tokenizer.end_of_text_id)

    def _given(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The prompts on the network's device, padded on the left."""
        device, dtype = self.network.device, self.network.dtype
        (first, *others) = prompts
        if not others and first.media is not None:
            shown = as_prompt(first.ids, first.media)
            return {
                name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
                for name, tensor in shown.items()
            }
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, longest - len(prompt.ids) :] = 1
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def opens(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends inside a block of reasoning."""
    return ending(prompt, tokenizer).endswith(f"{OPENING}\n")


def ending(prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """The last words of a prompt."""
    return tokenizer.decode([token for token in prompt[-NUM_LAST:] if token >= 0])
