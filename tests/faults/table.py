"""FAULTS.md: what a user sees for each fault, read from the marks on the tests that make it happen.

python -m tests.faults.table > FAULTS.md
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.faults.catalogue import EXCUSED, FAULTS

ROOT = Path(__file__).parents[2]
GROUPS = {
    "A": "Killed",
    "B": "Damaged checkpoints",
    "C": "Disks",
    "D": "Signals and processes",
    "E": "Exact resume",
    "F": "Changes since the checkpoint",
    "G": "Numbers and memory",
    "H": "Data files",
    "I": "Mistakes and services",
    "J": "Security",
    "K": "Several at once",
    "L": "What is read",
    "M": "Surroundings",
    "N": "Media",
    "O": "Several machines",
}
HEAD = """\
# Faults, and what you will see

Each row is made to happen by the tests named in it, on real runs wherever a process is involved; the table is made
from their marks by `python -m tests.faults.table > FAULTS.md`. Whatever the row, the same command again goes on from
the newest whole checkpoint, and the run ends with the weights and losses of one that was never disturbed.

The public tool [ckpt-chaos](https://pypi.org/project/ckpt-chaos/) kills a run at each file event of its saves,
resumes it and compares. It watches the first Python process only, so neither accelerate nor `qwentune train` may
stand before it, and it needs every checkpoint kept:

```sh
pip install ckpt-chaos
ckpt-chaos run --max-points 60 --modes before,torn,unsynced \\
  --checkpoint-glob "{out}/checkpoints/step-*" --ckpt-ignore-size --step-regex "resuming .* from step (\\d+)" \\
  --result-file "{out}/adapter/adapter_model.safetensors" --fail-on HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK \\
  -- python -m qwentune.train recipes/quickstart.yaml tuning.kind=lora output.dir={out} output.keep=1000
```

For full tuning the result file is `{out}/model/model.safetensors`. By hand: `pytest -m soak tests/faults` runs that
command and kills each kind of tuning a hundred times, with one process and with two.
"""


def marks(path: Path) -> Iterator[tuple[str, str, str]]:
    """Row, what a user sees, and name of the test, for each mark in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in reversed(node.decorator_list):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                rows, sees = (ast.literal_eval(argument) for argument in decorator.args)
                for row in rows.split():
                    yield row, sees, node.name


def shown_by_row() -> dict[str, list[tuple[str, str]]]:
    """For each row of the catalogue what a user sees, with the file of the test that shows it."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for row, sees, _ in marks(path):
            found[row].append((sees, str(path.relative_to(ROOT / "tests"))))
    return found


def render() -> str:
    """The content of FAULTS.md."""
    found = shown_by_row()
    lines = [HEAD]
    for letter, group in GROUPS.items():
        lines += [f"## {group}", "", "| | fault | what you will see | tests |", "|---|---|---|---|"]
        for row in sorted(row for row in FAULTS if row.startswith(letter)):
            sees = list(dict.fromkeys(sees for sees, _ in found[row]))
            if row in EXCUSED:
                sees.append(f"not tested: {EXCUSED[row]}")
            files = ", ".join(f"`{file}`" for file in dict.fromkeys(file for _, file in found[row]))
            lines.append(f"| {row} | {FAULTS[row]} | {'<br>'.join(sees)} | {files or '–'} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(render(), end="")
