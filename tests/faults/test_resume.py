"""Resumed at any step and under any settings, a run ends like one that never stopped; a change is refused or counts."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwentune.training.checkpoints import MANIFEST
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import KILL_AT, KILLED, final_weights, last_states, loss_history, write_recipe
from tests.warm import TRAIN, Warm

pytestmark = pytest.mark.slow

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
NUM_STEPS = 12
# Counts the batches that the run loads and the files that it renders.
COUNT = """
import atexit, os
from qwentune.data.layout.batch import TrainBatches
from qwentune.data.rendering.render import Renderer
done = {"loaded": 0, "rendered": 0}
def counted(function, name):
    def count(*arguments):
        done[name] += 1
        return function(*arguments)
    return count
TrainBatches.__getitem__ = counted(TrainBatches.__getitem__, "loaded")
Renderer.render_all = counted(Renderer.render_all, "rendered")
atexit.register(lambda: open(os.environ["COUNT"], "w").write(f"{done['loaded']} {done['rendered']}"))
"""
EXIT_BY_ATEXIT = "import atexit\ntry:\n    {}\nfinally:\n    atexit._run_exitfuncs()\n"


def killed(warm: Warm, recipe: Path, step: int, *arguments: str) -> None:
    run = warm.train(recipe, *arguments, code=KILL_AT, given=[str(step)])
    assert run.code == KILLED, run.said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with weights. Do not write into it."""
    return add_weights(write_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


def recipe_of(folder: Path, model: Path, **sections: Any) -> Path:
    sections = {"optimizer": {"max_steps": NUM_STEPS}, "output": {"save_every_steps": 1}, **sections}
    return write_recipe(folder, model, **{**sections, "data": {"max_tokens": 256, **sections.get("data", {})}})


def result(run: Path) -> tuple[object, ...]:
    return loss_history(run), final_weights(run), last_states(run)


@pytest.mark.fault("E33 A01", "resumed at any step: the same losses and weights, bit for bit")
def test_a_run_that_is_resumed_after_every_step_ends_the_same(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(tmp_path, model, tuning=LORA, batch={"sequences_per_step": 7, "micro_batch": 1})
    assert warm.train(recipe, f"output.dir={tmp_path / 'whole'}").code == 0
    run = tmp_path / "run"
    killed(warm, recipe, 1)  # before anything was saved
    for step in range(2, NUM_STEPS + 1):
        killed(warm, recipe, step)
    last = warm.train(recipe)
    assert (last.code, f"from step {NUM_STEPS - 1}" in last.said) == (0, True), last.said
    assert result(run) == result(tmp_path / "whole")


def test_the_clock_saves_as_well_as_the_steps(tmp_path: Path, warm: Warm, model: Path) -> None:
    output = {"save_every_steps": 1000, "save_every_minutes": 1e-5, "keep": 100}
    assert warm.train(recipe_of(tmp_path, model, output=output)).code == 0
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {f"step-{step}" for step in range(1, NUM_STEPS + 1)} <= saved


@pytest.mark.fault("F38", "how often to save, log and evaluate may change without permission, and counts at once")
def test_a_new_period_counts_and_changes_no_weight(tmp_path: Path, warm: Warm, model: Path) -> None:
    output = {"save_every_steps": 5, "eval_every_steps": 5, "keep": 100, "best": "loss", "early_stopping": 4}
    recipe = recipe_of(tmp_path, model, data={"eval_fraction": 0.2}, output=output)
    assert warm.train(recipe, f"output.dir={tmp_path / 'whole'}").code == 0
    killed(warm, recipe, 7)
    often = ("output.save_every_steps=2", "output.log_every_steps=3", "output.eval_every_steps=1")
    resumed = warm.train(recipe, *often)
    assert resumed.code == 0, resumed.said
    assert "trainer_state.json" not in resumed.said
    run = tmp_path / "run"
    assert [row[0] for row in loss_history(run)] == [1, 2, 3, 4, 5, 6, 9, 12]
    evaluated = [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert evaluated == [5, 6, 7, 8, 9, 10, 11, 12]
    assert {"step-5", "step-6", "step-8", "step-10", "step-12"} <= {p.name for p in (run / "checkpoints").iterdir()}
    assert final_weights(run) == final_weights(tmp_path / "whole")


CELLS: dict[str, dict[str, Any]] = {
    "full, packed, eval, linear": {
        "data": {"eval_fraction": 0.1}, "batch": {"micro_batch": 4}, "optimizer": {"schedule": "linear"},
        "output": {"eval_every_steps": 2},
    },
    "lora, accumulated, constant": {
        "tuning": LORA, "data": {"packing": False}, "batch": {"micro_batch": 1}, "optimizer": {"schedule": "constant"},
    },
    "dora, rows of 3 steps apart in the log": {
        "tuning": {**LORA, "variant": "dora"}, "batch": {"micro_batch": 2}, "output": {"log_every_steps": 3},
    },
    "qlora, eval": {
        "tuning": {**LORA, "kind": "qlora"}, "data": {"eval_fraction": 0.1}, "batch": {"micro_batch": 1},
        "output": {"eval_every_steps": 2},
    },
    "full, recomputed, all logits": {
        "memory": {"gradient_checkpointing": True, "loss": "full"}, "batch": {"micro_batch": 2},
    },
    "full, exact values behind bf16": {"precision": {"weights": "bf16"}, "batch": {"micro_batch": 2}},
    "full, exact values behind bf16, moments in 8 bits": {"precision": {"weights": "bf16", "optimizer_state": "8bit"}},
    "lora, exact values behind bf16": {
        "tuning": LORA, "precision": {"weights": "bf16", "adapters": "bf16"}, "batch": {"micro_batch": 1},
    },
    "full, the end of an epoch inside": {"optimizer": {"max_steps": None, "epochs": 2}, "data": {"packing": True}},
}  # fmt: skip


@pytest.mark.fault("E34 E35", "any tuning, packing, accumulation, evaluation, schedule, resumed twice: the same")
@pytest.mark.parametrize("cell", CELLS)
def test_settings_resume_exactly(tmp_path: Path, warm: Warm, model: Path, cell: str) -> None:
    sections = {name: dict(section) for name, section in CELLS[cell].items()}
    output = {"save_every_steps": 2, **sections.pop("output", {})}
    optimizer = {"max_steps": 8, **sections.pop("optimizer", {})}
    recipe = recipe_of(tmp_path, model, optimizer=optimizer, output=output, **sections)
    assert warm.train(recipe, f"output.dir={tmp_path / 'whole'}").code == 0
    killed(warm, recipe, 3)
    killed(warm, recipe, 6)
    last = warm.train(recipe)
    assert last.code == 0, last.said
    assert result(tmp_path / "run") == result(tmp_path / "whole")


@pytest.mark.fault("B16", "a run of before exact values: refused with both layouts and --fresh, exit 5")
def test_a_run_of_the_old_layout_is_refused_and_fresh_moves_it_aside(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(tmp_path, model, optimizer={"max_steps": 2}, output={"save_every_steps": 2})
    assert warm.train(recipe).code == 0
    run = tmp_path / "run"
    manifest = json.loads((run / "checkpoints" / "step-2" / MANIFEST).read_bytes())
    old = {**manifest, "schema": 1}
    del old["sha256"]
    old["sha256"] = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    (run / "checkpoints" / "step-2" / MANIFEST).write_text(json.dumps(old))
    plan = json.loads((run / "plan.json").read_bytes())
    plan["choices"]["optimizer_state"] = "bf16"  # as full tuning on a GPU had it
    for stored, said in (((run / "plan.json").read_text(), "reads layout 2"), (json.dumps(plan), "optimizer_state")):
        (run / "plan.json").write_text(stored)
        refused = warm.train(recipe, "optimizer.max_steps=4")
        assert refused.code == 5, refused.said
        assert said in refused.said
        assert "--fresh" in refused.said
        assert "Traceback" not in refused.said
    assert warm.train(recipe, "--fresh").code == 0
    assert len(list(tmp_path.glob("run.*"))) == 1


@pytest.mark.fault("E36", "the best step and the patience of early stopping go on, they do not start anew")
def test_early_stopping_counts_on_after_a_kill(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(
        tmp_path, model, data={"eval_fraction": 0.2},
        optimizer={"max_steps": 40, "learning_rate": 0.3, "schedule": "constant"},  # so much that the eval loss rises
        output={"save_every_steps": 1, "eval_every_steps": 2, "keep": 1, "best": "loss", "early_stopping": 3},
    )  # fmt: skip
    assert warm.train(recipe, f"output.dir={tmp_path / 'whole'}").code == 0
    whole = json.loads((tmp_path / "whole" / "status.json").read_text())
    assert whole["reason"].startswith("the eval loss stopped falling")
    killed(warm, recipe, whole["step"] - 3)  # in the middle of the patience
    last = warm.train(recipe)
    assert last.code == 0, last.said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["reason"], status["step"]) == (whole["reason"], whole["step"])
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert "already complete" in warm.train(recipe).said


@pytest.mark.fault("B11", "the best checkpoint is damaged when the weights are published: said, and the last is taken")
def test_damaged_weights_are_not_published_as_the_best(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(
        tmp_path, model, data={"eval_fraction": 0.2},
        optimizer={"max_steps": 40, "learning_rate": 0.3, "schedule": "constant"},  # so much that the eval loss rises
        output={"save_every_steps": 100, "eval_every_steps": 2, "best": "loss", "early_stopping": 2},
    )  # fmt: skip
    assert warm.train(recipe).code == 0
    run = tmp_path / "run"
    best, last = sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))[-2:]
    shutil.rmtree(run / "model")
    os.truncate(best / "model.safetensors", 100)
    again = warm.train(recipe)
    assert again.code == 0, again.said
    assert f"warning: the best step, {best.name[5:]}, is lost" in again.said
    assert final_weights(run)["model.safetensors"] == (last / "model.safetensors").read_bytes()


@pytest.mark.fault("E37", "resumed late in a run: the batches before are neither loaded nor rendered again")
def test_a_late_resume_loads_only_what_is_left(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(tmp_path, model, batch={"micro_batch": 4})
    killed(warm, recipe, NUM_STEPS - 1)
    code = COUNT + EXIT_BY_ATEXIT.format(TRAIN)
    last = warm.train(recipe, code=code, COUNT=str(tmp_path / "count"))
    assert last.code == 0, last.said
    loaded, rendered = map(int, (tmp_path / "count").read_text().split())
    assert loaded <= 3
    assert rendered == 0


@pytest.mark.fault("F39", "the same rows renamed or compressed: the same run; edited or reordered: refused, exit 5")
def test_the_rows_decide_and_not_their_file(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(tmp_path, model)
    data = tmp_path / "rows.jsonl"
    rows = data.read_text().splitlines(keepends=True)
    killed(warm, recipe, 4)
    longer = [row.replace('"content": "', '"content": "Well, ') for row in rows]
    for change in (rows[::-1], [*rows, *rows], longer):
        data.write_text("".join(change))
        refused = warm.train(recipe)
        assert (refused.code, "data" in refused.said) == (5, True), refused.said
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode()))
    same = warm.train(recipe, f"data.train={tmp_path / 'packed.jsonl.gz'}")
    assert (same.code, "from step 3" in same.said) == (0, True), same.said


@pytest.mark.fault("F40", "other base weights under the same name, another tokenizer or template: refused, exit 5")
@pytest.mark.parametrize("what", ["base", "tokenizer", "template"])
def test_another_model_under_the_same_name_is_refused(tmp_path: Path, warm: Warm, model: Path, what: str) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    recipe = recipe_of(tmp_path, own, tuning=LORA)
    killed(warm, recipe, 3)
    if what == "base":
        add_weights(own, seed=1)
    elif what == "template":
        (own / "chat_template.jinja").open("a").write("{# another #}")
    else:
        tokenizer = json.loads((own / "tokenizer.json").read_text())
        first, second = list(tokenizer["model"]["vocab"])[300:302]
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused = warm.train(recipe)
    assert refused.code == 5, refused.said
    assert any(line.split()[:2] == [what, "then"] for line in refused.said.splitlines()), refused.said


@pytest.mark.fault("B12", "a file of the newest checkpoint is missing: it is named and the one before is taken")
@pytest.mark.fault("B10 B11", "a file of the newest checkpoint is cut or one bit flips: it is named with sizes or hash")
def test_every_damaged_file_is_named_and_the_run_ends_the_same(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(tmp_path, model, tuning=LORA)
    assert warm.train(recipe, f"output.dir={tmp_path / 'whole'}").code == 0
    run = tmp_path / "run"
    killed(warm, recipe, 5)
    weights = run / "checkpoints" / "step-4" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    once = warm.train(recipe, code=KILL_AT, given=["6"])
    assert "step-4/adapter_model.safetensors: has been altered: its SHA-256 is not the manifest's" in once.said
    assert "from step 3" in once.said
    os.truncate(run / "checkpoints" / "step-5" / "optimizer.pt", 100)
    twice = warm.train(recipe)
    assert "step-5/optimizer.pt: has 100 bytes instead of " in twice.said
    assert "from step 4" in twice.said
    assert result(run) == result(tmp_path / "whole")


@pytest.mark.fault("G43", "a base weight that is not finite: ended at step 1 with its name, exit 6")
def test_a_base_weight_that_is_not_finite_is_named(tmp_path: Path, warm: Warm, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    own = shutil.copytree(model, tmp_path / "model")
    weights = load_file(own / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    ended = warm.train(recipe_of(tmp_path, own, tuning=LORA))
    assert ended.code == 6, ended.said
    assert "the weight " in ended.said
    assert "layers.1.mlp.up_proj" in ended.said
    assert not (tmp_path / "run" / "adapter").exists()


POISON = """
import torch
from qwentune.training.trainer import ExactResume
save = ExactResume._save_checkpoint
def poisoned(self, model, trial):
    if self.state.global_step == 4:
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("nan")
    save(self, model, trial)
ExactResume._save_checkpoint = poisoned
"""


@pytest.mark.fault("G44", "weights that are not finite are never saved: exit 6, the last good checkpoint is kept")
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, warm: Warm, model: Path) -> None:
    ended = warm.train(recipe_of(tmp_path, model), code=POISON + TRAIN)
    assert ended.code == 6, ended.said
    assert "1 weights are not finite and are not saved" in ended.said
    assert (tmp_path / "run" / "latest").read_text() == "checkpoints/step-3\n"


OUT_OF_MEMORY = """
import sys
from pathlib import Path
import torch
from qwentune.training.trainer import ExactResume
step = ExactResume.training_step
def exhausted(self, *args, **kwargs):
    loss = step(self, *args, **kwargs)
    if self.state.global_step == 4:
        Path(sys.argv[1]).write_text("edited meanwhile: [")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return loss
ExactResume.training_step = exhausted
"""


@pytest.mark.fault("G46", "out of memory: plan and truth by term, what to lower, exit 4; the last checkpoint resumes")
def test_out_of_memory_keeps_the_checkpoint_and_says_what_to_lower(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(tmp_path, model)
    ended = warm.train(recipe, code=OUT_OF_MEMORY + TRAIN)
    assert ended.code == 4, ended.said
    assert "step 5  the GPU's memory ran out" in ended.said
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["phases"]["train_step"]["terms"]
    # The plan's worst moment is at the head, the step has gone backward when it runs out.
    held = {"weights": plan["weights"], "optimizer": plan["optimizer"], "gradients": plan["weights"]}
    for term, size in held.items():
        row = re.search(rf"{term} +([\d.]+) +([\d.]+)\n", ended.said)
        assert row is not None, ended.said
        assert float(row[1]) == round(plan[term] / 2**20, 1)
        assert float(row[2]) == pytest.approx(size / 2**20, abs=0.06)
    mend = "batch.micro_batch=2 --allow-change batch.micro_batch"
    assert mend in ended.said
    recipe = recipe_of(tmp_path, model)
    again = warm.train(recipe, *mend.split())
    assert again.code == 0, again.said
    assert "from step 4" in again.said


OUT_OF_MEMORY_LOADING = """
import torch
from qwentune.model import loading
def exhausted(*args, **kwargs):
    raise {error}
loading.load_model = exhausted
"""


@pytest.mark.fault("G46", "out of memory while weights are loaded: what the plan had for it, exit 4")
@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
        "torch.AcceleratorError('CUDA error: out of memory')",
        "RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')",
        "RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED')",
        "RuntimeError('Triton Error [CUDA]: out of memory')",
        "RuntimeError('NCCL error: unhandled cuda error. Cuda failure 2 \"out of memory\"')",
    ],
)
def test_out_of_memory_while_loading_is_no_bug(tmp_path: Path, warm: Warm, model: Path, error: str) -> None:
    ended = warm.train(recipe_of(tmp_path, model), code=OUT_OF_MEMORY_LOADING.format(error=error) + TRAIN)
    assert ended.code == 4, ended.said
    assert "loading  the GPU's memory ran out" in ended.said


def test_another_error_while_loading_stays_a_bug(tmp_path: Path, warm: Warm, model: Path) -> None:
    error = "RuntimeError('CUDA error: an illegal memory access was encountered')"
    ended = warm.train(recipe_of(tmp_path, model), code=OUT_OF_MEMORY_LOADING.format(error=error) + TRAIN)
    assert ended.code == 1, ended.said
    assert "A bug in qwentune: RuntimeError" in ended.said


WITHOUT_A_PROBE = """
from qwentune.training.probe import Probe
Probe.on_train_begin = lambda *arguments, **named: None
"""


@pytest.mark.fault("G46", "the longest batches are tried before step 1, and leave no trace in weights or losses")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_batch_that_is_tried_leaves_no_trace(tmp_path: Path, warm: Warm, model: Path, kind: str) -> None:
    tuning = LORA if kind == "lora" else {"kind": "full"}
    recipe = recipe_of(tmp_path, model, tuning=tuning, data={"eval_fraction": 0.1}, batch={"micro_batch": 2})
    assert warm.train(recipe, f"output.dir={tmp_path / 'whole'}", code=WITHOUT_A_PROBE + TRAIN).code == 0
    killed(warm, recipe, 5)
    assert warm.train(recipe).code == 0
    assert result(tmp_path / "run") == result(tmp_path / "whole")


@pytest.mark.fault("K79", "export and chat beside a run that is not done: refused, nothing is read or written")
def test_an_unfinished_run_is_not_exported(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(tmp_path, model)
    running = warm.start(recipe, "optimizer.max_steps=2000")
    running.says("step 3/")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    export = "import sys; from qwentune.cli import app; sys.argv[1:] = ['export', sys.argv[2]]; app()"
    command = [sys.executable, "-c", export, "", str(tmp_path / "run")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, "holds no finished run" in refused.stderr) == (2, True), refused.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    running.signal(signal.SIGTERM)
    assert running.wait() == 75


FAKE_WANDB = """
import os
import re
def init(*args, **kwargs):
    with open(os.environ["SEEN"], "a") as file:
        file.write(os.environ["WANDB_RUN_ID"] + " " + os.environ["WANDB_RESUME"] + chr(10))
    raise ConnectionError("the tracker is down")
run = None
"""


@pytest.mark.fault("I70 E36", "a tracker that is down is a warning; each start of a run has the same record")
def test_a_tracker_that_is_down_ends_no_run_and_keeps_its_record(tmp_path: Path, warm: Warm, model: Path) -> None:
    (tmp_path / "modules" / "wandb" / "sdk" / "lib").mkdir(parents=True)
    (tmp_path / "modules" / "wandb" / "__init__.py").write_text(FAKE_WANDB)
    (tmp_path / "modules" / "wandb" / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): ...")
    (tmp_path / "modules" / "wandb-1.0.dist-info").mkdir()
    (tmp_path / "modules" / "wandb-1.0.dist-info" / "METADATA").write_text("Name: wandb\nVersion: 1.0\n")
    recipe = recipe_of(tmp_path, model, output={"report_to": ["wandb"], "save_every_steps": 1})
    path = f"import sys; sys.path.insert(0, {str(tmp_path / 'modules')!r})\n"
    seen = str(tmp_path / "seen")
    assert warm.train(recipe, code=path + KILL_AT, given=["4"], SEEN=seen).code == KILLED
    last = warm.train(recipe, code=path + TRAIN, SEEN=seen)
    assert last.code == 0, last.said
    assert last.said.count("warning: the tracker Wandb failed and is left out") == 1
    first, second = (tmp_path / "seen").read_text().splitlines()
    assert first == second
    assert first.endswith(" allow")


@pytest.mark.fault("B14", "no checkpoint verifies: each with its reason, exit 5; --fresh moves the folder aside")
@pytest.mark.fault("A04", "`latest` is stale: the newest whole checkpoint counts, and the pointer is mended")
def test_a_named_checkpoint_is_taken_and_a_fresh_run_moves_the_old_one_aside(
    tmp_path: Path, warm: Warm, model: Path
) -> None:
    recipe = recipe_of(tmp_path, model, tuning=LORA, output={"save_every_steps": 2})
    run = tmp_path / "run"
    assert warm.train(recipe, f"output.dir={tmp_path / 'whole'}").code == 0
    killed(warm, recipe, 7)
    (run / "latest").write_text("checkpoints/step-2\n")
    older = warm.train(recipe, "--resume", str(run / "checkpoints" / "step-4"))
    assert older.code == 0, older.said
    assert "from step 4" in older.said
    assert "moved a later checkpoint to " in older.said
    assert (run / "latest").read_text() == f"checkpoints/step-{NUM_STEPS}\n"
    assert result(run) == result(tmp_path / "whole")

    wrong = warm.train(recipe, "--resume", str(run / "checkpoints" / "step-3"))
    assert (wrong.code, "has no manifest" in wrong.said) == (5, True), wrong.said

    anew = warm.train(recipe, "--fresh")
    assert anew.code == 0, anew.said
    assert "moved the old run to " in anew.said
    assert "resuming" not in anew.said
    assert result(run) == result(tmp_path / "whole")
    (aside,) = tmp_path.glob("run.*")
    assert (aside / "adapter").is_dir()


@pytest.mark.fault("A09", "records of steps that a power cut took: the weights are published all the same")
def test_weights_are_published_though_the_records_are_lost(tmp_path: Path, warm: Warm, model: Path) -> None:
    recipe = recipe_of(tmp_path, model)
    run = tmp_path / "run"
    assert warm.train(recipe).code == 0
    weights = final_weights(run)
    shutil.rmtree(run / "model")
    (run / "metrics.jsonl").unlink()
    again = warm.train(recipe)
    assert (again.code, final_weights(run)) == (0, weights), again.said
    assert f"for {NUM_STEPS} steps." in (run / "README.md").read_text()


@pytest.mark.fault("J73", "a pickle that would run code, in a checkpoint whose hashes are right: refused, nothing runs")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_pickle_of_a_checkpoint_runs_code(tmp_path: Path, warm: Warm, model: Path, name: str) -> None:
    import torch

    recipe = recipe_of(tmp_path, model)
    killed(warm, recipe, 3)
    folder = tmp_path / "run" / "checkpoints" / "step-2"
    torch.save({"state": Trap(tmp_path / "sprung")}, folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused = warm.train(recipe)
    assert refused.code == 5, refused.said
    assert "holds a pickle of something else than numbers" in refused.said
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")
