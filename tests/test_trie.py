"""Rows in which examples share their beginnings train exactly what separate examples train, for fewer tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.layout.batch import collate
from qwentune.data.layout.trie import Packed, lay_out
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.model.attention import IMPLEMENTATIONS, Visibility
from qwentune.model.head import LossHead
from qwentune.model.loading import load_model, recompute_layers
from qwentune.recipe import DataOptions
from tests.checkpoints import ModelType, add_weights, write_checkpoint
from tests.dialogues import random_rows
from tests.oracle import expected_examples


@st.composite
def groups(draw: st.DrawFn) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Groups of examples over three tokens, so that many of them begin alike or are the same."""
    example = st.lists(st.integers(1, 3), min_size=2, max_size=9)
    drawn = draw(st.lists(st.lists(example, min_size=1, max_size=6), min_size=1, max_size=3))
    groups = []
    for texts in drawn:
        group = []
        for ids in texts:
            weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(ids), max_size=len(ids)))
            group.append((np.array(ids, dtype=np.int32), np.array([0.0, *weights[1:]], dtype=np.float32)))
        groups.append(group)
    return groups


def seen_by(row: Packed, token: int) -> list[int]:
    return [k for k in range(token + 1) if token < row.visible_until[k]]


@given(groups())
def test_a_token_sees_the_beginning_of_its_example_and_nothing_else(groups: Any) -> None:
    row = lay_out(groups)
    starts = np.cumsum([0, *(size for size, _ in row.trees)])
    for tree, group in enumerate(groups):
        tokens = range(starts[tree], starts[tree + 1])
        contexts = {tuple(row.input_ids[seen_by(row, token)].tolist()) for token in tokens}
        prefixes = {tuple(ids[: k + 1].tolist()) for ids, _ in group for k in range(len(ids))}
        assert contexts == prefixes
        assert len(tokens) == len(prefixes)  # each once
        assert row.trees[tree][1] == (len(prefixes) > max(len(ids) for ids, _ in group))
        for token in tokens:
            assert seen_by(row, token)[0] >= starts[tree]
            assert row.position_ids[token] == len(seen_by(row, token)) - 1


@given(groups())
def test_every_trained_token_is_predicted_from_what_stands_before_it(groups: Any) -> None:
    row = lay_out(groups)
    found = sorted(
        (tuple(row.input_ids[seen_by(row, at)].tolist()), int(target), float(weight))
        for at, target, weight in zip(row.predict_from, row.target, row.weight, strict=True)
    )
    wanted = sorted(
        (tuple(ids[:k].tolist()), int(ids[k]), float(weights[k]))
        for group in groups
        for ids, weights in group
        for k in np.flatnonzero(weights)
    )
    assert found == wanted


@given(groups(), st.sampled_from([1, 2, 3, 4, 100]), st.sampled_from([None, 1, 3]))
def test_the_blocks_of_flex_attention_hold_the_same_rule(groups: Any, block: int, window: int | None) -> None:
    batch = collate([lay_out(groups)], 1.0)
    visibility = Visibility.of(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwentune.model.attention.BLOCK_TOKENS", block)
        mask = visibility.blocks(window)
    tokens = torch.arange(batch["input_ids"].shape[1])
    allowed = mask.mask_mod(None, None, tokens[:, None], tokens[None, :])
    assert torch.equal(allowed, visibility.allowed(tokens, tokens, window))
    # A block is whole where all its pairs are allowed, in part where some are, and is left out where none is.
    for part in range(-(-len(tokens) // block)):
        rows = allowed[part * block : (part + 1) * block]
        whole = set(mask.full_kv_indices[0, 0, part, : mask.full_kv_num_blocks[0, 0, part]].tolist())
        some = set(mask.kv_indices[0, 0, part, : mask.kv_num_blocks[0, 0, part]].tolist())
        for keys in range(-(-len(tokens) // block)):
            pairs = rows[:, keys * block : (keys + 1) * block]
            assert not pairs.any() or keys in whole | some
            assert keys not in whole or bool(pairs.all())
            assert window is not None or pairs.any() or keys not in whole | some


# On rendered dialogues.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[ModelType, Path]:
    """A tiny checkpoint of each architecture."""
    root = tmp_path_factory.mktemp("checkpoints")
    types: tuple[ModelType, ...] = ("qwen2", "qwen3", "qwen3_moe")
    return {name: add_weights(write_checkpoint(root / name, name)) for name in types}


def rendered(folder: Path, tmp_path: Path, rows: list[dict[str, Any]], shares: bool = True, **options: Any) -> Dataset:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    options = {"train": [{"path": str(file)}], "max_tokens": 4096, "eval_fraction": 0, **options}
    data = DataOptions.model_validate(options)
    tokenizer = load_tokenizer(folder)
    return prepare(data, tokenizer, chat_template(data, tokenizer), 7, shares_prefixes=shares)


def prefixes_of(examples: list[dict[str, Any]]) -> set[tuple[int, ...]]:
    return {tuple(example["input_ids"][: k + 1]) for example in examples for k in range(len(example["input_ids"]))}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_rows_hold_each_distinct_prefix_of_a_dialogue_once(
    folders: dict[ModelType, Path], tmp_path: Path, model_type: ModelType
) -> None:
    from transformers import PreTrainedTokenizerFast

    rows = random_rows(3, 60, reasoning=model_type == "qwen3")
    dataset = rendered(folders[model_type], tmp_path, rows, max_tokens=32768)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders[model_type])
    distinct = sum(len(prefixes_of(expected_examples(row, tokenizer))) for row in rows)
    assert sum(dataset.train.num_tokens) == distinct
    assert sum(len(dataset.train[row].input_ids) for row in range(len(dataset.train))) == distinct
    report = dataset.report
    if model_type == "qwen3":
        assert report["expansion_factor"] < report["separate_expansion_factor"]
    apart = rendered(folders[model_type], tmp_path, rows, shares=False, max_tokens=32768)
    assert sum(apart.train.num_tokens) == report["tokens"] >= distinct
    assert apart.report["expansion_factor"] == report["separate_expansion_factor"]
    assert sum(apart.train.num_trained) == sum(dataset.train.num_trained)


def test_a_tree_longer_than_a_row_is_split_and_its_beginning_repeated(
    folders: dict[ModelType, Path], tmp_path: Path
) -> None:
    turns = [{"role": role, "content": f"{role} {k}"} for k in range(12) for role in ("user", "assistant")]
    rows = [{"messages": [{"role": "system", "content": "s " * 40}, *turns]}]
    whole = rendered(folders["qwen3"], tmp_path, rows)
    longest = int(whole.examples.lengths.max())
    split = rendered(folders["qwen3"], tmp_path, rows, max_tokens=longest)
    assert len(whole.train) == 1 < len(split.train)
    assert max(split.train.num_tokens) <= longest
    assert [len(split.train[k].input_ids) for k in range(len(split.train))] == split.train.num_tokens
    assert sum(split.train.num_trained) == sum(whole.train.num_trained)


def test_examples_that_part_and_meet_again_share_all_they_can(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen2")
    # Whether the number of questions is even stands first, so a turn begins as the turn before the last did.
    (folder / "chat_template.jinja").write_text(
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length % 2 }}{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": role, "content": f"{role} {k}"} for k in range(6) for role in ("user", "assistant")]
    dataset = rendered(folder, tmp_path, [{"messages": [{"role": "system", "content": "be brief"}, *turns]}])
    examples = [dataset.examples.ids(int(i)).tolist() for i in dataset.first_epoch]
    assert dataset.examples.back.tolist() == [1, 1, 2, 2, 2, 2]
    assert dataset.train.num_tokens == [len({tuple(ids[: k + 1]) for ids in examples for k in range(len(ids))})]


def step(folder: Path, batches: list[dict[str, torch.Tensor]], implementation: str, checkpointing: bool = False) -> Any:
    """The loss of some batches together and the gradient of every parameter."""
    model = load_model(folder, dtype="fp32", attention=implementation)
    recompute_layers(model, checkpointing)
    model.train()
    head = LossHead(model, "supervised")
    total = sum(head.loss(model, batch) for batch in batches)
    assert isinstance(total, torch.Tensor)
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_as_separate_examples(
    folder: Path, tmp_path: Path, rows: list[dict[str, Any]], attention: str, checkpointing: bool = False
) -> None:
    """Rows of trees by our kernels against examples one by one, by transformers' own."""
    shared = rendered(folder, tmp_path, rows, max_tokens=8192).train
    apart = rendered(folder, tmp_path, rows, max_tokens=8192, shares=False, packing=False).train
    scale = 1 / sum(shared.trained_weights)
    together = [collate([shared[k] for k in range(len(shared))], scale)]
    loss, grads = step(folder, together, IMPLEMENTATIONS[attention], checkpointing)
    expected, expected_grads = step(folder, [collate([apart[k]], scale) for k in range(len(apart))], "sdpa")
    assert abs(loss - expected) <= 1e-6 * abs(expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert torch.linalg.norm(grad - expected_grads[name]) <= 1e-5 * torch.linalg.norm(expected_grads[name]), name


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "checkpointing"])
def test_loss_and_gradients_are_those_of_separate_examples(
    folders: dict[ModelType, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: ModelType,
    attention: str,
) -> None:
    monkeypatch.setattr("qwentune.model.attention.CHUNK_TOKENS", 100)
    rows = random_rows(11, 6, reasoning=model_type != "qwen2", hostile=False)[: 2 if attention == "eager" else 6]
    kernel = "sdpa" if attention == "checkpointing" else attention
    assert_trains_as_separate_examples(folders[model_type], tmp_path, rows, kernel, attention == "checkpointing")


@pytest.fixture
def sliding_folder(tmp_path: Path) -> Path:
    """A tiny checkpoint whose second layer sees 50 tokens back."""
    folder = write_checkpoint(tmp_path / "sliding", "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return add_weights(folder)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sliding_window_counts_a_tokens_ancestors(tmp_path: Path, sliding_folder: Path, attention: str) -> None:
    rows = random_rows(11, 2, reasoning=True, hostile=False)
    assert_trains_as_separate_examples(sliding_folder, tmp_path, rows, attention)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
def test_flex_attention_gives_the_same_loss(
    folders: dict[ModelType, Path], tmp_path: Path, model_type: ModelType
) -> None:
    assert_flex_gives_the_same_loss(folders[model_type], tmp_path, random_rows(11, 4, reasoning=model_type != "qwen2"))


def test_flex_attention_keeps_to_a_sliding_window(tmp_path: Path, sliding_folder: Path) -> None:
    assert_flex_gives_the_same_loss(sliding_folder, tmp_path, random_rows(11, 4, reasoning=True))


def assert_flex_gives_the_same_loss(folder: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    train = rendered(folder, tmp_path, rows, max_tokens=8192).train
    batch = collate([train[k] for k in range(len(train))], 1.0)
    losses = []
    for name in ("flex_attention", "sdpa"):
        model = load_model(folder, dtype="fp32", attention=IMPLEMENTATIONS[name])
        with torch.no_grad():  # on a CPU it has no backward pass
            losses.append(LossHead(model, "full").loss(model, batch))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
