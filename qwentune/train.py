"""`python -m qwentune.train RECIPE [key=value]`: trains in this process, which accelerate launched.

`_walk` reads top to bottom as the walk itself: plan, data, ranks, start, model, trainer, train, publish.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwentune import console
from qwentune.errors import (
    DoesNotFitError,
    RunInUseError,
    UsageError,
    UserError,
)
from qwentune.training import reports
from qwentune.training.command_line import AllowChange, ForceMemory, Fresh, Overrides, RecipePath, Request, Resume
from qwentune.training.reports import Report
from qwentune.training.signals import stoppable, watch_launcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwentune.facts.launch import Sharding
    from qwentune.memory.plan_request import Auto
    from qwentune.memory.run_plan import RunPlan
    from qwentune.recipe import LoadedRecipe
    from qwentune.training.run_folder import RunFolder


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Resume = "auto",
    fresh: Fresh = False,
    allow_change: AllowChange = None,
    force_memory: ForceMemory = False,
) -> None:
    """Train in this process; `accelerate launch -m qwentune.train` makes several of them."""
    request = Request(recipe, tuple(overrides or ()), resume, fresh, tuple(allow_change or ()), force_memory)
    if _is_launched():
        watch_launcher()
    code = stoppable(lambda: console.run(lambda: run(request)))
    Report().end(code)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _end_rank(code)
    console.end(code)


def _is_launched() -> bool:
    """Whether accelerate or torchrun has started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _end_rank(code: int) -> None:
    """Ends one rank of several without the interpreter's teardown, in which torch was seen to abort a finished one."""
    if os.environ.get("RANK", "0") == "0":
        atexit._run_exitfuncs()  # trackers', which only rank 0 has
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(request: Request) -> int:
    """Trains the recipe to its end, or from where it was stopped; the exit code."""
    from qwentune.recipe import load_recipe
    from qwentune.training.run_folder import RunFolder
    from qwentune.training.start import refuse_unknown_changes

    reports.refuse_another_users()
    Report().keep_crash()
    refuse_unknown_changes(request.allow_change)
    loaded = load_recipe(request.recipe, request.overrides)
    folder = RunFolder(Path(loaded.recipe.output.dir))
    folder.refuse_other_things()
    exit_code_is_lost = _exit_code_is_lost()
    try:
        with loaded.located():
            return _walk(request, loaded, folder)
    except RunInUseError:
        raise
    except UserError as error:
        if exit_code_is_lost:
            with suppress(UserError, OSError), folder.lock():
                step, reason = folder.reached_step(), str(error.problems[0])
                folder.set_status(
                    "failed", exit_code=error.exit_code, reason=reason, step=step, command=request.command
                )
        raise


def _exit_code_is_lost() -> bool:
    """Whether a launcher stands above this process that turns every exit code into 1, and no supervisor above it."""
    return _is_launched() and reports.FOLDER not in os.environ and os.environ.get("RANK", "0") == "0"


def _walk(request: Request, loaded: LoadedRecipe, folder: RunFolder) -> int:
    """From a loaded recipe to a trained model; the exit code."""
    from qwentune.data.at_hand import largest_media, longest_row
    from qwentune.data.dataset import chat_template, prepare
    from qwentune.data.formats.samples import refuse_untrained
    from qwentune.data.layout.schedule import Schedule
    from qwentune.data.summary import summary
    from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
    from qwentune.data.tokenizing.tokenizer import load_tokenizer
    from qwentune.exporting.publish import publish
    from qwentune.facts.continued import continued
    from qwentune.facts.gpus import GpuSpec
    from qwentune.facts.models import model_spec, refuse_untrainable
    from qwentune.facts.present import count_cards_by_bus, may_have_gpu
    from qwentune.facts.towers import part_problems
    from qwentune.memory.device_remarks import recipe_remarks
    from qwentune.memory.judge import changes_the_plan, device_of, judge_recipe
    from qwentune.memory.run_plan import RunPlan
    from qwentune.memory.shortage import refusal
    from qwentune.pages.run_page import RunPage
    from qwentune.recipe import load_recipe
    from qwentune.training.device import refuse_other_device
    from qwentune.training.once import once
    from qwentune.training.prerequisites import refuse_what_is_not_here
    from qwentune.training.ranks import Ranks, expand_segments, launch_remarks
    from qwentune.training.relaunch import relaunched
    from qwentune.training.run import Run

    expand_segments()
    count_cards_by_bus()
    spec = model_spec(loaded.recipe.model, packing=loaded.recipe.data.packing)
    refuse_untrainable(spec)
    loaded, remarks = continued(loaded, spec)
    recipe = loaded.recipe
    ranks = Ranks.of_environment(on_cpu=recipe.hardware.gpu == "cpu")
    replan = request.fresh or changes_the_plan(request.allow_change)
    launched = {"count": ranks.num_here, "launch": "auto"}
    device, _, _ = device_of(recipe.hardware.model_copy(update=launched), here=True)
    stored = None if replan else folder.stored_plan()
    longest = longest_row(recipe)
    if reports.FOLDER not in os.environ:  # a supervisor has said them
        for remark in (
            *remarks,
            *recipe_remarks(spec, device, loaded, longest),
            *launch_remarks(recipe.hardware, ranks),
        ):
            console.say(remark)
    media = largest_media(recipe, spec)
    judged = partial(judge_recipe, spec, device=device, fresh=request.fresh, longest_row=longest, media=media)
    together = {"num_ranks": ranks.num_ranks, "num_machines": ranks.num_machines}
    judged_here = partial(judged, recipe, **together, sharding=ranks.sharding, stored=stored)

    def traced() -> dict[str, Any]:
        said: list[str] = []
        return {"plan": judged_here(tell=said.append).to_json(), "said": said}

    if stored is None and isinstance(device, GpuSpec):  # the first start on a GPU: seconds of work for every rank alike
        asked = ["plan", loaded.text, *request.overrides, ranks.sharding, str(ranks.num_ranks), f"{longest} {media}"]
        found = once("\n".join(asked), traced)
        plan = RunPlan.from_json(found["plan"])
        for words in found["said"]:
            console.say(words)
    else:
        plan = judged_here()
    if not plan.fits and not request.force_memory:
        if reports.FOLDER in os.environ:  # pasted after `qwentune train`, which launches
            raise DoesNotFitError(refusal(plan))
        arguments = [*request.command[2:], *["--fresh"] * request.fresh]

        def mended(overrides: Sequence[str], num_ranks: int, sharding: Sharding | Auto) -> RunPlan:
            changed, _ = continued(load_recipe(request.recipe, [*request.overrides, *overrides]), spec)
            anew = judged if changed.recipe.data == recipe.data else partial(judged, longest_row=None, media=None)
            return anew(changed.recipe, num_ranks=num_ranks, sharding=sharding)

        raise DoesNotFitError(refusal(plan, lambda mend: relaunched(mend, arguments, ranks.num_ranks, mended)))
    refuse_what_is_not_here(recipe, plan.choices)
    if isinstance(device, GpuSpec) or may_have_gpu():  # else torch, which takes seconds to load, is asked below
        refuse_other_device(device, ranks)

    tokenizer = load_tokenizer(checkpoint_folder(recipe.model, recipe.revision))
    template = chat_template(recipe.data, tokenizer)
    shares = recipe.memory.shares_prefixes
    refuse_untrained(recipe.data.sources)
    dataset = prepare(recipe.data, tokenizer, template, recipe.seed, shares_prefixes=shares)
    for line in summary(dataset):
        console.say(line)
    has_media = dataset.media is not None
    if problems := part_problems(spec, recipe.tuning, has_media=has_media, sharding=ranks.sharding):
        raise UsageError(problems)
    schedule = Schedule.of(dataset.train.per_epoch, recipe.batch, recipe.optimizer, recipe.seed)
    for remark in schedule.remarks(recipe.optimizer, recipe.output):
        console.say(remark)
    text = None if template is None else template.text
    with console.busy("loading torch"):
        refuse_other_device(device, ranks)
        ranks.join(plan.choices.weights)  # only now: no rank may wait for another that still renders
        plan = ranks.agree(lambda: plan)  # each judged by the memory that it saw
    rendered, page = (tokenizer, text, dataset, schedule), RunPage(folder)
    return Run(request, loaded, ranks, folder, spec, device, plan, *rendered, publish, page.write).run()


if __name__ == "__main__":
    console.main(train)
