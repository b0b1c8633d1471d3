"""Recipes mutated as values and as bytes: a plan, or words that a person can read; never a traceback, never a wait.

Small by default; `pytest -m soak tests/faults/test_fuzz_recipes.py` tries thousands, from a new seed each time, which
is printed: QWENTUNE_SEED=... makes the same ones again.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from qwentune import plan
from qwentune.errors import LONGEST_WORDS, UserError
from qwentune.recipe import describe_keys, load_recipe, resolved_yaml
from qwentune.shipped import shipped, shipped_files
from tests.faults.test_data import asked

NUM_SMALL, NUM_MANY = 150, 4000  # of each kind of mutation
LATEST_SECONDS = 20
MOST_BYTES = 4 * 2**30
LONGEST_ANSWER = 100 * LONGEST_WORDS
MODELS = ("builtin:tiny-qwen3", "Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen2.5-Coder-0.5B")
RECIPE: dict[str, Any] = {
    "model": "builtin:tiny-qwen3",
    "tuning": {"kind": "lora", "rank": 8, "targets": ["q_proj", "v_proj"]},
    "data": {
        "train": [{"path": "rows.jsonl", "format": "chat", "repeat": 2.0}],
        "max_tokens": 256,
        "template_args": {"a": 1},
    },
    "batch": {"sequences_per_step": 4, "micro_batch": "auto"},
    "optimizer": {"learning_rate": 1e-4, "betas": [0.9, 0.99], "max_steps": 3},
    "hardware": {"gpu": "h100-80gb", "count": 2},
    "memory": {"headroom": 0.1},
    "output": {"dir": "run", "keep": 2, "report_to": []},
    "seed": 3,
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**63, 2**64, 10**17, 10**18, -(10**30)),
    *(1e-300, 5e-324, 1e308, 0.5, -0.0, float("inf"), float("nan")),
    *("", " ", "auto", "none", "x" * 300, "名" * 200, "\0", "\u202e\x1b[2J", "\ud800", "🙂", "1e9", "0x10"),
    *("/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self/maps", "/", ".", "..", "a/b/c", "~", "*"),
    *("rows.jsonl", "r.yaml", "owner/name", "owner/name@v1:train", "qlora", "dora", "full", "cpu", "zero3", "../r"),
    *([], [1], [[[]]], [None], ["a"] * 50, [0.5, 0.5], [1, 2, 3], [{"path": "rows.jsonl"}] * 40),
    *({}, {"a": {}}, {"path": "rows.jsonl"}, {"": 1}, {"kind": "lora"}, {str(i): i for i in range(200)}),
)
PIECES = (
    *(
        "\0",
        "\t",
        "\r",
        "\n",
        ":",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "#",
        "&a ",
        "*a",
        "!!t ",
        "|\n",
        ">\n",
        "'",
        '"',
        "\\",
    ),
    *(
        "%",
        "@",
        "`",
        "---\n",
        "...\n",
        "\ufeff",
        "\u2028",
        "\x85",
        "\x1b",
        "\x7f",
        "<<: ",
        "? ",
        "e999",
        "9" * 50,
        "  ",
    ),
    *("null", "~", "\\ud800"),
)
KEYS = [key.name.replace("[]", ".0") for key in describe_keys()]


@pytest.fixture(autouse=True)
def in_a_folder_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("rows.jsonl").write_text("".join(asked(str(i), "x") + "\n" for i in range(8)))


def seed_of(is_soak: bool) -> int:
    seed = int(os.environ.get("QWENTUNE_SEED") or (random.randrange(2**32) if is_soak else 19))
    print(f"QWENTUNE_SEED={seed}")
    return seed


@contextmanager
def hang_guard() -> Iterator[None]:
    """Ends what takes longer than anything may, with the line where it stands."""

    def too_late(*_: object) -> None:
        raise TimeoutError(f"no answer within {LATEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(LATEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a tree, the root left out."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def with_other_values(chance: random.Random) -> Any:
    """The recipe with some of its values, or of the keys that it leaves out, replaced, removed or moved."""
    tree = deepcopy(RECIPE)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        *before, last = chance.choice(list(places(tree)))
        if chance.random() < 0.5:
            *before, last = chance.choice(KEYS).split(".")
        parent: Any = tree
        for key in before:
            if isinstance(parent, dict):
                parent = parent.setdefault(key, {})
            elif isinstance(parent, list) and isinstance(key, int) and key < len(parent):
                parent = parent[key]
        value = deepcopy(chance.choice(VALUES))
        if chance.random() < 0.3:
            value = chance.choice((-1, 1)) * 10 ** chance.uniform(-12, 20)
            value = round(value) if chance.random() < 0.7 else value
        if isinstance(parent, dict) and isinstance(last, str):
            if chance.random() < 0.1:
                parent.pop(last, None)
            else:
                parent[chance.choice((last,) * 9 + ("x" + last, "🙂", "\0"))[:1000]] = value
        elif isinstance(parent, list) and isinstance(last, int) and last < len(parent):
            parent[last] = value
    tree["model"] = chance.choice((*MODELS, tree.get("model")))
    return tree


def as_yaml(value: Any) -> str:
    """The value in flow style: JSON with YAML's words, escapes that JSON lacks, and numbers as Python writes them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_yaml(key)}: {as_yaml(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() or c in " ./_-:" else f"\\U{ord(c):08x}" for c in value) + '"'
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def with_other_bytes(chance: random.Random) -> bytes:
    """A shipped recipe, or ours, with bytes flipped, cut out, doubled or put in."""
    texts = [as_yaml(RECIPE), *(shipped(name).read_text(encoding="utf-8") for name in shipped_files("recipes"))]
    content = bytearray(chance.choice(texts).encode())
    for _ in range(chance.choice((1, 1, 2, 3, 8, 40))):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del content[at : at + chance.choice((1, 1, 2, 10, 1000))]
        elif kind == 2:
            content[at:at] = content[at : at + chance.choice((1, 10, 100))] * chance.choice((1, 2, 50))
        elif kind == 3:
            content[at:at] = chance.choice(PIECES).encode("utf-8", "surrogatepass") * chance.choice((1, 1, 1, 3, 300))
        else:
            content[at:at] = chance.randbytes(chance.choice((1, 2, 8)))
    return bytes(content)


def answer(content: bytes, overrides: list[str]) -> str:
    """What is said of a recipe: its problems, or `loaded`; AssertionError where that is no answer."""
    Path("r.yaml").write_bytes(content)
    said, code = "loaded", 0
    try:
        with hang_guard():
            loaded = load_recipe("r.yaml", overrides)
            Path("again.yaml").write_text(resolved_yaml(loaded.recipe, loaded.origins), encoding="utf-8")
            assert load_recipe("again.yaml").recipe == loaded.recipe
            plan.run("r.yaml", overrides, None, None, True, False)
    except UserError as error:
        said, code = str(error), error.exit_code
    assert code in (0, 2, 3, 4, 5), said
    assert len(said) < LONGEST_ANSWER
    return said


def fuzz(number: int, seed: int) -> None:
    taken = 0
    for i in range(number):
        chance = random.Random(f"{seed} {i}")
        content = with_other_bytes(chance) if i % 2 else as_yaml(with_other_values(chance)).encode()
        overrides = []
        if chance.random() < 0.2:
            many = range(chance.choice((1, 2, 30)))
            overrides = [f"{chance.choice(KEYS)}={as_yaml(chance.choice(VALUES))}" for _ in many]
        try:
            taken += answer(content, overrides) == "loaded"
        except Exception as error:
            raise AssertionError(f"QWENTUNE_SEED={seed}, recipe {i}: {content[:2000]!r} {overrides}") from error
    assert taken > number // 50, "the mutations leave too little to plan"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MOST_BYTES


@pytest.mark.fault("I67 I71", "recipes mutated as values and as bytes are planned or refused in words, within 20 s")
def test_a_mutated_recipe_is_planned_or_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    fuzz(NUM_SMALL, seed_of(is_soak=False))


@pytest.mark.soak
@pytest.mark.fault("I67 I71", "thousands of them, from new seeds")
def test_thousands_of_mutated_recipes_are_planned_or_refused_in_words() -> None:
    fuzz(NUM_MANY, seed_of(is_soak=True))
