"""With real weights: well-formed chats cost a real model little, and it learns to answer as taught.

    QWENTUNE_TEST_MODEL=FOLDER pytest -m real

FOLDER holds Qwen2.5-Coder-0.5B-Instruct or another small instruct checkpoint with its weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ENVIRONMENT, loss_history, write_recipe
from tests.test_walk import CHAT_ROWS, ROOT, run_command

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("QWENTUNE_TEST_MODEL" not in os.environ, reason="QWENTUNE_TEST_MODEL names no folder"),
]

ANSWER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, *questions = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
for question in questions:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    print(ascii(tokenizer.decode(ids, skip_special_tokens=True)))
"""


def test_a_lora_run_starts_low_falls_and_answers_as_taught_merged_and_unmerged(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        os.environ["QWENTUNE_TEST_MODEL"],
        tuning={"kind": "lora", "rank": 16, "alpha": 32},
        data={"train": str(ROOT / "data_templates" / "chat.jsonl"), "packing": False, "max_tokens": 256},
        optimizer={"max_steps": 40, "learning_rate": 5e-4},
        output={"save_every_steps": 40},
    )
    command = [sys.executable, "-m", "qwentune.train", str(recipe)]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    trained = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "run"
    losses = [row[1] for row in loss_history(run)]
    assert losses[0] < 3
    assert losses[-1] < 0.1 * losses[0]

    exported = run_command("export", str(run), "--merge", "--verify")
    assert exported.returncode == 0, exported.stderr
    questions = [row["messages"][0]["content"] for row in CHAT_ROWS]
    answers = [row["messages"][1]["content"] for row in CHAT_ROWS]
    served = subprocess.run(
        [sys.executable, "-c", ANSWER, str(run / "merged"), *questions], capture_output=True, text=True, check=True
    )
    assert served.stdout.splitlines() == [ascii(answer) for answer in answers]

    from qwentune.chat import Speaker
    from qwentune.data.sample import Message
    from qwentune.exporting.finished import open_run

    speaker = Speaker(open_run(run), thinking=None)
    replies = [speaker.answer([Message("user", question)]) for question in questions]
    assert [(reply.answer, reply.stopped) for reply in replies] == [(answer, True) for answer in answers]
    print(json.dumps({"first loss": losses[0], "last loss": losses[-1], "export": exported.stderr}))
