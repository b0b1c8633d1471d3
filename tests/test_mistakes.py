"""A mistake is said with its place and its mend, all at once, without a traceback, before anything was written."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwentune import plan, supervise, train
from qwentune.errors import DataError, UsageError, UserError
from qwentune.training.command_line import Request
from qwentune.training.run_folder import RunFolder
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import in_a_fork

THREE_MISTAKES = """\
model: builtin:tiny-qwen3
tuning:
  kind: lora
  rnak: 8
data:
  train: data_templates/chat.jsonl
  max_tokens: 256
batch: {sequences_per_step: many}
output:
  dir: run
seed: 1
data:
  max_tokens: 512
"""
GOOD_ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}'
BAD_ROWS = f"""\
{GOOD_ROW}
{{"messages": [{{"role": "user", "content": "hi"}}, {{"role": "assistant", "con
{GOOD_ROW}
{{"messages": [{{"role": "user", "content": "hi"}}, {{"role": "assisstant", "content": "hello"}}]}}
{{"messages": [{{"role": "user", "content": null}}, {{"role": "assistant", "content": "hello"}}]}}
{GOOD_ROW}
"""
RECIPE_COMMANDS = {
    "preview": ("qwentune.preview",),
    "plan": ("qwentune.plan",),
    "train": ("qwentune.cli", "train"),
    "train in this process": ("qwentune.train",),
}


def run(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return in_a_fork(module, folder, *arguments, QWENTUNE_CACHE=str(folder / "cache"))


def write_recipe(folder: Path, model: Path | str, **sections: object) -> Path:
    recipe = {
        "model": str(model),
        "tuning": {"kind": "full"},
        "data": {"train": "rows.jsonl", "max_tokens": 256},
        "optimizer": {"max_steps": 1},
        "output": {"dir": "run"},
        **sections,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder / "recipe.yaml"


def assert_is_refused(finished: subprocess.CompletedProcess[str], code: int) -> None:
    """It ended with `code`, in words for its user and in nothing else."""
    assert finished.returncode == code, finished.stderr
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    assert "A bug in qwentune" not in finished.stderr


# --- the recipe


@pytest.mark.fault("I67", "all mistakes at once, each with file, line and column, exit 2")
@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_three_mistakes_in_a_recipe_are_named_with_their_lines(tmp_path: Path, command: str) -> None:
    (tmp_path / "recipe.yaml").write_text(THREE_MISTAKES)
    finished = run(tmp_path, *RECIPE_COMMANDS[command], "recipe.yaml")
    assert_is_refused(finished, 2)
    unknown, wrong_type, duplicate, closing = re.findall(r"^\S.*(?:\n    .*)*", finished.stderr, re.M)
    assert unknown.startswith("recipe.yaml:4:3  ")
    assert "'rnak'" in unknown
    assert "'rank'" in unknown
    assert wrong_type.startswith("recipe.yaml:8:29  ")
    assert "many" in wrong_type
    assert duplicate.startswith("recipe.yaml:12:1  ")
    assert "it was given first at recipe.yaml:5:1" in duplicate
    assert closing.startswith("3 problems.")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.fault("I69", "the nearest known model is named, exit 2")
@pytest.mark.parametrize("command", ["preview", "plan", "train"])
def test_an_unknown_model_is_answered_with_the_nearest(tmp_path: Path, command: str) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD_ROW + "\n")
    write_recipe(tmp_path, "Qwen/Qwen3-8")
    finished = run(tmp_path, *RECIPE_COMMANDS[command], "recipe.yaml")
    assert_is_refused(finished, 2)
    assert "'Qwen/Qwen3-8' is not a known model. Did you mean 'Qwen/Qwen3-8B'?" in finished.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "rows.jsonl"}


# --- the data


@pytest.mark.parametrize("command", ["preview", "train", "train in this process"])
def test_three_mistakes_in_a_data_file_are_named_with_their_lines(
    tmp_path: Path, qwen3_folder: Path, command: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(BAD_ROWS)
    write_recipe(tmp_path, qwen3_folder)
    arguments = ["--jsonl", "out.jsonl"] if command == "preview" else []
    finished = run(tmp_path, *RECIPE_COMMANDS[command], "recipe.yaml", *arguments)
    assert_is_refused(finished, 3)
    said = finished.stderr[finished.stderr.index("rows.jsonl:") :]  # `train` shows its plan first
    truncated, typo, null, closing = re.findall(r"^\S.*(?:\n    .*)*", said, re.M)
    assert re.match(r"rows\.jsonl:2(:\d+)?  the value ends before it is complete", truncated)
    assert typo.startswith("rows.jsonl:4  messages[1] has the unknown role 'assisstant'")
    assert "Did you mean 'assistant'?" in typo
    assert null.startswith("rows.jsonl:5  messages[0].content is null")
    assert closing == "3 problems. Nothing was written."

    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.yaml", "rows.jsonl", "cache"}
    assert [path for path in tmp_path.glob("cache/data/*") if path.suffix != ".lock"] == []


def test_a_missing_data_file_is_answered_with_the_nearest(tmp_path: Path, qwen3_folder: Path) -> None:
    (tmp_path / "row.jsonl").write_text(GOOD_ROW + "\n")
    write_recipe(tmp_path, qwen3_folder)
    finished = run(tmp_path, "qwentune.preview", "recipe.yaml")
    assert_is_refused(finished, 3)
    assert "rows.jsonl  there is no such file\n    Did you mean 'row.jsonl'?" in finished.stderr


# --- the run folder


def test_what_this_machine_does_not_have_is_named_all_at_once(tmp_path: Path, qwen3_folder: Path) -> None:
    write_recipe(tmp_path, qwen3_folder)
    asked = ("tuning.kind=lora", "tuning.start_from=nowhere", "output.report_to=[trackio]", "hardware.gpu=cpu")
    refused = run(tmp_path, "qwentune.train", "recipe.yaml", *asked)
    assert_is_refused(refused, 2)
    assert "tuning.start_from: 'nowhere' holds no adapter" in refused.stderr
    assert "output.report_to: trackio is not installed" in refused.stderr


@pytest.mark.parametrize("start", [supervise.run, train.run], ids=["train", "train in this process"])
def test_a_change_that_no_run_has_is_refused_with_the_nearest(start: Callable[[Request], int]) -> None:
    known = (
        "number of ranks",
        "chat template",
        "base weights",
        "ranks",
        "base",
        "data",
        "tuning",
        "optimizer.max_steps",
        "plan",
        "plan.micro_batch",
        "seed",
    )
    with pytest.raises(UsageError) as refused:
        start(Request("recipe.yaml", allow_change=("nonsense", *known, "optimizer.max_step")))
    nonsense, misspelt = refused.value.problems
    assert (nonsense.where, nonsense.what) == ("--allow-change", "'nonsense' is nothing that can change.")
    assert all(name in nonsense.fix for name in ("ranks", "template", "tokenizer", "base", "data", "plan"))
    assert "Did you mean 'optimizer.max_steps'?" in misspelt.what


@pytest.mark.parametrize(
    ("asked", "error", "what"),
    [
        ({"tuning": {"kind": "lora", "start_from": "nowhere"}}, UsageError, "'nowhere' holds no adapter"),
        ({"data": {"train": [{"path": "row.jsonl", "format": "chat"}]}}, DataError, "there is no such file"),
        ({"data": {"train": "data_templates/preference.jsonl"}}, DataError, "the format preference can be previewed"),
        ({"output": {"dir": "run", "report_to": ["trackio"]}}, UsageError, "trackio is not installed"),
    ],
)
def test_what_no_run_can_do_without_is_refused_before_it_is_launched(
    tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any], error: type[UserError], what: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervise, "supervise", lambda *_: pytest.fail("it was launched"))
    Path("rows.jsonl").write_text(GOOD_ROW)
    write_recipe(tmp_path, qwen3_folder, hardware={"gpu": "cpu"}, **asked)
    with pytest.raises(error, match=what):
        supervise.run(Request("recipe.yaml"))


@pytest.mark.parametrize(
    "source", ["data_templates/preference.jsonl", {"path": "not-here.jsonl", "format": "preference"}]
)
def test_rows_that_nothing_trains_are_refused_by_the_plan_unrendered(
    tmp_path: Path, qwen3_folder: Path, source: object
) -> None:
    recipe = write_recipe(tmp_path, qwen3_folder, data={"train": [source]}, hardware={"gpu": "cpu"})
    with pytest.raises(DataError, match="the format preference can be previewed, but not trained on yet"):
        plan.run(str(recipe), [], None, None, as_json=True, trace=False)


@pytest.mark.parametrize("command", ["plan", "train in this process"])
def test_half_of_what_experts_hold_as_one_is_answered_with_the_other(
    tmp_path: Path, qwen3_moe_folder: Path, command: str
) -> None:
    """PEFT would say so once the weights are read; this folder has none."""
    (tmp_path / "rows.jsonl").write_text(GOOD_ROW)
    write_recipe(tmp_path, qwen3_moe_folder, tuning={"kind": "lora", "targets": ["q_proj", "gate_proj"]})
    finished = run(tmp_path, *RECIPE_COMMANDS[command], "recipe.yaml")
    assert_is_refused(finished, 2)
    assert "tuning.targets: gate_proj without up_proj, but the experts of qwen3_moe" in finished.stderr
    mend = "tuning.targets=[q_proj,gate_proj,up_proj]"
    assert mend in finished.stderr
    assert run(tmp_path, *RECIPE_COMMANDS["plan"], "recipe.yaml", mend, "--json").returncode == 0


@pytest.mark.fault(
    "K77", "the second is refused with process, host and time of the first, exit 7; the dead hold nothing"
)
@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "train in this process"])
def test_a_second_trainer_in_a_run_folder_is_refused(tmp_path: Path, command: str) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    (tmp_path / "rows.jsonl").write_text(f"{GOOD_ROW}\n" * 4)
    write_recipe(tmp_path, model, batch={"sequences_per_step": 1})
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
        finished = run(tmp_path, *RECIPE_COMMANDS[command], "recipe.yaml")
        assert_is_refused(finished, 7)
        assert re.search(r"^run  is in use by process \d+ on ", finished.stderr, re.M)
        assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(("override", "code"), [("", 3), ("data.max_tokens=4000000", 4)], ids=["data", "memory"])
def test_under_bare_accelerate_the_exit_code_stands_in_the_status(
    tmp_path: Path, qwen3_folder: Path, override: str, code: int
) -> None:
    """Accelerate turns every code into 1, so that of an error before training is left in the run folder."""
    (tmp_path / "rows.jsonl").write_text(BAD_ROWS)
    write_recipe(tmp_path, qwen3_folder)
    launch = ("--config_file", str(Path(__file__).parents[1] / "launch" / "single.yaml"), "-m", "qwentune.train")
    overrides = [override] if override else []
    ended = run(tmp_path, "accelerate.commands.launch", *launch, "recipe.yaml", *overrides)
    assert ended.returncode == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit"], status["step"]) == ("failed", code, 0), status
    assert status["reason"].splitlines()[0] in ended.stderr
    with RunFolder(tmp_path / "run").lock():
        pass


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["preview"], "Missing argument 'recipe'"),
        (["previw", "recipe.yaml"], "previw"),
        (["preview", "recipe.yaml", "--limt", "3"], "--limt"),
        (["preview", "recipe.yaml", "--limit", "-1"], "--limit"),
        (["preview", "recipe.yml"], "recipe.yml"),
        (["preview", "recipe.yaml", "data.max_tokens"], "this is no override"),
        (["preview", "recipe.yaml", "data.max_token=64"], "Did you mean 'max_tokens'?"),
        (["preview", "recipe.yaml", "--jsonl", "no/such/folder/out.jsonl"], "no/such/folder"),
        (["preview", "recipe.yaml", "data.chat_template=no.jinja"], "no.jinja"),
        (["plan", "recipe.yaml", "--gpu", "rtx-409"], "Did you mean 'rtx-4090'?"),
        (["plan", "recipe.yaml", "--gpus", "0"], "--gpus"),
        (["train", "recipe.yaml", "hardware.launch=singel"], "Did you mean 'single'?"),
        (["chat", "run"], "holds no finished run"),
        (["export", "run"], "holds no finished run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_2_and_names_what_is_wrong(
    tmp_path: Path, qwen3_folder: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{GOOD_ROW}\n")
    write_recipe(tmp_path, qwen3_folder)
    finished = run(tmp_path, "qwentune.cli", *arguments)
    assert_is_refused(finished, 2)
    assert said in finished.stderr
    assert not (tmp_path / "run").exists()
