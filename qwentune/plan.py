"""`qwentune plan RECIPE`: does it fit, with which settings, and if not, what would."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qwentune import console
from qwentune.errors import EXIT_OK, DoesNotFitError

if TYPE_CHECKING:
    from qwentune.data.dataset import Dataset
    from qwentune.recipe import LoadedRecipe, Recipe


def plan(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value: keys to change for this time.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="The GPU to plan for: a name of `qwentune gpus`, 24GiB, or cpu.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="How many GPUs to plan for; else what the recipe says.")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also run the real training step without weights, and judge by its peak.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Judge memory by phase and term, choose settings, name the cheapest changes that fit."""
    console.end(console.run(lambda: run(recipe, overrides or [], gpu, gpus, as_json, trace)))


def run(recipe_path: str, overrides: list[str], gpu: str | None, gpus: int | None, as_json: bool, trace: bool) -> int:
    """Prints the plan; the exit code says whether it fits."""
    from qwentune.recipe import load_recipe

    # A mend that is pasted after the command counts: the last override of a key does.
    overrides = [
        *([] if gpu is None else [f"hardware.gpu={gpu}"]),
        *([] if gpus is None else [f"hardware.count={gpus}"]),
        *overrides,
    ]
    loaded = load_recipe(recipe_path, overrides)
    with loaded.located():
        code = _judge(loaded, as_json=as_json, trace=trace)
    if code == EXIT_OK:
        console.say_next("qwentune", "train", recipe_path, *overrides)
    return code


def _judge(loaded: LoadedRecipe, *, as_json: bool, trace: bool) -> int:
    """Prints the plan of a recipe; the exit code."""
    from qwentune.data.at_hand import refuse_untrained_rows, rendered
    from qwentune.facts.continued import continued
    from qwentune.facts.machines import num_machines
    from qwentune.facts.models import model_spec
    from qwentune.memory import render_plan
    from qwentune.memory.device_remarks import recipe_remarks
    from qwentune.memory.judge import device_of, judge_recipe

    spec = model_spec(loaded.recipe.model, packing=loaded.recipe.data.packing)
    loaded, remarks = continued(loaded, spec)
    recipe = loaded.recipe
    refuse_untrained_rows(recipe.data)
    device, count, sharding = device_of(recipe.hardware, here=False)
    together = num_machines(recipe.hardware.machines)
    dataset = rendered(recipe)
    longest_row = None if dataset is None else dataset.longest_row
    for remark in (*remarks, *recipe_remarks(spec, device, loaded, longest_row)):
        console.say(remark)
    verdict = judge_recipe(
        spec,
        recipe,
        device=device,
        num_ranks=count * together,
        num_machines=together,
        sharding=sharding,
        longest_row=longest_row,
        media=None if dataset is None else dataset.largest_media,
        optimizer_steps=_num_steps(recipe, dataset),
        tell=console.say if trace else None,
    )
    factor = None if dataset is None else dataset.report["expansion_factor"]
    verdict = replace(verdict, expansion_factor=factor)
    if as_json:
        console.show_json(verdict.to_json())
    else:
        kind = recipe.tuning.kind + ("" if recipe.tuning.kind == "full" else f" r{recipe.tuning.rank}")
        title = f"{recipe.model} · {kind} · {verdict.row_tokens} tokens"
        console.show(render_plan(verdict, spec.num_layers, title, columns=console.width(sys.stdout)))
    return EXIT_OK if verdict.fits else DoesNotFitError.exit_code


def _num_steps(recipe: Recipe, dataset: Dataset | None) -> int | None:
    """The optimizer steps of the run; None where only the data, which is not rendered, would tell."""
    if dataset is None:
        return recipe.optimizer.max_steps
    from qwentune.data.layout.schedule import Schedule

    schedule = Schedule.of(dataset.train.per_epoch, recipe.batch, recipe.optimizer, recipe.seed)
    for remark in schedule.remarks(recipe.optimizer, recipe.output):
        console.say(remark)
    return schedule.num_steps


if __name__ == "__main__":
    console.main(plan)
