"""Held-out prompts that a run answers: they leave no trace in it, and what is best may follow their scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from qwentune.answering.answer import Answer, most_answered_in_training, most_cached
from qwentune.answering.speaker import Prompt, Speaker
from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from qwentune.errors import DataError
from qwentune.evaluating.questions import Question
from qwentune.facts.generation_config import read_generation_config
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.models import model_spec
from qwentune.memory.closed_form.phases import _cache_bytes
from qwentune.memory.plan_request import PlanRequest
from qwentune.memory.run_plan import make_plan
from qwentune.memory.settings import HostMemory
from qwentune.model.attention import prompts_for_trees
from qwentune.model.loading import load_model
from qwentune.recipe import DataOptions, OutputOptions, ScoreName
from qwentune.scores import SCORES
from qwentune.training.best import was_best_by
from qwentune.training.held_out import MOST_SCORED, HeldOut
from qwentune.training.progress import Recorder
from qwentune.training.run_folder import RunFolder
from tests.checkpoints import add_weights, write_checkpoint
from tests.finished import write_rows
from tests.runs import KILLED, final_weights, last_states, loss_history, write_recipe
from tests.test_eval import TEXTS, row
from tests.warm import Warm

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
# Kills the process between two answers of the evaluation after a step.
KILL_WHILE_ANSWERING = """
import os, signal, sys
from qwentune import console, train
from qwentune.answering.speaker import Speaker
from qwentune.training.evaluation import ExactEvaluation
answers, evaluated, last = Speaker.answers, ExactEvaluation._answers, int(sys.argv.pop(1))
def at(self, held_out):
    if self.state.global_step == last:
        Speaker.answers = killed
    return evaluated(self, held_out)
def killed(self, prompts):
    for answer in answers(self, prompts):
        yield answer
        os.kill(os.getpid(), signal.SIGKILL)
ExactEvaluation._answers = at
console.main(train.train)
"""


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with random weights. Do not write into it."""
    return add_weights(write_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3"))


def held_out(model: Path, folder: Path, sources: dict[str, list[Any]]) -> tuple[Dataset, Tokenizer]:
    """Rows that are held out, by the name of their file, and one that is trained."""
    files = [str(write_rows(folder / f"{name}.jsonl", rows)) for name, rows in sources.items()]
    train = write_rows(folder / "train.jsonl", [row(3)])
    options = {"train": [{"path": str(train)}], "eval": [{"path": file} for file in files], "max_tokens": 512}
    data, tokenizer = DataOptions.model_validate(options), load_tokenizer(model)
    return prepare(data, tokenizer, chat_template(data, tokenizer), 0), tokenizer


def asked_for(dataset: Dataset, tokenizer: Tokenizer, **output: Any) -> HeldOut:
    found = HeldOut.of(dataset, tokenizer, {}, OutputOptions(**output))
    assert found is not None
    return found


def places(asked: tuple[Question, ...]) -> list[str]:
    return [f"{Path(one.source.file).stem}:{one.source.line}" for one in asked]


def test_the_recipe_names_every_score() -> None:
    assert list(get_args(ScoreName)) == [score.name for score in SCORES]


def test_samples_are_of_each_source_in_turn_and_of_rows_that_ask(model: Path, tmp_path: Path) -> None:
    few, many = [row(3), row(7)], [row(k) for k in range(11, 40, 4)]
    dataset, tokenizer = held_out(model, tmp_path, {"few": few, "texts": TEXTS, "many": many})
    assert places(asked_for(dataset, tokenizer, samples=5).sampled) == ["few:1", "many:1", "few:2", "many:2", "many:3"]
    assert len(asked_for(dataset, tokenizer, samples=1000).sampled) == 10
    assert HeldOut.of(dataset, tokenizer, {}, OutputOptions(best="perplexity")) is None


def test_a_sample_has_its_prompt_and_what_is_taught_beside_what_was_answered(model: Path, tmp_path: Path) -> None:
    dataset, tokenizer = held_out(model, tmp_path, {"rows": [row(2)]})
    asked = asked_for(dataset, tokenizer, samples=1)
    (one,) = asked.samples(7, [Answer("<think>\nWell.\n</think>\n\nNo.", stopped=False, tokens=9)])
    assert one.pop("prompt").endswith("Why 2?<|im_end|>\n<|im_start|>assistant\n")
    source = {"file": str(tmp_path / "rows.jsonl"), "line": 1}
    assert one == {
        **{"step": 7, "index": 0, "source": source, "target": "Since 2."},
        **{"answer": "No.", "reasoning": "Well.", "stopped": False},
    }


def test_a_score_is_asked_for_where_it_applies(model: Path, tmp_path: Path) -> None:
    rows = [row(k) for k in range(5)]
    many = [row(4 * k + 3) for k in range(5, MOST_SCORED + 15)]
    dataset, tokenizer = held_out(model, tmp_path, {"rows": rows, "many": many})
    asked = asked_for(dataset, tokenizer, best="tool_arguments", samples=1)
    assert places(asked.scored) == ["rows:1", "rows:5"]
    assert len(asked.asked) == 2, "the sample is one of them"
    assert asked.scores([question.taught for question in asked.asked]) == {
        **{"stopped": 1.0, "exact_match": 1.0, "tool_name": 1.0, "tool_arguments": 1.0, "reasoning_as_asked": 1.0}
    }
    first = asked.asked[0].taught
    assert asked.scores([first, first])["tool_arguments"] == 0.5
    every = asked_for(dataset, tokenizer, best="exact_match")
    assert [len([q for q in every.scored if name in q.source.file]) for name in ("rows", "many")] == [5, MOST_SCORED]

    with pytest.raises(DataError, match=r"output\.best  fim_exact, which no answer to one of the 79 held-out examples"):
        asked_for(dataset, tokenizer, best="fim_exact")


def test_the_answers_of_a_network_that_keeps_to_trees_are_those_of_any_other(model: Path) -> None:
    trained: Any = load_model(model, dtype="fp32", attention="qwentune_sdpa").eval()
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = [Prompt([7, 8, 9], 6), Prompt(list(range(20, 60)), 6), Prompt([5], 3)]
    tokenizer, generation = load_tokenizer(model), read_generation_config(model)
    with prompts_for_trees(trained):
        answers = dict(Speaker(trained, tokenizer, generation).answers(prompts))
    assert answers == dict(Speaker(plain, tokenizer, generation).answers(prompts))
    assert trained.config._attn_implementation == "qwentune_sdpa"


def test_prompts_stand_together_while_their_tokens_are_few(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def generated(self: Speaker, prompts: list[Prompt]) -> list[Answer]:
        sizes.append(len(prompts))
        return [Answer("", stopped=True, tokens=1)] * len(prompts)

    monkeypatch.setattr(Speaker, "_generated", generated)
    prompts = [Prompt(range(n), 10) for n in (90, 40, 40, 20, 20, 20, 1)]
    assert len(dict(Speaker(None, load_tokenizer(model), {}, most_together=100).answers(prompts))) == 7
    assert sizes == [1, 2, 3, 1]


def test_the_cache_is_as_large_as_the_plan_says_and_counts(model: Path) -> None:
    spec = model_spec(str(model), packing=True)
    request = PlanRequest("full", 512, 4)
    settings = make_plan(spec, HostMemory(2**40), request)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    cache = DynamicCache(config=network.config)
    with torch.no_grad():
        network(torch.arange(5, 105)[None], past_key_values=cache)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    step = request.settings(HostMemory(2**40), **vars_of(settings.choices))
    assert _cache_bytes(spec, step, 100) == held * (spec.num_layers + 1) // spec.num_layers


def vars_of(choices: Any) -> dict[str, Any]:
    return {name: getattr(choices, name) for name in choices.__dataclass_fields__}


@pytest.mark.parametrize(("taught", "most"), [(1, 256), (200, 400), (5000, 6024)])
def test_an_answer_in_training_is_bounded(taught: int, most: int) -> None:
    assert most_answered_in_training(taught) == most
    assert all(t + most_answered_in_training(t) <= most_cached(2 * t) for t in (1, 200, 5000))


def test_a_plan_counts_answers_and_offers_to_leave_them_out() -> None:
    spec, card = model_spec("Qwen/Qwen3-8B"), gpu_spec("rtx-4090")
    without = make_plan(spec, card, PlanRequest("qlora", 4096, 16))
    asking = make_plan(spec, card, PlanRequest("qlora", 4096, 16, answers=True))
    assert "answer" not in without.phases
    assert asking.phases["answer"].terms["cache"] == (36 + 1) * most_cached(4096) * 2 * 1024 * 2
    assert asking.phases["answer"].total < asking.peak_bytes == without.peak_bytes


def test_samples_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    sample = {"index": 0, "source": {"file": "a/rows.jsonl", "line": 3}, "answer": "A  long\nanswer " * 20}
    recorder = Recorder(folder, 40, 0)
    for step in (10, 20):
        recorder.evaluated(step, 1.5, {"exact_match": 0.25})
        recorder.sampled([{"step": step, **sample}, {"step": step, **sample, "index": 1}])
    folder.rewind(10)
    assert [(row["step"], row["index"]) for row in rows_of(tmp_path / "samples.jsonl")] == [(10, 0), (10, 1)]
    assert rows_of(tmp_path / "evaluations.jsonl") == [{"step": 10, "loss": 1.5, "exact_match": 0.25}]


def test_what_was_the_best_by_something_else_is_no_bar() -> None:
    history = [{"step": 2, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.4, "eval_exact_match": 0.1}]
    assert was_best_by("loss", history, 4, 0.4)
    assert not was_best_by("exact_match", history, 4, 0.4)
    assert not was_best_by("loss", history, None, None)


@pytest.mark.slow
def test_samples_change_no_bit_of_a_run_killed_while_it_answers(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    sections: dict[str, Any] = {
        "tuning": LORA,
        "data": {"eval_fraction": 0.2},
        "optimizer": {"max_steps": 8},
        "precision": {"weights": "bf16"},
    }
    output = {"eval_every_steps": 3, "save_every_steps": 4, "best": "loss"}
    run, plain = tmp_path / "run", tmp_path / "plain"
    finished = warm.train(write_recipe(tmp_path, model, **sections, output=output))
    assert finished.code == 0, finished.said
    assert not (run / "samples.jsonl").exists()
    shutil.move(run, plain)

    recipe = write_recipe(tmp_path, model, **sections, output={**output, "samples": 4})
    assert warm.train(recipe, code=KILL_WHILE_ANSWERING, given=["6"]).code == KILLED
    assert {row["step"] for row in rows_of(run / "samples.jsonl")} == {3}
    resumed = warm.train(recipe)
    assert resumed.code == 0, resumed.said
    assert "resuming" in resumed.said

    assert loss_history(run) == loss_history(plain)
    assert rows_of(run / "evaluations.jsonl") == rows_of(plain / "evaluations.jsonl")
    assert final_weights(run) == final_weights(plain)
    assert last_states(run) == last_states(plain) != {}
    samples = rows_of(run / "samples.jsonl")
    assert [(row["step"], row["index"]) for row in samples] == [(s, k) for s in (3, 6, 8) for k in range(4)]


@pytest.mark.slow
def test_the_best_by_a_score_is_the_first_and_the_run_ends_when_it_does_not_rise(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    rows, held = (
        write_rows(tmp_path / name, [row(4 * k + 3) for k in range(4)]) for name in ("rows.jsonl", "eval.jsonl")
    )
    recipe = write_recipe(
        tmp_path,
        model,
        data={"train": str(rows), "eval": str(held)},
        optimizer={"max_steps": 300, "learning_rate": 5e-3},
        output={"eval_every_steps": 5, "save_every_steps": 300, "best": "exact_match", "early_stopping": 2},
    )
    trained = warm.train(recipe)
    assert trained.code == 0, trained.said
    evaluations = rows_of(tmp_path / "run" / "evaluations.jsonl")
    best = next(row["step"] for row in evaluations if row["exact_match"] == 1)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["step"] == best + 10 < 300
    assert status["reason"] == f"exact_match no longer improved; published step {best}"
    assert evaluations[-1]["loss"] < next(row["loss"] for row in evaluations if row["step"] == best)


@pytest.mark.soak
@pytest.mark.parametrize("launch", ["cpu-2", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_several_ranks_answer_and_are_left_as_they_were(tmp_path: Path, warm: Warm, launch: str, kind: str) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    found: dict[int, Any] = {}
    for samples in (0, 3):
        recipe = write_recipe(
            tmp_path,
            model,
            tuning=LORA if kind == "lora" else {"kind": kind},
            data={"eval_fraction": 0.2},
            optimizer={"max_steps": 4},
            output={"dir": str(tmp_path / f"run-{samples}"), "eval_every_steps": 2, "samples": samples},
        )
        trained = warm.train(recipe, launch=launch)
        assert trained.code == 0, trained.said
        run = tmp_path / f"run-{samples}"
        found[samples] = loss_history(run), final_weights(run), last_states(run)
    assert found[0] == found[3]
    assert [(row["step"], row["index"]) for row in rows_of(run / "samples.jsonl")] == [
        (s, k) for s in (2, 4) for k in range(3)
    ]
