"""The data of a run, rendered once: read, render, split, store; later starts open what was stored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from qwentune.data.checkpoint import cache_folder
from qwentune.data.files import content_sha256
from qwentune.data.pack import Packed, lay_out, pack
from qwentune.data.read import read_samples
from qwentune.data.render import Dropped, Rendered, Renderer, RenderOptions
from qwentune.data.report import Report
from qwentune.data.sample import Source
from qwentune.data.template import ChatTemplate
from qwentune.data.tokenizer import Tokenizer
from qwentune.errors import DataError, Problem, RecipeError
from qwentune.recipe import DataOptions, DataSource

CACHE_FORMAT = 2  # raise it whenever rendering or storing changes what stands in the cache
ARRAYS = ("input_ids", "weights", "offsets", "lines", "files", "turns", "turn_offsets", "train", "evaluation")


@dataclass(frozen=True)
class Examples:
    """All rendered examples of a run, memory-mapped.

    `input_ids` (int32) and `weights` (float32) hold the tokens of example i at `offsets[i]:offsets[i + 1]`; `turns`
    likewise by `turn_offsets`. `train` and `evaluation` are indices of examples in training order, an index standing
    as often as its source is repeated.
    """

    input_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    offsets: NDArray[np.int64]
    lines: NDArray[np.int64]
    files: NDArray[np.int32]
    turns: NDArray[np.int32]
    turn_offsets: NDArray[np.int64]
    train: NDArray[np.int64]
    evaluation: NDArray[np.int64]
    file_names: tuple[str, ...]

    def tokens(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and weights of example i."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.input_ids[span], self.weights[span]

    def rendered(self, i: int) -> Rendered:
        """Example i with its source."""
        ids, weights = self.tokens(i)
        turns = self.turns[self.turn_offsets[i] : self.turn_offsets[i + 1]]
        source = Source(self.file_names[int(self.files[i])], int(self.lines[i]))
        return Rendered(source, tuple(turns.tolist()), ids.tolist(), weights.tolist())

    def length(self, i: int) -> int:
        """Number of tokens of example i."""
        return int(self.offsets[i + 1] - self.offsets[i])


@dataclass(frozen=True)
class Rows:
    """The rows that a model is given: packed ones, or one example each."""

    examples: Examples
    members: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: int) -> Packed:
        return lay_out([self.examples.tokens(i) for i in self.members[row]])

    @cached_property
    def trained_weights(self) -> list[float]:
        """The sum of loss weights of each row."""
        sums = np.add.reduceat(np.asarray(self.examples.weights, dtype=np.float64), self.examples.offsets[:-1])
        return [float(sum(sums[i] for i in members)) for members in self.members]

    @cached_property
    def num_tokens(self) -> list[int]:
        """The number of tokens of each row."""
        return [sum(self.examples.length(i) for i in members) for members in self.members]

    @cached_property
    def num_trained(self) -> list[int]:
        """The number of supervised tokens of each row."""
        counts = np.add.reduceat((self.examples.weights != 0).astype(np.int64), self.examples.offsets[:-1])
        return [int(sum(counts[i] for i in members)) for members in self.members]

    def trained_weight(self, row: int) -> float:
        """The sum of loss weights of a row: what its step is divided by."""
        return self.trained_weights[row]


@dataclass(frozen=True)
class Dataset:
    """The rendered data of a run and what there is to say about it.

    `fingerprint` names all that went into it; `content` is a hash of what is trained, wherever it was read.
    """

    examples: Examples
    report: dict[str, Any]
    dropped: tuple[dict[str, Any], ...]
    fingerprint: str
    content: str
    tokens_per_row: int
    packing: bool

    @cached_property
    def train(self) -> Rows:
        """The training rows."""
        return self._rows(self.examples.train)

    @cached_property
    def evaluation(self) -> Rows:
        """The evaluation rows; there may be none."""
        return self._rows(self.examples.evaluation)

    def control_tokens_used(self, tokenizer: Tokenizer) -> list[int]:
        """The ids of the control tokens that stand in the training examples, without the end of text."""
        used = set(np.unique(self.examples.input_ids).tolist()) & set(tokenizer.control_ids.values())
        return sorted(used - {tokenizer.end_of_text_id})

    def _rows(self, indices: NDArray[np.int64]) -> Rows:
        chosen = [int(i) for i in indices]
        if not self.packing:
            return Rows(self.examples, tuple((i,) for i in chosen))
        packed = pack([self.examples.length(i) for i in chosen], self.tokens_per_row)
        return Rows(self.examples, tuple(tuple(chosen[k] for k in row) for row in packed))


def prepare(data: DataOptions, tokenizer: Tokenizer, template: ChatTemplate | None, seed: int) -> Dataset:
    """The rendered data of a run, from the cache where the same was rendered before.

    Raises DataError with every problem of every file, before anything is written.
    """
    fingerprint = _fingerprint(data, tokenizer, template, seed)
    folder = cache_folder() / "data" / fingerprint
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():  # another process may have rendered it meanwhile
                _publish(_build(data, tokenizer, template, seed), folder)
    return _open(folder, fingerprint, data)


def prepared(data: DataOptions, tokenizer: Tokenizer, template: ChatTemplate | None, seed: int) -> Dataset | None:
    """The same data where it stands in the cache already, else None; renders nothing."""
    try:
        fingerprint = _fingerprint(data, tokenizer, template, seed)
    except DataError:
        return None
    folder = cache_folder() / "data" / fingerprint
    return _open(folder, fingerprint, data) if folder.exists() else None


def chat_template(data: DataOptions, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of this run: `data.chat_template` where given, else the checkpoint's own; None where it has none.

    Raises RecipeError where the file cannot be read.
    """
    if data.chat_template is not None:
        try:
            text: str | None = Path(data.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = f"{data.chat_template!r} cannot be read: {error}"
            raise RecipeError(Problem("data.chat_template", what, "Name a file with a Jinja template.")) from None
    else:
        text = tokenizer.chat_template
    return None if text is None else ChatTemplate(text, tokenizer.special_tokens, data.template_args)


def _fingerprint(data: DataOptions, tokenizer: Tokenizer, template: ChatTemplate | None, seed: int) -> str:
    sources = [*data.train, *(data.evaluation or ())]
    parts = {
        "format": CACHE_FORMAT,
        "options": {k: v for k, v in data.model_dump(mode="json").items() if k not in {"packing", "chat_template"}},
        "contents": [content_sha256(source.path) for source in sources],
        "tokenizer": tokenizer.fingerprint,
        "template": None if template is None else template.text,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Built:
    rendered: list[Rendered]
    train: list[int]
    evaluation: list[int]
    dropped: list[Dropped]
    report: dict[str, Any]


def _build(data: DataOptions, tokenizer: Tokenizer, template: ChatTemplate | None, seed: int) -> _Built:
    options = RenderOptions(
        max_tokens=data.max_tokens,
        thinking=data.thinking,
        turns=data.turns,
        too_long=data.too_long,
        unsupported_reasoning=data.unsupported_reasoning,
        system=data.system,
    )
    renderer = Renderer(tokenizer, template, options)
    report = Report(tokenizer, template, data.thinking)
    problems: list[Problem] = []
    rendered: list[Rendered] = []
    groups: list[list[list[int]]] = []  # per source and sample: the indices of its examples
    dropped: list[Dropped] = []
    refused: list[Dropped] = []  # rows that are wrong
    for source in [*data.train, *(data.evaluation or ())]:
        samples: list[list[int]] = []
        num_problems = len(problems)
        for sample in read_samples(source.path, source.format, problems):
            outcome = renderer.render(sample)
            report.add(outcome)
            problems.extend(outcome.problems)
            dropped.extend(outcome.dropped)
            if outcome.examples:
                samples.append(list(range(len(rendered), len(rendered) + len(outcome.examples))))
                rendered.extend(outcome.examples)
        groups.append(samples)
        refused += [
            Dropped(_source_of(problem, source.path), None, problem.what) for problem in problems[num_problems:]
        ]
    if problems and data.bad_rows == "error":
        raise DataError(problems)
    dropped += refused
    _refuse_losses(data, report, dropped, problems)
    train, evaluation = _split(data, groups, seed)
    if not train:
        raise DataError(Problem(data.train[0].path, "no row is left to train on", "See the problems above."))
    return _Built(rendered, train, evaluation, dropped, report.finish(rendered, train, evaluation, dropped))


def _source_of(problem: Problem, file: str) -> Source:
    digits = problem.where.removeprefix(f"{file}:").split(":")[0]
    return Source(file, int(digits) if digits.isdigit() else 0)


def _refuse_losses(data: DataOptions, report: Report, dropped: Sequence[Dropped], problems: Sequence[Problem]) -> None:
    num_lost = len({(drop.source, drop.turn) for drop in dropped})
    fraction = num_lost / max(1, num_lost + report.num_trained_turns)
    if fraction > data.max_dropped_fraction:
        first = ", ".join(str(drop.source) for drop in dropped[:3])
        what = (
            f"{num_lost} of {num_lost + report.num_trained_turns} turns ({fraction:.1%}) would not be trained, more "
            f"than data.max_dropped_fraction={data.max_dropped_fraction}; the first: {first} ({dropped[0].reason})"
        )
        fix = "Raise data.max_tokens, mend the rows, or allow more with data.max_dropped_fraction."
        raise DataError([*problems, Problem(data.train[0].path, what, fix)])


def _split(data: DataOptions, groups: list[list[list[int]]], seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and evaluation examples; whole dialogues go to one side, before anything is repeated."""
    train: list[int] = []
    evaluation = [i for samples in groups[len(data.train) :] for sample in samples for i in sample]
    sizes = [len(samples) for samples in groups[: len(data.train)]]
    chosen = set(_choice(sum(sizes), data.eval_fraction, seed))
    first = 0
    for number, (source, samples) in enumerate(zip(data.train, groups, strict=False)):
        kept = [sample for k, sample in enumerate(samples, first) if k not in chosen]
        evaluation += [i for k, sample in enumerate(samples, first) if k in chosen for i in sample]
        first += len(samples)
        for sample in _repeated(kept, source, seed + number):
            train += sample
    return train, evaluation


def _choice(count: int, fraction: float, seed: int) -> list[int]:
    size = 0 if fraction == 0 or count < 2 else min(count - 1, max(1, round(fraction * count)))
    return [int(i) for i in np.random.default_rng([seed, 0xE7A1]).permutation(count)[:size]]


def _repeated(samples: list[list[int]], source: DataSource, seed: int) -> Iterator[list[int]]:
    whole = int(source.repeat)
    for _ in range(whole):
        yield from samples
    size = round((source.repeat - whole) * len(samples))
    for k in sorted(np.random.default_rng([seed, 0x5EED]).permutation(len(samples))[:size]):
        yield samples[int(k)]


def _publish(built: _Built, folder: Path) -> None:
    files = {name: k for k, name in enumerate(dict.fromkeys(example.source.file for example in built.rendered))}
    rendered = built.rendered
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": np.concatenate([np.asarray(example.input_ids, dtype=np.int32) for example in rendered]),
        "weights": np.concatenate([np.asarray(example.weights, dtype=np.float32) for example in rendered]),
        "offsets": np.cumsum([0] + [len(example.input_ids) for example in rendered], dtype=np.int64),
        "lines": np.asarray([example.source.line for example in rendered], dtype=np.int64),
        "files": np.asarray([files[example.source.file] for example in rendered], dtype=np.int32),
        "turns": np.asarray([turn for example in rendered for turn in example.turns], dtype=np.int32),
        "turn_offsets": np.cumsum([0] + [len(example.turns) for example in rendered], dtype=np.int64),
        "train": np.asarray(built.train, dtype=np.int64),
        "evaluation": np.asarray(built.evaluation, dtype=np.int64),
    }
    content = hashlib.sha256()
    for name in ("input_ids", "weights", "offsets", "train"):
        content.update(np.ascontiguousarray(arrays[name]).data)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        for name in ARRAYS:
            np.save(staging / f"{name}.npy", arrays[name], allow_pickle=False)
        description = {
            "file_names": list(files),
            "content": content.hexdigest()[:32],
            "report": built.report,
            "dropped": [{**asdict(drop), "source": asdict(drop.source)} for drop in built.dropped],
        }
        (staging / "description.json").write_text(json.dumps(description, ensure_ascii=False))
        os.rename(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _open(folder: Path, fingerprint: str, data: DataOptions) -> Dataset:
    description = json.loads((folder / "description.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
    examples = Examples(**arrays, file_names=tuple(description["file_names"]))
    return Dataset(
        examples=examples,
        report=description["report"],
        dropped=tuple(description["dropped"]),
        fingerprint=fingerprint,
        content=description["content"],
        tokens_per_row=data.max_tokens,
        packing=data.packing,
    )
