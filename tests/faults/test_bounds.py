"""Numbers, names, files and rows without bound: each ends at once, in words that give the limit."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import qwentune
from qwentune import init, plan, preview
from qwentune.bounded import LONGEST_NAME, LONGEST_PATH, UnreadableError, read_bytes
from qwentune.data.dataset import chat_template, prepare
from qwentune.data.reading import faults, json_rows, tables
from qwentune.data.reading.files import read_rows
from qwentune.data.reading.loss import SMALLEST_WEIGHT
from qwentune.data.templates.guard import PRIVATE_USE, choose_guard
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import LONGEST_WORDS, DataError, Problem, UserError
from qwentune.facts.launch import sharding_of
from qwentune.recipe import DataOptions, describe_keys, load_recipe
from qwentune.recipe.syntax import MAX_VALUES
from tests.faults.test_data import asked
from tests.runs import ENVIRONMENT

RECIPE = "model: builtin:tiny-qwen3\ntuning: {kind: lora}\ndata: {train: rows.jsonl}\n"
GIVEN_BESIDE = {
    "output.early_stopping": ["data.eval_fraction=0.5"],
    "output.samples": ["data.eval_fraction=0.5"],
    "batch.micro_batch": ["batch.sequences_per_step=65536"],
    "optimizer.min_learning_rate": ["optimizer.learning_rate=10"],
    "optimizer.decay_fraction": ["optimizer.schedule=wsd", "optimizer.warmup_steps=0"],
}
UPPER = re.compile(r"number (?:>=?) ([\d,.]+) and (<=?) ([\d,.]+)")


@pytest.fixture(autouse=True)
def in_a_folder_with_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    Path("rows.jsonl").write_text("".join(asked(f"{i} of many", "x") + "\n" for i in range(20)))


def refused(*overrides: str, recipe: str = "r.yaml") -> str:
    with pytest.raises(UserError) as raised:
        load_recipe(recipe, overrides)
    return str(raised.value)


# --- numbers


def numbers() -> dict[str, tuple[float, bool, bool]]:
    """The largest value of each key that takes a number, whether it is still taken, and whether the key has two."""
    found: dict[str, tuple[float, bool, bool]] = {}
    for key in describe_keys():
        if "number" not in key.type or key.name == "data.template_args":
            continue
        match = UPPER.search(key.type)
        assert match, f"{key.name}: {key.type} has no upper end"
        most = float(match[3].replace(",", ""))
        found[key.name.replace("[]", ".0")] = most, match[2] == "<=", "list of 2" in key.type
    return found


NUMBERS = {name: bound for name, bound in numbers().items() if not name.startswith("data.eval.")}


def override(name: str, value: float) -> str:
    text = repr(int(value) if value == int(value) and "fraction" not in name else value)
    return f"{name}=[{text}, {text}]" if NUMBERS[name][2] else f"{name}={text}"


@pytest.mark.fault("I71", "a number beyond any run is refused with its limit, which `qwentune keys` lists, exit 2")
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_an_upper_end_that_its_refusal_names(name: str) -> None:
    most, _, _ = NUMBERS[name]
    for value in ("1e17", "1e308", "1e999", "9" * 400, "-1", f"{most * 2 + 1:.0f}"):
        given = f"[{value}, {value}]" if NUMBERS[name][2] else value
        said = refused(f"{name}={given}", *GIVEN_BESIDE.get(name, ()))
        assert f"{most:,.0f}" in said, said
        assert len(said) < 2000


def test_numbers_are_refused_without_torch() -> None:
    code = "import sys; from qwentune import cli; sys.argv = ['q', 'plan', 'r.yaml', 'data.max_tokens=1e17']\n"
    code += "try:\n    cli.main()\nfinally:\n    assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=300
    )
    assert ended.returncode == 2, ended.stderr
    assert "4,194,304" in ended.stderr


SLOWEST = ("data.max_tokens", "batch.sequences_per_step", "data.fim.cuts", "optimizer.epochs", "tuning.rank")


@pytest.mark.fault("I71", "at its limit a number is planned with, or refused in words")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOWEST else pytest.mark.soak) for name in NUMBERS]
)
def test_a_plan_and_a_preview_answer_at_the_upper_end_of_every_number(name: str) -> None:
    most, is_taken, _ = NUMBERS[name]
    given = [override(name, most if is_taken else most * (1 - 2**-53)), *GIVEN_BESIDE.get(name, ())]
    if name == "seed":
        given = [f"seed={2**32 - 1}"]
    answers: list[Callable[[], int]] = [
        lambda: plan.run("r.yaml", given, "h100-80gb", None, True, False),
        lambda: plan.run("r.yaml", [*given, "model=Qwen/Qwen3-8B"], "h100-80gb", None, True, False),
        lambda: preview.run("r.yaml", given, None, None, None, True, False),
    ]
    for answer in answers:
        try:
            said, code = "", answer()
        except UserError as error:
            said, code = str(error), error.exit_code
        assert code in (0, 2, 3, 4)
        assert len(said) < 4000


@pytest.mark.fault("I71", "rows repeated beyond 100,000,000 are refused with the count")
def test_a_repeat_of_many_rows_is_refused_with_its_product(qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwentune.data.layout.split.MOST_REPEATED", 10_000)
    with pytest.raises(DataError, match=r"repeat 1000 of 20 rows makes more than 10,000"):
        prepared(qwen3_folder, train=[{"path": "rows.jsonl", "repeat": 1000.0}])


# --- recipes of any size


@pytest.mark.fault("I67", "thousands of unknown keys are counted, the first of them shown")
def test_thousands_of_unknown_keys_are_grouped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    nearest = qwentune.recipe.check.nearest
    monkeypatch.setattr(
        "qwentune.recipe.check.nearest", lambda key, known: looked_up.append(key) or nearest(key, known)
    )
    Path("r.yaml").write_text(RECIPE + "".join(f"key{i}: 1\n" for i in range(4000)))
    said = refused()
    assert said.endswith("4,000 problems. Nothing was loaded.")
    assert len(said.splitlines()) < 100
    assert len(looked_up) < 100
    Path("r.yaml").write_text(RECIPE + "".join(f"key{i}: 1\n" for i in range(60_000)))
    assert f"more than {MAX_VALUES:,} keys and values" in refused()


@pytest.mark.fault("I67", "keys and values of any length and depth are cut in the message")
@pytest.mark.parametrize(
    "lines",
    [
        "x" * 900_000 + ": 1",
        '"' + "'\\\\" * 200_000 + '": 1',
        "model: " + "y" * 900_000,
        "seed: " + "9" * 900_000,
        "data: {train: " + "[" * 100_000,
        "- " * 100_000,
        "seed: !" + "t" * 500_000 + " 1",
        "seed: &" + "a" * 500_000 + " 1",
        "k: 1\n" * 4000,
    ],
    ids=lambda lines: lines[:12],
)
def test_what_is_said_of_a_recipe_is_bounded(lines: str) -> None:
    Path("r.yaml").write_text(f"{lines}\n")
    assert len(refused()) < 4 * LONGEST_WORDS


@pytest.mark.fault("I68", "overrides of any number, length and depth are refused in words")
@pytest.mark.parametrize(
    "overrides",
    [
        [".".join("a" * 100_000) + "=1"],
        ["data.train." + "9" * 5000 + ".path=x"],
        ["data.train.\u0663.path=x"],
        ["seed=" + "[" * 100_000],
        ["x" * 100_000 + "=1"],
        [f"key{i}=1" for i in range(3000)],
        ["seed=\udcff"],
        ["\udcff=1"],
        ["model=\0"],
    ],
    ids=lambda overrides: ascii(overrides[0][:12]),
)
def test_what_is_said_of_overrides_is_bounded(overrides: list[str]) -> None:
    assert len(refused(*overrides)) < 20 * LONGEST_WORDS


# --- special files


def make_special(kind: str) -> Path:
    path = Path(f"special-{kind}.jsonl")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "kernel": "/proc/self/maps", "loop": path.name}[kind])
    return path


SPECIAL = ("pipe", "socket", "folder", "device", "kernel", "loop")


@pytest.mark.fault("I67 H65", "a pipe, a socket, a device or a file that the kernel makes up is refused unread")
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused_wherever_a_file_is_named(kind: str, qwen3_folder: Path) -> None:
    path = make_special(kind)
    words = "no regular file|symbolic link"
    assert re.search(words, refused(recipe=str(path)))
    problems: list[Problem] = []
    assert list(read_rows(str(path), problems)) == []
    assert re.search(words, problems[0].what)
    Path("launch").mkdir()
    Path("launch/mine.yaml").symlink_to(path.absolute())
    for command in (
        lambda: sharding_of("mine"),
        lambda: prepared(qwen3_folder, chat_template=str(path)),
        lambda: init.run("builtin:tiny-qwen3", [str(path)], "cpu", Path("new.yaml")),
        lambda: plan.run("r.yaml", ["hardware.launch=mine"], "h100-80gb", None, True, False),
    ):
        with pytest.raises(UserError, match=words):
            command()


def test_a_file_that_grows_while_it_is_read_is_read_no_further_than_its_limit(tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UnreadableError, match=r"1,099,511,627,776 bytes are too many; such a file has at most 1,000"):
        read_bytes(big, 1000)
    big.write_bytes(b"x" * 1000)
    assert read_bytes(big, 1000) == b"x" * 1000


@pytest.mark.fault("I71", "a launch file that is no mapping, or no YAML, is refused with its name")
@pytest.mark.parametrize("text", ["- a", "a: [", "[" * 5000, "x", "distributed_type: [1]", "\x00", "a: b: c"])
def test_a_launch_file_of_any_content_is_refused_in_words(text: str) -> None:
    Path("launch").mkdir()
    Path("launch/mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"launch/mine\.yaml"):
        sharding_of("mine")


# --- names


NAMES = {
    "a long part": ("x" * (LONGEST_NAME + 1), f"at most {LONGEST_NAME} bytes"),
    "a long part of Chinese": ("名" * 100, f"at most {LONGEST_NAME} bytes"),
    "a long path": ("x/" * 2100, f"at most {LONGEST_PATH:,} bytes"),
    "a null": ("a\0b", "null character"),
    "a surrogate": ("a\udcff", "surrogate"),
}
PATH_KEYS = (
    "model", "revision", "tuning.start_from", "data.train", "data.train.0.path", "data.eval", "data.chat_template",
    "output.dir", "hardware.launch", "hardware.gpu",
)  # fmt: skip


@pytest.mark.fault("I71 C21", "a name longer than the file system's, or with a null character, is refused, exit 2")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_name_that_no_file_can_have_is_refused_in_every_key(key: str, name: str) -> None:
    value, words = NAMES[name]
    said = refused(f"{key}={value}")
    assert words in said, said
    assert len(said) < 3 * LONGEST_WORDS


@pytest.mark.fault("I71 C21", "so is one on the command line")
@pytest.mark.parametrize("name", ["a long part", "a long path", "a surrogate"])
def test_a_name_that_no_file_can_have_is_refused_by_every_command(name: str) -> None:
    from qwentune.exporting.finished import open_run

    value, words = NAMES[name]
    for command in (
        lambda: load_recipe(value),
        lambda: init.run("builtin:tiny-qwen3", ["rows.jsonl"], "cpu", Path(value)),
        lambda: init.run("builtin:tiny-qwen3", [value], "cpu", Path("new.yaml")),
        lambda: init.run(value, ["rows.jsonl"], "cpu", Path("new.yaml")),
        lambda: preview.run("r.yaml", [], None, Path(value), None, False, False),
        lambda: preview.run("r.yaml", [], None, None, Path(value), False, False),
        lambda: open_run(Path(value)),
    ):
        with pytest.raises(UserError, match=words):
            command()


# --- rows


def prepared(folder: Path, **options: Any) -> Any:
    data = DataOptions.model_validate({"train": [{"path": "rows.jsonl"}], **options})
    tokenizer = load_tokenizer(folder)
    return prepare(data, tokenizer, chat_template(data, tokenizer), seed=1)


@pytest.mark.fault("H68", "the row is refused by its line; rows that leave one such character are trained")
def test_a_row_that_uses_every_private_character_is_refused_by_name(qwen3_folder: Path) -> None:
    assert choose_guard("|" + PRIVATE_USE[:-1]) == PRIVATE_USE[-1]
    assert choose_guard("|" + PRIVATE_USE) is None
    rows = [asked("a | b", PRIVATE_USE), *(asked(str(i), "x") for i in range(30)), asked("a | b", PRIVATE_USE[1:])]
    Path("rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"^rows\.jsonl:1  its texts hold '\|' and all 6,400 private-use characters"):
        prepared(qwen3_folder)
    report = prepared(qwen3_folder, bad_rows="skip", max_dropped_fraction=0.5, max_tokens=30_000).report
    assert (report["samples"], report["examples"]) == (32, 31)


def test_no_call_of_next_in_the_data_stage_can_end_a_stream() -> None:
    """An escaped StopIteration ends a `map` in silence, and a generator with a bug's traceback."""
    for path in Path(qwentune.__file__).parent.glob("data/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next":
                assert len(node.args) == 2 or ast.unparse(node) == "next(spare)", f"{path}:{node.lineno}"


@pytest.mark.fault("H68", "a weight that 32 bits round to nothing is refused with the smallest, exit 3")
@pytest.mark.parametrize("weight", [1e-300, 5e-324, SMALLEST_WEIGHT / 2, -1e-9, 1e300, 10**400])
def test_a_weight_that_vanishes_is_refused(qwen3_folder: Path, weight: float) -> None:
    message = {"role": "assistant", "content": "x", "weight": weight}
    Path("rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, message]}) + "\n")
    with pytest.raises(
        DataError, match=r"^rows\.jsonl:1  messages\[1\]\.weight is|thousands of digits|finite"
    ) as raised:
        prepared(qwen3_folder)
    assert raised.value.exit_code == 3
    text = Path("rows.jsonl").read_text().replace(json.dumps(weight), repr(SMALLEST_WEIGHT))
    Path("rows.jsonl").write_text(text)
    assert len(prepared(qwen3_folder).train.trained_weights) == 1
    assert prepared(qwen3_folder).train.trained_weight(0) > 0


def told(name: str, content: bytes) -> list[Problem]:
    Path(name).write_bytes(content)
    problems: list[Problem] = []
    for _ in read_rows(name, problems):
        pass
    return problems


@pytest.mark.fault("H63", "a header, a row or a number of columns without bound is refused with the limit")
def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "longer than 1 MiB" in told("a.csv", b"a" * 2**21)[0].what
    assert "longer than 1 MiB" in told("b.csv", b"ab," * 2**20)[0].what
    assert (
        "20,000 columns, and at most 10,000" in told("c.csv", ",".join(f"c{i}" for i in range(20_000)).encode())[0].what
    )
    monkeypatch.setattr(tables, "LARGEST_ROW_BYTES", 2**20)
    assert "longer than 1 MiB" in told("d.csv", b"text\n" + b"x" * 2**21)[0].what
    assert "longer than 1 MiB" in told("e.csv", b'text\n"' + b"x\n" * 2**20)[0].what
    assert "longer than 1 MiB" in told("f.csv", b"text,b\n" + b"12," * 2**20)[0].what
    assert not told("g.csv", b"text\n" + (b"x" * 2**19 + b"\n") * 8), "the limit is that of one row"


@pytest.mark.fault("H64", "a small Parquet file whose rows all name one huge cell is read no further than some rows")
def test_rows_of_parquet_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LARGEST_ROW_BYTES", 2**16)
    monkeypatch.setattr(tables, "LARGEST_BATCH_BYTES", 2**21)
    sizes: list[int] = []
    read = tables._batch_rows
    monkeypatch.setattr(tables, "_batch_rows", lambda batch: sizes.append(batch.nbytes) or read(batch))
    cell = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), ["x" * 2**18])
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": cell}), file, compression="zstd", store_schema=False)
    problems = told("a.parquet", file.getvalue())
    assert "it takes 262,148 bytes, and at most 65,536 are read" in problems[0].what
    assert problems[-1].what.endswith("rows up to here are too long, and the rest is not read")
    assert len(problems) < 50
    assert max(sizes) <= 2**21
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({f"c{i}": [1] for i in range(10_001)}), file)
    assert "10,001 columns" in told("b.parquet", file.getvalue())[0].what


def test_a_column_of_many_texts_in_a_dictionary_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "LARGEST_ROW_BYTES", 2**16)
    texts = [f"{i} " + "x" * 500 for i in range(300)]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}), file)
    problems: list[Problem] = []
    rows = list(tables.read_parquet_rows(file, "rows.parquet", problems))
    assert not problems
    assert [row for _, row in rows] == [{"text": text} for text in texts]


@pytest.mark.fault("H63", "empty lines, white space and wrong rows without end are refused with the count")
def test_what_is_no_row_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_rows, tables):
        monkeypatch.setattr(module, "MOST_EMPTY_LINES", 1000)
    monkeypatch.setattr(json_rows, "LARGEST_ROW_BYTES", 2**20)
    monkeypatch.setattr(faults, "MOST_PROBLEMS", 50)
    assert "more than 1,000 empty lines" in told("a.jsonl", b"\n" * 5000)[0].what
    assert "more than 1,000 empty lines" in told("a.csv", b"text\n" + b"\n" * 5000)[0].what
    assert "nothing but white space" in told("a.json", b"[" + b" " * 2**22)[0].what
    assert "no value ends within 1 MiB" in told("b.json", b'[{"text": "' + b"x" * 2**22 + b'"}]')[0].what
    long = told("d.json", b'[{"text": "' + b"x" * (2**20 + 9) + b'"}, {"text": "a"}]' + b" " * 2**20)
    assert [(one.where, one.what) for one in long] == [("d.json:1", "the row is longer than 1 MiB")]
    for name, content in (
        ("b.jsonl", b"x\n" * 5000),
        ("c.json", b"[" + b'{"a":NaN},' * 5000),
        ("b.csv", b"a\n1,2\n" * 500),
    ):
        problems = told(name, content)
        assert len(problems) == 51
        assert problems[-1].what == "50 problems are in the file up to here, and the rest is not read"
