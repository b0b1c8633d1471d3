"""The page of a run, `run.html` in its folder, made of what the folder holds and of nothing else."""

from __future__ import annotations

import math
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwentune import console
from qwentune.data.summary import counts, media
from qwentune.errors import counted
from qwentune.memory.settings import GIB
from qwentune.pages.charts import LOOKS, NUM_COLOURS, Chart, Mark, Series, number_text
from qwentune.pages.template import page
from qwentune.training.overview import RunSummary, summary
from qwentune.training.run_folder import EVALUATIONS, EVENTS, SAMPLES, RunFolder

PAGE = "run.html"
RECIPE = "recipe.resolved.yaml"
NUM_PROMPTS, NUM_TIMES = 12, 8  # of samples, and how many answers to each
NUM_EVENTS = 100
LONGEST = 1500  # characters of a text of a sample
CARD = re.compile(r"^(.+):\n\n```sh\n(.+)\n```$", re.MULTILINE)  # a command in a model card
STOPPED = {"preempted": "stopped", "interrupted": "stopped"}
LOWER_IS_BETTER = {"loss", "perplexity"}
HAPPENED = {"start": "started", "resume": "resumed", "save": "saved"}

Row = Mapping[str, Any]


class RunPage:
    """Writes the page anew; what keeps it from that is said once, and ends no run."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.has_failed = False

    def write(self) -> None:
        """Puts the page of this moment in the place of the last one."""
        try:
            self.folder.write(PAGE, run_page(self.folder))
        except Exception as error:  # a full disk, a file that somebody has changed: the run depends on neither
            if not self.has_failed:
                console.say(f"warning: {self.folder.path / PAGE} could not be written: {error or type(error).__name__}")
            self.has_failed = True


def run_page(run: RunFolder) -> str:
    """The page as HTML."""
    from qwentune.recipe import load_recipe

    text = (run.path / RECIPE).read_text("utf-8")
    recipe = load_recipe(run.path / RECIPE).recipe
    stands, plan, report = summary(run.path), run.read_json("plan.json"), run.read_json("data_report.json")
    rows, evaluations, events = run.records(), run.records(EVALUATIONS), _events(run.records(EVENTS))
    steps = next((event["steps"] for event in reversed(events) if "steps" in event), stands.steps)
    limit = _limit(plan)
    return page(
        "run.html.jinja",
        nonce=secrets.token_urlsafe(16),
        name=run.path.resolve().name,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        state=STOPPED.get(stands.state, stands.state),
        step=stands.step,
        steps=steps,
        left=_seconds(run.read_json("status.json").get("eta_seconds")) if stands.state == "running" else "",
        reason=stands.reason,
        resume=run.read_json("status.json").get("resume_command")
        if stands.state in (*STOPPED, "failed", "killed")
        else "",
        model=f"{recipe.model} · {recipe.tuning.kind}"
        + ("" if recipe.tuning.kind == "full" else f", rank {recipe.tuning.rank}"),
        figures=list(_figures(rows, evaluations, stands, plan, limit)),
        charts=[chart.drawn() for chart in _charts(rows, evaluations, events, limit)],
        events=events[-NUM_EVENTS:],
        num_events=len(events),
        happened=HAPPENED,
        scores=list(_scores(run.read_json("eval.json"))),
        prompts=list(_prompts(run.records(SAMPLES))),
        memory=_memory(plan, rows) if plan else None,
        data=list(_data(report, [source.path for source in recipe.data.sources])) if report else [],
        warnings=report.get("warnings", []),
        commands=list(_commands(run, is_finished=stands.state == "finished")),
        recipe=text,
    )


def _events(found: Sequence[Row]) -> list[Row]:
    """The events in order, but for saves of steps that were lost and done again."""
    kept = list[Row]()
    for event in found:
        if event.get("event") in ("start", "resume"):
            kept = [one for one in kept if one["event"] != "save" or one["step"] <= event["step"]]
        kept.append(event)
    return kept


def _best_step(events: Sequence[Row]) -> int | None:
    return next((event.get("best") for event in reversed(events) if event["event"] == "save"), None)


def _marks(events: Sequence[Row]) -> list[Mark]:
    """What stands in the charts, first what keeps its words where there is little room."""
    best = _best_step(events)
    marks = [Mark(best, "best", "best")] if best else []
    for event in events:
        match event["event"]:
            case "resume":
                marks.append(Mark(event["step"], "resume", "resumed"))
            case "failed":
                marks.append(Mark(event["step"], "stop", "failed"))
            case "preempted" | "interrupted":
                marks.append(Mark(event["step"], "stop", "stopped"))
            case _:
                pass
    saves = [event["step"] for event in events if event["event"] == "save"]
    return [*marks, *(Mark(step, "save") for step in saves[-NUM_EVENTS:])]


def _charts(
    rows: Sequence[Row], evaluations: Sequence[Row], events: Sequence[Row], limit: float | None
) -> Iterator[Chart]:
    steps = [row["step"] for row in (*rows[:1], *rows[-1:], *evaluations[-1:])]
    if not steps:
        return
    axis, marks = (min(steps), max(steps)), _marks(events)
    losses = _series("train", rows, "loss"), _series("eval", evaluations, "loss", "dashed", has_dots=True)
    if found := [one for one in losses if one is not None]:
        yield Chart("loss", "Loss", found, *axis, marks, note="of the trained tokens")
    names = dict.fromkeys(name for row in evaluations for name in row if name not in ("step", *LOWER_IS_BETTER))
    looks = [LOOKS[(k + k // NUM_COLOURS) % len(LOOKS)] for k in range(len(names))]  # none twice in one colour
    scores = [_series(name, evaluations, name, look, has_dots=True) for name, look in zip(names, looks, strict=True)]
    if found := [one for one in scores if one is not None]:
        yield Chart("scores", "Scores of held-out rows", found, *axis, marks, from_zero=True)
    if rate := _series("", rows, "learning_rate"):
        yield Chart("rate", "Learning rate", [rate], *axis, marks, from_zero=True, has_means=False)
    if norm := _series("", rows, "grad_norm"):
        yield Chart("norm", "Gradient norm", [norm], *axis, marks)
    if ratio := _series("", rows, "update_ratio"):
        yield Chart("ratio", "Update ratio", [ratio], *axis, marks, note="step over weights")
    if speed := _series("", rows, "tokens_per_second"):
        found, note = [speed], ""
        if limit is not None:
            note = f"limit of the card {limit:,.0f}"
            if limit < 4 * max(speed.values):  # else it would press the rest flat
                found.append(Series("limit", [speed.steps[0], speed.steps[-1]], [limit, limit], "dotted"))
        yield Chart("speed", "Tokens per second", found, *axis, marks, from_zero=True, note=note)


def _series(name: str, rows: Sequence[Row], key: str, look: str = "solid", *, has_dots: bool = False) -> Series | None:
    """The finite values of a key; None where there are none."""
    found = [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), int | float)]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    steps, values = [step for step, _ in found], [value for _, value in found]
    return Series(name, steps, values, look, has_dots) if found else None


def _limit(plan: Row) -> float | None:
    """Tokens per second that the roofline of the plan gives to full rows; None on a CPU."""
    seconds, tokens = plan.get("step_seconds"), plan.get("row_tokens")
    if not seconds or not tokens:
        return None
    choices = plan["choices"]
    return choices["micro_batch"] * choices["accumulation"] * plan["gpus"] * tokens / seconds


def _figures(
    rows: Sequence[Row], evaluations: Sequence[Row], stands: RunSummary, plan: Row, limit: float | None
) -> Iterator[tuple[str, str, str]]:
    """The figures that count: a name, a number, and a word on it."""
    if stands.loss is not None:
        yield "loss", f"{stands.loss:.4f}", f"from {number_text(rows[0]['loss'])}"
    losses = [(row["loss"], row["step"]) for row in evaluations if isinstance(row.get("loss"), float)]
    if losses:
        lowest, step = min(losses)
        yield "eval loss", f"{losses[-1][0]:.4f}", f"lowest {number_text(lowest)} at step {step:,}"
    seconds = sum(row.get("seconds") or 0 for row in rows)
    tokens = sum(row.get("tokens") or 0 for row in rows)
    if seconds:
        speed = tokens / seconds
        yield "tokens/s", f"{speed:,.0f}", f"{speed / limit:.0%} of the card's limit" if limit else "mean of the run"
        trained = sum(row.get("trained_tokens") or 0 for row in rows)
        yield "tokens", _short(tokens), f"{trained / max(1, tokens):.0%} trained"
        yield "training time", _seconds(seconds), "without pauses"
    if peak := _peak(rows):
        yield "peak memory", f"{peak / GIB:.2f} GiB", f"planned {plan.get('allocated_peak_bytes', 0) / GIB:.2f}"


def _peak(rows: Sequence[Row]) -> int:
    return max((row.get("peak_allocated_bytes") or 0 for row in rows), default=0)


def _memory(plan: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """Planned bytes by phase and, of the worst one, by term, beside those measured; shares are of what is usable."""
    found, worst = plan.get("measured", {}), plan["limiting_phase"]
    steps = max(_peak(rows), found.get("train", 0), found.get("steps", 0))
    measured = {"train_step": steps, "evaluate": found.get("evaluate", 0)}
    usable, phases = max(1, plan["usable_bytes"]), plan["phases"]
    shown = {name: phase for name, phase in phases.items() if phase["total"]}
    terms = shown.get(worst, {"terms": {}})["terms"]

    def line(name: str, planned: int, held: int = 0) -> dict[str, Any]:
        return {
            "name": name.replace("_", " "),
            "planned": f"{planned / GIB:.2f}",
            "measured": f"{held / GIB:.2f}" if held else "",
            "share": min(100.0, 100 * planned / usable),
            "held": min(100.0, 100 * held / usable),
        }

    return {
        "device": plan["gpu"],
        "usable": f"{usable / GIB:.2f}",
        "is_measured": any(measured.values()),
        "worst": worst.replace("_", " "),
        "phases": [line(name, phase["total"], measured.get(name, 0)) for name, phase in shown.items()],
        "terms": [line(name, size) for name, size in terms.items() if size],
    }


def _data(report: Row, sources: Sequence[str]) -> Iterator[str]:
    """Sentences on what is trained."""
    yield f"{', '.join(sources)}: {counts(report)}."
    lengths = report["lengths"]
    yield f"An example has {lengths['mean']:,.0f} tokens in the mean and {lengths['max']:,} at most."
    if report["modes"]:
        modes = ", ".join(f"{count:,} {mode.replace('_', '-')}" for mode, count in report["modes"].items())
        yield f"{counted(report['trained_turns'], 'trained turn{|s}')}: {modes}."
    if ends := ", ".join(f"{token} × {count:,}" for token, count in report["stop_tokens"].items()):
        yield f"What is trained ends with {ends}."
    yield from (f"{line}." for line in media(report))
    if report["dropped"]:
        reasons = ", ".join(f"{reason} × {count:,}" for reason, count in report["dropped"].items())
        yield f"Not trained: {reasons}; dropped.jsonl names the rows."


def _scores(found: Row) -> Iterator[dict[str, Any]]:
    """The scores of each source, as `qwentune eval` printed them, and what is certain of the differences."""
    if not found:
        return
    from qwentune.evaluating.comparison import in_brackets, in_words  # loads torch

    for file, source in found["sources"].items():
        lines = list[dict[str, Any]]()
        for score, of in source["intervals"].items():
            cells = dict[str, Any]()
            for whose in ("base", "tuned"):
                if of[whose] is not None:
                    value = source[whose][score]
                    cells[whose] = (in_words(value, score, source["counts"][score]), in_brackets(of[whose]))
            if of["difference"] is not None:
                difference = source["tuned"][score] - source["base"][score]
                cells["difference"] = (f"{difference:+.4g}", in_brackets(of["difference"]))
                cells["verdict"] = _verdict(of["difference"], score)
            lines.append({"name": score, **cells})
        yield {
            "file": file,
            "rows": counted(source["rows"], "row{|s}"),
            "has_base": source["base"] is not None,
            "lines": lines,
        }


def _verdict(bounds: Sequence[float], score: str) -> str:
    low, high = bounds if score not in LOWER_IS_BETTER else (-bounds[1], -bounds[0])
    return "better" if low > 0 else "worse" if high < 0 else "not certain"


def _prompts(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Each held-out prompt with what was answered at first and at last, and in between."""
    by_prompt: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        source = row["source"]
        place = str(source["file"]), int(row.get("index", source["line"])), str(row["prompt"])
        by_prompt.setdefault(place, []).append(row)
    for (file, _, _), answers in [*by_prompt.items()][:NUM_PROMPTS]:
        found = sorted(answers, key=lambda row: row["step"])
        yield {
            "source": f"{file}:{found[0]['source']['line']}",
            "prompt": _cut(found[-1]["prompt"]),
            "target": _cut(found[-1]["target"]),
            "answers": [
                {
                    "step": row["step"],
                    "answer": _cut(row["answer"]),
                    "reasoning": _cut(row.get("reasoning") or ""),
                    "stopped": row["stopped"],
                    "is_taught": str(row["answer"]).strip() == str(row["target"]).strip(),
                }
                for row in [found[0], *found[1:][-NUM_TIMES + 1 :]]
            ],
        }


def _cut(text: Any) -> str:
    """The text, or the beginning of a long one."""
    text = str(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … (of {len(text):,} characters, which {SAMPLES} has)"


def _commands(run: RunFolder, *, is_finished: bool) -> Iterator[tuple[str, str, str]]:
    """What to do with the run: what for, the command, and of what; servers' as the model cards of exports have them."""
    folder = shlex.quote(str(run.path))
    if is_finished:
        yield "talk to it", f"qwentune chat {folder}", ""
        yield "did it get better?", f"qwentune eval {folder} --base", ""
        yield "serve it", f"qwentune serve {folder}", ""
        yield "one model for servers", f"qwentune export {folder} --merge --verify", ""
    for card in sorted(run.path.glob("*/README.md")):
        for purpose, command in CARD.findall(card.read_text("utf-8", "replace")):
            yield purpose, command, card.parent.name


def _short(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / min(size, 1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{count:,}"


def _seconds(seconds: float | None) -> str:
    """A time in words; empty where it is not known."""
    if seconds is None:
        return ""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{int(hours)} h {round(seconds / 60) % 60} min"
