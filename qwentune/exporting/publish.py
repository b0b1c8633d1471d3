"""From the last checkpoint of a run, or its best, to the trained weights in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwentune import console
from qwentune.data.tokenizing.tokenizer import Tokenizer
from qwentune.durable import mark, remove, replace_folder
from qwentune.errors import Problem, ResumeError
from qwentune.exporting.package import copy_weights, keep_config, model_card, stop_token_ids, write_package
from qwentune.exporting.processors import is_whole, write_processors
from qwentune.recipe import Recipe, ScoreName
from qwentune.training.best import best_step
from qwentune.training.checkpoints import Checkpoint, Checkpoints, verify
from qwentune.training.run_folder import RunFolder


def publish(
    folder: RunFolder,
    checkpoints: Checkpoints,
    recipe: Recipe,
    report: Mapping[str, Any],
    *,
    base: Path,
    tokenizer: Tokenizer,
    chat_template: str | None,
) -> tuple[int, int]:
    """The last step of the run and the one whose weights it publishes, with all that stands around them.

    `report` is the data's. Raises ResumeError where no whole checkpoint is left.
    """
    from qwentune.exporting.whole import name_as_part  # loads torch, which a run has loaded by now, under its own words

    last, skipped = checkpoints.newest()
    if last is None:
        raise ResumeError(skipped, "The run ended without a checkpoint.")
    source = _best(checkpoints, last, recipe.output.followed) if recipe.output.best is not None else last
    target = folder.path / ("model" if recipe.tuning.kind == "full" else "adapter")
    staging = target.with_name(f".{target.name}.writing")
    remove(staging)
    mark(staging)
    copy_weights(source.folder, staging)
    if recipe.tuning.kind == "full":
        name_as_part(staging)
        keep_config(staging, base)
    write_package(
        staging,
        base,
        chat_template=chat_template,
        stop_token_ids=stop_token_ids(report, tokenizer.control_ids),
        end_of_text_id=tokenizer.end_of_text_id,
    )
    if is_whole(staging):
        write_processors(staging, base, recipe.data.media, report.get("media", ()))
    aside = replace_folder(staging, target)
    if aside is not None:
        console.say(f"moved {target}, which no run wrote, to {aside}")
    loss = (folder.last_record() or {}).get("loss")
    card = model_card(
        name=folder.path.name,
        base=recipe.model,
        tuning=recipe.tuning.kind,
        report=report,
        step=last.step,
        loss=loss if isinstance(loss, float) else None,
    )
    folder.write("README.md", card)
    return last.step, source.step


def _best(checkpoints: Checkpoints, last: Checkpoint, followed: ScoreName) -> Checkpoint:
    """The best checkpoint of a run; the last one where that is damaged, which is said, or where none was the best."""
    best = best_step(last, followed)
    if best is None:
        return last
    found = verify(checkpoints.published(best))
    if isinstance(found, Problem):
        console.say(f"warning: the best step, {best}, is lost and the last is published: {found}")
        return last
    return found
