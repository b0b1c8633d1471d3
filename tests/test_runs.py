"""Sequences that share their beginnings: what is put together of runs, and which earlier one each begins most alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwentune.data.rendering.runs import Beginnings, Run, Tokens

IDS = st.lists(st.integers(0, 2), max_size=12)


@st.composite
def sequences(draw: st.DrawFn) -> list[list[Run]]:
    """Runs of a few lists, some of them long beyond what is compared at once."""
    lists = [ids * draw(st.sampled_from((1, 1, 40))) for ids in draw(st.lists(IDS, min_size=1, max_size=3))]
    run = st.sampled_from(lists).flatmap(
        lambda ids: st.tuples(st.just(ids), *[st.integers(0, len(ids))] * 2).map(lambda r: (r[0], *sorted(r[1:])))
    )
    return draw(st.lists(st.lists(run, max_size=4), max_size=12))


def num_common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@given(sequences())
def test_each_sequence_begins_as_the_last_of_the_earlier_ones_that_are_most_alike(given: list[list[Run]]) -> None:
    plain = [[token for ids, start, stop in runs for token in ids[start:stop]] for runs in given]
    beginnings = Beginnings()
    for k, (runs, ids) in enumerate(zip(given, plain, strict=True)):
        tokens = Tokens(runs)
        assert (len(tokens), tokens.ids(0, len(ids))) == (len(ids), ids)
        assert [tokens[place] for place in range(len(ids))] == ids
        alike = [num_common(ids, earlier) for earlier in plain[:k]]
        most = max(alike, default=0)
        back = next((back for back, count in enumerate(reversed(alike), 1) if count == most), 1)
        assert beginnings.add(tokens) == (most, back)
