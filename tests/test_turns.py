"""People are told the place of a turn in the row as they wrote it; programs, its index among the row's messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwentune.data.formats import FORMATS
from qwentune.data.rendering.render import Outcome, Renderer, RenderOptions
from qwentune.data.sample import Conversation, Source
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.tokenizing.tokenizer import load_tokenizer

THOUGHT = "<think>\nbecause\n</think>\n\nb"


def rendered(folder: Path, format: str, row: dict[str, Any], **options: Any) -> Outcome:
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(tokenizer.chat_template or "", tokenizer.special_tokens, {})
    sample = FORMATS[format](row, Source("rows.jsonl", 1))
    assert isinstance(sample, Conversation)
    return Renderer(tokenizer, template, RenderOptions(max_tokens=1000, **options)).render(sample)


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


DIALOGUE = (("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", THOUGHT))
ROWS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("sharegpt", {"conversations": said(*DIALOGUE)}, [1, 3]),
    ("sharegpt", {"conversations": said(*DIALOGUE), "system": "s"}, [1, 3]),
    ("sharegpt", {"conversations": said(("system", "s"), *DIALOGUE)}, [2, 4]),
    ("instruction", {"instruction": "r", "output": THOUGHT, "history": [["q", "a"]], "system": "s"}, [1, 3]),
]


@pytest.mark.parametrize("system", [None, "default"])
@pytest.mark.parametrize(("format", "row", "places"), ROWS)
def test_a_system_text_beside_the_turns_is_none_of_them(
    qwen2_folder: Path, qwen3_folder: Path, format: str, row: dict[str, Any], places: list[int], system: str | None
) -> None:
    outcome = rendered(qwen3_folder, format, row, system=system)
    before = int("system" in row)  # a message of the row, if not a turn
    assert [turn for example in outcome.examples for turn in example.turns] == [before + place for place in places]
    (problem,) = rendered(qwen3_folder, format, row, thinking="off", system=system).problems
    assert f"messages[{places[-1]}]" in problem.what
    (dropped,) = {drop.turn for drop in rendered(qwen2_folder, format, {**row, **_long(row)}, system=system).dropped}
    assert dropped == before + places[-1]


def _long(row: dict[str, Any]) -> dict[str, Any]:
    """The row's last answer, too long to be trained."""
    if "output" in row:
        return {"output": "long " * 1000}
    return {"conversations": [*row["conversations"][:-1], {"from": "gpt", "value": "long " * 1000}]}
