"""`qwentune init` writes a recipe that loads, that fits, and that holds what the data needs."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qwentune.cli import app
from qwentune.data.dataset import chat_template, prepare
from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import Problem, UsageError
from qwentune.facts import present
from qwentune.facts.gpus import gpu_spec
from qwentune.init import KINDS, look_at, which_gpu
from qwentune.memory import RunPlan, judge
from qwentune.recipe import load_recipe
from tests.checkpoints import write_checkpoint
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


@pytest.mark.parametrize(
    ("model", "data", "gpu"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "image", "l40s"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "chat", "l40s"),
        ("Qwen/Qwen3.5-4B", "video", "rtx-4090"),
        ("Qwen/Qwen3.5-4B", "chat", "rtx-4090"),
        ("Qwen/Qwen2-Audio-7B-Instruct", "audio", "h100-80gb"),
    ],
)
def test_a_recipe_is_judged_as_its_plan_is_also_where_rows_have_media(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, data: str, gpu: str
) -> None:
    plans: list[RunPlan] = []
    made = judge.judge

    def recorded(*args: Any, **kwargs: Any) -> RunPlan:
        plans.append(made(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(judge, "judge", recorded)
    source = Path(__file__).parent.parent / f"data_templates/{data}.jsonl"
    code, said, recipe = init(tmp_path, "--model", model, "--data", str(source), "--gpu", gpu)
    assert code == 0, said
    chosen = plans[-1]
    ended = CliRunner().invoke(app, ["plan", str(recipe), "--json"])
    assert json.loads(ended.stdout)["phases"] == chosen.to_json()["phases"]
    assert (chosen.phases["train_step"].terms["media"] > 0) == (data != "chat" or "VL" in model)


def rows(folder: Path, *texts: str) -> Path:
    path = folder / "rows, with: signs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(
    ("model", "gpu", "kind"),
    [
        ("Qwen/Qwen3-0.6B", "rtx-4090", "full"),
        ("Qwen/Qwen3-8B", "RTX 4090", "lora"),
        ("Qwen/Qwen3-4B", "24GiB", "lora"),  # its optimizer would fit into host memory, at a fraction of the speed
        ("Qwen/Qwen3-8B", "t4", "qlora"),
        ("Qwen/Qwen3-8B", "h200", "full"),
        ("Qwen/Qwen2.5-72B-Instruct", "h100-80gb", "qlora"),
    ],
)
def test_with_many_rows_the_richest_tuning_that_fits_is_written_for_each_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, gpu: str, kind: str
) -> None:
    monkeypatch.setattr("qwentune.init.FEWEST_ROWS_FOR_FULL", 12)
    code, said, recipe = init(tmp_path, "--model", model, "--data", "data_templates/chat.jsonl", "--gpu", gpu)
    assert code == 0, said
    loaded = load_recipe(recipe).recipe
    assert (loaded.model, loaded.tuning.kind, loaded.hardware.gpu) == (model, kind, gpu_spec(gpu).name)
    assert ("assumed" in said) == (gpu == "24GiB")
    assert fits(recipe)
    text = re.sub(r"  (rank|alpha):.*\n", "", recipe.read_text())
    for richer in KINDS[: KINDS.index(kind)]:
        recipe.write_text(text.replace(f"kind: {kind}", f"kind: {richer}"))
        assert not fits(recipe, "hardware.launch=single"), "on the GPU alone"


def not_at_hand(folder: Path) -> None:
    raise UsageError(Problem(str(folder), "was not fetched yet"))


def test_no_row_is_longer_than_the_length_that_was_guessed_from_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in random_rows(5, 300, hostile=False)))
    monkeypatch.setattr("qwentune.data.tokenizing.tokenizer.load_tokenizer", not_at_hand)
    code, said, recipe = init(tmp_path, "--model", "builtin:tiny-qwen3", "--data", str(data), "--gpu", "cpu")
    assert code == 0, said
    assert "by a guess from its bytes" in recipe.read_text()
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
    assert (loaded.data.max_tokens, loaded.data.packing, loaded.data.eval_fraction) == (512, False, 0.1)
    assert (loaded.batch.sequences_per_step, loaded.output.eval_every_epochs) == (2, 1)
    recipe.unlink()
    many = rows(tmp_path, *["word " * 2000] * 2000)
    code, _, recipe = init(tmp_path, "--model", "Qwen/Qwen3-8B", "--gpu", "h100-80gb", "--data", str(many))
    loaded = load_recipe(recipe).recipe
    assert (loaded.data.max_tokens, loaded.data.packing, loaded.data.eval_fraction) == (3584, True, 0.02)
    assert loaded.batch.sequences_per_step == 16


@pytest.mark.parametrize(
    ("model", "gpu", "learning_rate"),
    [("Qwen/Qwen3-8B", "4090", 2e-4), ("Qwen/Qwen3-32B", "h100", 1e-4), ("builtin:tiny-qwen3", "cpu", 1e-3)],
)
def test_few_rows_are_for_adapters_unless_the_weights_are_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, gpu: str, learning_rate: float
) -> None:
    monkeypatch.setattr("qwentune.data.tokenizing.tokenizer.load_tokenizer", not_at_hand)
    data = rows(tmp_path, *["word " * 50] * 59)
    code, said, recipe = init(tmp_path, "--model", model, "--gpu", gpu, "--data", str(data))
    assert code == 0, said
    loaded = load_recipe(recipe).recipe
    assert (loaded.tuning.kind == "full") == model.startswith("builtin:")
    assert loaded.optimizer.learning_rate == learning_rate
    assert "below 50 little is learned" not in said, "of a recipe that it chose itself"


def test_keys_that_nothing_reads_are_named_without_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwentune.data.tokenizing.tokenizer.load_tokenizer", not_at_hand)
    data = tmp_path / "rows.jsonl"
    spoken = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data.write_text(json.dumps({"messages": spoken, "available_functions": []}) + "\n")
    code, said, _ = init(tmp_path, "--model", "builtin:tiny-qwen3", "--data", str(data), "--gpu", "cpu")
    assert code == 0, said
    assert "'available_functions' (1, first:" in said


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_that_is_asked_for_is_written_with_a_learning_rate_of_its_own(tmp_path: Path, kind: str) -> None:
    arguments = ("--model", "Qwen/Qwen3-8B", "--gpu", "h200", "--data", "data_templates/chat.jsonl", "--kind", kind)
    code, said, recipe = init(tmp_path, *arguments)
    assert code == 0, said
    loaded = load_recipe(recipe).recipe
    assert loaded.tuning.kind == kind
    assert loaded.optimizer.learning_rate == (1e-5 if kind == "full" else 2e-4)


def test_the_longest_example_is_measured_where_the_tokenizer_is_at_hand(tmp_path: Path, qwen3_folder: Path) -> None:
    longest = "word " * 700
    data = rows(tmp_path, *["word " * 50] * 30, longest)
    num_tokens = len(load_tokenizer(qwen3_folder).encode([longest])[0]) + 1  # the end of the text
    code, said, recipe = init(tmp_path, "--model", str(qwen3_folder), "--gpu", "cpu", "--data", str(data))
    assert code == 0, said
    assert load_recipe(recipe).recipe.data.max_tokens == math.ceil(num_tokens / 512) * 512
    (line,) = (line for line in recipe.read_text().splitlines() if "max_tokens" in line)
    assert line.endswith(f"the longest example has {num_tokens:,} tokens")
    assert "warning: 29 rows train exactly what an earlier row trains" in said, "as the preview does"


def test_what_the_preview_will_refuse_is_said_and_the_recipe_written(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "qwen2")  # whose template knows no reasoning
    data = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    code, said, recipe = init(tmp_path, "--model", str(model), "--gpu", "cpu", "--data", str(data))
    assert code == 0, said
    assert "The preview will refuse this data" in said
    assert "rows.jsonl:1" in said
    assert "data.unsupported_reasoning" in said
    assert "by a guess" in recipe.read_text()


def test_without_a_gpu_the_flag_is_named_with_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(present, "present_gpus", lambda: None)
    arguments = ("--model", "Qwen/Qwen3-8B", "--data", "data_templates/chat.jsonl")
    code, said, recipe = init(tmp_path, *arguments)
    assert (code, recipe.exists()) == (2, False)
    assert said.count("--gpu ") >= 3
    for example in re.findall(r"--gpu ([\w-]+)", said.split("Name the one")[1]):
        again = init(tmp_path, *arguments, "--gpu", example)
        assert again[0] in (0, 4), again[1]  # this machine may be too small
        recipe.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("model", "options", "offered"),
    [
        ("Qwen/Qwen3-8B", ("--gpu", "24GiB", "--kind", "full"), ["--kind", "--gpu", "--model"]),
        ("Qwen/Qwen3-30B-A3B", ("--gpu", "rtx-4090"), ["--gpu", "--model"]),
        ("Qwen/Qwen2.5-32B-Instruct", ("--gpu", "cpu"), ["--gpu", "--model"]),
        ("Qwen/Qwen3-235B-A22B", ("--gpu", "h200"), ["--model"]),
    ],
)
def test_where_nothing_fits_each_mend_is_an_option_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, options: tuple[str, ...], offered: list[str]
) -> None:
    monkeypatch.setattr(judge, "free_host_bytes", lambda: 2 * 10**10)
    given = {
        "--model": model,
        "--data": "data_templates/chat.jsonl",
        **dict(zip(options[::2], options[1::2], strict=True)),
    }
    code, said, recipe = init(tmp_path, *itertools.chain(*given.items()))
    assert (code, recipe.exists()) == (4, False), said
    mends = re.findall(r": (--\w+) (\S+)$", said, re.MULTILINE)
    assert [option for option, _ in mends] == offered
    assert "=" not in said.split("does not fit")[1], "init takes no overrides"
    for option, value in mends:
        code, said, recipe = init(tmp_path, *itertools.chain(*{**given, option: value}.items()))
        assert code == 0, said
        recipe.unlink()


def test_on_a_terminal_the_gpu_is_asked_for_until_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(present, "present_gpus", lambda: None)
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True, raising=False)
    answers = iter(["a100", "4090"])
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    assert which_gpu(None) == "rtx-4090"
    assert "'a100-40gb' or 'a100-80gb'" in capsys.readouterr().err

    def gone(*_: object, **__: object) -> str:
        raise typer.Abort

    monkeypatch.setattr("typer.prompt", gone)
    with pytest.raises(KeyboardInterrupt):
        which_gpu(None)


def test_every_mistake_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n{"messages": 3}\n')
    code, said, recipe = init(tmp_path, "--model", "Qwen/Qwen3-8B", "--data", str(bad), "--data", "missing.jsonl")
    assert (code, recipe.exists()) == (3, False)
    assert all(place in said for place in ("bad.jsonl:1", "bad.jsonl:2", "missing.jsonl"))
    code, said, recipe = init(
        tmp_path, "--model", "Qwen/Qwen3-8B", "--data", "data_templates/chat.jsonl", "--kind", "lorra"
    )
    assert (code, recipe.exists()) == (2, False)
    assert "'lorra'" in said
    assert "full, lora, qlora" in said
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


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "image"),
        ("Qwen/Qwen3-VL-8B-Instruct", "video"),
        ("Qwen/Qwen2-Audio-7B", "audio"),
    ],
)
def test_rows_with_media_get_a_recipe(tmp_path: Path, model: str, file: str) -> None:
    data = f"data_templates/{file}.jsonl"
    code, said, recipe = init(tmp_path, "--model", model, "--data", data, "--gpu", "h100-80gb")
    assert code == 0, said
    assert load_recipe(recipe).recipe.data.train[0].path == data
    (seen,) = look_at([data])
    assert all(tokens > 400 for tokens in seen.tokens)
