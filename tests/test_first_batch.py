"""Before the first step every rank's first batch is seen to carry loss and the tokens that end its spans."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.layout.batch import TrainBatches
from qwentune.data.layout.schedule import Schedule
from qwentune.data.layout.store import seal
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import DataError
from qwentune.recipe import load_recipe
from tests.checkpoints import add_weights, token_ids, write_checkpoint
from tests.runs import write_recipe
from tests.warm import Warm

NUM_RANKS = 2


def prepared(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Path]:
    """Rendered dialogues, and the folder in which they are stored."""
    monkeypatch.setenv("QWENTUNE_CACHE", str(folder / "cache"))
    recipe = load_recipe(str(write_recipe(folder, model))).recipe
    tokenizer = load_tokenizer(model)
    dataset = prepare(recipe.data, tokenizer, chat_template(recipe.data, tokenizer), recipe.seed)
    return dataset, folder / "cache" / "data" / dataset.fingerprint


def prove(dataset: Dataset, stop: int, step: int, every: bool = True) -> None:
    schedule = Schedule(dataset.train.per_epoch, 3, 1, epochs=1, max_steps=None)
    batches = TrainBatches(dataset.train, schedule, 1, 2, rank=1, num_ranks=NUM_RANKS)
    batches.prove_first(step, {"<|im_end|>": stop}, every)


@pytest.fixture
def stop(qwen3_folder: Path) -> int:
    return token_ids(qwen3_folder)["<|im_end|>"]


def test_every_step_of_sound_data_may_be_the_first_one(
    tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    dataset, _ = prepared(tmp_path, qwen3_folder, monkeypatch)
    assert sum(dataset.report["stop_tokens"].values()) == dataset.report["trained_spans"] > 0
    steps = -(-len(dataset.train) // 3)
    assert len(dataset.train) % 3, "the last step leaves a rank without rows, which is no fault"
    for step in range(steps):
        prove(dataset, stop, step)


def test_a_batch_without_loss_is_refused_with_its_rank_and_sample(
    tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    dataset, folder = prepared(tmp_path, qwen3_folder, monkeypatch)
    np.memmap(folder / "weights.bin", dtype=np.float32, mode="r+")[:] = 0
    with pytest.raises(DataError) as caught:
        prove(dataset, stop, 1)
    assert len(caught.value.problems) == NUM_RANKS, "each rank speaks for all, so that none waits"
    for rank, problem in enumerate(caught.value.problems):
        assert problem.where.startswith(str(tmp_path / "rows.jsonl:"))
        assert problem.what.startswith(f"step 2: the first batch of rank {rank} (")
        assert problem.what.endswith("carries no loss")
        assert str(folder.parent) in problem.fix


@pytest.mark.parametrize("every", [True, False])
def test_a_mask_that_misses_its_stop_tokens_is_refused(
    tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int, every: bool
) -> None:
    dataset, folder = prepared(tmp_path, qwen3_folder, monkeypatch)
    np.memmap(folder / "stops.bin", dtype=np.int32, mode="r+")[:] -= 1  # the most common fault of masks: one off
    if every:
        with pytest.raises(DataError, match=r"rank 0 .* trains <\|im_end\|> 0 times, though \d+ trained spans end so"):
            prove(dataset, stop, 0)
    else:  # where not every span of the data ends so, as texts that are cut do not
        prove(dataset, stop, 0, every=False)


def test_a_run_on_data_that_was_rendered_wrongly_ends_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: Warm
) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    _, folder = prepared(tmp_path, model, monkeypatch)
    np.memmap(folder / "stops.bin", dtype=np.int32, mode="r+")[:] -= 1
    seal(folder, json.loads((folder / "description.json").read_text()))  # as a bug of ours would
    refused = warm.train(tmp_path / "recipe.yaml", QWENTUNE_CACHE=str(tmp_path / "cache"))
    assert refused.code == 3, refused.said
    assert "the first batch of rank 0" in refused.said
    assert "Traceback" not in refused.said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())
