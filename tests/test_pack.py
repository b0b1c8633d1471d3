"""Rows hold whole examples, lose none, are few, and say for every token what it may see and what it predicts."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from qwentune.data.layout.batch import collate
from qwentune.data.layout.pack import pack
from qwentune.data.layout.trie import lay_out
from qwentune.facts.packing import packing_problems
from qwentune.model.attention import attention_arguments
from qwentune.model.head import LossHead
from tests.runs import ENVIRONMENT, write_recipe


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 100))
def test_every_example_stands_in_exactly_one_row_and_no_row_overflows(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_no_two_rows_could_be_one(lengths: list[int]) -> None:
    totals = sorted(sum(lengths[i] for i in row) for row in pack(lengths, 64))
    assert len(totals) < 2 or totals[0] + totals[1] > 64


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The number of rows by the textbook: the longest first, each into the fullest row that has room for it."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        having_room = [k for k, space in enumerate(spaces) if space >= length]
        if having_room:
            spaces[min(having_room, key=lambda k: spaces[k])] -= length
        else:
            spaces.append(capacity - length)
    return len(spaces)


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 100))
def test_there_are_no_more_rows_than_best_fit_decreasing_makes(lengths: list[int], capacity: int) -> None:
    assert len(pack(lengths, capacity)) <= best_fit_decreasing(lengths, capacity)


def corpora(capacity: int) -> dict[str, np.ndarray[Any, Any]]:
    """Lengths of 20,000 examples as data sets have them; what is longer than a row is left out or cut to it."""
    rng = np.random.default_rng(capacity)
    chats = rng.lognormal(math.log(300), 0.9, 20_000)  # most are short, a few are very long
    reasoning = rng.lognormal(math.log(1800), 0.7, 20_000)
    code = np.minimum(rng.lognormal(math.log(1500), 1.3, 20_000), capacity)  # many files are cut to a whole row
    calls = np.concatenate([rng.lognormal(math.log(250), 0.4, 14_000), rng.lognormal(math.log(2100), 0.3, 6_000)])
    return {
        name: np.clip(lengths[lengths <= capacity], 8, None).astype(int)
        for name, lengths in {"chats": chats, "reasoning": reasoning, "code": code, "calls": calls}.items()
    }


@pytest.mark.parametrize("capacity", [2048, 4096, 16384])
@pytest.mark.parametrize("corpus", ["chats", "reasoning", "code", "calls"])
def test_rows_are_as_full_as_can_be(corpus: str, capacity: int) -> None:
    lengths = corpora(capacity)[corpus]
    fewest = max(math.ceil(lengths.sum() / capacity), int((lengths > capacity / 2).sum()))
    assert fewest <= len(pack(lengths.tolist(), capacity)) <= 1.005 * fewest


SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 256, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None},
}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 64}
LINEAR = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16) | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


@pytest.mark.parametrize(
    ("model_type", "sizes", "attention", "leaks"),
    [
        ("qwen3", {}, "qwentune_sdpa", False),
        ("qwen3_moe", EXPERTS, "qwentune_sdpa", False),
        ("qwen3_next", {**LINEAR, **SHARED}, "qwentune_sdpa", True),
        ("qwen3_5_text", LINEAR, "qwentune_sdpa", True),
        ("qwen3_5_moe_text", {**LINEAR, **SHARED}, "qwentune_sdpa", True),
        # What stands apart by its position ids alone, as under FlashAttention.
        ("qwen3", {}, "sdpa", False),
        ("qwen2_vl_text", SECTIONS, "sdpa", True),
        ("qwen2_5_vl_text", SECTIONS, "sdpa", True),
    ],
)
def test_what_is_refused_to_be_packed_leaks_and_nothing_else_does(
    model_type: str, sizes: dict[str, Any], attention: str, leaks: bool
) -> None:
    config = CONFIG_MAPPING[model_type](**{**SIZES, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation=attention).eval()

    def hidden(*lengths: int) -> torch.Tensor:
        batch = collate([lay_out([[example(length, 1, length)] for length in lengths])], 1.0)
        names = ("input_ids", "position_ids")
        arguments = attention_arguments(attention, batch)
        with torch.no_grad():
            return model(**{n: batch[n] for n in names}, use_cache=False, **arguments).last_hidden_state[0]

    lengths = (37, 20, 50, 9)
    packed, apart = hidden(*lengths), torch.cat([hidden(length) for length in lengths])
    difference = float((packed - apart).abs().max())
    assert difference > 1e-2 if leaks else difference < 1e-5
    assert bool(packing_problems(model_type)) is leaks


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("qwen3_next", {**LINEAR, **SHARED}),
        ("qwen3_5_text", LINEAR),
        ("qwen3_5_moe_text", {**LINEAR, **SHARED}),
    ],
)
def test_the_loss_of_a_hybrids_row_is_that_of_its_one_example(model_type: str, sizes: dict[str, Any]) -> None:
    config = CONFIG_MAPPING[model_type](**{**SIZES, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="qwentune_sdpa")
    batch = collate([lay_out([[example(150, 70, 50)]])], 1.0 / (80 * 1.5))
    ids = batch["input_ids"]
    ours = LossHead(model, "supervised").loss(model, batch)
    model.set_attn_implementation("eager")
    labels = torch.where(torch.arange(150) < 70, -100, ids)
    theirs = model(input_ids=ids, labels=labels, use_cache=False).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("command", ["preview", "plan", "train"])
def test_packing_is_refused_with_the_reason_where_examples_would_not_stay_apart(
    tmp_path: Path, qwen3_folder: Path, command: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(qwen3_folder, folder)
    sizes = {**LINEAR, **SHARED, "linear_conv_kernel_dim": 4, "num_hidden_layers": 4}
    config = {**json.loads((folder / "config.json").read_text()), **sizes, "model_type": "qwen3_next"}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = write_recipe(tmp_path, folder)

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "qwentune.cli", command, str(recipe), *overrides]
        environment = {**ENVIRONMENT, "QWENTUNE_CACHE": str(tmp_path / "cache")}
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

    refused = run()
    assert refused.returncode == 2
    assert "data.packing: qwen3_next cannot train on packed rows: its linear attention reads on" in refused.stderr
    assert "\n    data.packing=false\n" in refused.stderr
    if command != "train":  # these weights are another model's
        mended = run("data.packing=false")
        assert mended.returncode == 0, mended.stderr


def example(length: int, first_trained: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    weights = np.zeros(length, dtype=np.float32)
    weights[first_trained:] = 1.5
    return np.arange(start, start + length, dtype=np.int32), weights


@given(st.lists(st.tuples(st.integers(2, 20), st.integers(1, 19)), min_size=1, max_size=8))
def test_a_target_is_predicted_from_its_left_neighbour_in_the_same_example(shapes: list[tuple[int, int]]) -> None:
    examples = [example(length, first, 100 * k) for k, (length, first) in enumerate(shapes)]
    row = lay_out([[example] for example in examples])
    owner = np.concatenate([np.full(len(ids), k) for k, (ids, _) in enumerate(examples)])
    assert np.array_equal(row.target, row.input_ids[row.predict_from + 1])
    assert np.array_equal(owner[row.predict_from], owner[row.predict_from + 1])
    assert len(row.target) == sum(max(0, length - first) for length, first in shapes)
    assert (row.weight == 1.5).all()


def test_a_token_sees_what_stands_before_it_in_its_example_and_nothing_else() -> None:
    row = lay_out([[example(3, 1, 0)], [example(2, 1, 10)]])
    tokens = range(5)
    sees = [[bool(k <= q < row.visible_until[k]) for k in tokens] for q in tokens]
    assert sees == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [False, False, False, True, False],
        [False, False, False, True, True],
    ]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
