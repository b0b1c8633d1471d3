"""The data of a run, rendered once: read, render, split, store; later starts open what was stored."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from array import array
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwentune.bounded import UnreadableError, read_text
from qwentune.console import busy, say
from qwentune.data.blocks import READ_OTHERWISE, BlockRenderer, render_source, source_of
from qwentune.data.cache import alone, cache_folder
from qwentune.data.layout.media_table import RunMedia
from qwentune.data.layout.row_media import RowMedia, most
from qwentune.data.layout.rows import Rows, Trie, packed_rows
from qwentune.data.layout.split import copies, dialogues, fates, logged_again, split, untrained_sources
from qwentune.data.layout.store import Examples, ExampleWriter, open_sealed, seal
from qwentune.data.layout.sums import DamagedError, StaleError
from qwentune.data.media.limits import MediaLimits, limits_if_needed
from qwentune.data.media.pixels import refuse_without_room
from qwentune.data.reading.faults import Unread, Waiting
from qwentune.data.reading.files import Content, content_of, is_at_hand
from qwentune.data.rendering.grammar import ReadOtherwiseError
from qwentune.data.rendering.outcome import Dropped
from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.report import NUM_PLACES, Report, with_separate_examples
from qwentune.data.templates.chat_template import ChatTemplate, refuse_broken_template
from qwentune.data.tokenizing.tokenizer import Tokenizer
from qwentune.data.workers import Workers
from qwentune.durable import mark, move_aside, remove, replace_folder
from qwentune.errors import FULL, DataError, DoesNotFitError, Problem, RecipeError, UsageError
from qwentune.facts.documents import LARGEST_TEMPLATE_BYTES, read_object
from qwentune.facts.media import FAMILIES
from qwentune.recipe import DataOptions

CACHE_FORMAT = 19  # raise it whenever rendering or storing changes what stands in the cache
ANOTHER_CACHE = "Name another cache folder with the variable QWENTUNE_CACHE."


@dataclass(frozen=True)
class Dataset:
    """The rendered data of a run and what there is to say about it.

    `fingerprint` names all that went into it; `content` is a hash of what is trained, wherever it was read;
    `control_ids_used` are the control tokens that stand in the examples, without the end of text. With packing, the
    examples of a dialogue stand in a row as one tree where it `shares_prefixes`, else apart. `media` are those that the
    examples show; None: they show none.
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
    media: RunMedia | None = None

    @cached_property
    def train(self) -> Rows:
        """The training rows, version after version."""
        versions = self.examples.versions[self.examples.train]
        blocks = [
            self._rows(self.examples.train[(versions == version) | (versions < 0)])
            for version in range(max(1, int(versions.max(initial=0)) + 1))
        ]
        members = [block for block in blocks if block]
        return Rows(self.examples, tuple(chain.from_iterable(members)), tuple(map(len, members)), self.media)

    @cached_property
    def first_epoch(self) -> NDArray[np.int64]:
        """The examples of the first epoch, in order."""
        return self.examples.train[self.examples.versions[self.examples.train] <= 0]

    @cached_property
    def evaluation(self) -> Rows:
        """The evaluation rows; there may be none."""
        rows = self._rows(self.examples.evaluation)
        return Rows(self.examples, tuple(rows), (len(rows),), self.media)

    @property
    def longest_row(self) -> int:
        """The most tokens that a row may have: as many as are packed into one, else those of the longest example."""
        if self.packing:
            return self.tokens_per_row
        used = np.concatenate([self.examples.train, self.examples.evaluation])
        return int(self.examples.lengths[used].max())

    @cached_property
    def largest_media(self) -> RowMedia:
        """The most that a row shows of pictures, videos and sounds."""
        return RowMedia() if self.media is None else most([*self.train.shown, *self.evaluation.shown])

    def _rows(self, indices: NDArray[np.int64]) -> list[tuple[Trie, ...]]:
        chosen = [int(i) for i in indices]
        if not self.packing:
            return [((i,),) for i in chosen]
        return packed_rows(self.examples, chosen, self.tokens_per_row, self.shares_prefixes)


@busy("looking at the data")
def prepare(
    data: DataOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seed: int,
    *,
    shares_prefixes: bool = True,
) -> Dataset:
    """The rendered data of a run, from the cache where the same was rendered before and is what was written.

    Raises DataError with every problem of every file, before anything is written; UsageError or DoesNotFitError where
    the cache does not take the data.
    """
    contents = _contents(data)
    fingerprint = _fingerprint(data, tokenizer, template, seed, contents)
    cache = cache_folder()
    folder = cache / "data" / fingerprint
    with suppress(DamagedError):  # or not there yet: what is to be done, one process does alone
        return _open(folder, fingerprint, data, tokenizer, shares_prefixes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if os.path.lexists(folder):  # another process may have rendered it meanwhile
                try:
                    return _open(folder, fingerprint, data, tokenizer, shares_prefixes)
                except DamagedError as damage:
                    _set_aside(folder, damage)
            _publish(data, tokenizer, template, seed, contents, folder, fingerprint)
            return _open(folder, fingerprint, data, tokenizer, shares_prefixes)
    except DamagedError as damage:
        what = f"what was written for {folder} reads back otherwise: {damage}"
        raise UsageError(Problem(str(cache), what, f"The disk seems to be at fault. {ANOTHER_CACHE}")) from None
    except OSError as error:
        full = error.errno in FULL
        fix = f"Make room. {ANOTHER_CACHE}" if full else ANOTHER_CACHE
        problem = Problem(str(cache), f"the data cache cannot be written: {error.strerror or error}", fix)
        raise (DoesNotFitError if full else UsageError)(problem) from None


@busy("looking at the data")
def prepared(
    data: DataOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seed: int,
    *,
    shares_prefixes: bool = True,
) -> Dataset | None:
    """The same data where it stands in the cache already, else None; renders and fetches nothing."""
    if not all(is_at_hand(source.path) for source in data.sources):
        return None
    try:
        fingerprint = _fingerprint(data, tokenizer, template, seed, _contents(data))
    except DataError:
        return None
    folder = cache_folder() / "data" / fingerprint
    if not os.path.lexists(folder):
        return None
    try:
        return _open(folder, fingerprint, data, tokenizer, shares_prefixes)
    except DamagedError as damage:
        state = "is of before" if isinstance(damage, StaleError) else "is damaged"
        say(f"the rendered data in {folder} {state}: {damage}. Planned without it; a preview renders it again")
        return None


def chat_template(data: DataOptions, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of this run: `data.chat_template` where given, else the checkpoint's own; None where it has none.

    Raises RecipeError where the file cannot be read, or holds no template.
    """
    if data.chat_template is not None:
        try:
            text: str | None = read_text(Path(data.chat_template), LARGEST_TEMPLATE_BYTES)
        except UnreadableError as error:
            what = f"{data.chat_template!r}: {error}"
            raise RecipeError(Problem("data.chat_template", what, "Name a file with a Jinja template.")) from None
    else:
        text = tokenizer.chat_template
    if text is None:
        return None
    refuse_broken_template(text, data.chat_template or tokenizer.template_file)
    return ChatTemplate(text, tokenizer.special_tokens, data.template_args)


def _fingerprint(
    data: DataOptions, tokenizer: Tokenizer, template: ChatTemplate | None, seed: int, contents: Mapping[str, Content]
) -> str:
    limits = limits_of(data, tokenizer)
    # Where media may lie: the same rows beside other files are other data.
    places = [] if limits is None else [os.getcwd(), *(os.path.abspath(source.path) for source in data.sources)]
    options = data.model_copy(update={"media": data.media.model_copy(update={"cache": "none"})}).model_dump(mode="json")
    parts = {
        "format": CACHE_FORMAT,
        "options": {k: v for k, v in options.items() if k not in {"packing", "chat_template"}},
        "contents": [contents[source.path].fingerprint for source in data.sources],
        "tokenizer": tokenizer.fingerprint,
        "template": None if template is None else template.text,
        "media": [repr(limits), *places],
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def limits_of(data: DataOptions, tokenizer: Tokenizer) -> MediaLimits | None:
    """What the checkpoint of a tokenizer takes of media; None where it takes text alone."""
    folder = Path(tokenizer.folder)
    try:
        model_type = read_object(folder / "config.json").get("model_type")
    except UsageError:
        return None  # what is wrong with that file is said by those who need it
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return None if family is None else limits_if_needed(folder, family, data.media)


def _contents(data: DataOptions) -> dict[str, Content]:
    """What each file holds; DataError with every file that cannot be read."""
    contents: dict[str, Content] = {}
    problems: list[Problem] = []
    for path in dict.fromkeys(source.path for source in data.sources):
        try:
            contents[path] = content_of(path)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return contents


def _set_aside(folder: Path, damage: DamagedError) -> None:
    """Moves a damaged folder out of the way; who has it open goes on with the files it opened."""
    if isinstance(damage, StaleError):
        remove(folder)
        say(f"{damage}. It is rendered again")
        return
    aside = move_aside(folder, f"{folder.name}.damaged")
    say(f"the rendered data in {folder} is damaged: {damage}. It was moved to {aside.name}, and is rendered again")


def _publish(
    data: DataOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seed: int,
    contents: Mapping[str, Content],
    folder: Path,
    fingerprint: str,
) -> None:
    staging = folder.with_name(f".building-{folder.name}")  # of one name: the next one clears what a kill leaves
    remove(staging)
    try:
        mark(staging)
        with ExampleWriter(staging, tokenizer.control_ids.values()) as writer, _no_garbage():
            description = _build(data, tokenizer, template, seed, contents, writer)
        seal(staging, {"fingerprint": fingerprint, **description})
        replace_folder(staging, folder)
    except BaseException:
        with suppress(OSError):
            remove(staging)
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
    data: DataOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seed: int,
    contents: Mapping[str, Content],
    writer: ExampleWriter,
) -> dict[str, Any]:
    """What is to be known of the examples that were written."""
    options = RenderOptions(
        max_tokens=data.max_tokens,
        thinking=data.thinking,
        turns=data.turns,
        too_long=data.too_long,
        unsupported_reasoning=data.unsupported_reasoning,
        system=data.system,
        secrets=data.secrets,
        fim=data.fim,
        seed=seed,
    )
    report = Report(tokenizer=tokenizer, template=template, thinking=data.thinking)
    problems: list[Problem] = []
    groups: list[NDArray[np.int64]] = []  # per source: where the examples of each sample begin, and where the last end
    dropped: list[Dropped] = []
    refused: list[Dropped] = []  # rows that are wrong
    versions = array("h")  # of the examples
    identities, lines = array("q"), array("q")  # of the samples that have examples
    warnings: list[str] = []
    answers, before = array("Q"), array("Q")  # of logged calls: fingerprints with their answer, and with that before it
    sources = data.sources
    with Workers(BlockRenderer(Renderer(tokenizer, template, options, limits=limits_of(data, tokenizer)))) as workers:
        for number, source in enumerate(sources):
            mark, content = writer.mark(), contents[source.path]
            try:
                rendered, count = render_source(source, number, content, workers, writer)
            except ReadOtherwiseError as difference:
                writer.take_back(mark)
                rendered, count = render_source(source, number, content, workers, writer, by_rule=True)
                warnings.append(READ_OTHERWISE.format(source.path, difference))
            groups.append(mark.num_examples + np.asarray([*rendered.begins, len(rendered.versions)], dtype=np.int64))
            versions.extend(rendered.versions)
            identities.extend(rendered.identities)
            lines.extend(rendered.lines)
            answers.extend(rendered.answers)
            before.extend(rendered.before)
            report.merge(rendered.tally)
            problems += rendered.problems
            dropped += rendered.dropped
            refused += [Dropped(source_of(one, source.path), None, one.what) for one in rendered.problems]
            if not any(isinstance(problem, Unread) for problem in problems):  # else there is no telling, and no run
                report.end_source(source.path, count)
    if problems and (data.bad_rows == "error" or any(isinstance(problem, Unread) for problem in problems)):
        raise DataError(problems)
    dropped += refused
    _refuse_losses(data, report, dropped, problems)
    first_calls = dialogues(np.asarray(answers), np.asarray(before))
    files = np.repeat(np.arange(len(sources)), [len(begins) - 1 for begins in groups])
    again = logged_again(np.asarray(identities), np.asarray(answers), int((files < len(data.train)).sum()))
    train, evaluation = split(data, groups, first_calls, again, seed)
    once = np.asarray(versions) <= 0
    evaluation = evaluation[once[evaluation]]
    if not len(train):
        fix = "Give rows with a turn that is trained, or raise `repeat` where it takes no row."
        raise DataError(Problem(data.train[0].path, "no row is left to train on", fix))
    report.end(fates(groups, train, evaluation, again))
    found = copies(np.asarray(identities), groups, evaluation, again) | {"calls_logged_again": np.flatnonzero(again)}
    same = {
        name: (len(samples), [f"{sources[files[k]].path}:{lines[k]}" for k in samples[:NUM_PLACES].tolist()])
        for name, samples in found.items()
    }
    going_on = int(((first_calls != np.arange(len(first_calls))) & ~again).sum())
    calls = {"logged_calls": int(np.count_nonzero(answers)), "calls_going_on": going_on}
    finished = report.finish(int(once[train].sum()), len(evaluation), dropped, same, calls)
    finished["warnings"] += [*untrained_sources(data, groups, train, evaluation, again), *warnings]
    return {
        "content": writer.finish(train, evaluation, [one for one in problems if isinstance(one, Waiting)]),
        "file_names": list(writer.file_names),
        "control_ids_used": sorted(writer.control_ids_used - {tokenizer.end_of_text_id}),
        "report": finished,
        "dropped": [{**asdict(drop), "source": asdict(drop.source)} for drop in dropped],
    }


def _refuse_losses(data: DataOptions, report: Report, dropped: Sequence[Dropped], problems: Sequence[Problem]) -> None:
    dropped = [drop for drop in dropped if drop.kind != "not asked for"]
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


def _open(folder: Path, fingerprint: str, data: DataOptions, tokenizer: Tokenizer, shares_prefixes: bool) -> Dataset:
    description, examples = open_sealed(folder, fingerprint)
    media, keeps_pixels = None, data.media.cache == "pixels"
    if examples.media and (limits := limits_of(data, tokenizer)) is not None:
        media = RunMedia.of(examples.media, limits, tokenizer.control_ids, folder, keeps_pixels=keeps_pixels)
        if keeps_pixels:
            refuse_without_room(examples.media, limits)
    shares = data.packing and shares_prefixes
    return Dataset(
        examples=examples,
        report=description["report"] if shares else with_separate_examples(description["report"]),
        dropped=tuple(description["dropped"]),
        fingerprint=fingerprint,
        content=description["content"],
        control_ids_used=tuple(description["control_ids_used"]),
        tokens_per_row=data.max_tokens,
        packing=data.packing,
        shares_prefixes=shares,
        media=media,
    )
