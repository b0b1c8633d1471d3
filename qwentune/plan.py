"""`qwentune plan RECIPE`: does it fit, with which settings, and if not, what would."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qwentune import console
from qwentune.errors import EXIT_OK, DoesNotFitError, UsageError

if TYPE_CHECKING:
    from qwentune.data.dataset import Dataset
    from qwentune.recipe import Recipe


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, as often as needed.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A name that `qwentune gpus` lists, 24GiB, or cpu.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many of them.")] = None,
    trace: Annotated[bool, typer.Option(help="Trace the real step on meta tensors too; it has the last word.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Judge memory by phase and term, choose settings, name the cheapest changes that fit."""
    console.end(console.run(lambda: run(recipe, overrides or [], gpu, gpus, as_json, trace)))


def run(recipe_path: str, overrides: list[str], gpu: str | None, gpus: int | None, as_json: bool, trace: bool) -> int:
    """Prints the plan; the exit code says whether it fits."""
    from qwentune.facts.models import model_spec
    from qwentune.memory import render_plan
    from qwentune.memory.device_remarks import recipe_remarks
    from qwentune.memory.judge import device_of, judge_recipe
    from qwentune.recipe import load_recipe

    # A mend that is pasted after the command counts: the last override of a key does.
    overrides = [
        *([] if gpu is None else [f"hardware.gpu={gpu}"]),
        *([] if gpus is None else [f"hardware.count={gpus}"]),
        *overrides,
    ]
    loaded = load_recipe(recipe_path, overrides)
    recipe = loaded.recipe
    device, count, sharding = device_of(recipe.hardware, here=False)
    spec = model_spec(recipe.model, packing=recipe.data.packing)
    for remark in recipe_remarks(spec, device, loaded):
        console.say(remark)
    steps, expansion_factor = _of_data(recipe)
    verdict = judge_recipe(
        spec,
        recipe,
        device=device,
        num_ranks=count,
        sharding=sharding,
        optimizer_steps=steps,
        tell=console.say if trace else None,
    )
    verdict = replace(verdict, expansion_factor=expansion_factor)
    if as_json:
        console.show_json(verdict.to_json())
    else:
        kind = recipe.tuning.kind + ("" if recipe.tuning.kind == "full" else f" r{recipe.tuning.rank}")
        title = f"{recipe.model} · {kind} · {recipe.data.max_tokens} tokens"
        console.show(render_plan(verdict, spec.num_layers, title))
    return EXIT_OK if verdict.fits else DoesNotFitError.exit_code


def _of_data(recipe: Recipe) -> tuple[int | None, float | None]:
    """The steps of the run and its expansion factor, where they are known without rendering the data."""
    dataset = _rendered(recipe)
    if dataset is None:
        return recipe.optimizer.max_steps, None
    from qwentune.data.layout.schedule import Schedule

    schedule = Schedule.of(dataset.train.per_epoch, recipe.batch, recipe.optimizer, recipe.seed)
    for remark in schedule.remarks(recipe.optimizer, recipe.output):
        console.say(remark)
    return schedule.num_steps, dataset.report["expansion_factor"]


def _rendered(recipe: Recipe) -> Dataset | None:
    from qwentune.data.cache import cache_folder
    from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder

    if not (cache_folder() / "data").is_dir():  # no data was rendered yet; the rest takes its time
        return None
    from qwentune.data.dataset import chat_template, prepared
    from qwentune.data.tokenizing.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint_folder(recipe.model, recipe.revision, fetches=False))
    except UsageError:  # it was not fetched yet
        return None
    template = chat_template(recipe.data, tokenizer)
    return prepared(recipe.data, tokenizer, template, recipe.seed, shares_prefixes=recipe.memory.shares_prefixes)


if __name__ == "__main__":
    console.main(plan)
