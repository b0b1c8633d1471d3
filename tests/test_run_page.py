"""`run.html`: what a run folder holds, as a page; written whatever the folder holds, and in little time."""

from __future__ import annotations

import html
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import model_spec
from qwentune.memory import PlanRequest, make_plan
from qwentune.pages.charts import MOST_BUCKETS, Chart, Series, averaged, thinned
from qwentune.pages.run_page import PAGE, RunPage, run_page
from qwentune.training.run_folder import EVALUATIONS, EVENTS, METRICS, RunFolder
from tests.test_html_report import HOSTILE, Page

PEAKS = {100: 40.0, 7001: 55.5}  # losses of single steps
RECIPE = "model: Qwen/Qwen3-8B\ntuning: {kind: qlora, rank: 16}\ndata: {train: rows.jsonl}\n"
REPORT: dict[str, Any] = {
    "samples": 12,
    "examples": 12,
    "train_examples": 10,
    "eval_examples": 2,
    "tokens": 400,
    "trained_tokens": 100,
    "lengths": {"mean": 33.3, "max": 40},
    "modes": {"non_thinking": 12},
    "trained_turns": 12,
    "stop_tokens": {"<|im_end|>": 12},
    "dropped": {},
    "warnings": [HOSTILE],
}
SCORES: dict[str, Any] = {
    "rows": 40,
    "counts": {"loss": 40, "exact_match": 40},
    "base": {"loss": 7.0, "exact_match": 0.0},
    "tuned": {"loss": 0.5, "exact_match": 0.05},
    "intervals": {
        "loss": {"base": [6.9, 7.1], "tuned": [0.4, 0.6], "difference": [-6.7, -6.3]},
        "exact_match": {"base": [0.0, 0.09], "tuned": [0.0, 0.12], "difference": [0.0, 0.12]},
    },
}


def metrics(step: int, num_steps: int) -> dict[str, Any]:
    progress = step / num_steps
    return {
        "step": step,
        "loss": PEAKS.get(step, 2.5 - 1.5 * progress + 0.1 * math.sin(step)),
        "learning_rate": 2e-4 * (1 - progress),
        "grad_norm": 1 + 0.5 * math.cos(step),
        "update_ratio": 1e-3,
        "tokens": 65_536,
        "trained_tokens": 20_000,
        "tokens_per_second": 9000.0 + step % 7,
        "peak_allocated_bytes": 19 * 2**30,
        "seconds": 7.0,
    }


def written_run(path: Path, num_steps: int = 40, *, samples: bool = True) -> RunFolder:
    """The folder of a run on a card, stopped in its middle and gone on to its end, and evaluated."""
    run = RunFolder(path)
    middle = num_steps // 2
    with run.lock():
        lines = [json.dumps(metrics(step, num_steps)) + "\n" for step in range(1, num_steps + 1)]
        (path / METRICS).write_text("".join(lines))
        run.write_rows(
            EVALUATIONS, [{"step": k * num_steps // 4, "loss": 2.6 - k / 4, "stopped": k / 4} for k in (1, 2, 3, 4)]
        )
        run.add_event("start", 0, steps=num_steps)
        run.add_event("save", middle, best=middle)
        run.add_event("save", middle + 3, best=middle)  # lost
        run.add_event("preempted", middle + 3)
        run.add_event("resume", middle, steps=num_steps)
        run.add_event("save", num_steps, best=3 * num_steps // 4)
        run.set_status(
            "finished", exit_code=0, reason="all steps are done", step=num_steps, command=["qwentune", "train"]
        )
    plan = make_plan(model_spec("Qwen/Qwen3-8B"), gpu_spec("rtx-4090"), PlanRequest("qlora", 4096, 16, rank=16))
    run.write_json("plan.json", {**plan.to_json(), "measured": {"train": 18 * 2**30, "evaluate": 9 * 2**30}})
    run.write_json("data_report.json", REPORT)
    run.write("recipe.resolved.yaml", RECIPE)
    run.write_json("eval.json", {"schema": 1, "sources": {"held.jsonl": SCORES}})
    (path / "merged").mkdir()
    (path / "merged" / "README.md").write_text("# m\n\n## Serving\n\nvLLM:\n\n```sh\nvllm serve 'merged'\n```\n")
    if samples:
        places = [(step, index) for step in (10, 20, 30) for index in (0, 1)]
        run.write_rows("samples.jsonl", [sample(step, index) for step, index in places])
    return run


def sample(step: int, index: int) -> dict[str, Any]:
    target = HOSTILE if index else "Canberra."
    return {
        "step": step,
        "index": index,
        "source": {"file": "held.jsonl", "line": index + 1},
        "prompt": f"Question {index}?",
        "target": target,
        "answer": target if step == 30 else f"not yet at {step}",
        "stopped": step > 10,
        **({"reasoning": f"Thought {HOSTILE}"} if index else {}),
    }


@settings(max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 20))
def test_thinning_keeps_the_lowest_and_the_highest_of_every_bucket_and_both_ends(
    values: list[float], num_buckets: int
) -> None:
    kept = thinned(values, num_buckets)
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    assert len(kept) <= 2 * num_buckets + 2
    num_buckets = min(num_buckets, len(values))
    for k in range(num_buckets):
        start, stop = (len(values) * edge // num_buckets for edge in (k, k + 1))
        bucket = values[start:stop]
        left = [values[place] for place in kept if start <= place < stop]
        assert (min(left), max(left)) == (min(bucket), max(bucket))


@settings(max_examples=30)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20), st.booleans())
def test_every_value_and_tick_stands_within_the_plot(values: list[float], from_zero: bool) -> None:
    steps = list(range(1, len(values) + 1))
    drawn = Chart("x", "X", [Series("x", steps, values)], 1, len(values), from_zero=from_zero).drawn()
    heights = [float(place.split()[1].partition("h")[0]) for place in drawn["lines"][0]["path"][1:].split("L")]
    rows = [row["at"] for row in drawn["rows"]]
    assert all(-0.1 <= at <= 1000.1 for at in [*heights, *rows, *(column["at"] for column in drawn["columns"])])
    assert len({row["text"] for row in drawn["rows"]}) == len(rows) <= 8
    assert [label["at"] for label in drawn["labels"]] == pytest.approx([max(0, min(1000, heights[-1]))], abs=0.1)


def test_means_end_where_the_series_ends() -> None:
    assert averaged([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, 7.0, 100.0], 2) == ([2, 4, 5], [2.0, 6.0, 100.0])


def test_ten_thousand_steps_are_a_small_page_that_is_written_at_once_with_every_peak(tmp_path: Path) -> None:
    run = written_run(tmp_path, 10_000)
    page = run_page(run)  # what is loaded once is loaded
    start = time.process_time()
    RunPage(run).write()
    assert time.process_time() - start < 1.0
    assert (tmp_path / PAGE).stat().st_size < 500_000
    data = json.loads(page.partition('<script type="application/json"')[2].partition(">")[2].partition("</script>")[0])
    train = data["series"][0]
    found = dict(zip(train["steps"], train["values"], strict=True))
    assert {step: found[step] for step in PEAKS} == PEAKS
    assert MOST_BUCKETS < len(found) <= 2 * MOST_BUCKETS + 2


def test_the_page_says_what_the_folder_holds(tmp_path: Path) -> None:
    written = run_page(written_run(tmp_path))
    page, text = Page(written), " ".join(html.unescape(re.sub("<[^>]+>", " ", written)).split())
    for words in (
        "finished Qwen/Qwen3-8B · qlora, rank 16 Step 40 of 40",
        "eval loss 1.6000 lowest 1.6 at step 40",
        "peak memory 19.00 GiB planned",
        "5 events",  # without the save that was lost
        "started",
        "0/40 [0, 0.09] 2/40 [0, 0.12] +0.05 [0, 0.12] not certain",
        "7 [6.9, 7.1] 0.5 [0.4, 0.6] -6.5 [-6.7, -6.3] better",
        "held.jsonl:1 Question 0? then, step 10 · cut off not yet at 10 now, step 30 as taught Canberra. taught Canb",
        "rows.jsonl: 12 rows → 12 examples (10 train, 2 eval) · 400 tokens, 100 trained (25%).",
        f"qwentune chat {tmp_path}",
        "vLLM (merged) vllm serve 'merged'",
        "tuning: {kind: qlora, rank: 16}",
    ):
        assert words in text, words
    titles = [title for title in page.texts["h3"] if title[0].isupper()]
    assert titles == [
        "Loss",
        "Scores of held-out rows",
        "Learning rate",
        "Gradient norm",
        "Update ratio",
        "Tokens per second",
    ]
    marks = [
        attributes["class"] for tag, attributes in page.tags if tag == "path" and "mark" in str(attributes["class"])
    ]
    assert marks[:3] == ["mark best", "mark stop", "mark resume"]
    assert marks.count("mark save") == 2 * len(titles)
    pictures = [str(attributes["aria-label"]) for tag, attributes in page.tags if tag == "svg"]
    assert "eval from 2.35 at step 10 to 1.6 at step 40" in pictures[0]


@pytest.mark.fault(
    "J76", "the page of a run shows control and bidi characters written out, and runs no script of a row"
)
def test_rows_add_no_element_and_the_page_loads_nothing(tmp_path: Path) -> None:
    text = run_page(written_run(tmp_path))
    page = Page(text)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    policy = next(str(attributes["content"]) for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    assert {f"script-src 'nonce-{script['nonce']}'" for script in scripts} == {policy.split("; ")[-1]}
    assert not any("alert" in script for script in page.texts["script"])
    assert not {"img", "iframe", "link"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "src"]
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_run_that_has_only_begun_and_one_that_failed_have_a_page_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.lock():
        run.write("recipe.resolved.yaml", RECIPE)
        run.set_status("running", exit_code=None, reason="", step=0, command=["qwentune", "train", "r.yaml"])
        assert "again at the next save" in run_page(run)
        run.append(METRICS, {**metrics(1, 40), "loss": math.nan, "peak_allocated_bytes": None})
        run.set_status(
            "failed", exit_code=6, reason="step 2: not finite", step=1, command=["qwentune", "train", "r.yaml"]
        )
        page = "".join(Page(run_page(run)).texts["main"])
    assert "step 2: not finite" in page
    assert "qwentune train r.yaml" in page


def test_what_keeps_a_page_from_being_written_is_said_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written_run(tmp_path)
    (tmp_path / PAGE).mkdir()
    page = RunPage(run)
    page.write()
    run.write_json("eval.json", {"sources": "of another program"})
    page.write()
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert f"{tmp_path / PAGE} could not be written: " in said
    assert (tmp_path / PAGE).is_dir()
    assert not list(tmp_path.glob(f".{PAGE}*"))


def test_no_secret_stands_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = written_run(tmp_path, samples=False)
    secret = "a <secret> & 'more'"
    rows = [{**sample(step, 0), "answer": f"the key is {secret} or hf_{'a1B2' * 6}"} for step in (1, 2)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # before it was one
    monkeypatch.setenv("SOME_API_KEY", secret)
    RunPage(run).write()
    written = (tmp_path / PAGE).read_text()
    assert "the key is [secret] or [secret]" in written
    assert "&lt;secret&gt;" not in written


def test_saves_of_lost_steps_are_forgotten_and_what_happened_stays(tmp_path: Path) -> None:
    run = written_run(tmp_path)
    assert [row["event"] for row in run.records(EVENTS)].count("save") == 3
    table = run_page(run).partition('<table class="events">')[2].partition("</table>")[0]
    assert re.findall(r"<td>([a-z, ]+)</td>", table) == [
        "started",
        "saved, the best so far",
        "preempted",
        "resumed",
        "saved",
    ]


def test_answers_to_another_prompt_at_the_same_place_stand_apart(tmp_path: Path) -> None:
    run = written_run(tmp_path, samples=False)
    rows = [{**sample(step, 0), "prompt": f"prompt {step}"} for step in (1, 2)]
    run.write_rows("samples.jsonl", rows)
    shown = run_page(run)
    assert shown.count('<section class="prompt">') == 2
