"""`preview` shows what training sees: the command agrees with first principles, and with the trainer's batches."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qwentune import preview as preview_command
from qwentune.data.dataset import chat_template, prepare
from qwentune.data.layout.batch import TrainBatches
from qwentune.data.layout.schedule import Schedule
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import NUM_PLACES
from qwentune.recipe import load_recipe
from tests.checkpoints import add_weights, write_checkpoint
from tests.dialogues import random_rows
from tests.oracle import UNTRAINED, UntrainableError, expected_examples, masked_text
from tests.runs import ENVIRONMENT, in_a_fork

ROOT = Path(__file__).parent.parent
MAX_TOKENS = 8192  # more than any generated dialogue needs
CHAT_FILES = ("chat", "dialogue", "thinking", "tool_call")
TEMPERATURE_TOOL = {
    "type": "function",
    "function": {
        "name": "get_temperature",
        "description": "The present temperature in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# The rows of two files of data_templates/ as rows of the format `chat`, translated by hand.
IN_CHAT_FORMAT: dict[str, list[dict[str, Any]]] = {
    "sharegpt": [
        {
            "messages": [
                {"role": "user", "content": "Which gas do we mostly breathe in?"},
                {"role": "assistant", "content": "Mostly nitrogen: it is about 78 % of dry air."},
                {"role": "user", "content": "And oxygen?"},
                {"role": "assistant", "content": "Oxygen is about 21 % of it."},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "You answer in Chinese."},
                {"role": "user", "content": "How many days are there in a week?"},
                {"role": "assistant", "content": "一周有七天。"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "How warm is it in Lisbon?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "get_temperature", "arguments": {"city": "Lisbon"}}}
                    ],
                },
                {"role": "tool", "content": '{"celsius": 22}'},
                {"role": "assistant", "content": "It is 22 °C in Lisbon."},
            ],
            "tools": [TEMPERATURE_TOOL],
        },
    ],
    "instruction": [
        {
            "messages": [
                {"role": "user", "content": "Name three primary colours of light."},
                {"role": "assistant", "content": "Red, green and blue."},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Put the sentence into the past tense.\nShe walks to school."},
                {"role": "assistant", "content": "She walked to school."},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "You are a translator."},
                {"role": "user", "content": "把下面的句子翻译成英文。\n今天是星期一。"},
                {"role": "assistant", "content": "Today is Monday."},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "How many hours are in a day?"},
                {"role": "assistant", "content": "A day has 24 hours."},
                {"role": "user", "content": "And how many hours are in a week?"},
                {"role": "assistant", "content": "A week has 168 hours."},
            ]
        },
    ],
}
# Trains a recipe and writes the batches of its training steps, as the trainer is given them, to the first argument.
RECORD_BATCHES = """
import json, sys
from qwentune import console, train
from qwentune.training.trainer import ExactResume
step, out = ExactResume.training_step, open(sys.argv.pop(1), "w")
def recorded(self, model, inputs, *rest, **options):
    out.write(json.dumps({name: tensor.tolist() for name, tensor in inputs.items()}) + "\\n")
    out.flush()
    return step(self, model, inputs, *rest, **options)
ExactResume.training_step = recorded
console.main(train.train)
"""


Tokenizers = dict[str, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def models(real_qwen2_folder: Path, real_qwen3_folder: Path) -> dict[str, Path]:
    """Checkpoints with the real vocabulary and without weights, by family."""
    return {"qwen2.5": real_qwen2_folder, "qwen3": real_qwen3_folder}


@pytest.fixture(scope="module")
def tokenizers(models: dict[str, Path]) -> Tokenizers:
    """What the oracle renders and encodes with, by family."""
    return {family: PreTrainedTokenizerFast.from_pretrained(folder) for family, folder in models.items()}


# --- the command, as a process of its own in a folder of its own


def write_recipe(folder: Path, model: Path, *train: str | dict[str, Any], **data: Any) -> None:
    sections = {"train": list(train), "max_tokens": MAX_TOKENS, **data}
    # JSON is YAML
    (folder / "recipe.yaml").write_text(
        json.dumps({"model": str(model), "tuning": {"kind": "full"}, "data": sections, "output": {"dir": "run"}})
    )


def write_rows(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "rows.jsonl"


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qwentune.preview", "recipe.yaml", *arguments],
        cwd=folder,
        env=ENVIRONMENT | {"QWENTUNE_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def preview(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return in_a_fork("qwentune.preview", folder, "recipe.yaml", *arguments, QWENTUNE_CACHE=str(folder / "cache"))


def previewed(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines of `--jsonl` and the report of `--json`, from one process."""
    finished = preview(folder, "--jsonl", "out.jsonl", "--json")
    assert finished.returncode == 0, finished.stderr
    return read_jsonl(folder / "out.jsonl"), json.loads(finished.stdout)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]


def expected(file: str, rows: Iterable[dict[str, Any]], tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    """What `--jsonl` must hold for the rows of a file."""
    return [
        {"source": {"file": file, "line": line}} | example
        for line, row in enumerate(rows, start=1)
        for example in expected_examples(row, tokenizer, **options)
    ]


# --- against first principles


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2.5", {"unsupported_reasoning": "drop"}),
        ("qwen3", {}),
        ("qwen3", {"thinking": "on", "turns": "last"}),
    ],
    ids=["qwen2.5-drop", "qwen3", "qwen3-thinking-last"],
)
def test_the_rows_of_the_data_templates_give_what_first_principles_give(
    tmp_path: Path, models: dict[str, Path], tokenizers: Tokenizers, family: str, options: dict[str, str]
) -> None:
    in_chat_format = {name: read_jsonl(ROOT / f"data_templates/{name}.jsonl") for name in CHAT_FILES} | IN_CHAT_FORMAT
    files = {f"data_templates/{name}.jsonl": rows for name, rows in in_chat_format.items()}
    write_recipe(tmp_path, models[family], *files, **options)
    tokenizer = tokenizers[family]
    theirs = [example for file, rows in files.items() for example in expected(file, rows, tokenizer, **options)]
    assert previewed(tmp_path)[0] == theirs


def test_a_text_is_trained_from_its_second_token_to_the_end_of_text(
    tmp_path: Path, models: dict[str, Path], tokenizers: Tokenizers
) -> None:
    write_recipe(tmp_path, models["qwen3"], "data_templates/text.jsonl")
    examples, _ = previewed(tmp_path)
    texts = [row["text"] + "<|endoftext|>" for row in read_jsonl(ROOT / "data_templates/text.jsonl")]
    assert [example["input_ids"] for example in examples] == tokenizers["qwen3"](texts)["input_ids"]
    for example in examples:
        assert example["labels"] == [UNTRAINED, *example["input_ids"][1:]]


@pytest.mark.parametrize(("family", "reasoning"), [("qwen2.5", False), ("qwen3", True)])
def test_300_generated_dialogues_give_what_first_principles_give(
    tmp_path: Path, models: dict[str, Path], tokenizers: Tokenizers, family: str, reasoning: bool
) -> None:
    rows = random_rows(2025, 300, reasoning=reasoning)
    write_recipe(tmp_path, models[family], write_rows(tmp_path, *rows))
    process = started(tmp_path, "--jsonl", "out.jsonl")  # beside it, this process works out what is to come of it
    theirs = expected("rows.jsonl", rows, tokenizers[family])
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    found = read_jsonl(tmp_path / "out.jsonl")
    assert len(found) == len(theirs) >= 300
    for ours, example in zip(found, theirs, strict=True):
        assert ours == example, rows[example["source"]["line"] - 1]


def test_rows_that_first_principles_cannot_train_are_the_rows_that_are_refused(
    tmp_path: Path, models: dict[str, Path], tokenizers: Tokenizers
) -> None:
    rows = random_rows(7, 25, reasoning=True)  # Qwen2.5's template has no place for reasoning
    kept: list[dict[str, Any]] = []
    refused: list[int] = []
    for line, row in enumerate(rows, start=1):
        try:
            examples = expected_examples(row, tokenizers["qwen2.5"])
            kept += [{"source": {"file": "rows.jsonl", "line": line}} | example for example in examples]
        except UntrainableError:
            refused.append(line)
    assert kept
    assert refused
    file = write_rows(tmp_path, *rows)

    write_recipe(tmp_path, models["qwen2.5"], file)
    finished = preview(tmp_path, "--jsonl", "refused.jsonl")
    assert finished.returncode == 3
    assert [int(line) for line in re.findall(r"^rows\.jsonl:(\d+)", finished.stderr, re.M)] == refused[:NUM_PLACES]
    more = f"… and {len(refused) - NUM_PLACES} more of this kind, the last at rows.jsonl:{refused[-1]}"
    assert more in finished.stderr
    assert not (tmp_path / "refused.jsonl").exists()

    write_recipe(tmp_path, models["qwen2.5"], file, bad_rows="skip", max_dropped_fraction=0.99)
    examples, report = previewed(tmp_path)
    assert examples == kept
    assert report["dropped"] == {"bad row": len(refused)}


def test_a_checkpoint_without_weights_is_enough(tmp_path: Path, models: dict[str, Path]) -> None:
    for folder in models.values():
        names = {file.name for file in folder.iterdir()}
        assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    write_recipe(tmp_path, models["qwen3"], "data_templates/chat.jsonl")
    assert len(previewed(tmp_path)[0]) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "out.jsonl", "cache"}


# --- against what the trainer is given


def trained(batch: dict[str, Any]) -> Iterator[tuple[tuple[int, int], float]]:
    """What a micro-batch trains: a context (as its hash), the token to follow it, and its weight."""
    ids, positions, visible_until = (batch[name][0] for name in ("input_ids", "position_ids", "visible_until"))
    for predictor, target, weight in zip(batch["predict_from"], batch["target"], batch["weight"], strict=True):
        seen = [k for k in range(predictor + 1) if predictor < visible_until[k]]
        assert [positions[k] for k in seen] == list(range(len(seen)))
        yield (hash(tuple(ids[k] for k in seen)), target), weight


def assert_an_epoch_holds_what_preview_shows(steps: list[list[dict[str, Any]]], shown: list[dict[str, Any]]) -> None:
    """`steps` has, for each optimizer step, the micro-batches of all ranks."""
    wanted: Counter[tuple[int, int]] = Counter()
    weights_shown: dict[tuple[int, int], float] = {}
    for example in shown:
        ids, labels = example["input_ids"], example["labels"]
        for k in (k for k, label in enumerate(labels) if label != UNTRAINED):
            pair = hash(tuple(ids[:k])), labels[k]
            wanted[pair] += 1
            weights_shown[pair] = 1.0 if example["weights"] is None else example["weights"][k]
    held: Counter[tuple[int, int]] = Counter()
    for micro_batches in steps:
        pairs = [pair for batch in micro_batches if any(batch["weight"]) for pair in trained(batch)]
        held.update(pair for pair, _ in pairs)
        total = sum(weights_shown[pair] for pair, _ in pairs)
        weights = [weight for _, weight in pairs]
        assert weights == pytest.approx([weights_shown[pair] / total for pair, _ in pairs], rel=1e-5)
    assert held == wanted


@pytest.mark.parametrize("packing", [True, False])
def test_the_batches_of_an_epoch_hold_what_preview_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qwen3_folder: Path, packing: bool
) -> None:
    file = write_rows(tmp_path, *random_rows(21, 40, reasoning=True))
    sources = [{"path": file, "repeat": 1.5}, "data_templates/thinking.jsonl", "data_templates/text.jsonl"]
    write_recipe(tmp_path, qwen3_folder, *sources, packing=packing, max_tokens=2048, eval_fraction=0.1)
    shown, report = previewed(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    recipe, tokenizer = load_recipe("recipe.yaml").recipe, load_tokenizer(qwen3_folder)
    dataset = prepare(recipe.data, tokenizer, chat_template(recipe.data, tokenizer), recipe.seed)
    assert dataset.fingerprint == report["fingerprint"]
    assert (len(dataset.train) < len(shown)) is packing
    for micro_batch, accumulation, num_ranks in ((3, 2, 1), (1, 3, 2)):
        schedule = Schedule(dataset.train.per_epoch, 6, recipe.seed, epochs=1, max_steps=None)
        assert len(dataset.train) % 6, "the last step is to be a short one"
        ranks = [
            TrainBatches(dataset.train, schedule, micro_batch, accumulation, r, num_ranks) for r in range(num_ranks)
        ]
        steps = [
            [
                {name: tensor.tolist() for name, tensor in batches[step * accumulation + turn].items()}
                for batches in ranks
                for turn in range(accumulation)
            ]
            for step in range(schedule.num_steps)
        ]
        assert_an_epoch_holds_what_preview_shows(steps, shown)


@pytest.mark.slow
def test_a_training_process_trains_what_preview_shows(tmp_path: Path) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    write_recipe(tmp_path, model, write_rows(tmp_path, *random_rows(23, 20, reasoning=True)), max_tokens=2048)
    shown, _ = previewed(tmp_path)
    overrides = ["optimizer.epochs=1", "batch.sequences_per_step=2", "batch.micro_batch=1"]
    finished = subprocess.run(
        [sys.executable, "-c", RECORD_BATCHES, "batches.jsonl", "recipe.yaml", *overrides],
        cwd=tmp_path,
        env=ENVIRONMENT | {"QWENTUNE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    batches = read_jsonl(tmp_path / "batches.jsonl")
    assert_an_epoch_holds_what_preview_shows([batches[k : k + 2] for k in range(0, len(batches), 2)], shown)


# --- the report


def test_the_report_counts_what_the_examples_are(tmp_path: Path, models: dict[str, Path]) -> None:
    rows = read_jsonl(ROOT / "data_templates/thinking.jsonl")
    write_recipe(tmp_path, models["qwen3"], "data_templates/thinking.jsonl", max_tokens=512)
    examples, report = previewed(tmp_path)
    lengths = [len(example["input_ids"]) for example in examples]
    longest_of_row: dict[int, int] = {}
    prefixes = {
        (e["source"]["line"], tuple(e["input_ids"][: k + 1])) for e in examples for k in range(len(e["input_ids"]))
    }
    for example, length in zip(examples, lengths, strict=True):
        line = example["source"]["line"]
        longest_of_row[line] = max(length, longest_of_row.get(line, 0))

    assert report["samples"] == len(rows)
    assert report["examples"] == report["train_examples"] == len(examples) > len(rows)
    assert report["eval_examples"] == 0
    assert report["tokens"] == sum(lengths)
    assert report["trained_tokens"] == sum(label != UNTRAINED for example in examples for label in example["labels"])
    one_rendering = sum(longest_of_row.values())
    assert report["expansion_factor"] == round(len(prefixes) / one_rendering, 3)
    assert report["separate_expansion_factor"] == round(sum(lengths) / one_rendering, 3)
    assert report["lengths"]["max"] == max(lengths)
    edges = [bucket["up_to"] for bucket in report["lengths"]["histogram"]]
    counts = [sum(low < length <= high for length in lengths) for low, high in zip([0, *edges], edges, strict=False)]
    assert [bucket["examples"] for bucket in report["lengths"]["histogram"]] == counts
    assert sum(counts) == len(examples)
    assert report["modes"] == {"non_thinking": 2, "thinking": 6}
    assert report["trained_turns"] == sum(len(example["turns"]) for example in examples) == 8
    assert report["turns_with_reasoning"] == 6
    assert report["stop_tokens"] == {"<|im_end|>": 8}
    assert report["dropped"] == {}
    assert report["template"]["thinking_switch"] is True
    packing = report["packing"]
    assert packing["tokens"] == len(prefixes)
    assert packing["filled"] == round(len(prefixes) / (packing["rows"] * 512), 4)


def test_evaluation_takes_whole_dialogues_away_from_what_is_trained(
    tmp_path: Path, models: dict[str, Path], tokenizers: Tokenizers
) -> None:
    rows = random_rows(5, 20, reasoning=True)
    write_recipe(tmp_path, models["qwen3"], write_rows(tmp_path, *rows), eval_fraction=0.25)
    examples, report = previewed(tmp_path)
    trained = Counter(example["source"]["line"] for example in examples)
    of_all = Counter(example["source"]["line"] for example in expected("rows.jsonl", rows, tokenizers["qwen3"]))
    assert len(trained) == 15
    assert trained == {line: of_all[line] for line in trained}
    assert (report["train_examples"], report["examples"]) == (trained.total(), of_all.total())
    assert report["eval_examples"] == of_all.total() - trained.total()


@pytest.mark.parametrize("name", ["preference", "retrieval"])
def test_rows_that_are_not_trained_yet_are_previewed(
    tmp_path: Path, models: dict[str, Path], tokenizers: Tokenizers, name: str
) -> None:
    rows = read_jsonl(ROOT / f"data_templates/{name}.jsonl")
    write_recipe(tmp_path, models["qwen3"], f"data_templates/{name}.jsonl", max_tokens=2048)
    examples, report = previewed(tmp_path)
    assert report["samples"] == len(rows)
    tokenizer = tokenizers["qwen3"]
    if name == "preference":
        ends = [{"messages": row["prompt"] + row[end]} for row in rows for end in ("chosen", "rejected")]
        wanted = [example for end in ends for example in expected("", [end], tokenizer)]
        assert [e["input_ids"] for e in examples] == [e["input_ids"] for e in wanted]
        assert [e["labels"] for e in examples] == [e["labels"] for e in wanted]
        assert [e["part"] for e in examples] == ["chosen", "rejected"] * len(rows)
    else:
        parts = [["query", "positive", *["negative"] * len(row.get("negatives", []))] for row in rows]
        assert [e["part"] for e in examples] == [part for row in parts for part in row]
        texts = [
            text
            for row in rows
            for text in (
                f"Instruct: {row['instruction']}\nQuery:{row['query']}" if "instruction" in row else row["query"],
                row["positive"],
                *row.get("negatives", []),
            )
        ]
        assert [tokenizer.decode(e["input_ids"]) for e in examples] == [f"{text}<|endoftext|>" for text in texts]
        assert {label for e in examples for label in e["labels"]} == {UNTRAINED}
    trained = subprocess.run(
        [sys.executable, "-m", "qwentune.train", "recipe.yaml"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"QWENTUNE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (trained.returncode, "not trained on yet" in trained.stderr) == (3, True), trained.stderr


# --- the terminal


def test_without_colour_the_masks_stand_in_brackets(
    tmp_path: Path, models: dict[str, Path], tokenizers: Tokenizers
) -> None:
    rows = read_jsonl(ROOT / "data_templates/dialogue.jsonl")
    write_recipe(tmp_path, models["qwen3"], "data_templates/dialogue.jsonl")
    finished = preview(tmp_path, "--limit", "100")
    assert finished.returncode == 0
    for example in expected("", rows, tokenizers["qwen3"]):
        assert masked_text(example, tokenizers["qwen3"]) in finished.stdout
    assert "⟦四" not in finished.stdout
    assert "⟦一年有四个季节。<|im_end|>⟧" in finished.stdout
    assert "\x1b" not in finished.stdout + finished.stderr
    lines = [line for line in finished.stderr.splitlines() if "…" not in line]  # of what takes its time
    counts, *warnings = lines
    assert counts.startswith(f"{len(rows)} rows → ")
    assert all(line.startswith("warning: ") for line in warnings)


def test_limit_says_how_many_examples_are_shown(tmp_path: Path, qwen3_folder: Path) -> None:
    write_recipe(tmp_path, qwen3_folder, "data_templates/chat.jsonl")
    assert preview(tmp_path, "--limit", "3").stdout.count("⟦") == 3


HOSTILE = "\x9b5m\u202e\x7f[/bold]\x1b]0;owned\x07\x1b[2J\x1b[31m\x08\x00\r\u2066[red]:heart:"


@pytest.mark.fault("J76", "preview shows control and bidi characters written out; its page runs no script of a row")
def test_data_can_neither_steer_the_terminal_nor_style_what_it_shows(tmp_path: Path, qwen3_folder: Path) -> None:
    good = {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"a{HOSTILE}z"}]}
    bad = [
        {"messages": [{"role": HOSTILE, "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {HOSTILE: HOSTILE}}]}]},
        {"messages": [{"role": "user", "content": {"x": HOSTILE}}, {"role": "assistant", "content": "y"}]},
        {"messages": [HOSTILE], HOSTILE: 1},
        {"messages": [["[/bold]"]]},
    ]
    file = write_rows(tmp_path, good, *bad)
    write_recipe(tmp_path, qwen3_folder, file, bad_rows="skip", max_dropped_fraction=0.99)
    shown = preview(tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "⟦a\\u009b5m\\u202e" in shown.stdout
    assert shown.stdout.count("[red]:heart:") >= 2
    assert all(f"dropped rows.jsonl:{line}" in shown.stdout for line in range(2, 7))
    write_recipe(tmp_path, qwen3_folder, file)
    refused = preview(tmp_path)
    assert refused.returncode == 3
    for printed in (shown.stdout, refused.stderr):
        assert [c for c in printed if not c.isprintable() and c != "\n"] == []


def test_on_a_terminal_the_only_escapes_are_colours_of_our_own(tmp_path: Path, qwen3_folder: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{HOSTILE}z"}]
    write_recipe(tmp_path, qwen3_folder, write_rows(tmp_path, {"messages": messages}))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "qwentune.preview", "recipe.yaml"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"QWENTUNE_CACHE": str(tmp_path / "cache"), "TERM": "xterm-256color"},
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    printed = read_terminal(ours)
    assert process.wait(timeout=300) == 0
    coloured = re.findall(r"\x1b\[[\d;]+m⟦a.*?⟧\x1b\[0m", printed, re.S)
    assert len(coloured) == 1
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed).replace("\r\n", "\n")
    assert [c for c in plain if not c.isprintable() and c != "\n"] == []
    assert "\x1b[31m" not in printed


def read_terminal(descriptor: int) -> str:
    pieces: list[bytes] = []
    try:
        while piece := os.read(descriptor, 65536):
            pieces.append(piece)
    except OSError:  # Linux says so that the other side was closed
        pass
    os.close(descriptor)
    return b"".join(pieces).decode("utf-8")


def test_what_is_dropped_is_named_with_its_reason(
    tmp_path: Path, models: dict[str, Path], tokenizers: Tokenizers
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "word " * 200}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assitant", "content": "hello"}]},
    ]
    options = {"bad_rows": "skip", "max_dropped_fraction": 0.99, "max_tokens": 128}
    write_recipe(tmp_path, models["qwen3"], write_rows(tmp_path, *rows), **options)
    printed = preview(tmp_path).stdout
    num_tokens = len(expected("", [rows[1]], tokenizers["qwen3"])[0]["input_ids"])
    assert f"dropped rows.jsonl:2 messages[1]: {num_tokens} tokens, more than data.max_tokens=128" in printed
    assert "dropped rows.jsonl:3: messages[1] has the unknown role 'assitant'" in printed
    assert "dropped rows.jsonl:1" not in printed


def in_this_process(
    capsys: pytest.CaptureFixture[str], jsonl: str = "", html: str = "", *, as_json: bool = False, strict: bool = False
) -> tuple[int, str]:
    """The exit code of a preview and what it said on stderr."""
    files = (Path(name) if name else None for name in (jsonl, html))
    code = preview_command.run("recipe.yaml", [], None, *files, as_json=as_json, strict=strict)
    return code, capsys.readouterr().err


def test_what_deserves_a_look_is_said_in_every_mode(
    tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    wrong = {"messages": [{"role": "user", "content": "hi"}, {"role": "assitant", "content": "hello"}]}
    options = {"bad_rows": "skip", "max_dropped_fraction": 0.99}
    write_recipe(tmp_path, qwen3_folder, write_rows(tmp_path, row, row, wrong), **options)
    code, said = in_this_process(capsys)
    counts, dropped, warning = said.splitlines()
    assert code == 0
    assert counts.startswith("2 rows → 2 examples (2 train, 0 eval) · ")
    assert dropped.startswith("dropped rows.jsonl:3: messages[1] has the unknown role 'assitant'")
    assert warning.startswith("warning: 1 row trains exactly what an earlier row trains")
    assert in_this_process(capsys, as_json=True) == (0, said)
    assert in_this_process(capsys, "out.jsonl") == (0, f"wrote out.jsonl\n{said}")
    assert in_this_process(capsys, "", "out.html") == (0, f"wrote out.html\n{said}")
    code, strict = in_this_process(capsys, as_json=True, strict=True)
    assert (code, strict) == (3, f"{said}1 warning, and --strict allows none.\n")


def test_the_ends_of_a_preference_are_labelled(
    tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, qwen3_folder, "data_templates/preference.jsonl", max_tokens=2048)
    preview_command.run("recipe.yaml", [], 4, None, None, as_json=False, strict=False)
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("── data_templates")]
    assert [title.split(" · ")[1] for title in titles] == ["chosen", "rejected"] * 2
