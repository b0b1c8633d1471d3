"""The folder that `export` writes of a run, and `serve` serves: whole models, or adapters, as servers take them."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwentune import console
from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
from qwentune.errors import DoesNotFitError, Problem
from qwentune.exporting.finished import FinishedRun
from qwentune.exporting.merge import merge as merge_adapter
from qwentune.exporting.omni import is_omni
from qwentune.exporting.package import keep_config, own_limits, stop_token_ids, write_package
from qwentune.exporting.processors import ServerOption, beyond_servers, is_whole, server_options, write_processors
from qwentune.exporting.whole import copy_other_files, is_part, name_as_whole, put_back
from qwentune.facts.present import free_disk_bytes
from qwentune.facts.weight_files import read_weights
from qwentune.model.loading import silence_loading, weights_folder
from qwentune.recipe import MediaOptions


def write_export(run: FinishedRun, target: Path, *, merge: bool, where: str = "-o") -> None:
    """Writes a run into a folder, with the adapter merged into the base if asked; `where` names another disk.

    Raises DoesNotFitError where the merged weights have no room on the disk.
    """

    if merge and run.has_adapter:
        silence_loading()
        base = weights_folder(run.model, run.revision)
        _refuse_full_disk(base, target, where)
        merge_adapter(base, run.trained, target)
        keep_config(target, base)
        write_package(
            target,
            run.trained,
            chat_template=run.tokenizer.chat_template,
            stop_token_ids=stop_token_ids(run.report, run.tokenizer.control_ids),
            end_of_text_id=run.tokenizer.end_of_text_id,
        )
        if is_omni(base):
            copy_other_files(base, target)
        elif is_whole(target):
            with_limits = is_whole(run.trained)  # which say already what the recipe says
            write_processors(target, run.trained if with_limits else base, MediaOptions())
    else:
        shutil.copytree(run.trained, target, dirs_exist_ok=True)
        _name_as_the_base(run, target)
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


def _refuse_full_disk(base: Path, target: Path, where: str) -> None:
    """Raises DoesNotFitError where what is written of a base's weights has no room."""

    needed, free = sum(tensor.num_bytes for tensor in read_weights(base).values()), free_disk_bytes(target, fresh=True)
    if needed > free:
        what = f"the weights take {needed / 1e6:,.1f} MB of disk; {free / 1e6:,.1f} MB are free"
        raise DoesNotFitError(Problem(str(target), what, f"Name a folder on another disk with {where}."))


def _name_as_the_base(run: FinishedRun, target: Path) -> None:
    """Makes what was tuned of a checkpoint, loaded without the rest, one of the class that its files name."""

    if run.has_adapter:
        name_as_whole(target, checkpoint_folder(run.model, run.revision))
    elif is_part(target, checkpoint_folder(run.model, run.revision)):
        base = weights_folder(run.model, run.revision)
        put_back(base, target)
        if is_omni(base):
            copy_other_files(base, target)
        else:
            write_processors(target, base, MediaOptions())
