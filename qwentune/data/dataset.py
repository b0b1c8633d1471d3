"""The data of a run, rendered once: read, render, split, store; later starts open what was stored."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from qwentune.data.checkpoint import cache_folder
from qwentune.data.files import content_sha256, is_at_hand
from qwentune.data.outcome import Dropped
from qwentune.data.read import read_samples
from qwentune.data.render import Renderer, RenderOptions
from qwentune.data.report import Report, with_separate_examples
from qwentune.data.rows import Rows, Trie, packed_rows
from qwentune.data.sample import Source
from qwentune.data.store import Examples, ExampleWriter
from qwentune.data.template import ChatTemplate, refuse_broken_template
from qwentune.data.tokenizer import Tokenizer
from qwentune.durable import replace_folder
from qwentune.errors import DataError, Problem, RecipeError
from qwentune.recipe import DataOptions

CACHE_FORMAT = 10  # raise it whenever rendering or storing changes what stands in the cache


@dataclass(frozen=True)
class Dataset:
    """The rendered data of a run and what there is to say about it.

    `fingerprint` names all that went into it; `content` is a hash of what is trained, wherever it was read;
    `control_ids_used` are the control tokens that stand in the examples, without the end of text. With packing, the
    examples of a dialogue stand in a row as one tree where it `shares_prefixes`, else apart.
    """

    examples: Examples
    report: dict[str, Any]
    dropped: tuple[dict[str, Any], ...]
    fingerprint: str
    content: str
    control_ids_used: tuple[int, ...]
    tokens_per_row: int
    packing: bool
    shares_prefixes: bool

    @cached_property
    def train(self) -> Rows:
        """The training rows, version after version."""
        versions = self.examples.versions[self.examples.train]
        blocks = [
            self._rows(self.examples.train[(versions == version) | (versions < 0)])
            for version in range(max(1, int(versions.max(initial=0)) + 1))
        ]
        members = [block for block in blocks if block]
        return Rows(self.examples, tuple(chain.from_iterable(members)), tuple(map(len, members)))

    @cached_property
    def first_epoch(self) -> NDArray[np.int64]:
        """The examples of the first epoch, in order."""
        return self.examples.train[self.examples.versions[self.examples.train] <= 0]

    @cached_property
    def evaluation(self) -> Rows:
        """The evaluation rows; there may be none."""
        rows = self._rows(self.examples.evaluation)
        return Rows(self.examples, tuple(rows), (len(rows),))

    def _rows(self, indices: NDArray[np.int64]) -> list[tuple[Trie, ...]]:
        chosen = [int(i) for i in indices]
        if not self.packing:
            return [((i,),) for i in chosen]
        return packed_rows(self.examples, chosen, self.tokens_per_row, self.shares_prefixes)


def prepare(
    data: DataOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seed: int,
    *,
    shares_prefixes: bool = True,
) -> Dataset:
    """The rendered data of a run, from the cache where the same was rendered before.

    Raises DataError with every problem of every file, before anything is written.
    """
    fingerprint = _fingerprint(data, tokenizer, template, seed)
    folder = cache_folder() / "data" / fingerprint
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():  # another process may have rendered it meanwhile
                _publish(data, tokenizer, template, seed, folder)
    return _open(folder, fingerprint, data, shares_prefixes)


def prepared(
    data: DataOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seed: int,
    *,
    shares_prefixes: bool = True,
) -> Dataset | None:
    """The same data where it stands in the cache already, else None; renders and fetches nothing."""
    if not all(is_at_hand(source.path) for source in (*data.train, *(data.evaluation or ()))):
        return None
    try:
        fingerprint = _fingerprint(data, tokenizer, template, seed)
    except DataError:
        return None
    folder = cache_folder() / "data" / fingerprint
    return _open(folder, fingerprint, data, shares_prefixes) if folder.exists() else None


def chat_template(data: DataOptions, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of this run: `data.chat_template` where given, else the checkpoint's own; None where it has none.

    Raises RecipeError where the file cannot be read, or holds no template.
    """
    if data.chat_template is not None:
        try:
            text: str | None = Path(data.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = f"{data.chat_template!r} cannot be read: {error}"
            raise RecipeError(Problem("data.chat_template", what, "Name a file with a Jinja template.")) from None
    else:
        text = tokenizer.chat_template
    if text is None:
        return None
    refuse_broken_template(text, data.chat_template or tokenizer.template_file)
    return ChatTemplate(text, tokenizer.special_tokens, data.template_args)


def _fingerprint(data: DataOptions, tokenizer: Tokenizer, template: ChatTemplate | None, seed: int) -> str:
    sources = [*data.train, *(data.evaluation or ())]
    parts = {
        "format": CACHE_FORMAT,
        "options": {k: v for k, v in data.model_dump(mode="json").items() if k not in {"packing", "chat_template"}},
        "contents": _contents([source.path for source in sources]),
        "tokenizer": tokenizer.fingerprint,
        "template": None if template is None else template.text,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _contents(paths: Sequence[str]) -> list[str]:
    """The hash of each file; DataError with every file that cannot be read."""
    hashes: list[str] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            hashes.append(content_sha256(path))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return hashes


def _publish(data: DataOptions, tokenizer: Tokenizer, template: ChatTemplate | None, seed: int, folder: Path) -> None:
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        with ExampleWriter(staging, tokenizer.control_ids.values()) as writer, _no_garbage():
            description = _build(data, tokenizer, template, seed, writer)
        (staging / "description.json").write_text(json.dumps(description, ensure_ascii=False))
        replace_folder(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def _no_garbage() -> Generator[None]:
    """Stops the search for cyclic garbage: it would walk through all tokens in memory again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _build(
    data: DataOptions, tokenizer: Tokenizer, template: ChatTemplate | None, seed: int, writer: ExampleWriter
) -> dict[str, Any]:
    """What is to be known of the examples that were written."""
    options = RenderOptions(
        max_tokens=data.max_tokens,
        thinking=data.thinking,
        turns=data.turns,
        too_long=data.too_long,
        unsupported_reasoning=data.unsupported_reasoning,
        system=data.system,
        fim=data.fim,
        seed=seed,
    )
    renderer = Renderer(tokenizer, template, options)
    report = Report(tokenizer, template, data.thinking)
    problems: list[Problem] = []
    groups: list[NDArray[np.int64]] = []  # per source: where the examples of each sample begin, and where the last end
    dropped: list[Dropped] = []
    refused: list[Dropped] = []  # rows that are wrong
    versions = array("h")  # of the examples
    identities = array("q")  # of the samples that have examples
    for number, source in enumerate([*data.train, *(data.evaluation or ())]):
        begins = array("q", [writer.num_examples])
        faults: list[Problem] = []
        for outcome in renderer.render_all(read_samples(source.path, source.format, faults), number):
            report.add(outcome)
            faults.extend(outcome.problems)
            dropped.extend(outcome.dropped)
            if outcome.examples:
                writer.add(outcome.examples)
                versions.extend(example.version for example in outcome.examples)
                begins.append(writer.num_examples)
                identities.append(outcome.identity)
        groups.append(np.asarray(begins, dtype=np.int64))
        # Rows are read ahead of what is rendered.
        faults.sort(key=lambda problem: _source_of(problem, source.path).line)
        problems += faults
        refused += [Dropped(_source_of(problem, source.path), None, problem.what) for problem in faults]
    if problems and data.bad_rows == "error":
        raise DataError(problems)
    dropped += refused
    _refuse_losses(data, report, dropped, problems)
    train, evaluation = _split(data, groups, seed)
    once = np.asarray(versions) <= 0
    evaluation = evaluation[once[evaluation]]
    if not len(train):
        fix = "Give rows with a turn that is trained, or raise `repeat` where it takes no row."
        raise DataError(Problem(data.train[0].path, "no row is left to train on", fix))
    copies = _copies(np.asarray(identities), groups, evaluation)
    finished = report.finish(int(once[train].sum()), len(evaluation), dropped, copies)
    finished["warnings"] += _untrained_sources(data, groups, train, evaluation)
    return {
        "content": writer.finish(train, evaluation),
        "file_names": list(writer.file_names),
        "control_ids_used": sorted(writer.control_ids_used - {tokenizer.end_of_text_id}),
        "report": finished,
        "dropped": [{**asdict(drop), "source": asdict(drop.source)} for drop in dropped],
    }


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


def _split(
    data: DataOptions, groups: Sequence[NDArray[np.int64]], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of training and evaluation examples; whole dialogues go to one side, before anything is repeated."""
    sizes = [len(begins) - 1 for begins in groups[: len(data.train)]]
    held_out = np.zeros(sum(sizes), dtype=bool)
    held_out[_choice(sum(sizes), data.eval_fraction, seed)] = True
    train: list[NDArray[np.int64]] = []
    evaluation = [np.arange(begins[0], begins[-1], dtype=np.int64) for begins in groups[len(data.train) :]]
    for number, (source, begins, out) in enumerate(
        zip(data.train, groups, np.split(held_out, np.cumsum(sizes)), strict=False)
    ):
        evaluation.append(_examples_of(begins, np.flatnonzero(out)))
        train.append(_examples_of(begins, _repeated(np.flatnonzero(~out), source.repeat, seed + number)))
    return np.concatenate(train), np.concatenate(evaluation)


def _untrained_sources(
    data: DataOptions, groups: Sequence[NDArray[np.int64]], train: NDArray[np.int64], evaluation: NDArray[np.int64]
) -> list[str]:
    """A warning for each source that has rows to train and none of them is."""
    warnings: list[str] = []
    for source, begins in zip(data.train, groups, strict=False):
        num_left = len(begins) - 1 - int(np.isin(begins[:-1], evaluation).sum())
        if len(begins) == 1 or np.isin(begins[:-1], train).any():
            continue
        if num_left:
            cause = f"repeat {source.repeat:g} of {num_left} rounds to none. Raise its repeat, or leave it out"
        else:
            cause = f"data.eval_fraction={data.eval_fraction:g} holds out all. Add rows, or name data.eval"
        warnings.append(f"no row of {source.path} is trained: {cause}")
    return warnings


def _copies(
    identities: NDArray[np.int64], groups: Sequence[NDArray[np.int64]], evaluation: NDArray[np.int64]
) -> dict[str, int]:
    """How many samples train what an earlier one trains, and how many are evaluated though they are trained too."""
    is_evaluated = np.isin(np.concatenate([begins[:-1] for begins in groups]), evaluation)
    trained, evaluated = identities[~is_evaluated], identities[is_evaluated]
    overlap = np.isin(evaluated, trained)
    return {"duplicates": len(trained) - len(np.unique(trained)), "eval_overlap": int(overlap.sum())}


def _examples_of(begins: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices of the examples of the given samples, in their order."""
    counts = begins[samples + 1] - begins[samples]
    ends = np.cumsum(counts)
    return np.repeat(begins[samples] - (ends - counts), counts) + np.arange(counts.sum(), dtype=np.int64)


def _choice(count: int, fraction: float, seed: int) -> NDArray[np.int64]:
    size = 0 if fraction == 0 or count < 2 else min(count - 1, max(1, round(fraction * count)))
    return np.random.default_rng([seed, 0xE7A1]).permutation(count)[:size]


def _repeated(samples: NDArray[np.int64], repeat: float, seed: int) -> NDArray[np.int64]:
    whole = int(repeat)
    size = round((repeat - whole) * len(samples))
    some = np.sort(np.random.default_rng([seed, 0x5EED]).permutation(len(samples))[:size])
    return np.concatenate([*[samples] * whole, samples[some]])


def _open(folder: Path, fingerprint: str, data: DataOptions, shares_prefixes: bool) -> Dataset:
    description = json.loads((folder / "description.json").read_text())
    shares = data.packing and shares_prefixes
    return Dataset(
        examples=Examples.open(folder, description["file_names"]),
        report=description["report"] if shares else with_separate_examples(description["report"]),
        dropped=tuple(description["dropped"]),
        fingerprint=fingerprint,
        content=description["content"],
        control_ids_used=tuple(description["control_ids_used"]),
        tokens_per_row=data.max_tokens,
        packing=data.packing,
        shares_prefixes=shares,
    )
