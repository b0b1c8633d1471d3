"""A layer imports only layers above it, and what is torch-free stays so: both read from the source."""

import ast
import subprocess
import sys
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
    "recipe",
    "facts",
    "data",
    "model",
    "memory",
    "training",
    "exporting",
    "html_report",
)
COMMANDS = {"init", "train", "supervise", "preview", "plan", "export", "chat", "cli"}
TORCH_FREE = ("errors", "bounded", "redaction", "durable", "streams", "shipped", "recipe", "facts", "memory")
WITH_TORCH = {"trace", "meta_step", "delta_rule", "replay", "cross_check"}  # of memory: they run the real step
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
        "from qwentune.recipe import load_recipe; load_recipe('recipes/quickstart.yaml')",
    ],
)
def test_torch_is_not_loaded_before_training(statement: str) -> None:
    check = f"import sys; {statement}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "common", "helpers", "base", "manager", "misc"}
