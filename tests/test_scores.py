"""Each kind of score on answers that are right and wrong, and how far a few rows let one trust it."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwentune.answering.answer import Answer
from qwentune.answering.call_syntax import WrittenCall, calls_in, same_json
from qwentune.data.sample import Json, Source
from qwentune.evaluating.comparison import compared, records
from qwentune.evaluating.intervals import NUM_DRAWS, drawn_means, interval
from qwentune.evaluating.questions import Question
from qwentune.scores import SCORES
from qwentune.scores.case import Case, Kind
from qwentune.scores.middle import distance, similarity

HERMES = '<tool_call>\n{"name": "look", "arguments": {"city": "Rome", "days": [1, 2]}}\n</tool_call>'
TAGS = (
    "<tool_call>\n<function=look>\n<parameter=city>\nRome\n</parameter>\n"
    "<parameter=days>\n[1, 2]\n</parameter>\n</function>\n</tool_call>"
)
RIGHT, WRONG = 1.0, 0.0


def text(words: str, *, stopped: bool = True, opened: bool = False) -> Answer:
    return Answer(words, stopped, len(words), opened)


def scores(taught: str, given: str | Answer | None, kind: Kind = "turn", asked: bool | None = None) -> dict[str, float]:
    """Every score that applies, but for those of the loss."""
    answer = text(given) if isinstance(given, str) else given
    case = Case(kind, text(taught), 1.5, 3.0, answer, asked)
    marks = {score.name: score.of(case) for score in SCORES if score.in_shares}
    return {name: mark for name, mark in marks.items() if mark is not None}


def test_the_scores_are_those_of_the_contract() -> None:
    assert [score.name for score in SCORES] == [
        *("loss", "perplexity", "stopped", "exact_match", "valid_json", "tool_name", "tool_arguments"),
        *("fim_exact", "fim_similarity", "reasoning_as_asked"),
    ]


def test_of_a_text_only_the_loss_is_known() -> None:
    assert scores("a text", None, "text") == {}


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        ("It is 18 °C.", RIGHT),
        ("It is 18 °C.\n", RIGHT),  # a template trims it
        ("<think>\nsummer\n</think>\n\nIt is 18 °C.", RIGHT),  # reasoning may differ
        ("It is 18 °C", WRONG),
        ("it is 18 °C.", WRONG),
        ("It is 18 °C. Or 19.", WRONG),
        ("<think>\nIt is 18 °C.", WRONG),  # cut while it reasoned
        ("", WRONG),
    ],
)
def test_exact_match(given: str, exact: float) -> None:
    assert scores("It is 18 °C.", given) == {"stopped": RIGHT, "exact_match": exact}
    as_text = WRONG if "<think>" in given else exact  # without a template there is no reasoning
    assert scores("It is 18 °C.", given, "completion")["exact_match"] == as_text


def test_stopped() -> None:
    assert scores("yes", text("yes", stopped=False))["stopped"] == WRONG


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        ('{"b": 2}', RIGHT),
        ("[1, 2]", RIGHT),
        ('<think>\nwell\n</think>\n\n{"a": 1}', RIGHT),
        ('{"a": 1', WRONG),
        ("{'a': 1}", WRONG),
        ('{"a": 1} and more', WRONG),
        ('```json\n{"a": 1}\n```', WRONG),
        ('{"a": NaN}', WRONG),
        ('{"a": 1, "a": 2}', WRONG),
        ("7", WRONG),
    ],
)
def test_valid_json(given: str, valid: float) -> None:
    assert scores('{"a": 1}', given)["valid_json"] == valid


@pytest.mark.parametrize("taught", ["7", "true", '"a text"', "prose", "```json\n{}\n```", ""])
def test_json_is_asked_for_where_it_is_taught(taught: str) -> None:
    assert "valid_json" not in scores(taught, "{}")


@pytest.mark.parametrize("taught", [HERMES, f"I will look.\n{HERMES}", TAGS])
@pytest.mark.parametrize(
    ("given", "name", "arguments"),
    [
        (HERMES, RIGHT, RIGHT),
        (TAGS, RIGHT, RIGHT),
        ('<tool_call>{"arguments": {"days": [1, 2.0], "city": "Rome"}, "name": "look"}</tool_call>', RIGHT, RIGHT),
        (HERMES.replace("Rome", "rome"), RIGHT, WRONG),
        (HERMES.replace("[1, 2]", "[2, 1]"), RIGHT, WRONG),
        (HERMES.replace("[1, 2]", "[true, 2]"), RIGHT, WRONG),
        (HERMES.replace('"look"', '"see"'), WRONG, RIGHT),
        (f"{HERMES}\n{HERMES}", WRONG, WRONG),
        (HERMES.replace("}}", "}"), WRONG, WRONG),  # no JSON
        (TAGS.replace("</parameter>\n<", "<"), RIGHT, WRONG),  # unclosed
        ("I would look.", WRONG, WRONG),
        (f"<think>\n{HERMES}\n</think>\n\nno", WRONG, WRONG),  # no server calls what was only thought of
    ],
)
def test_tools(taught: str, given: str, name: float, arguments: float) -> None:
    found = scores(taught, given)
    assert (found["tool_name"], found["tool_arguments"]) == (name, arguments)


def test_several_calls_are_compared_in_order() -> None:
    first, second = HERMES, HERMES.replace("Rome", "Oslo")
    assert scores(f"{first}\n{second}", f"{first}\n{second}")["tool_arguments"] == RIGHT
    assert scores(f"{first}\n{second}", f"{second}\n{first}")["tool_arguments"] == WRONG
    assert scores(f"{first}\n{second}", first)["tool_name"] == WRONG


@pytest.mark.parametrize("taught", ["no call", "<tool_call>\ncall me\n</tool_call>"])
def test_where_no_call_is_taught_that_can_be_read_none_is_judged(taught: str) -> None:
    assert not {"tool_name", "tool_arguments"} & {*scores(taught, HERMES)}


def test_a_value_between_tags_is_json_where_it_can_be() -> None:
    written = "<function=f>\n<parameter=a>\n7\n</parameter>\n<parameter=b>\na\n\nb\n</parameter>\n</function>"
    assert calls_in(f"<tool_call>\n{written}\n</tool_call>") == (WrittenCall("f", {"a": 7, "b": "a\n\nb"}),)
    assert calls_in("<tool_call>\n<function=f>\n</function>\n</tool_call>") == (WrittenCall("f", {}),)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 0.5, "", "1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


def tagged(value: Json) -> object:
    """The value with the kind of each part, as JSON tells kinds apart."""
    if isinstance(value, dict):
        return "object", frozenset((key, tagged(item)) for key, item in value.items())
    if isinstance(value, list):
        return "list", tuple(map(tagged, value))
    return ("number" if type(value) in (int, float) else type(value).__name__), value


@given(VALUES, VALUES)
def test_equality_of_json(one: Json, other: Json) -> None:
    assert same_json(one, other) == (tagged(one) == tagged(other))


@pytest.mark.parametrize(
    ("given", "exact", "similar"),
    [("x + 1", RIGHT, 1.0), ("x + 2", WRONG, 0.8), ("x + 1\n", WRONG, 5 / 6), ("", WRONG, 0.0)],
)
def test_the_middle_of_code(given: str, exact: float, similar: float) -> None:
    found = scores("x + 1", given, "middle")
    assert found == {"stopped": RIGHT, "fim_exact": exact, "fim_similarity": pytest.approx(similar)}


@given(st.text("abü🙂", max_size=7), st.text("abü🙂", max_size=7))
def test_distance_is_the_textbook_s(one: str, other: str) -> None:
    @cache
    def steps(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = steps(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(replaced, steps(i - 1, j) + 1, steps(i, j - 1) + 1)

    assert distance(one, other) == steps(len(one), len(other))
    assert 0 <= similarity(one, other) == similarity(other, one) <= 1


@pytest.mark.parametrize(
    ("given", "asked", "right"),
    [
        (text("<think>\nbecause\n</think>\n\nyes"), True, RIGHT),
        (text("because\n</think>\n\nyes", opened=True), True, RIGHT),
        (text("because of many", stopped=False, opened=True), True, RIGHT),  # cut
        (text("<think>\n\n</think>\n\nyes"), True, WRONG),
        (text("\n</think>\n\nyes", opened=True), True, WRONG),
        (text("yes"), True, WRONG),
        (text("yes"), False, RIGHT),
        (text("<think>\nbecause\n</think>\n\nyes"), False, WRONG),
    ],
)
def test_reasoning(given: Answer, asked: bool, right: float) -> None:
    assert scores("yes", given, asked=asked)["reasoning_as_asked"] == right
    assert "reasoning_as_asked" not in scores("yes", given)


# Means, and their intervals.


def question(line: int, file: str = "rows.jsonl", kind: Kind = "turn") -> Question:
    return Question(Source(file, line), 1, kind, line, 3, 5, text("yes"), None)


def case(answer: str, loss: float = 1.0, weight: float = 1.0) -> Case:
    return Case("turn", text("yes"), loss, weight, text(answer))


def test_the_loss_is_the_mean_over_tokens_and_the_others_over_answers() -> None:
    asked = [question(1), question(1), question(2)]
    cases = [case("yes", 1.0, 30.0), case("no", 4.0, 10.0), case("yes", 2.0, 20.0)]
    (source,) = compared(asked, cases, None)["sources"].values()
    assert source["rows"] == 2
    assert source["base"] is None
    assert source["tuned"]["loss"] == pytest.approx((30 + 40 + 40) / 60)
    assert source["tuned"]["perplexity"] == pytest.approx(math.exp(110 / 60))
    assert source["tuned"]["exact_match"] == pytest.approx(2 / 3)
    assert source["counts"] == {"loss": 3, "perplexity": 3, "stopped": 3, "exact_match": 3}
    low, high = source["intervals"]["loss"]["tuned"]
    assert (low, high) == (pytest.approx(70 / 40), pytest.approx(40 / 20))  # rows are drawn whole


def test_each_source_has_scores_of_its_own_and_the_difference_is_paired() -> None:
    asked = [question(k, file) for file in ("a", "b") for k in range(10)]
    tuned = [case("yes" if k % 10 < 9 else "no", 1.0 + k % 3) for k in range(20)]
    base = [case("yes" if k % 10 < 3 else "no", 2.0 + k % 3) for k in range(20)]  # each loss larger by one
    sources = compared(asked, tuned, base)["sources"]
    assert list(sources) == ["a", "b"]
    for source in sources.values():
        assert (source["base"]["exact_match"], source["tuned"]["exact_match"]) == (0.3, 0.9)
        assert source["intervals"]["loss"]["difference"] == pytest.approx([-1.0, -1.0])
        low, high = source["intervals"]["exact_match"]["difference"]
        assert 0 < low < 0.6 < high < 1
        assert (
            source["intervals"]["loss"]["tuned"][0] < source["tuned"]["loss"] < source["intervals"]["loss"]["tuned"][1]
        )


def test_intervals_are_those_of_every_possible_draw() -> None:
    """Of five rows all 3,125 draws can be listed: the percentiles of the drawn ones are theirs."""
    sums, weights = (
        np.array([[1.0, 4.0, 9.0, 2.0, 7.0], [1.0, 1.0, 2.0, 8.0, 3.0]]),
        np.array([1.0, 2.0, 3.0, 1.0, 2.0]),
    )
    every = np.array(list(itertools.product(range(5), repeat=5)))
    means = [each[every].sum(1) / weights[every].sum(1) for each in sums]
    drawn = drawn_means(sums, weights)
    assert drawn.shape == (2, NUM_DRAWS)
    for exact, ours in ((means[0], drawn[0]), (means[1], drawn[1]), (means[0] - means[1], drawn[0] - drawn[1])):
        for bound, share in zip(interval(ours, 5, None), (0.025, 0.975), strict=True):
            assert (exact < bound - 1e-9).mean() < share + 0.008
            assert (exact < bound + 1e-9).mean() > share - 0.008


def test_intervals_are_those_of_the_normal_distribution_for_many_rows() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, size=(1, 2000))
    low, high = interval(drawn_means(values, np.ones(2000))[0], 2000, None)
    error = values.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
    assert interval(drawn_means(values, np.ones(2000))[0], 2000, None) == [low, high], "the same each time"


@pytest.mark.parametrize("count", [1, 10, 40, 1000])
def test_rows_that_all_agree_are_no_proof(count: int) -> None:
    """Clopper and Pearson: of `count` rows all are right with a chance of 1 in 40 where that share of all is."""
    low, high = interval(np.ones(5), count, (0.0, 1.0))
    assert (low**count, high) == (pytest.approx(0.025), 1.0)
    assert interval(np.zeros(5), count, (0.0, 1.0)) == pytest.approx([0.0, 1 - low])
    least, most = interval(np.zeros(5), count, (-1.0, 1.0))
    assert -1 < least == -most < 0
    assert interval(np.ones(5), count, None) == [1.0, 1.0]


def test_records_stand_in_the_order_of_their_loss() -> None:
    asked = [question(1), question(2), question(3, kind="text")]
    text_only = Case("text", text("yes"), 2.0, 1.0)
    first, second, third = records(asked, [case("yes", 0.1), case("no", 3.0), text_only], None)
    assert [row["source"]["line"] for row in (first, second, third)] == [2, 3, 1]
    assert first == {
        "source": {"file": "rows.jsonl", "line": 2},
        "turn": 1,
        "loss": 3.0,
        "answer": "no",
        "scores": {"stopped": 1.0, "exact_match": 0.0},
        "taught": {"answer": "yes"},
        "base": None,
    }
    assert second["answer"] is None
