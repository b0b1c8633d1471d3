"""A layer imports only layers above it, and what is torch-free stays so: both read from the source."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import qwentune

PACKAGE = Path(qwentune.__file__).parent
# From the top down; a layer may import itself and those before it.
LAYERS = (
    "errors",
    "bounded",
    "redaction",
    "durable",
    "streams",
    "console",
    "shipped",
    "row_formats",
    "peers",
    "recipe",
    "facts",
    "conversion",
    "data",
    "model",
    "answering",
    "scores",
    "evaluating",
    "memory",
    "training",
    "machine",
    "exporting",
    "pages",
)
COMMANDS = {"init", "train", "supervise", "preview", "plan", "export", "chat", "eval", "serve", "doctor", "runs", "cli"}
TORCH_FREE = (
    "errors",
    "bounded",
    "redaction",
    "durable",
    "streams",
    "shipped",
    "row_formats",
    "peers",
    "recipe",
    "facts",
    "memory",
)
# Of memory: they run the real step.
WITH_TORCH = {"live_bytes", "meta_step", "moving", "stand_ins", "tower_step", "delta_rule", "replay", "cross_check"}
# From the top down in data/: a stage imports only itself and those before it.
STAGES = (
    "sample",
    "cache",
    "workers",
    "reading",
    "media",
    "formats",
    "tokenizing",
    "templates",
    "rendering",
    "layout",
    "report",
    "blocks",
    "dataset",
    "at_hand",
    "summary",
)
MOST_FILES = 16  # of a folder in data/ and memory/: more are no longer seen at once
BOTH_A_VERB_AND_A_THING = {"chat"}  # a command and a row format, both named by the contract
TORCH = {"torch", "peft", "accelerate", "bitsandbytes", "trl", "deepspeed"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_layers(path: Path) -> set[str]:
    parts = [name.split(".") for name in imports(path) if name.startswith("qwentune.")]
    return {part[1] for part in parts if (PACKAGE / part[1]).is_dir() or (PACKAGE / f"{part[1]}.py").exists()}


@pytest.mark.parametrize("path", [p for p in MODULES if layer(p) in LAYERS], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_layer_imports_only_layers_above_it(path: Path) -> None:
    allowed = set(LAYERS[: LAYERS.index(layer(path)) + 1])
    assert own_layers(path) <= allowed


def test_every_module_belongs_to_a_layer_or_is_a_command() -> None:
    assert {layer(path) for path in MODULES} == {*LAYERS, *COMMANDS, "__init__"}


def test_nothing_but_the_command_table_imports_a_command() -> None:
    for path in MODULES:
        if layer(path) != "cli":
            assert own_layers(path) & COMMANDS <= {layer(path)}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if layer(p) in TORCH_FREE and p.stem not in WITH_TORCH], ids=lambda p: p.stem
)
def test_torch_free_layers_name_no_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & TORCH


@pytest.mark.parametrize(
    "statement",
    [
        "import qwentune.cli",
        "import qwentune.data.dataset",
        "import qwentune.exporting.publish",
        "from qwentune.recipe import load_recipe; load_recipe('recipes/quickstart.yaml')",
    ],
)
def test_torch_is_not_loaded_before_training(statement: str) -> None:
    check = f"import sys; {statement}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "common", "helpers", "base", "manager", "misc"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_stage_of_the_data_imports_only_stages_before_it(path: Path) -> None:
    own = path.relative_to(PACKAGE / "data").parts[0].removesuffix(".py")
    named = {name.split(".")[2] for name in imports(path) if name.startswith("qwentune.data.")}
    assert own == "__init__" or named <= set(STAGES[: STAGES.index(own) + 1])


def test_no_folder_of_data_and_memory_is_too_full_to_be_seen_at_once() -> None:
    folders = [folder for layer in ("data", "memory") for folder in ((PACKAGE / layer), *(PACKAGE / layer).rglob("*/"))]
    assert {str(folder): count for folder in folders if (count := len(list(folder.glob("*.py")))) > MOST_FILES} == {}


def test_a_file_name_means_one_thing() -> None:
    names = Counter(path.stem for path in MODULES if path.stem != "__init__")
    assert {name for name, count in names.items() if count > 1} <= BOTH_A_VERB_AND_A_THING


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_every_path_that_a_page_names_is_there(page: str) -> None:
    """`data/layout/` and the like are inside the package, the others at the top of the repository."""
    top = PACKAGE.parent
    named = set(re.findall(r"`((?:\.?[a-z_0-9]+/)+(?:[a-z_0-9]+\.[a-z]+)?)`", (top / page).read_text(encoding="utf-8")))
    assert len(named) > 5
    folders = (top, PACKAGE)
    assert {path for path in named if not any((folder / path).exists() for folder in folders)} == set()
