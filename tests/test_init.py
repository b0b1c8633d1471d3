"""`qwentune init` writes a recipe that loads, that fits, and that holds what the data needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwentune.cli import app
from qwentune.data.dataset import chat_template, prepare
from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.init import KINDS, look_at
from qwentune.memory import judge
from qwentune.recipe import load_recipe
from tests.dialogues import random_rows


def init(folder: Path, *arguments: str) -> tuple[int, str, Path]:
    recipe = folder / "mine.yaml"
    ended = CliRunner().invoke(app, ["init", *arguments, "-o", str(recipe)])
    return ended.exit_code, ended.stderr, recipe


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "free_disk_bytes", lambda *_, **__: 10**13)
    monkeypatch.setattr(judge, "free_host_bytes", lambda: 10**12)


def fits(recipe: Path, *overrides: str) -> bool:
    ended = CliRunner().invoke(app, ["plan", str(recipe), *overrides])
    assert ended.exit_code in (0, 4), ended.stderr
    return ended.exit_code == 0


def rows(folder: Path, *texts: str) -> Path:
    path = folder / "rows, with: signs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(
    ("model", "gpu", "kind"),
    [
        ("Qwen/Qwen3-0.6B", "rtx-4090", "full"),
        ("Qwen/Qwen3-8B", "rtx-4090", "lora"),
        ("Qwen/Qwen3-4B", "rtx-4090", "lora"),  # its optimizer would fit into host memory, at a fraction of the speed
        ("Qwen/Qwen3-8B", "t4", "qlora"),
        ("Qwen/Qwen3-8B", "h200", "full"),
        ("Qwen/Qwen2.5-72B-Instruct", "h100-80gb", "qlora"),
    ],
)
def test_the_richest_tuning_that_fits_is_written_for_each_gpu(tmp_path: Path, model: str, gpu: str, kind: str) -> None:
    code, said, recipe = init(tmp_path, "--model", model, "--data", "data_templates/chat.jsonl", "--gpu", gpu)
    assert code == 0, said
    loaded = load_recipe(recipe).recipe
    assert (loaded.model, loaded.tuning.kind, loaded.hardware.gpu) == (model, kind, gpu)
    assert fits(recipe)
    text = re.sub(r"  (rank|alpha):.*\n", "", recipe.read_text())
    for richer in KINDS[: KINDS.index(kind)]:
        recipe.write_text(text.replace(f"kind: {kind}", f"kind: {richer}"))
        assert not fits(recipe, "hardware.launch=single"), "on the GPU alone"


def test_no_row_is_longer_than_the_length_that_was_guessed_from_its_bytes(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in random_rows(5, 300, hostile=False)))
    code, said, recipe = init(tmp_path, "--model", "builtin:tiny-qwen3", "--data", str(data))
    assert code == 0, said
    loaded = load_recipe(recipe).recipe
    tokenizer = load_tokenizer(checkpoint_folder(loaded.model, None))
    template = chat_template(loaded.data, tokenizer)
    dataset = prepare(loaded.data, tokenizer, template, loaded.seed)
    assert dataset.report["dropped"] == {}


def test_settings_follow_the_amount_of_data(tmp_path: Path) -> None:
    few = look_at([str(rows(tmp_path, *["word " * 50] * 40))])
    assert (few[0].format, few[0].count) == ("text", "40 rows")
    code, _, recipe = init(tmp_path, "--model", "Qwen/Qwen3-8B", "--gpu", "h100-80gb", "--data", few[0].path)
    assert code == 0
    loaded = load_recipe(recipe).recipe
    assert loaded.data.train[0].path == few[0].path
    assert (loaded.data.max_tokens, loaded.data.packing, loaded.data.eval_fraction) == (512, False, 0)
    assert loaded.batch.sequences_per_step == 4
    recipe.unlink()
    many = rows(tmp_path, *["word " * 2000] * 2000)
    code, _, recipe = init(tmp_path, "--model", "Qwen/Qwen3-8B", "--gpu", "h100-80gb", "--data", str(many))
    loaded = load_recipe(recipe).recipe
    assert (loaded.data.max_tokens, loaded.data.packing, loaded.data.eval_fraction) == (4096, True, 0.02)
    assert loaded.batch.sequences_per_step == 16


def test_every_mistake_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n{"messages": 3}\n')
    code, said, recipe = init(tmp_path, "--model", "Qwen/Qwen3-8B", "--data", str(bad), "--data", "missing.jsonl")
    assert (code, recipe.exists()) == (3, False)
    assert all(place in said for place in ("bad.jsonl:1", "bad.jsonl:2", "missing.jsonl"))
    code, said, recipe = init(tmp_path, "--model", "Qwen/Qwen3-80", "--data", "data_templates/chat.jsonl")
    assert (code, recipe.exists()) == (2, False)
    assert "Did you mean" in said
    code, said, recipe = init(
        tmp_path, "--model", "Qwen/Qwen3-235B-A22B", "--data", "data_templates/chat.jsonl", "--gpu", "t4"
    )
    assert (code, recipe.exists()) == (4, False)
    assert "does not fit" in said
    recipe.write_text("mine")
    code, said, recipe = init(tmp_path, "--model", "Qwen/Qwen3-8B", "--data", "data_templates/chat.jsonl")
    assert (code, recipe.read_text()) == (2, "mine")
    assert "nothing is overwritten" in said
