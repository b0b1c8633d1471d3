"""Every shipped recipe loads, fits the cards that its opening names, and previews, whatever folder it stands in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from typer.testing import CliRunner

from qwentune.cli import app
from qwentune.facts.models import config_of, model_spec
from qwentune.memory.judge import device_of, judge_recipe
from qwentune.recipe import load_recipe
from tests import qwen3_5
from tests.checkpoints import SMALL_NUM_RANKS, write_checkpoint
from tests.media.checkpoints import MediaType, write_media_checkpoint

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
OF_GPUS = [path for path in RECIPES if path.stem != "quickstart"]
CHEAP = ("qwen2.5-math-7b-lora", "qwen2.5-7b-instruct-qlora", "qwen3-30b-a3b-lora", "qwen3-4b-thinking-2507-lora")
# Of those that TRL does not ship, the most alike.
TEMPLATES = (
    ("QwQ|Thinking", "thinking_only"),
    ("Qwen1.5|Qwen2", "qwen2_5"),
    ("Instruct", "qwen3_instruct_2507"),
    ("Qwen3.5", "qwen3_5_think"),
    ("Qwen3.6", "qwen3_6"),
    ("", "qwen3"),
)
EVERY = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(FOLDER).as_posix())
NEEDED = ("model", "kind", "train")


@pytest.fixture
def checkpoint_of(qwen2_folder: Path, qwen3_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a model's folder: its config.json, a tokenizer of its family in small, its chat template or a like one."""

    def written(model: str, *, has_media: bool = False) -> Path:
        spec = model_spec(model)
        if has_media:
            thinker = {"qwen2_5_omni": "qwen2_5_omni_thinker", "qwen3_omni_moe": "qwen3_omni_moe_thinker"}
            kind = thinker.get(spec.checkpoint_type, spec.checkpoint_type)
            return write_media_checkpoint(tmp_path / "model", cast(MediaType, kind))
        template = next(template for found, template in TEMPLATES if re.search(found, model))
        own = Path(__file__).parent / f"templates/{template}.jinja"
        is_qwen2, is_base = spec.model_type.startswith("qwen2"), spec.kind == "base"
        folder = write_checkpoint(
            tmp_path / "model",
            "qwen2" if is_qwen2 else "qwen3",
            template=None if own.exists() else template,
            eos="<|endoftext|>" if is_base else "<|im_end|>",
            tokenizer_from=None if is_base else qwen2_folder if is_qwen2 else qwen3_folder,
        )
        if own.exists():
            (folder / "chat_template.jinja").write_bytes(own.read_bytes())
        if template.startswith(("qwen3_5", "qwen3_6")):
            qwen3_5.write_tokenizer(folder, SMALL_NUM_RANKS)
        (folder / "config.json").write_text(json.dumps(config_of(spec)), encoding="utf-8")
        return folder

    return written


@EVERY
def test_a_shipped_recipe_loads_and_writes_to_a_folder_of_its_own_name(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.recipe.output.dir == f"runs/{path.stem}"


def test_the_readme_names_every_shipped_recipe() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8").partition("## ")[0]
    assert sorted(re.findall(r"^\| `(\S+\.yaml)`", table, re.MULTILINE)) == [path.name for path in RECIPES]


@EVERY
def test_a_shipped_recipe_opens_with_the_commands_that_run_it(path: Path) -> None:
    opening = path.read_text(encoding="utf-8").partition("model:")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert len(opening.splitlines()) == 4
    named = re.findall(r"recipes/\S+", opening)
    assert named
    assert set(named) == {f"recipes/{path.name}"}


@EVERY
def test_a_shipped_recipe_says_nothing_that_is_the_default(path: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    resolved = load_recipe(path).recipe.model_dump()
    shorter = tmp_path / path.name
    for section, key in list(leaves(document)):
        if key not in NEEDED:
            value = section.pop(key)
            shorter.write_text(yaml.safe_dump(document), encoding="utf-8")
            assert load_recipe(shorter).recipe.model_dump() != resolved, f"{key}: {value} is the default"
            section[key] = value


def leaves(section: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every key that holds no other keys, with the section in which it stands."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield section, key


def cards(path: Path) -> tuple[str, str]:
    """The GPU, and how many of them, of the plan that a recipe's opening tells to make."""
    command = re.search(r"qwentune plan .* --gpu (\S+)(?: --gpus (\d+))?", path.read_text(encoding="utf-8"))
    assert command
    return command[1], command[2] or "1"


@pytest.mark.parametrize("path", OF_GPUS, ids=lambda path: path.stem)
def test_a_shipped_recipe_fits_the_cards_that_it_is_meant_for(path: Path) -> None:
    gpu, gpus = cards(path)
    ended = CliRunner().invoke(app, ["plan", str(path), "--gpu", gpu, "--gpus", gpus, "--json"])
    assert ended.exit_code == 0, ended.output


@EVERY
def test_a_shipped_recipe_previews_and_there_is_nothing_to_warn_of(
    path: Path, checkpoint_of: Callable[..., Path]
) -> None:
    recipe = load_recipe(path).recipe
    model, has_media = recipe.model, any(re.search("image|audio", source.path) for source in recipe.data.train)
    folder = checkpoint_of(model, has_media=has_media)
    ended = CliRunner().invoke(app, ["preview", str(path), f"model={folder}", "--json"])
    assert ended.exit_code == 0, ended.output
    report = json.loads(ended.stdout)
    assert report["trained_tokens"] > 0
    assert report["rows"]["dropped"] == report["rows"]["refused"] == 0
    warnings = report["warnings"]
    if model_spec(model).kind == "thinking":  # the file of examples is for those too that think or not
        assert "without reasoning" in warnings.pop()
    assert not warnings


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in CHEAP else pytest.mark.soak) for path in OF_GPUS],
    ids=lambda path: path.stem,
)
def test_the_trace_of_a_shipped_recipe_fits_and_agrees_with_the_closed_form(path: Path) -> None:
    """Prints the row of `recipes/README.md`'s table."""
    gpu, gpus = cards(path)
    recipe = load_recipe(path, [f"hardware.gpu={gpu}", f"hardware.count={gpus}"]).recipe
    spec = model_spec(recipe.model)
    device, num_ranks, sharding = device_of(recipe.hardware, here=False)
    told: list[str] = []
    planned, traced = (
        judge_recipe(spec, recipe, device=device, num_ranks=num_ranks, sharding=sharding, tell=tell)
        for tell in (None, told.append)
    )
    sizes = [f"{plan.allocated_peak_bytes / 2**30:.2f}" for plan in (planned, traced)]
    apart = planned.allocated_peak_bytes / traced.allocated_peak_bytes - 1
    held, usable = (f"{size / 2**30:.1f}" for size in (traced.peak_bytes, traced.usable_bytes))
    card = gpu if gpus == "1" else f"{gpus} × {gpu}"
    print(
        f"\n| `{path.name}` | {card} | {sizes[0]} | {sizes[1]} | {100 * apart:+.2f} % | {held} of {usable} |",
        *told,
        sep="\n",
    )
    assert traced.fits
    assert abs(apart) < 0.03
    assert planned.choices == traced.choices
