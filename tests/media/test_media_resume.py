"""A run with media is killed anywhere and ends like one that nobody touched; a changed medium is noticed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_kill import KINDS, kill_warm
from tests.media import lessons
from tests.media.checkpoints import TYPES, MediaType, add_media_weights, let_pictures_be_small, write_media_checkpoint
from tests.media.lessons import Lesson
from tests.media.test_media_change import flip
from tests.runs import KILLED, train, write_recipe
from tests.warm import Warm

SIDE = 56  # pixels
NUM_ROWS = 40
MEDIA_KINDS: dict[str, dict[str, Any]] = {
    "lora": KINDS["lora"],
    "lora-pixels": {**KINDS["lora"], "data": {"media": {"cache": "pixels"}}},  # decoded once, kept in the data cache
    "full": KINDS["full"],
}


@pytest.mark.fault("A01 A08 E35", "with pictures, two ranks, the language model trained: the same, bit for bit")
@pytest.mark.slow
def test_kills_of_two_ranks_that_train_on_pictures_change_nothing(tmp_path: Path) -> None:
    kill_warm(tmp_path, KINDS["full"], kills=3, ranks=2, model=write_rows_and_model(tmp_path, "qwen2_5_vl"))


@pytest.mark.fault("A01 A08 E35", "with media: the same, bit for bit")
@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "lora-pixels", "full"])
@pytest.mark.parametrize("name", TYPES)
def test_kills_of_runs_with_media_change_nothing(tmp_path: Path, name: MediaType, kind: str, ranks: int) -> None:
    kill_warm(tmp_path, MEDIA_KINDS[kind], kills=6, ranks=ranks, model=write_rows_and_model(tmp_path, name))


@pytest.mark.fault("F39 N97", "a picture that is another one at a resume is drift, told with its row; exit 5")
@pytest.mark.fault("N97", "also where size and time are as before: the step that reads it ends the run; exit 5")
@pytest.mark.fault("N99", "missing at a resume: a data error with its row; exit 3")
@pytest.mark.slow
@pytest.mark.parametrize("happens", ["changed", "changed quietly", "missing"])
def test_a_medium_that_changes_between_two_starts_is_told_with_its_row(
    tmp_path: Path, warm: Warm, happens: str
) -> None:
    model = write_rows_and_model(tmp_path, "qwen2_5_vl")
    recipe = write_recipe(
        tmp_path, model, optimizer={"max_steps": 8}, output={"save_every_steps": 2}, data={"max_tokens": 256}
    )
    assert train(recipe, kill_at=4).returncode == KILLED
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[2])
    picture = Path(next(part["image"] for part in row["messages"][0]["content"] if part["type"] == "image"))
    if happens == "missing":
        picture.unlink()
    elif happens == "changed quietly":
        for file in picture.parent.glob("*.png"):
            flip(file, quietly=True)
    else:
        other = lessons.pictures(tmp_path / "other", 1, 99, SIDE)[0]
        picture.write_bytes(other.path.read_bytes())

    again = warm.train(recipe)
    assert again.code == (3 if happens == "missing" else 5), again.said
    assert ("rows.jsonl:" if happens == "changed quietly" else "rows.jsonl:3") in again.said
    assert "Traceback" not in again.said


def write_rows_and_model(folder: Path, name: MediaType) -> Path:
    """Writes `rows.jsonl`, short dialogues with media beside it, of which some are shown twice; the model's folder."""
    hears = name == "qwen2_audio"
    shown = lessons.sounds(folder / "shown", 30, 0, 0.3) if hears else lessons.pictures(folder / "shown", 30, 0, SIDE)
    chance = random.Random(name)
    rows = [dialogue(chance, shown) for _ in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = write_media_checkpoint(folder / "model", name)
    let_pictures_be_small(model, SIDE**2)
    return add_media_weights(model)


def dialogue(chance: random.Random, shown: list[Lesson]) -> dict[str, Any]:
    """One to three questions, most of them with one medium or two; the third row begins with one."""
    messages: list[dict[str, Any]] = []
    for _ in range(chance.randint(1, 3)):
        chosen = chance.choices(shown, k=chance.choice((1, 1, 2)) if not messages else chance.randint(0, 1))
        parts = [{"type": one.kind, one.kind: str(one.path)} for one in chosen]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]})
        messages.append({"role": "assistant", "content": chosen[0].answer if chosen else "The same."})
    return {"messages": messages}
