"""The whole walk as real processes: train, stop by a signal, go on, export, merge, chat."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from qwentune.data.tokenizing.tokenizer import split_pattern
from qwentune.errors import DoesNotFitError, UserError
from qwentune.export import run_export
from qwentune.exporting import folder as exporting
from qwentune.exporting import verify as verifying
from tests import qwen3_5
from tests.checkpoints import SMALL_NUM_RANKS, add_weights, write_checkpoint
from tests.runs import ENVIRONMENT, final_weights, loss_history, write_recipe
from tests.warm import CLI, PAUSED, TRAIN, Warm

ROOT = Path(__file__).parents[1]
CHAT_ROWS = [json.loads(line) for line in (ROOT / "data_templates" / "chat.jsonl").read_text().splitlines()]
LORA = {"kind": "lora", "rank": 4, "alpha": 32, "dropout": 0.0}

# Runs in a process that has never seen qwentune: the merged folder against the adapter on its base.
COMPARE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, merged = sys.argv[1:]
untuned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
result = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(merged)
text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], tokenize=False)
ids = torch.tensor([tokenizer(text)["input_ids"]])
with torch.no_grad():
    before = untuned(ids).logits.clone()
    tuned = PeftModel.from_pretrained(untuned, adapter).eval()
    print(float((tuned(ids).logits - result(ids).logits).abs().max()), float((before - result(ids).logits).abs().max()))
"""


def run_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwentune.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)


def wait_until(process: subprocess.Popen[str], happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not happens():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("qwen3", "lora"),
        pytest.param("qwen2", "qlora", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_merged_folder_is_the_adapter_on_its_base(
    tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch, model_type: str, kind: str
) -> None:
    # Of another family, to see that its pattern survives in every folder.
    tokenizer = qwen3_5.write_tokenizer(tmp_path / "tokenizer", SMALL_NUM_RANKS) if model_type == "qwen3" else None
    model = write_checkpoint(tmp_path / "model", model_type, tokenizer_from=tokenizer)  # type: ignore[arg-type]
    recipe = write_recipe(tmp_path, add_weights(model), tuning={**LORA, "kind": kind}, optimizer={"max_steps": 8})
    trained = warm.train(recipe)
    assert trained.code == 0, trained.said

    run = tmp_path / "run"
    exported = warm.train(run, "--merge", "--verify", code=CLI, given=["export"])
    assert exported.code == 0, exported.said
    assert "on 4 texts, 4 rows of the run" in exported.said
    assert ("whose base stood in 4 bits, differs from it" in exported.said) is (kind == "qlora")

    compared = subprocess.run(
        [sys.executable, "-c", COMPARE, str(model), str(run / "adapter"), str(run / "merged")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    difference, learnt = map(float, compared.stdout.split())
    assert difference <= 1e-5
    assert learnt > 1e-3, "the adapter changed nothing, so equality would prove nothing"

    generation = json.loads((run / "merged" / "generation_config.json").read_text())
    tokens = json.loads((run / "merged" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert tokens[str(generation["eos_token_id"][0])]["content"] == "<|im_end|>"
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (run / "merged" / name).read_bytes() == (model / name).read_bytes()

    with_tokenizer = {file.parent for pattern in ("tokenizer*", "vocab*") for file in run.rglob(pattern)}
    assert with_tokenizer == {run / "adapter", run / "merged"}
    pattern = split_pattern(json.loads((model / "tokenizer.json").read_bytes()))
    for folder in with_tokenizer:
        loaded = AutoTokenizer.from_pretrained(folder)
        assert split_pattern(json.loads(loaded.backend_tokenizer.to_str())) == pattern

    beside = warm.train(run, code=CLI, given=["export"])
    if model_type == "qwen3_moe":
        assert "adapts experts by PEFT's names" in beside.said
    else:
        assert f"vllm serve {model} --enable-lora" in beside.said
        assert f"--lora-modules run={run / 'export'}" in beside.said
    assert f"vllm serve {run / 'merged'} --served-model-name run" in exported.said
    assert "vllm serve" in (run / "merged" / "README.md").read_text()

    twice = warm.train(run, "--merge", code=CLI, given=["export"])
    assert (twice.code, "exists already" in twice.said) == (2, True)

    run_export(run, merge=False, verify=True, output=tmp_path / "gguf", gguf="q8_0")
    assert {"run-Q8_0.gguf", "Modelfile", "README.md"} <= {file.name for file in (tmp_path / "gguf").iterdir()}
    assert "llama-server -m" in (tmp_path / "gguf" / "README.md").read_text()

    with monkeypatch.context() as scarce:
        scarce.setattr(exporting, "free_disk_bytes", lambda *_, **__: 10**5)
        with pytest.raises(DoesNotFitError, match=r"of disk; 0\.1 MB are free"):
            run_export(run, merge=True, verify=False, output=tmp_path / "too-large")
        with pytest.raises(DoesNotFitError, match=r"of disk; 0\.1 MB are free"):
            run_export(run, merge=False, verify=False, output=tmp_path / "too-large", gguf="f32")
    with monkeypatch.context() as scarce:
        scarce.setattr(verifying, "free_host_bytes", lambda: 10**5)
        with pytest.raises(DoesNotFitError, match="compared in memory"):
            run_export(run, merge=True, verify=True, output=tmp_path / "too-large")
    assert not (tmp_path / "too-large").exists()

    def forget_the_adapter(base: Path, adapter: Path, target: Path) -> None:
        shutil.copytree(base, target, dirs_exist_ok=True)

    monkeypatch.setattr(exporting, "merge", forget_the_adapter)
    with pytest.raises(UserError, match="its logits differ from the run's"):
        run_export(run, merge=True, verify=True, output=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.fault("D23 D32", "saved at the next step, exit 75; the same command goes on, bit for bit")
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model, output={"save_every_steps": 1000})
    run = tmp_path / "run"
    assert warm.train(recipe).code == 0
    undisturbed = loss_history(run), final_weights(run)
    run.rename(tmp_path / "undisturbed")

    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED + TRAIN, str(recipe)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_until(process, lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted"
    assert status["exit"] == 75
    assert 0 < status["step"] < 40
    assert f"saved step {status['step']}" in errors

    assert warm.train(recipe).code == 0
    assert (loss_history(run), final_weights(run)) == undisturbed
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path: Path) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(tmp_path, model)
    process = subprocess.Popen(
        [sys.executable, "-m", "qwentune.train", str(recipe)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_until(process, lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())  # it is being imported
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "bug" not in errors


# What trackers are told is written to the file that SEEN names.
TOLD = """
import json, os
from transformers.trainer_callback import CallbackHandler
on_log = CallbackHandler.on_log
def written(self, args, state, control, logs):
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps({"step": state.global_step, **logs}) + chr(10))
    return on_log(self, args, state, control, logs)
CallbackHandler.on_log = written
"""


@pytest.mark.slow
def test_the_last_step_is_logged_and_evaluated_whatever_the_period(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(
        tmp_path,
        model,
        data={"eval_fraction": 0.2},
        optimizer={"max_steps": 5},
        output={"log_every_steps": 3, "eval_every_steps": 100, "save_every_steps": 4},
    )
    assert warm.train(recipe, code=TOLD + TRAIN, SEEN=str(tmp_path / "told")).code == 0
    run = tmp_path / "run"
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        seen = next(one for one in told if one["step"] == row["step"] and "loss" in one)
        assert {name: seen.get(name) for name in row} == row, "trackers are told what is recorded"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(row["event"], row["step"]) for row in events] == [("start", 0), ("save", 4), ("save", 5), ("finished", 5)]
    page = (run / "run.html").read_text()
    assert "<title>run: finished, step 5</title>" in page
    assert "Step 5 of 5" in page
    assert [row[0] for row in loss_history(run)] == [3, 5]
    assert [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()] == [5]


@pytest.mark.fault("A06", "killed before the weights are published: the same command publishes them")
def test_a_run_killed_before_its_weights_were_published_publishes_them(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen2"))
    recipe = write_recipe(tmp_path, model, optimizer={"max_steps": 4})
    run = tmp_path / "run"
    assert warm.train(recipe).code == 0
    weights = final_weights(run)
    (run / "model").rename(run / ".model.writing")

    again = warm.train(recipe)
    assert again.code == 0, again.said
    assert final_weights(run) == weights
    assert len(loss_history(run)) == 4


@pytest.mark.slow
def test_the_best_step_is_published_and_a_run_that_no_longer_improves_ends(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(
        tmp_path,
        model,
        data={"eval_fraction": 0.2},
        optimizer={"learning_rate": 0.05, "schedule": "constant"},  # so much that the eval loss soon rises
        output={"eval_every_steps": 2, "save_every_steps": 100, "keep": 1, "best": "loss", "early_stopping": 3},
    )
    trained = warm.train(recipe)
    assert trained.code == 0, trained.said
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["loss"])["step"]
    status = json.loads((run / "status.json").read_text())
    assert status["step"] == best + 3 * 2 < 40
    assert status["reason"] == f"the eval loss stopped falling; published step {best}"
    checkpoint = run / "checkpoints" / f"step-{best}" / "model.safetensors"
    assert final_weights(run)["model.safetensors"] == checkpoint.read_bytes()
    assert "already complete" in warm.train(recipe).said


@pytest.mark.slow
def test_the_quickstart_says_its_rows_back(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "QWENTUNE_CACHE": os.environ.get("QWENTUNE_CACHE", str(tmp_path / "cache"))}
    command = [sys.executable, "-m", "qwentune.cli", "train", "recipes/quickstart.yaml"]
    trained = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs" / "quickstart"
    losses = [row[1] for row in loss_history(run)]
    assert losses[0] > 10 > 0.1 > losses[-1]

    from qwentune.chat import MAX_NEW_TOKENS
    from qwentune.data.sample import Message
    from qwentune.exporting.finished import open_run
    from qwentune.exporting.speakers import Partner

    partner = Partner(open_run(run), thinking=None)
    for row in CHAT_ROWS:
        question, answer = (message["content"] for message in row["messages"])
        reply = partner.answer([Message("user", question)], MAX_NEW_TOKENS)
        assert (reply.answer, reply.stopped) == (answer, True)

    question, answer = (message["content"] for message in CHAT_ROWS[0]["messages"])
    said = run_command("chat", str(run), "--message", question, "--json", cwd=tmp_path)
    assert json.loads(said.stdout) == {"answer": answer, "stopped": True, "tokens": reply_tokens(run, answer)}


def reply_tokens(run: Path, answer: str) -> int:
    """The number of tokens of an answer with the one that ends its turn."""
    from qwentune.data.tokenizing.tokenizer import load_tokenizer

    return len(load_tokenizer(run / "model").encode([answer])[0]) + 1
