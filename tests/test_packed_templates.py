"""What packed rows train under every published template: each token stands after just what the oracle says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.recipe import DataOptions
from tests.dialogues import Row, random_rows
from tests.oracle import UntrainableError, expected_examples
from tests.test_templates import PUBLISHED

# What precedes a trained token, the token, and its weight.
Trained = Counter[tuple[tuple[int, ...], int, float]]
REPEAT = 2


def trained_in(dataset: Dataset) -> Trained:
    found: Trained = Counter()
    for row in range(len(dataset.train)):
        packed = dataset.train[row]
        for at, target, weight in zip(packed.predict_from, packed.target, packed.weight, strict=True):
            sees = packed.visible_until[: at + 1] > at
            found[tuple(packed.input_ids[: at + 1][sees].tolist()), int(target), round(float(weight), 6)] += 1
    return found


def trained_by_the_oracle(row: Row, judge: PreTrainedTokenizerFast, **options: Any) -> Trained:
    wanted: Trained = Counter()
    for example in expected_examples(row, judge, **options):
        weights = example["weights"] or [1.0] * len(example["labels"])
        for k, label in enumerate(example["labels"]):
            if label != -100:
                wanted[tuple(example["input_ids"][:k]), label, round(weights[k], 6)] += REPEAT
    return wanted


@pytest.mark.slow
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize(("thinking", "turns"), [("auto", "all"), ("auto", "last"), ("on", "all")])
def test_packed_rows_train_what_the_oracle_says_and_nothing_else(
    path: Path, thinking: str, turns: str, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    judge = PreTrainedTokenizerFast.from_pretrained(qwen3_folder)
    judge.chat_template = path.read_text(encoding="utf-8")
    rows: list[Row] = []
    wanted: list[Trained] = []
    for row in random_rows(91, 15, reasoning=True):
        try:
            of_row = trained_by_the_oracle(row, judge, thinking=thinking, turns=turns, unsupported_reasoning="inline")
        except (UntrainableError, jinja2.TemplateError):
            continue
        rows.append(row)
        wanted.append(of_row)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"thinking": thinking, "turns": turns, "unsupported_reasoning": "inline"}
    options |= {"max_tokens": 1 << 14, "eval_fraction": 0, "bad_rows": "skip", "max_dropped_fraction": 0.9}
    train = [{"path": str(file), "repeat": REPEAT}]
    data = DataOptions.model_validate({"train": train, "chat_template": str(path), **options})
    tokenizer = load_tokenizer(qwen3_folder)
    dataset = prepare(data, tokenizer, chat_template(data, tokenizer), 3)
    refused = {drop["source"]["line"] for drop in dataset.dropped}  # what the template loses; the oracle looks away
    expected = sum((of_row for line, of_row in enumerate(wanted, 1) if line not in refused), Trained())
    assert trained_in(dataset) == expected
    assert expected.total() > 400
