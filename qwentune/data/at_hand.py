"""What the data of a recipe tells where it is at hand: nothing is rendered and nothing fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from qwentune.data.cache import cache_folder
from qwentune.data.dataset import Dataset, chat_template, prepared
from qwentune.data.formats.samples import NUM_ROWS_LOOKED_AT, format_of_source, read_samples, refuse_untrained
from qwentune.data.layout.row_media import RowMedia
from qwentune.data.reading.columns import Columns
from qwentune.data.reading.files import is_at_hand
from qwentune.data.sample import Conversation
from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import DataError, UsageError
from qwentune.facts.architecture import ModelSpec
from qwentune.recipe import DataOptions, DataSource, Recipe


def rendered(recipe: Recipe) -> Dataset | None:
    """The data as an earlier command has rendered it; None where it was not, or where its tokenizer is not here."""
    if not (cache_folder() / "data").is_dir():  # no data was rendered yet; the rest takes its time
        return None
    try:
        tokenizer = load_tokenizer(checkpoint_folder(recipe.model, recipe.revision, fetches=False))
    except UsageError:
        return None
    template = chat_template(recipe.data, tokenizer)
    return prepared(recipe.data, tokenizer, template, recipe.seed, shares_prefixes=recipe.memory.shares_prefixes)


def refuse_untrained_rows(data: DataOptions) -> None:
    """Raises DataError naming every source of a format that nothing trains, given or seen in the first rows of a file.

    What else is wrong with a file is said where its rows are read.
    """
    known: list[DataSource] = []
    for source in data.sources:
        with suppress(DataError):
            if source.format != "auto" or is_at_hand(source.path):
                known.append(source.model_copy(update={"format": format_of_source(source)}))
    refuse_untrained(known)


def show_media(data: DataOptions) -> bool:
    """Whether one of the first rows of a source that is at hand has media."""
    return any(message.media for sample in _first_dialogues(data) for message in sample.messages)


def first_question(data: DataOptions) -> str | None:
    """The text with which the first dialogue that is at hand begins; None where none begins with a text alone."""
    first = next(_first_dialogues(data), None)
    spoken = [] if first is None else [message for message in first.messages if message.role != "system"]
    is_text = len(spoken) > 1 and spoken[0].role == "user" and not spoken[0].media
    return spoken[0].content if is_text else None


def _first_dialogues(data: DataOptions) -> Iterator[Conversation]:
    """The dialogues among the first rows of each source that is at hand and can be read."""
    for source in data.sources:
        with suppress(DataError):
            if is_at_hand(source.path):
                samples = read_samples(source.path, source.format, [], columns=Columns.of(source))
                yield from (one for one in islice(samples, NUM_ROWS_LOOKED_AT) if isinstance(one, Conversation))


def largest_media(recipe: Recipe, spec: ModelSpec) -> RowMedia | None:
    """The most that a row of the rendered data shows of media; None where it is not at hand."""
    dataset = None if spec.tower is None else rendered(recipe)
    return None if dataset is None else dataset.largest_media


def longest_row(recipe: Recipe) -> int | None:
    """The most tokens of a row of the rendered data; None where it is not at hand, or where rows are packed full."""
    dataset = None if recipe.data.packing else rendered(recipe)
    return None if dataset is None else dataset.longest_row
