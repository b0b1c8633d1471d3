"""Which of the rendered samples are trained, how often, and which are held out for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwentune.errors import DataError, Problem
from qwentune.recipe import DataOptions

MOST_REPEATED = 10**8  # rows of a source in an epoch

# `groups` has for each source where the examples of its samples begin, and where those of the last end.


def split(
    data: DataOptions,
    groups: Sequence[NDArray[np.int64]],
    dialogues: NDArray[np.int64],
    again: NDArray[np.bool_],
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of training and evaluation examples; whole dialogues go to one side, before anything is repeated.

    `dialogues` has for each sample the first one of its dialogue, `again` whether it is a call that was logged before:
    of `data.train` those are left out.
    """
    sizes = [len(begins) - 1 for begins in groups[: len(data.train)]]
    held_out = np.zeros(sum(sizes), dtype=bool)
    held_out[_choice(dialogues[: sum(sizes)], data.eval_fraction, seed)] = True
    train: list[NDArray[np.int64]] = []
    evaluation = [np.arange(begins[0], begins[-1], dtype=np.int64) for begins in groups[len(data.train) :]]
    places = np.cumsum([0, *sizes])
    for number, (source, begins) in enumerate(zip(data.train, groups, strict=False)):
        out, new = (mask[places[number] : places[number + 1]] for mask in (held_out, ~again))
        if source.repeat > 1 and source.repeat * len(begins) > MOST_REPEATED:
            what = f"repeat {source.repeat:g} of {len(begins) - 1:,} rows makes more than {MOST_REPEATED:,}"
            raise DataError(Problem(source.path, what, "Lower its repeat, or take more optimizer.epochs."))
        evaluation.append(_examples_of(begins, np.flatnonzero(out & new)))
        train.append(_examples_of(begins, _repeated(np.flatnonzero(~out & new), source.repeat, seed + number)))
    return np.concatenate(train), np.concatenate(evaluation)


def untrained_sources(
    data: DataOptions,
    groups: Sequence[NDArray[np.int64]],
    train: NDArray[np.int64],
    evaluation: NDArray[np.int64],
    again: NDArray[np.bool_],
) -> list[str]:
    """A warning for each source that has rows to train and none of them is."""
    warnings: list[str] = []
    repeats = np.split(again, np.cumsum([len(begins) - 1 for begins in groups]))
    for source, begins, seen in zip(data.train, groups, repeats, strict=False):
        num_left = len(begins) - 1 - int((np.isin(begins[:-1], evaluation) | seen).sum())
        if len(begins) == 1 or np.isin(begins[:-1], train).any():
            continue
        if num_left:
            cause = f"repeat {source.repeat:g} of {num_left} rounds to none. Raise its repeat, or leave it out"
        elif seen.all():
            cause = "all its calls were logged in rows before. Leave it out"
        else:
            cause = f"data.eval_fraction={data.eval_fraction:g} holds out all. Add rows, or name data.eval"
        warnings.append(f"no row of {source.path} is trained: {cause}")
    return warnings


def dialogues(answers: NDArray[np.uint64], before: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each sample the first of its dialogue: itself, unless it is a logged call that has or goes on with another's
    answer.

    `answers` are fingerprints of the dialogues with the answers trained, `before` of those with the answers before
    them; 0 where there is none.
    """
    order, first = np.argsort(answers, kind="stable"), np.arange(len(answers))
    for wanted in (answers, before) if len(order) else ():
        found = order[np.minimum(np.searchsorted(answers[order], wanted), len(order) - 1)]
        first = np.where((wanted != 0) & (answers[found] == wanted), found, first)
    for _ in range(len(first).bit_length()):  # each doubles the way back
        first = first[first]
    return first


def logged_again(identities: NDArray[np.int64], answers: NDArray[np.uint64], num_trained: int) -> NDArray[np.bool_]:
    """For each sample whether it is a logged call that trains exactly what an earlier call trains.

    `answers` are as of `dialogues`; of the samples the first `num_trained` are those of `data.train`, the others are
    never said to be logged again.
    """
    again = np.zeros(len(answers), dtype=np.bool_)
    calls = np.flatnonzero(answers[:num_trained])
    _, firsts = np.unique(identities[calls], return_index=True)
    again[np.delete(calls, firsts)] = True
    return again


def copies(
    identities: NDArray[np.int64],
    groups: Sequence[NDArray[np.int64]],
    evaluation: NDArray[np.int64],
    again: NDArray[np.bool_],
) -> dict[str, NDArray[np.int64]]:
    """Which samples, counted over all sources, train what an earlier one trains or are evaluated though trained too."""
    is_evaluated = np.isin(np.concatenate([begins[:-1] for begins in groups]), evaluation)
    trained, evaluated = np.flatnonzero(~is_evaluated & ~again), np.flatnonzero(is_evaluated)
    _, firsts = np.unique(identities[trained], return_index=True)
    overlap = np.isin(identities[evaluated], identities[trained])
    return {"duplicates": np.delete(trained, firsts), "eval_overlap": evaluated[overlap]}


def fates(
    groups: Sequence[NDArray[np.int64]],
    train: NDArray[np.int64],
    evaluation: NDArray[np.int64],
    again: NDArray[np.bool_],
) -> dict[str, int]:
    """How many samples are trained, evaluated, left out as logged before, and left out by a `repeat` below one."""
    begins = np.concatenate([group[:-1] for group in groups])
    chosen = np.zeros((2, int(groups[-1][-1])), dtype=bool)
    chosen[0, train] = chosen[1, evaluation] = True
    trained, evaluated = np.logical_or.reduceat(chosen, begins, axis=1) if len(begins) else chosen[:, :0]
    return {
        "trained": int(trained.sum()),
        "evaluated": int(evaluated.sum()),
        "logged_again": int(again.sum()),
        "left_out_by_repeat": int((~trained & ~evaluated & ~again).sum()),
    }


def _examples_of(begins: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices of the examples of the given samples, in their order."""
    counts = begins[samples + 1] - begins[samples]
    ends = np.cumsum(counts)
    return np.repeat(begins[samples] - (ends - counts), counts) + np.arange(counts.sum(), dtype=np.int64)


def _choice(dialogues: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """The samples of drawn dialogues, nearly so large a share of all, at least one dialogue and never all."""
    first, members, sizes = np.unique(dialogues, return_inverse=True, return_counts=True)
    count = len(dialogues)
    if fraction == 0 or len(first) < 2:
        return np.zeros(0, dtype=np.int64)
    order = np.random.default_rng([seed, 0xE7A1]).permutation(len(first))
    size = min(count - 1, max(1, round(fraction * count)))
    num_drawn = max(1, int(np.searchsorted(np.cumsum(sizes[order]), size, side="right")))
    return np.flatnonzero(np.isin(members, order[:num_drawn]))


def _repeated(samples: NDArray[np.int64], repeat: float, seed: int) -> NDArray[np.int64]:
    whole = int(repeat)
    size = round((repeat - whole) * len(samples))
    some = np.sort(np.random.default_rng([seed, 0x5EED]).permutation(len(samples))[:size])
    return np.concatenate([*[samples] * whole, samples[some]])
