"""The renderer against the oracle: the same examples, ids and weights, on every row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qwentune.data.formats.samples import read_samples
from qwentune.data.rendering.example import Example
from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from tests.dialogues import random_rows
from tests.oracle import expected_examples

NUM_ROWS = 100  # three times as many go through the command in test_preview


def renderer_of(folder: Path, **options: object) -> Renderer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, {})
    return Renderer(tokenizer, template, RenderOptions(max_tokens=1 << 20, **options))  # type: ignore[arg-type]


def as_previewed(example: Example) -> dict[str, object]:
    plain = all(weight == 1 for weight in example.weights if weight)
    return {
        "turns": list(example.turns),
        "input_ids": example.input_ids,
        "labels": [t if w else -100 for t, w in zip(example.input_ids, example.weights, strict=True)],
        "weights": None if plain else example.weights,
    }


def rendered(renderer: Renderer, rows: list[dict], folder: Path) -> list[list[dict]]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems: list = []
    outcomes = [renderer.render(sample) for sample in read_samples(str(file), "chat", problems)]
    assert not problems
    assert not [problem for outcome in outcomes for problem in outcome.problems]
    return [[as_previewed(example) for example in outcome.examples] for outcome in outcomes]


@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
@pytest.mark.parametrize(("fixture", "reasoning"), [("real_qwen2_folder", False), ("real_qwen3_folder", True)])
def test_generated_dialogues_give_what_first_principles_give(
    request: pytest.FixtureRequest, tmp_path: Path, fixture: str, reasoning: bool, thinking: str
) -> None:
    if thinking == "off" and reasoning:
        reasoning = False
    folder = request.getfixturevalue(fixture)
    rows = random_rows(11, NUM_ROWS if thinking == "auto" else 40, reasoning=reasoning)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [expected_examples(row, tokenizer, thinking=thinking) for row in rows]
    found = rendered(renderer_of(folder, thinking=thinking), rows, tmp_path)
    assert len(found) == len(expected)
    for row, ours, theirs in zip(rows, found, expected, strict=True):
        assert ours == theirs, row
