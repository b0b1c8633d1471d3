"""What ended a run, in words for its user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from torch import OutOfMemoryError

from qwentune.errors import DoesNotFitError, LostRankError, Problem, ResumeError, UserError, machine_error
from qwentune.facts.continued import continued
from qwentune.memory.judge import judge_recipe
from qwentune.memory.shortage import ran_out as shortage
from qwentune.recipe import parse_recipe
from qwentune.training.disk import disk_error, is_about
from qwentune.training.held import held_bytes

if TYPE_CHECKING:
    from qwentune.memory.run_plan import RunPlan
    from qwentune.training.run import Run
    from qwentune.training.trainer import SftTrainer

# What torch, Triton, NCCL and NVIDIA's libraries say where the driver or an allocator gave none.
SIGNS_OF_A_FULL_GPU = ("out of memory", "CUBLAS_STATUS_ALLOC", "CUDNN_STATUS_ALLOC")
# What gloo says on the ranks that are left; NCCL ends their processes itself.
SIGNS_OF_A_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


def explained(error: Exception, num_ranks: int, folder: Path) -> UserError | None:
    """The error of a run in `folder` in words for the user; None for a bug."""
    if isinstance(error, UserError):
        return error
    if num_ranks > 1 and any(sign in str(error) for sign in SIGNS_OF_A_LOST_RANK):
        return LostRankError(Problem("", "another rank was lost; the last checkpoint is kept"))
    if isinstance(error, UnpicklingError):
        what = f"a checkpoint holds a pickle of something else than numbers: {str(error).splitlines()[0]}"
        return ResumeError(Problem(str(folder), what, "It was not run. Take an earlier checkpoint."))
    if is_about(error, folder):
        return disk_error(error, folder, "the run folder cannot be written")
    return machine_error(error)


def fills_a_gpu(error: RuntimeError) -> bool:
    """Whether a GPU had no memory left."""
    return isinstance(error, OutOfMemoryError) or any(sign in str(error) for sign in SIGNS_OF_A_FULL_GPU)


def ran_out(run: Run, trainer: SftTrainer | None, error: Exception) -> DoesNotFitError:
    """Out of memory in words, with what this rank holds of it at that moment; without a trainer it still loads."""
    request, loaded, recipe, ranks, plan = run.request, run.loaded, run.loaded.recipe, run.ranks, run.plan
    model: Any = None if trainer is None else trainer.model
    where, phase = "loading", "load"
    if trainer is not None:
        where = f"step {trainer.state.global_step + 1}"
        evaluating = [name for name in ("evaluate", "answer") if name in plan.phases]
        worst = max(evaluating, key=lambda name: plan.phases[name].total)
        phase = "train_step" if model.training else worst

    def judged(overrides: Sequence[str]) -> RunPlan:
        # Of the text that this run began with: the file may have been edited since.
        changed = continued(parse_recipe(loaded.text, loaded.path, [*request.overrides, *overrides]), run.spec)[0]
        is_counted = changed.recipe.data == recipe.data
        return judge_recipe(
            run.spec,
            changed.recipe,
            device=run.device,
            num_ranks=ranks.num_ranks,
            sharding=ranks.sharding,
            fresh=request.fresh,
            longest_row=run.dataset.longest_row if is_counted else None,
            media=run.dataset.largest_media if is_counted else None,
        )

    problem = shortage(
        plan,
        where,
        str(error),
        max_tokens=min(recipe.data.max_tokens, run.dataset.longest_row),
        headroom=recipe.memory.headroom,
        phase=phase,
        held=held_bytes(model, None if trainer is None else trainer.optimizer, ranks.device),
        judged=judged,
    )
    return DoesNotFitError(problem, "Training ended; the last checkpoint is kept.")
