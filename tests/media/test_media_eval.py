"""`qwentune eval` of models that see and hear: loss as in training, answers as transformers alone gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwentune.answering.speaker import Speaker
from qwentune.data.dataset import chat_template, prepare
from qwentune.data.layout.batch import EvalBatches
from qwentune.data.layout.media_batch import as_prompt
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import EXIT_OK
from qwentune.eval import run_eval
from qwentune.evaluating.questions import questions
from qwentune.exporting.merge import load_tuned
from qwentune.facts.generation_config import read_generation_config
from qwentune.model.attention import prompts_for_trees
from qwentune.model.head import LossHead
from qwentune.model.loading import load_model
from qwentune.recipe import DataOptions
from tests.finished import finished_run, write_rows
from tests.media.checkpoints import HEARS, HYBRIDS, SEES, TYPES, MediaType, add_media_weights, write_media_checkpoint
from tests.media.lessons import pictures, sounds

MOST_TOKENS = 5


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one == "qwen2_5_vl" else pytest.mark.slow) for one in TYPES]
)
def test_what_is_shown_is_shown_when_it_is_asked(name: MediaType, tmp_path: Path) -> None:
    folder = add_media_weights(write_media_checkpoint(tmp_path / "model", name))
    lessons = pictures(tmp_path / "pictures", 3, 0) if name in SEES else []
    lessons += sounds(tmp_path / "sounds", 2, 0) if name in HEARS else []
    plain = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    file = write_rows(tmp_path / "rows.jsonl", [plain, *(lesson.row() for lesson in lessons), plain])
    options = {"train": str(file), "packing": name not in HYBRIDS, "max_tokens": 2000}
    run = finished_run(tmp_path / "run", folder, data=options)
    assert run_eval(run, str(file), False, None, MOST_TOKENS, True) == EXIT_OK
    (source,) = json.loads((run / "eval.json").read_text())["sources"].values()

    data, tokenizer = DataOptions.model_validate({**options, "train": [{"path": str(file)}]}), load_tokenizer(folder)
    dataset = prepare(data, tokenizer, chat_template(data, tokenizer), 0)
    attention = "sdpa" if name in HYBRIDS else "qwentune_sdpa"
    network = load_model(folder, dtype="fp32", has_media=True, attention=attention).eval()
    head, packed = LossHead(network, "full"), EvalBatches(dataset.train, 0, 1)
    with torch.no_grad():
        losses = sum(float(head.loss(network, packed[k])) for k in range(len(packed)))
    weight = sum(float(packed[k]["weight"].sum()) for k in range(len(packed)))
    assert source["tuned"]["loss"] == pytest.approx(losses / weight, rel=1e-4)

    asked = list(questions(dataset, dataset.first_epoch.tolist(), tokenizer, has_reasoning=False))
    with prompts_for_trees(network):  # as a run answers them between its steps
        speaker = Speaker(network, tokenizer, read_generation_config(run / "model"))
        in_training = dict(speaker.answers([question.prompt(dataset, MOST_TOKENS) for question in asked]))

    alone: Any = load_tuned(folder, None)
    said = {one["source"]["line"]: one["answer"] for one in map(json.loads, (run / "examples.jsonl").open())}
    assert {asked[k].source.line: answer.answer for k, answer in in_training.items()} == said
    for i in dataset.first_epoch.tolist():
        ids = dataset.examples.ids(i)[: dataset.examples.starts[i]].tolist()
        assert dataset.media is not None
        shown = as_prompt(ids, dataset.media)
        answer = alone.generate(**shown, max_new_tokens=MOST_TOKENS, do_sample=False)[0, len(ids) :].tolist()
        stops = [place for place, token in enumerate(answer) if token in alone.generation_config.eos_token_id]
        assert said[dataset.examples.source(i).line] == tokenizer.decode(answer[: stops[0] if stops else None])
