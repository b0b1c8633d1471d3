"""Pairs of keys that cannot both hold, and keys that would have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from qwentune.errors import Problem
from qwentune.recipe.schema import (
    ADAPTER_KEYS,
    DECAY_FRACTION,
    EITHER,
    FULL_LEARNING_RATE,
    LEARNING_RATE,
    BatchOptions,
)
from qwentune.recipe.syntax import Node, Place, plain
from qwentune.row_formats import COLUMNS, MESSAGE_TAGS, ROLE_TAGS, ROW_FORMATS


class _Given:
    """What a recipe says, by dotted key; null counts as not said."""

    def __init__(self, root: Node) -> None:
        self._root = root

    def place(self, key: str) -> Place | None:
        """Where a key is given, None where it is not."""
        found = self._find(key)
        return None if found is None else found[1]

    def value(self, key: str, default: object) -> object:
        """The plain value of a key, or its default."""
        found = self._find(key)
        return default if found is None else plain(found[0])

    def number(self, key: str, default: float) -> float | None:
        """The number of a key or its default; None where it is given as something else."""
        value = self.value(key, default)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def _find(self, key: str) -> tuple[Node, Place] | None:
        node, place = self._root, self._root.place
        for part in key.split("."):
            if not isinstance(node.value, dict) or part not in node.value:
                return None
            node, place = node.value[part], node.keys[part]
        return None if node.value is None else (node, place)


def contradictions(root: Node) -> Iterator[Problem]:
    """Every contradiction of a tree, whatever else is wrong with it."""
    given = _Given(root)
    if given.value("tuning.kind", "") == "full":
        for key in (*(f"tuning.{key}" for key in ADAPTER_KEYS), "optimizer.lora_plus_ratio"):
            if place := given.place(key):
                what = f"{key}: tuning.kind is full, which has no adapters"
                fix = f"Leave it out (on the command line: {key}=null), or use kind: lora."
                yield Problem(place.where, what, fix)
        for key in ("tuning.towers", "tuning.merger"):
            if (place := given.place(key)) and given.value(key, "") == "adapters":
                what = f"{key}: adapters, but tuning.kind is full, which has none"
                yield Problem(place.where, what, "Use trained, or kind: lora.")
    for part in ("towers", "merger"):
        place = given.place(f"tuning.{part}_learning_rate")
        if place and given.value(f"tuning.{part}", "frozen") == "frozen":
            what = f"tuning.{part}_learning_rate: tuning.{part} is frozen"
            yield Problem(place.where, what, f"Leave it out, or use tuning.{part}=trained or adapters.")
    for first, second, decided in EITHER:
        if (place := given.place(second)) and given.place(first):
            what = f"{second}: {first} is given too, and one of them decides {decided}"
            yield Problem(place.where, what, "Set one of them to null.")
    place = given.place("data.eval_fraction")
    if place and given.place("data.eval") and given.value("data.eval_fraction", 0) != 0:
        what = "data.eval_fraction: data.eval is given too, and one of them decides what is evaluated"
        yield Problem(place.where, what, "Leave one of them out.")
    yield from _names_of_sources(root)
    yield from _learning_rates(given)
    yield from _phases(given)
    yield from _trackers(given)
    yield from _batches(given)
    has_eval = given.place("data.eval") or given.value("data.eval_fraction", 0) != 0
    for key in ("output.best", "output.early_stopping", "output.samples"):
        if (place := given.place(key)) and given.value(key, 0) != 0 and not has_eval:
            what = f"{key}: nothing is evaluated"
            yield Problem(place.where, what, "Give data.eval_fraction or data.eval, or leave it out.")
    least, most = (given.number(f"data.media.{end}_pixels", 0) for end in ("min", "max"))
    if (place := given.place("data.media.min_pixels")) and least and most and least > most:
        yield Problem(place.where, f"data.media.min_pixels: max_pixels is {most}, which is less", "Lower it.")
    if place := given.place("data.template_args.enable_thinking"):
        what = "data.template_args.enable_thinking: data.thinking decides this"
        yield Problem(place.where, what, "Use data.thinking: on, off or auto.")


def _names_of_sources(root: Node) -> Iterator[Problem]:
    """Columns that the format of their source does not have, and names that are given to two tags."""
    for key in ("train", "eval"):
        data = root.value.get("data") if isinstance(root.value, dict) else None
        listed = data.value.get(key) if data and isinstance(data.value, dict) else None
        for number, source in enumerate(listed.value if listed and isinstance(listed.value, list) else []):
            if not isinstance(source.value, dict):
                continue
            head = f"data.{key}.{number}"
            format = str(plain(source.value["format"])) if "format" in source.value else "auto"
            columns = source.value.get("columns")
            if format in ROW_FORMATS and columns and isinstance(columns.value, dict):
                known = ROW_FORMATS[format].keys
                for name in (name for name in columns.value if name in COLUMNS and name not in known):
                    what = f"{head}.columns.{name}: rows of the format {format} have no such column"
                    yield Problem(columns.keys[name].where, what, f"They have {', '.join(sorted(known))}.")
            yield from _names_of_two_tags(source.value.get("tags"), head)


def _names_of_two_tags(tags: Node | None, head: str) -> Iterator[Problem]:
    if tags is None or not isinstance(tags.value, dict):
        return
    for kind in (MESSAGE_TAGS, ROLE_TAGS):
        seen: dict[object, str] = {}
        for name in (name for name in tags.value if name in kind):
            value = plain(tags.value[name])
            for theirs in cast("list[object]", value) if isinstance(value, list) else [value]:
                other = seen.setdefault(str(theirs), name)
                if other != name:
                    what = f"{head}.tags.{name}: {theirs!r} stands for {other} as well"
                    yield Problem(tags.value[name].place.where, what, "Give each name to one of them.")


def _learning_rates(given: _Given) -> Iterator[Problem]:
    place = given.place("optimizer.min_learning_rate")
    lowest = given.number("optimizer.min_learning_rate", 0.0)
    if place is None or not lowest:
        return
    if given.value("optimizer.schedule", "cosine") == "constant":
        what = "optimizer.min_learning_rate: the schedule constant does not use it"
        yield Problem(place.where, what, "Leave it out, or use schedule: cosine, linear or wsd.")
    default = FULL_LEARNING_RATE if given.value("tuning.kind", "") == "full" else LEARNING_RATE
    highest = given.number("optimizer.learning_rate", default)
    if highest is not None and lowest > highest:
        what = f"optimizer.min_learning_rate: {lowest} is more than optimizer.learning_rate, which is {highest}"
        yield Problem(place.where, what, "Lower it, or raise the learning rate.")


def _phases(given: _Given) -> Iterator[Problem]:
    """The learning rate rises and falls within the run."""
    place = given.place("optimizer.decay_fraction")
    is_wsd = given.value("optimizer.schedule", "cosine") == "wsd"
    if place and not is_wsd:
        what = "optimizer.decay_fraction: only the schedule wsd uses it"
        yield Problem(place.where, what, "Leave it out, or use schedule: wsd.")
    steps, most = given.number("optimizer.warmup_steps", 0), given.number("optimizer.max_steps", float("inf"))
    if (warmup := given.place("optimizer.warmup_steps")) and steps and most is not None and steps >= most:
        what = f"optimizer.warmup_steps: {steps} steps are not fewer than optimizer.max_steps, which is {most}"
        yield Problem(warmup.where, what, "Lower it: the learning rate would never arrive.")
    rises = given.number("optimizer.warmup_fraction", 0.0)
    falls = given.number("optimizer.decay_fraction", DECAY_FRACTION)
    place = place or given.place("optimizer.warmup_fraction")
    if place and is_wsd and rises is not None and falls is not None and rises + falls > 1:
        what = f"optimizer.decay_fraction: {falls} and optimizer.warmup_fraction, {rises}, are more than the run"
        yield Problem(place.where, what, "Lower one of them.")


def _trackers(given: _Given) -> Iterator[Problem]:
    if given.value("output.report_to", []) not in ([], ["tensorboard"]):
        return
    for key in ("output.project", "output.run_name"):
        if place := given.place(key):
            what = f"{key}: output.report_to names no tracker that shows it"
            yield Problem(place.where, what, "Name the tracker, as in report_to: [wandb], or leave it out.")


def _batches(given: _Given) -> Iterator[Problem]:
    place = given.place("batch.micro_batch")
    micro_batch = given.value("batch.micro_batch", "auto")
    per_step = given.value("batch.sequences_per_step", BatchOptions().sequences_per_step)
    if place is None or not isinstance(micro_batch, int) or not isinstance(per_step, int):
        return
    if micro_batch > 0 and per_step % micro_batch:
        what = f"batch.micro_batch: {micro_batch} does not divide batch.sequences_per_step ({per_step})"
        yield Problem(place.where, what, "Steps are made of whole micro-batches: change one of the two.")
