"""The middle of a cut code: whether it is the taught one, and how much of it would have to be edited."""

from __future__ import annotations

import numpy as np

from qwentune.scores.case import Case, Score, given


def _fim_exact(case: Case) -> float | None:
    return float(given(case).text == case.taught.text) if case.kind == "middle" else None


def _fim_similarity(case: Case) -> float | None:
    return similarity(given(case).text, case.taught.text) if case.kind == "middle" else None


def similarity(one: str, other: str) -> float:
    """1 less Levenshtein's distance as a share of the longer text's characters."""
    longest = max(len(one), len(other))
    return 1 - distance(one, other) / longest if longest else 1.0


def distance(one: str, other: str) -> int:
    """The fewest characters that are put in, taken out or replaced to make one text the other."""
    characters = np.frombuffer(other.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    places = np.arange(len(characters) + 1)
    row = places  # from the beginning of `one` so far to each beginning of `other`
    for count, character in enumerate(one, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (characters != ord(character)))
        # What is put in follows from the left: a running minimum, each step of which costs one.
        row = np.minimum.accumulate(np.concatenate([[count], best]) - places) + places
    return int(row[-1])


FIM_EXACT = Score("fim_exact", _fim_exact)
FIM_SIMILARITY = Score("fim_similarity", _fim_similarity)
