"""The folder of an export: the weights under the names of the class that it declares, and what stands around them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from qwentune import console
from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
from qwentune.errors import DoesNotFitError, Problem, UsageError
from qwentune.exporting.finished import FinishedRun
from qwentune.exporting.merge import merge, tuned_tensors
from qwentune.exporting.omni import is_omni
from qwentune.exporting.package import keep_config, own_limits, stop_token_ids, write_package
from qwentune.exporting.processors import ServerOption, beyond_servers, is_whole, server_options, write_processors
from qwentune.exporting.tensors import ModelTensor
from qwentune.exporting.whole import copy_other_files, is_part, put_back, write_text_part
from qwentune.facts.documents import read_object
from qwentune.facts.present import free_disk_bytes
from qwentune.facts.towers import LOADED_ALONE
from qwentune.facts.weight_files import StoredTensor, read_weights
from qwentune.model.loading import silence_loading, weights_folder
from qwentune.model.part_names import name_as_whole
from qwentune.recipe import MediaOptions


def write_folder(
    run: FinishedRun, target: Path, *, merges: bool, text_only: bool = False, elsewhere: str = "-o"
) -> None:
    """Writes what was tuned into the folder `target`: adapters, or with `merges` and after full tuning a whole model.

    With `text_only` only the part of such a model that reads and writes text. Raises UsageError where it has no such
    part, DoesNotFitError where a merged model has no room (`elsewhere` names another disk), ResumeError where its
    weights cannot be merged.
    """
    described = checkpoint_folder(run.model, run.revision)
    if text_only and read_object(described / "config.json").get("model_type") not in LOADED_ALONE:
        what = f"{run.model} has no text part that transformers and servers load as a model of its own"
        raise UsageError(Problem("--text-only", what, "Leave it out."))
    if text_only:
        _write_text_part(run, target, elsewhere)
    elif merges and run.has_adapter:
        _write_merged(run, target, elsewhere)
    else:
        _write_trained(run, described, target, elsewhere)
    copy_model_card(run, target)


def copy_model_card(run: FinishedRun, target: Path) -> None:
    """Copies the model card that stands in the run folder; says where there is none."""
    if (run.folder / "README.md").is_file():
        shutil.copyfile(run.folder / "README.md", target / "README.md")
    else:
        console.say(f"warning: {run.folder / 'README.md'} is missing: there is no model card to export")


def media_options(run: FinishedRun, target: Path) -> list[ServerOption]:
    """What vLLM must be told of media; says what no option tells it."""
    if not is_whole(target):
        return []
    base = checkpoint_folder(run.model, run.revision)
    kinds = run.report.get("media", {})
    for remark in filter(None, (beyond_servers(base, run.data.media, kinds), own_limits(run.report))):
        console.say(f"warning: {remark}")
    return server_options(base, run.data.media, kinds, has_files=(target / "config.json").exists())


def _write_trained(run: FinishedRun, described: Path, target: Path, elsewhere: str) -> None:
    base = None
    if not run.has_adapter:
        base = weights_folder(run.model, run.revision) if is_part(run.trained, described) else None
        refuse_full_disk([run.trained, *([base] if base else ())], target, elsewhere)
    shutil.copytree(run.trained, target, dirs_exist_ok=True)
    if run.has_adapter:
        name_as_whole(target, described)
    elif base:
        _put_back(base, target)


def _write_text_part(run: FinishedRun, target: Path, elsewhere: str) -> None:
    silence_loading()
    base = weights_folder(run.model, run.revision)
    if run.has_adapter:
        tensors = tuned_tensors(base, run.trained)
    else:
        tensors = {name: ModelTensor(tensor) for name, tensor in read_weights(run.trained).items()}
    refuse_full_disk([base if run.has_adapter else run.trained], target, elsewhere)
    write_text_part(tensors, base, target)
    _write_around(run, base, target)


def _write_merged(run: FinishedRun, target: Path, elsewhere: str) -> None:
    silence_loading()
    base = weights_folder(run.model, run.revision)
    refuse_full_disk([base], target, elsewhere)
    merge(base, run.trained, target)
    _write_around(run, base, target)
    if is_omni(base):
        copy_other_files(base, target)
    elif is_whole(target):
        with_limits = is_whole(run.trained)  # which say already what the recipe says
        write_processors(target, run.trained if with_limits else base, MediaOptions())


def _write_around(run: FinishedRun, base: Path, target: Path) -> None:
    keep_config(target, base)
    write_package(
        target,
        run.trained,
        chat_template=run.tokenizer.chat_template,
        stop_token_ids=stop_token_ids(run.report, run.tokenizer.control_ids),
        end_of_text_id=run.tokenizer.end_of_text_id,
    )


def _put_back(base: Path, target: Path) -> None:
    """Makes what was tuned of a checkpoint, loaded without the rest, one of the class that its files name."""
    put_back(base, target)
    if is_omni(base):
        copy_other_files(base, target)
    else:
        write_processors(target, base, MediaOptions())


def refuse_full_disk(
    sources: Sequence[Path], target: Path, elsewhere: str, num_bytes: Callable[[StoredTensor], float] | None = None
) -> None:
    """Raises DoesNotFitError where what is written of checkpoints' weights has no room; as they are stored, or so."""
    stored = [tensor for source in sources for tensor in read_weights(source).values()]
    needed, free = sum(map(num_bytes or _as_stored, stored)), free_disk_bytes(target, fresh=True)
    if needed > free:
        what = f"the weights take {needed / 1e6:,.1f} MB of disk; {free / 1e6:,.1f} MB are free"
        raise DoesNotFitError(Problem(str(target), what, f"Name a folder on another disk with {elsewhere}."))


def _as_stored(tensor: StoredTensor) -> int:
    return tensor.num_bytes
