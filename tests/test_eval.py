"""`qwentune eval`: the model is asked after the very ids that are trained, and what it answers is counted honestly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwentune.answering.speaker import Prompt, Speaker
from qwentune.data.dataset import chat_template, prepare
from qwentune.data.layout.batch import EvalBatches
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import EXIT_OK, DataError, NotFiniteError, ResumeError, UsageError, machine_error
from qwentune.eval import run_eval
from qwentune.evaluating.measure import measured
from qwentune.evaluating.questions import Question, questions
from qwentune.exporting.finished import open_run
from qwentune.exporting.speakers import networks, speaker
from qwentune.facts.generation_config import read_generation_config
from qwentune.model.head import LossHead
from qwentune.model.loading import load_model
from qwentune.recipe import DataOptions
from tests.checkpoints import ModelType, add_weights, write_checkpoint
from tests.finished import finished_run, write_rows
from tests.runs import in_a_fork, write_recipe
from tests.test_hybrid_walk import write_hybrid
from tests.warm import Warm

LIGHT = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Sets a light.",
        "parameters": {"type": "object", "properties": {"room": {"type": "string"}, "level": {"type": "integer"}}},
    },
}
MOST_TOKENS = 12


def call(k: int) -> dict[str, Any]:
    function = {"name": "set_light", "arguments": {"room": f"r{k}", "level": k}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def row(k: int) -> dict[str, Any]:
    """A call, JSON, reasoning or a plain answer."""
    match k % 4:
        case 0:
            return {"messages": [{"role": "user", "content": f"Light {k}"}, call(k)], "tools": [LIGHT]}
        case 1:
            question, answer = f"JSON {k}", {"content": json.dumps({"n": k, "half": k / 2})}
        case 2:
            question, answer = f"Why {k}?", {"reasoning_content": f"It is {k}.", "content": f"Since {k}."}
        case _:
            question, answer = f"Say {k}", {"content": f"It is {7 * k}."}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", **answer}]}


FIM = [{"prefix": "a = 1\nb = ", "middle": "a + 1", "suffix": "\nprint(b)\n"}]
TEXTS = [{"text": "A text that is trained as a whole, and that nobody asks for."}]
COMPLETIONS = [{"prompt": "The sky is", "completion": " blue."}]
DIALOGUE = [
    {
        "messages": [
            *({"role": "user", "content": "One?"}, {"role": "assistant", "reasoning_content": "1", "content": "1."}),
            *({"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2."}),
            *({"role": "user", "content": "Three?"}, {"role": "assistant", "content": "3.", "weight": 0.5}),
        ]
    }
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with random weights. Do not write into it."""
    return add_weights(write_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3"))


def finished(folder: Path, model: Path, *, lora: bool = False, **data: Any) -> Path:
    """A run on eight rows."""
    rows = write_rows(folder / "rows.jsonl", [row(k) for k in range(8)])
    return finished_run(folder / "run", model, lora=lora, data={"train": str(rows), **data})


def asked_of(model: Path, file: Path, **options: Any) -> tuple[Any, list[Question], Speaker]:
    """The rendered rows of a file, what they ask, and the tiny model that answers."""
    data = DataOptions.model_validate({"train": [{"path": str(file)}], "max_tokens": 512, **options})
    tokenizer = load_tokenizer(model)
    dataset = prepare(data, tokenizer, chat_template(data, tokenizer), 0)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    asked = list(questions(dataset, dataset.first_epoch.tolist(), tokenizer, has_reasoning=True))
    return dataset, asked, Speaker(network, tokenizer, read_generation_config(model))


def test_what_is_asked_is_what_stands_before_what_is_trained(model: Path, tmp_path: Path) -> None:
    rows = {"fim": FIM, "text": TEXTS, "completion": COMPLETIONS, "chat": [row(k) for k in range(4)]}
    asked: dict[str, list[Question]] = {}
    prompts: dict[str, list[str]] = {}
    for name, some in rows.items():
        dataset, asked[name], speaker = asked_of(model, write_rows(tmp_path / f"{name}.jsonl", some))
        prompts[name] = [speaker.tokenizer.decode(list(q.prompt(dataset, None).ids)) for q in asked[name]]
    kinds = {name: {question.kind for question in some} for name, some in asked.items()}
    assert kinds == {"fim": {"middle"}, "text": {"text"}, "completion": {"completion"}, "chat": {"turn"}}
    assert prompts["fim"] == ["<|fim_prefix|>a = 1\nb = <|fim_suffix|>\nprint(b)\n<|fim_middle|>"]
    assert prompts["completion"] == ["The sky is"]
    assert [question.taught.text for name in ("fim", "completion") for question in asked[name]] == ["a + 1", " blue."]
    call, data, thinking, plain = (question.taught for question in asked["chat"])
    assert (call.calls[0].name, call.calls[0].arguments) == ("set_light", {"room": "r0", "level": 0})
    assert json.loads(data.answer) == {"n": 1, "half": 0.5}
    assert (thinking.reasoning, thinking.answer, plain.answer) == ("It is 2.", "Since 2.", "It is 21.")
    assert [question.asked_to_reason for question in asked["chat"]] == [False, False, True, False]
    assert prompts["chat"][3].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_of_a_cut_code_that_is_trained_as_a_whole_only_the_middle_is_asked_for(model: Path, tmp_path: Path) -> None:
    dataset, (question,), speaker = asked_of(model, write_rows(tmp_path / "fim.jsonl", FIM), fim={"loss": "all"})
    assert question.taught.text == "a + 1"
    (case,) = measured([question], dataset, speaker, whose="tuned", most_tokens=1)
    assert case.weight == dataset.examples.length(0) - 1


def test_rows_apart_have_the_loss_that_they_have_packed(model: Path, tmp_path: Path) -> None:
    """Of turns that share their beginning, of unequal weights, of texts: as training and its evaluation reckon it."""
    for number, rows in enumerate((DIALOGUE + [row(k) for k in range(6)], FIM + TEXTS, COMPLETIONS)):
        file = write_rows(tmp_path / f"{number}.jsonl", rows)
        format = {"format": "fim"} if rows[0] is FIM[0] else {}
        dataset, asked, speaker = asked_of(model, file, train=[{"path": str(file), **format}], fim={"cuts": 1})
        cases = measured(asked, dataset, speaker, whose="tuned", most_tokens=1)
        assert len(cases) == len(dataset.examples.starts)
        network = load_model(model, dtype="fp32", attention="qwentune_sdpa").eval()
        head, packed = LossHead(network, "supervised"), EvalBatches(dataset.train, 0, 1)
        with torch.no_grad():
            losses = [float(head.loss(network, packed[k])) for k in range(len(packed))]
        weight = sum(float(packed[k]["weight"].sum()) for k in range(len(packed)))
        assert sum(case.weight for case in cases) == pytest.approx(weight)
        mean = sum(case.loss * case.weight for case in cases) / weight
        assert mean == pytest.approx(sum(losses) / weight, rel=1e-5)


def answers_are_the_same_alone(folder: Path) -> None:
    """Prompts of unlike lengths together, more than are answered at once, against each alone."""
    tokenizer = load_tokenizer(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    speaker = Speaker(network, tokenizer, read_generation_config(folder))
    random = np.random.default_rng(1)
    prompts = [
        Prompt(random.integers(0, 900, size=int(random.integers(1, 40))).tolist(), int(random.integers(1, MOST_TOKENS)))
        for _ in range(20)
    ]
    together = dict(speaker.answers(prompts))
    assert [together[k] for k in range(20)] == [speaker.answer(prompt) for prompt in prompts]
    assert len({answer.text for answer in together.values()}) > 10, "else it would prove nothing"
    assert all(answer.tokens <= prompts[k].most_tokens for k, answer in together.items())


@pytest.mark.parametrize("kind", ["qwen2", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_answers_do_not_depend_on_their_batch(kind: ModelType, tmp_path: Path) -> None:
    folder = add_weights(write_checkpoint(tmp_path / "model", kind))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "repetition_penalty": 1.3, "top_k": 5}))
    answers_are_the_same_alone(folder)


def test_memory_that_does_not_suffice_halves_the_batch(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    speaker = Speaker(network, load_tokenizer(model), read_generation_config(model))
    prompts = [Prompt([k + 1, 7], 2) for k in range(11)]
    expected, sizes, generate = dict(speaker.answers(prompts)), list[int](), network.generate

    def small(input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(network, "generate", small)
    assert dict(speaker.answers(prompts)) == expected
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]

    monkeypatch.setattr(network, "generate", lambda **_: small(torch.zeros(9, 1)))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        speaker.answer(prompts[0])
    words = "the GPU  has no room for it: CUDA out of memory. Tried to allocate 2 GiB\n"
    assert words in str(machine_error(caught.value))


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_base_beside_the_tuned_model_is_the_base(lora: bool, model: Path, tmp_path: Path) -> None:
    run = open_run(finished(tmp_path, model, lora=lora))
    file = write_rows(tmp_path / "some.jsonl", [row(k) for k in range(4)])
    dataset, asked, plain = asked_of(model, file)
    found = {}
    for whose, network in networks(run, with_base=True):
        found[whose] = measured(asked, dataset, speaker(run, network), whose=whose, most_tokens=MOST_TOKENS)
    expected = measured(asked, dataset, plain, whose="base", most_tokens=MOST_TOKENS)
    assert [case.answer for case in found["base"]] == [case.answer for case in expected]
    assert [case.loss for case in found["base"]] == pytest.approx([case.loss for case in expected], rel=1e-6)
    assert (found["tuned"] != found["base"]) == lora


def test_scores_are_printed_and_each_example_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "held.jsonl", [row(k) for k in range(5)])
    run = finished(tmp_path, model, lora=True, eval=[{"path": str(file)}])
    assert run_eval(run, None, True, None, MOST_TOKENS, True) == EXIT_OK
    scores = json.loads(capsys.readouterr().out)
    assert json.loads((run / "eval.json").read_text()) == scores
    assert scores["schema"] == 1
    (source,) = scores["sources"].values()
    names = {"loss", "perplexity", "stopped", "exact_match", "valid_json", "tool_name", "tool_arguments"}
    assert {*source["tuned"]} == {*source["base"]} == {*source["intervals"]} == {*names, "reasoning_as_asked"}
    for name, intervals in source["intervals"].items():
        assert {*intervals} == {"base", "tuned", "difference"}
        for whose in ("base", "tuned"):
            low, high = intervals[whose]
            assert low - 1e-9 <= source[whose][name] <= high + 1e-9
    kept = [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]
    assert sorted(one["source"]["line"] for one in kept) == [1, 2, 3, 4, 5]
    assert {one["source"]["file"] for one in kept} == {str(file)}
    assert [one["loss"] for one in kept] == sorted((one["loss"] for one in kept), reverse=True)

    assert run_eval(run, None, False, 2, MOST_TOKENS, True) == EXIT_OK
    (source,) = json.loads(capsys.readouterr().out)["sources"].values()
    assert (source["rows"], source["base"], source["intervals"]["loss"]["difference"]) == (2, None, None)

    assert run_eval(run, None, True, None, MOST_TOKENS, False) == EXIT_OK
    heading, heads, *lines = capsys.readouterr().out.splitlines()
    assert heading == f"{file} · 5 rows · 95 % intervals in brackets; few rows prove little"
    assert heads.split() == ["base", "tuned", "difference"]
    assert [line.split()[0] for line in lines] == list(scores["sources"][str(file)]["tuned"])
    assert lines[3].split()[:2] == ["exact_match", "0/5"]


def test_held_out_rows_are_those_that_the_run_held_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path, model, eval_fraction=0.5)
    assert run_eval(run, None, False, None, 1, True) == EXIT_OK
    opened = open_run(run)
    dataset = prepare(opened.data, opened.tokenizer, opened.template, opened.seed)
    held_out = [dataset.examples.source(int(i)).line for i in dataset.examples.evaluation]
    kept = [json.loads(line)["source"]["line"] for line in (run / "examples.jsonl").read_text().splitlines()]
    assert sorted(kept) == held_out
    assert 0 < len(kept) < 8

    capsys.readouterr()
    for data, is_said in ((dataset.content, False), ("0" * 64, True)):
        checkpoint = run / "checkpoints" / "step-1"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "manifest.json").write_text(json.dumps({"facts": {"run": {"data": data}}}))
        (run / "latest").write_text("checkpoints/step-1\n")
        assert run_eval(run, None, False, None, 1, True) == EXIT_OK
        assert ("the rows were changed since the run" in capsys.readouterr().err) == is_said


def test_rows_of_any_format_are_taken_under_the_recipe_s_names(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_rows(tmp_path / "own.jsonl", [{"ask": "Hi", "reply": "Hello"}] * 2)
    source = {"path": str(own), "columns": {"instruction": "ask", "output": "reply"}}
    run = finished(tmp_path, model, train=[source])
    other = write_rows(tmp_path / "other.jsonl", [{"ask": "Bye", "reply": "See you"}])
    sharegpt = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
    for file in (own, other, write_rows(tmp_path / "sharegpt.jsonl", sharegpt)):
        assert run_eval(run, str(file), False, 1, 1, True) == EXIT_OK
        assert json.loads(capsys.readouterr().out)["sources"][str(file)]["rows"] == 1


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_wrong_rows_are_refused_or_left_out_as_training_does(
    bad_rows: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path, model, bad_rows=bad_rows, max_dropped_fraction=0.9)
    rows = [row(3), {"messages": [{"role": "nobody", "content": "?"}]}, row(7)]
    file = write_rows(tmp_path / "some.jsonl", rows)
    if bad_rows == "error":
        with pytest.raises(DataError, match=r"some.jsonl:2  messages\[0\] has the unknown role"):
            run_eval(run, str(file), False, None, 1, False)
        assert not (run / "examples.jsonl").exists()
        return
    assert run_eval(run, str(file), False, None, 1, False) == EXIT_OK
    printed = capsys.readouterr()
    assert "dropped" in printed.err
    assert "some.jsonl:2" in printed.err
    assert f"{file} · 2 rows" in printed.out


PREFERENCE = [{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}]


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "holds no rows"), (PREFERENCE, "can be previewed, but not trained on yet"), (None, "some.jsonl")],
)
def test_data_that_cannot_be_asked_is_refused(rows: list[Any] | None, words: str, model: Path, tmp_path: Path) -> None:
    run, file = finished(tmp_path, model), tmp_path / "some.jsonl"
    if rows is not None:
        write_rows(file, rows)
    with pytest.raises(DataError, match=words):
        run_eval(run, str(file), False, None, 1, False)


def test_a_run_without_held_out_rows_says_what_to_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no held-out rows\n.*--data FILE.*data\.eval_fraction"):
        run_eval(finished(tmp_path, model), None, False, None, None, False)


def test_a_run_that_has_not_ended_or_is_damaged_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no finished run"):
        run_eval(tmp_path, None, False, None, None, False)
    run = finished(tmp_path, model, lora=True, eval_fraction=0.5)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ResumeError, match=r"adapter_model\.safetensors"):
        run_eval(run, None, False, None, None, False)


def test_a_loss_that_is_no_number_is_said(model: Path, tmp_path: Path) -> None:
    dataset, asked, speaker = asked_of(model, write_rows(tmp_path / "some.jsonl", [row(1)]))
    with torch.no_grad():
        speaker.network.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"some.jsonl:1  the loss of the tuned model is not finite: nan"):
        measured(asked, dataset, speaker, whose="tuned", most_tokens=1)


@pytest.mark.slow
def test_a_hybrid_s_answers_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    """Linear attention passes over padding."""
    answers_are_the_same_alone(write_hybrid(tmp_path / "model"))


@pytest.mark.slow
def test_forty_taught_rows_are_said_back_where_the_base_says_none(tmp_path: Path, warm: Warm, model: Path) -> None:
    file = write_rows(tmp_path / "taught.jsonl", [row(k) for k in range(40)])
    recipe = write_recipe(
        tmp_path,
        model,
        data={"train": str(file)},
        optimizer={"max_steps": 300, "learning_rate": 5e-3},
        precision={"weights": "fp32"},
        output={"save_every_steps": 300, "log_every_steps": 50},
    )
    trained = warm.train(recipe)
    assert trained.code == 0, trained.said
    corrupted = [row(k) for k in range(40)]
    corrupted[16]["messages"][1] = call(39)
    others = write_rows(tmp_path / "corrupted.jsonl", corrupted)

    said = in_a_fork("qwentune.eval", tmp_path, "run", "--data", str(file), "--base")
    assert said.returncode == 0, said.stderr
    lines = {line.split()[0]: line.split() for line in said.stdout.splitlines()}
    assert (lines["exact_match"][1], lines["exact_match"][4]) == ("0/40", "40/40")
    for name in ("valid_json", "tool_name", "tool_arguments"):
        assert (lines[name][1], lines[name][4]) == ("0/10", "10/10")

    said = in_a_fork("qwentune.eval", tmp_path, "run", "--data", str(others), "--json")
    assert said.returncode == 0, said.stderr
    (source,) = json.loads(said.stdout)["sources"].values()
    assert source["tuned"]["exact_match"] == 39 / 40
    assert source["tuned"]["tool_arguments"] == 0.9
    worst = json.loads((tmp_path / "run" / "examples.jsonl").read_text().splitlines()[0])
    assert worst["source"] == {"file": str(others), "line": 17}
    assert "r16" in worst["answer"]
