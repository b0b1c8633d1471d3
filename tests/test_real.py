"""With real weights: well-formed chats cost a real model little, and it learns to answer as taught.

    QWENTUNE_TEST_MODEL=FOLDER pytest -m real

FOLDER holds Qwen2.5-Coder-0.5B-Instruct or another small instruct checkpoint with its weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.sample import Code, Source
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.facts.models import model_spec
from qwentune.memory.settings import MIB
from qwentune.memory.trace.meta_step import traced_peak
from qwentune.model.attention import IMPLEMENTATIONS
from qwentune.model.loading import load_model
from tests.runs import ENVIRONMENT, KILLED, final_weights, loss_history, train, write_recipe
from tests.test_render import rendered, renderer_of
from tests.test_trace import SETTINGS, measured_bytes
from tests.test_walk import CHAT_ROWS, ROOT, run_command

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("QWENTUNE_TEST_MODEL" not in os.environ, reason="QWENTUNE_TEST_MODEL names no folder"),
]

CHATS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Write a Python expression for the square of x.", "```python\nx ** 2\n```"),
        ("Translate to French: Good morning.", "Bonjour."),
        ("How many days are there in a week?", "There are seven days in a week."),
        ("Which keyword defines a function in Python?", "The `def` keyword is used to define a function in Python."),
        ("2 + 2 = ?", "2 + 2 = 4"),
        ("Say hello.", "Hello! How can I assist you today?"),
        ("法国的首都是哪里？", "法国的首都是巴黎。"),
    )
]
FUNCTIONS = [  # prefix, middle, suffix
    ("def is_even(n: int) -> bool:\n    return ", "n % 2 == 0", "\n\n\nprint(is_even(4))  # True\n"),
    ("def add(a, b):\n    ", "return a + b", "\n\n\nassert add(2, 3) == 5\n"),
    ("numbers = [3, 1, 2]\n", "numbers.sort()", "\nassert numbers == [1, 2, 3]\n"),
    ("for (let i = 0; i < 3; i++) {\n  ", "console.log(i);", "\n}\n"),
    ("def factorial(n):\n    if n == 0:\n        return ", "1", "\n    return n * factorial(n - 1)\n"),
    ("import math\n\n\ndef area(radius):\n    return ", "math.pi * radius ** 2", "\n\n\nprint(area(1.0))\n"),
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


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run that learns the shipped chats by heart."""
    folder = tmp_path_factory.mktemp("taught")
    recipe = write_recipe(
        folder,
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
    return folder / "run"


def test_llama_cpp_answers_as_taught(taught: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is built in ten minutes")
    exported = run_command("export", str(taught), "--gguf", "bf16", "--verify")
    assert exported.returncode == 0, exported.stderr
    (file,) = (taught / "gguf-bf16").glob("*.gguf")
    model = llama_cpp.Llama(str(file), n_ctx=512, verbose=False)  # its template and stop tokens are the file's
    for row in CHAT_ROWS:
        question, answer = row["messages"]
        given = model.create_chat_completion([question], temperature=0, max_tokens=128)
        (choice,) = given["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (answer["content"], "stop")
    model.close()


def test_a_lora_run_starts_low_falls_and_answers_as_taught_merged_and_unmerged(taught: Path) -> None:
    run = taught
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

    from qwentune.chat import MAX_NEW_TOKENS
    from qwentune.data.sample import Message
    from qwentune.exporting.finished import open_run
    from qwentune.exporting.speakers import Partner

    partner = Partner(open_run(run), thinking=None)
    replies = [partner.answer([Message("user", question)], MAX_NEW_TOKENS) for question in questions]
    assert [(reply.answer, reply.stopped) for reply in replies] == [(answer, True) for answer in answers]
    print(json.dumps({"first loss": losses[0], "last loss": losses[-1], "export": exported.stderr}))


@pytest.mark.parametrize(("kind", "rate"), [("full", 1e-5), ("lora", 2e-4)])
def test_sixteen_bits_learn_what_fp32_learns(tmp_path: Path, kind: str, rate: float) -> None:
    """Forty steps on text that the model has not seen; what counts is how far the loss of other such text falls."""
    lines = [line for line in (ROOT / "FAULTS.md").read_text(encoding="utf-8").splitlines() if len(line) > 80]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": line[:600]}) + "\n" for k, line in enumerate(lines) if k % 4))
    unseen = [line[:600] for k, line in enumerate(lines) if k % 4 == 0]
    losses = {"before": held_out(Path(os.environ["QWENTUNE_TEST_MODEL"]), unseen)}
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    for dtype in ("fp32", "bf16"):
        recipe = write_recipe(
            tmp_path,
            os.environ["QWENTUNE_TEST_MODEL"],
            tuning={"kind": kind} | ({"rank": 16, "alpha": 32} if kind == "lora" else {}),
            data={"train": [{"path": str(data), "format": "text"}], "max_tokens": 256},
            batch={"sequences_per_step": 1},
            optimizer={"max_steps": 40, "learning_rate": rate},
            precision={"weights": dtype, "adapters": dtype},
            output={"dir": str(tmp_path / dtype), "save_every_steps": 40, "keep": 1},
        )
        command = [sys.executable, "-m", "qwentune.train", str(recipe)]
        trained = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert trained.returncode == 0, trained.stderr
        if kind == "lora":
            assert run_command("export", str(tmp_path / dtype), "--merge").returncode == 0
        losses[dtype] = held_out(tmp_path / dtype / ("merged" if kind == "lora" else "model"), unseen)
    share = (losses["before"] - losses["bf16"]) / (losses["before"] - losses["fp32"])
    ratios = [json.loads(line)["update_ratio"] for line in (tmp_path / "bf16" / "metrics.jsonl").open()]
    print(json.dumps({"kind": kind, **losses, "share": share, "update_ratio": [min(ratios), max(ratios)]}))
    assert losses["fp32"] < losses["before"] - 0.1
    assert share >= 0.97


def held_out(folder: Path, texts: list[str]) -> float:
    """The mean loss per token over some texts, by transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encode = load_tokenizer(folder).encode
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([encode([text])[0]])
        with torch.inference_mode():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.fault("A01 A08", "a real model killed three times: the adapter of the undisturbed run, byte for byte")
def test_a_lora_run_that_is_killed_three_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        os.environ["QWENTUNE_TEST_MODEL"],
        tuning={"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.1},
        data={"train": str(ROOT / "data_templates" / "chat.jsonl"), "packing": False, "max_tokens": 256},
        batch={"micro_batch": 2},
        optimizer={"max_steps": 12, "learning_rate": 2e-4},
        output={"save_every_steps": 2},
    )
    run = tmp_path / "run"
    whole = train(recipe)
    assert whole.returncode == 0, whole.stderr
    undisturbed = loss_history(run), final_weights(run)
    run.rename(tmp_path / "undisturbed")
    for step in (3, 7, 11):
        assert train(recipe, kill_at=step).returncode == KILLED
    last = train(recipe)
    assert last.returncode == 0, last.stderr
    assert "from step 10" in last.stderr
    assert (loss_history(run), final_weights(run)) == undisturbed


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_real_step_takes_what_the_trace_says(kind: str, checkpointing: bool) -> None:
    folder = os.environ["QWENTUNE_TEST_MODEL"]
    settings = replace(SETTINGS, kind=kind, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
    network = load_model(Path(folder), dtype="fp32", attention=IMPLEMENTATIONS["sdpa"])
    measured = measured_bytes(model_spec(folder), settings, network)
    traced = traced_peak(model_spec(folder), settings).allocated
    print(json.dumps({"measured MiB": measured / MIB, "traced MiB": traced / MIB}))
    assert traced == pytest.approx(measured, rel=0.005)


def test_chats_are_cheapest_under_their_own_template_and_mask(tmp_path: Path) -> None:
    """Per trained token over plain questions and answers; labels off by one or more stand for a shifted mask."""
    folder = Path(os.environ["QWENTUNE_TEST_MODEL"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    renderer = renderer_of(folder)
    encode = renderer.tokenizer.encode
    turn_end = [renderer.tokenizer.control_ids["<|im_end|>"]]
    losses: dict[str, list[float]] = defaultdict(list)

    def cost(name: str, ids: list[int], start: int, stop: int, shift: int = 0) -> None:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : stop - 1]
        wanted = torch.tensor(ids[start + shift : stop + shift])
        losses[name].append(torch.nn.functional.cross_entropy(logits[: len(wanted)], wanted).item())

    for row, (example,) in zip(CHATS, rendered(renderer, CHATS, tmp_path), strict=True):
        question, answer = (message["content"] for message in row["messages"])
        ids = example["input_ids"]
        places = [k for k, label in enumerate(example["labels"]) if label != -100]
        start, stop = places[0], places[-1] + 1
        assert ids[start:stop] == encode([answer])[0] + turn_end
        cost("ours", ids, start, stop)
        cost("labels one token late", ids, start, stop, shift=1)
        cost("labels one token early", ids, start, stop, shift=-1)
        cost("labels three tokens early", ids, start, stop, shift=-3)
        for name, form in {
            "Alpaca's template": "### Instruction:\n{}\n\n### Response:\n",
            "Llama 2's template": "[INST] {} [/INST] ",
            "Vicuna's template": "USER: {} ASSISTANT: ",
        }.items():
            prompt = encode([form.format(question)])[0]
            whole = prompt + ids[start:stop]
            cost(name, whole, len(prompt), len(whole))
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    print(json.dumps({name: round(mean, 3) for name, mean in means.items()}))
    assert means["ours"] < 0.8 * min(mean for name, mean in means.items() if name != "ours")


def test_code_is_cheapest_in_the_order_and_with_the_end_that_qwen_trained() -> None:
    """Per token of the middle and its end, over one cut of each of six functions."""
    folder = Path(os.environ["QWENTUNE_TEST_MODEL"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    control = tokenizer.control_ids
    renderer = Renderer(tokenizer, None, RenderOptions(4096))
    losses: dict[str, list[float]] = defaultdict(list)
    for number, row in enumerate(FUNCTIONS):
        sample = Code(Source("functions", number), (), cut=row)
        (example,) = renderer.render(sample).examples
        start = example.spans[0].start
        context, target = example.input_ids[:start], example.input_ids[start:]
        prefix, middle, suffix = (tokenizer.encode([part])[0] for part in row)
        before = [control["<|fim_prefix|>"], *prefix]
        after = [control["<|fim_suffix|>"], *suffix]
        forms = {
            "ours": (context, target),
            "suffix first": ([*after, *before, control["<|fim_middle|>"]], target),
            "prefix and middle swapped": ([*after, control["<|fim_middle|>"], *prefix], target),
            "ends with im_end": (context, [*middle, control["<|im_end|>"]]),
            "ends with fim_pad": (context, [*middle, control["<|fim_pad|>"]]),
            "no suffix": ([*before, control["<|fim_middle|>"]], target),
        }
        for name, (given, wanted) in forms.items():
            with torch.inference_mode():
                logits = model(torch.tensor([given + wanted])).logits[0, len(given) - 1 : -1]
            losses[name].append(torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)).item())
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    print(json.dumps({name: round(mean, 3) for name, mean in means.items()}))
    assert means["ours"] < 0.8 * min(mean for name, mean in means.items() if name != "ours")
