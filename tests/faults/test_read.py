"""What is read is what was proved, and no row is lost uncounted: the data file, the tokenizer, the rows."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from qwentune.data import blocks
from qwentune.data import dataset as datasets
from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.reading import files
from qwentune.data.reading.files import content_of, read_rows
from qwentune.data.rendering.render import Renderer
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from qwentune.errors import DataError, Problem, UsageError
from qwentune.recipe import DataOptions


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))


def rendered(folder: Path, tokenizer: Tokenizer | None = None, **options: Any) -> Dataset:
    data = DataOptions.model_validate({"max_tokens": 512, **options})
    tokenizer = tokenizer or load_tokenizer(folder)
    return prepare(data, tokenizer, chat_template(data, tokenizer), 0)


def json_lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- a data file replaced while it is read


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=50, compression="none")
    return file.getvalue()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "rows.jsonl": lambda texts: json_lines(*({"text": text} for text in texts)),
    "rows.json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    "rows.csv": lambda texts: ("text\n" + "\n".join(texts) + "\n").encode(),
    "rows.parquet": parquet,
}
WRITERS |= {f"{name}.gz": lambda texts, write=write: gzip.compress(write(texts), 0) for name, write in WRITERS.items()}
WRITERS |= {
    f"{name}.zst": lambda texts, write=write: zstandard.compress(write(texts))
    for name, write in WRITERS.items()
    if not name.endswith(".gz")
}
TEXTS = [f"row {k} of the first kind" for k in range(300)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_proved_file_gives_the_rows_of_a_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(name).write_bytes(WRITERS[name](TEXTS))
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    problems: list[Problem] = []
    assert [row.value for row in read_rows(name, problems, content=content_of(name))] == [{"text": t} for t in TEXTS]
    assert problems == []


@pytest.mark.fault(
    "L82", "the file is named: it was changed while it was read, start again; nothing is in the cache, exit 3"
)
@pytest.mark.parametrize("is_in_place", [True, False], ids=["written", "replaced"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_changes_between_its_hash_and_its_rows_is_not_trained(
    name: str, is_in_place: bool, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [*TEXTS[:-1], TEXTS[-1].replace("first", "other")]
    Path(name).write_bytes(WRITERS[name](TEXTS))
    hashed = datasets.content_of

    def hashed_then_changed(path: str) -> files.Content:
        content = hashed(path)
        Path(name if is_in_place else "new").write_bytes(WRITERS[name](changed))
        if not is_in_place:
            os.replace("new", name)
        return content

    monkeypatch.setattr(datasets, "content_of", hashed_then_changed)
    with pytest.raises(DataError) as refused:
        rendered(qwen3_folder, train=[{"path": name}])
    (problem,) = refused.value.problems
    assert (problem.where, problem.what) == (name, "the file was changed while it was read")
    assert not [path for path in Path("cache", "data").iterdir() if path.is_dir()]


@pytest.mark.parametrize("change", ["grown", "cut", "written"])
def test_a_file_that_changes_while_its_rows_are_read_is_not_trained(
    change: str, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = WRITERS["rows.jsonl"](TEXTS)
    Path("rows.jsonl").write_bytes(data)
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(blocks, "MOST_ROWS", 1)
    monkeypatch.setenv("QWENTUNE_WORKERS", "1")
    render_all = Renderer.render_all

    def change_after_the_first(self: Renderer, samples: Any, number: int) -> Any:
        yield from render_all(self, samples, number)
        after = {"grown": data + json_lines({"text": "more"}), "cut": data[:-300], "written": data[:-300] + b" " * 300}
        Path("rows.jsonl").write_bytes(after[change])

    monkeypatch.setattr(Renderer, "render_all", change_after_the_first)
    with pytest.raises(DataError, match="the file was changed while it was read"):
        rendered(qwen3_folder, train=[{"path": "rows.jsonl"}])


# --- a tokenizer that does not give back what it was given


def edited(folder: Path, to: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(folder, to)
    (to / "tokenizer_config.json").unlink()
    document = json.loads((to / "tokenizer.json").read_text())
    edit(document)
    (to / "tokenizer.json").write_text(json.dumps(document))
    return to


def token(document: dict[str, Any], content: str) -> dict[str, Any]:
    return next(token for token in document["added_tokens"] if token["content"] == content)


UNTRUE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "dropout": (lambda d: d["model"].update(dropout=0.1), "dropout 0.1: the same text has other tokens each time"),
    "lower case": (lambda d: d.update(normalizer={"type": "Lowercase"}), "its normaliser 'Lowercase' changes texts"),
    "strip": (
        lambda d: d.update(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": True}],
            }
        ),
        "its normaliser 'Strip' changes texts",
    ),
    "replace": (
        lambda d: d.update(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
        "its normaliser 'Replace' changes texts",
    ),
    "compatibility": (lambda d: d.update(normalizer={"type": "NFKC"}), "its normaliser 'NFKC' changes texts"),
    "lost spaces": (
        lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"}),
        "it does not give back what it is given: ",
    ),
    "added spaces": (
        lambda d: d["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
        "it does not give back what it is given: ",
    ),
    "no decoder": (lambda d: d.update(decoder=None), "it does not give back what it is given: "),
    "lost byte": (lambda d: d["model"]["vocab"].pop("ð"), "it does not give back what it is given: "),
    "two names": (
        lambda d: token(d, "<|im_end|>").update(id=token(d, "<|im_start|>")["id"]),
        "that of both '<|im_start|>' and '<|im_end|>'",
    ),
    "a taken id": (lambda d: token(d, "<|im_end|>").update(id=5), "the id 5 of '<|im_end|>' is that of another"),
    "no end": (
        lambda d: d["added_tokens"].remove(token(d, "<|endoftext|>")),
        "it has no token <|endoftext|>",
    ),
    "no row": (lambda d: token(d, "<|im_end|>").update(id=99_999), "the model has rows for"),
    "takes white space": (
        lambda d: token(d, "<|im_end|>").update(rstrip=True),
        "the control token <|im_end|> is not the one token",
    ),
    "whole words": (
        lambda d: token(d, "<|im_start|>").update(single_word=True),
        "the control token <|im_start|> is not the one token",
    ),
}


@pytest.mark.fault("L83", "tokenizer.json is named with the text or the token that does not come back; exit 2")
@pytest.mark.parametrize("name", UNTRUE)
def test_a_tokenizer_that_loses_something_is_refused(name: str, tmp_path: Path, qwen3_folder: Path) -> None:
    edit, words = UNTRUE[name]
    folder = edited(qwen3_folder, tmp_path / "model", edit)
    with pytest.raises(UsageError) as refused:
        load_tokenizer(folder).encode(["a"])
    assert words in str(refused.value)
    assert {problem.where for problem in refused.value.problems} == {str(folder / "tokenizer.json")}


@pytest.mark.fault("L83", "tokenizer.json and tokenizer_config.json that name other tokens are refused; exit 2")
def test_two_files_that_disagree_about_a_token_are_refused(tmp_path: Path, qwen3_folder: Path) -> None:
    shutil.copytree(qwen3_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["1001"]["content"] = "<|other|>"
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"the id 1001 is that of both '<\|im_start\|>' and '<\|other\|>'"):
        load_tokenizer(tmp_path / "model")


def test_what_a_tokenizer_may_say_of_length_and_padding_cuts_nothing(tmp_path: Path, qwen3_folder: Path) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    folder = edited(qwen3_folder, tmp_path / "model", lambda d: d.update(truncation=cut))
    text = "a text of more than three tokens"
    assert load_tokenizer(folder).encode([text]) == load_tokenizer(qwen3_folder).encode([text])


@pytest.mark.fault("L83", "a row that does not come back names the tokenizer and the row; exit 2")
def test_rows_of_the_run_must_come_back_too(qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.jsonl").write_bytes(json_lines({"text": "nothing of this"}, {"text": "the rare case"}))
    tokenizer = load_tokenizer(qwen3_folder)
    encode = Tokenizer.encode

    def loses_the_rare(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        return encode(self, [text.replace("rare", "") for text in texts])

    monkeypatch.setattr(Tokenizer, "encode", loses_the_rare)
    with pytest.raises(UsageError, match=r"(?s)'the rare case' comes back as 'the  case' .*rows\.jsonl:2"):
        rendered(qwen3_folder, tokenizer, train=[{"path": "rows.jsonl"}])


@pytest.mark.fault("L83", "rows with characters that Qwen's own tokenizer composes (NFC) are counted in a warning")
def test_rows_that_nfc_changes_are_counted(qwen3_folder: Path) -> None:
    Path("rows.jsonl").write_bytes(
        json_lines(*({"text": text} for text in ("caf\u00e9", "cafe\u0301", "\u1112\u1161 in parts", "x")))
    )
    report = rendered(qwen3_folder, train=[{"path": "rows.jsonl"}]).report
    assert report["rows_changed_by_nfc"] == 2
    (warning,) = (w for w in report["warnings"] if "composes" in w)
    assert warning.startswith("2 rows hold characters that the tokenizer composes")
    assert warning.endswith("First: rows.jsonl:2, rows.jsonl:3")


# --- rows that vanish uncounted


def asked(*roles: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": role, **(fields if role == "assistant" else {})} for role in roles]}


def pair(*roles: str) -> dict[str, Any]:
    prompt, end = asked(*roles[:-1])["messages"], {"role": "assistant", "content": "no"}
    return {"prompt": prompt, "chosen": [{**end, "content": "yes"}], "rejected": [end]}


UNREACHABLE = "no user turn stands before what the assistant says"
VANISHED: dict[str, tuple[Any, Any, str]] = {
    "chat": (asked("user", "assistant"), asked("system", "assistant"), UNREACHABLE),
    "preference": (pair("user", "assistant"), pair("system", "assistant"), UNREACHABLE),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "system", "value": "q"}, {"from": "gpt", "value": "a"}]},
        UNREACHABLE,
    ),
}


@pytest.mark.fault(
    "L84", "a row of which nothing is trained is dropped with its reason and counts for data.max_dropped_fraction"
)
@pytest.mark.parametrize("name", VANISHED)
def test_rows_of_which_nothing_is_trained_are_dropped_and_counted(name: str, qwen3_folder: Path) -> None:
    good, bad, reason = VANISHED[name]
    Path("rows.jsonl").write_bytes(json_lines(good, *[bad] * 19))
    with pytest.raises(DataError, match=r"19 of \d\d turns .* would not be trained"):
        rendered(qwen3_folder, train=[{"path": "rows.jsonl"}])
    dataset = rendered(qwen3_folder, train=[{"path": "rows.jsonl"}], max_dropped_fraction=1.0)
    rows = {
        "read": 20,
        "trained": 1,
        "evaluated": 0,
        "left_out_by_repeat": 0,
        "logged_again": 0,
        "dropped": 19,
        "refused": 0,
    }
    assert dataset.report["rows"] == rows
    assert {drop["source"]["line"] for drop in dataset.dropped} == set(range(2, 21))
    assert all(drop["reason"].startswith(reason) and drop["kind"] == "nothing to train" for drop in dataset.dropped)


@pytest.mark.fault("L84", "rows that the user wants untrained are counted, and are no loss")
@pytest.mark.parametrize("fields", [{"train": False}, {"weight": 0}])
def test_rows_that_are_not_to_be_trained_are_no_loss(fields: dict[str, Any], qwen3_folder: Path) -> None:
    rows = [asked("user", "assistant"), *[asked("user", "assistant", **fields)] * 19]
    Path("rows.jsonl").write_bytes(json_lines(*rows))
    dataset = rendered(qwen3_folder, train=[{"path": "rows.jsonl"}])
    assert (dataset.report["rows"]["trained"], dataset.report["rows"]["dropped"]) == (1, 19)
    assert {drop["kind"] for drop in dataset.dropped} == {"not asked for"}


@pytest.mark.fault("L84", "a file that cannot be read, before others that can: its own error, not a lost count")
def test_a_source_that_cannot_be_read_is_named_before_others(qwen3_folder: Path) -> None:
    Path("cut.jsonl.gz").write_bytes(
        gzip.compress(json_lines(*({"text": os.urandom(20).hex()} for _ in range(99))))[:-900]
    )
    Path("good.jsonl").write_bytes(json_lines({"text": "a b c"}))
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz") as error:
        rendered(qwen3_folder, train=[{"path": "cut.jsonl.gz"}, {"path": "good.jsonl"}], max_dropped_fraction=1.0)
    assert "good" not in str(error.value)


@pytest.mark.fault("L84", "a file that cannot be read to its end is refused, also where bad rows are skipped; exit 3")
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.json", b'[{"text": "a"}, {"text": "b"'),
        ("rows.jsonl.gz", gzip.compress(json_lines(*({"text": os.urandom(20).hex()} for _ in range(99))))[:-900]),
        ("rows.csv", b'text\na\n"b" c,\n'),
        ("rows.jsonl", b'{"text": "a"}\n{\n"text": "b"}\n'),
    ],
)
def test_skipping_bad_rows_skips_no_rest_of_a_file(name: str, data: bytes, qwen3_folder: Path) -> None:
    Path(name).write_bytes(data)
    with pytest.raises(DataError):
        rendered(qwen3_folder, train=[{"path": name}], bad_rows="skip", max_dropped_fraction=1.0)


@pytest.mark.fault("L84", "the counts of a run's rows add up, or the run ends: a bug of ours, with the counts; exit 1")
@pytest.mark.parametrize("loss", ["silent", "short"])
def test_a_row_that_our_own_code_loses_ends_the_run(
    loss: str, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("rows.jsonl").write_bytes(json_lines(*({"text": f"text {k}"} for k in range(5))))
    render_all = Renderer.render_all

    def lossy(self: Renderer, samples: Any, number: int) -> Any:
        for k, outcome in enumerate(render_all(self, samples, number)):
            if k != 2 or loss != "silent":
                yield outcome
            if k == 2 and loss == "short":
                return

    monkeypatch.setattr(Renderer, "render_all", lossy)
    with pytest.raises(AssertionError, match="rows are lost: 5 were read, accounted for are"):
        rendered(qwen3_folder, train=[{"path": "rows.jsonl"}])


@pytest.mark.fault("L84", "`rows` in the report: read = trained + evaluated + left out by repeat + dropped + refused")
def test_what_becomes_of_each_row_adds_up_over_all_sources(qwen3_folder: Path) -> None:
    def texts(name: str, count: int) -> list[dict[str, str]]:
        return [{"text": f"{name} {k}"} for k in range(count)]

    Path("half.jsonl").write_bytes(json_lines(*texts("a", 10), {"text": 5}, {"text": ""}) + b"no row\n")
    Path("twice.jsonl").write_bytes(json_lines(*texts("b", 4), *texts("b", 1)))
    Path("eval.jsonl").write_bytes(json_lines(*texts("c", 3), {"no": "text"}))
    report = rendered(
        qwen3_folder,
        train=[{"path": "half.jsonl", "repeat": 0.5}, {"path": "twice.jsonl", "repeat": 2}],
        eval=[{"path": "eval.jsonl", "format": "text"}],
        bad_rows="skip",
        max_dropped_fraction=0.5,
    ).report
    rows = {
        "read": 22,
        "trained": 10,
        "evaluated": 3,
        "left_out_by_repeat": 5,
        "logged_again": 0,
        "dropped": 0,
        "refused": 4,
    }
    assert report["rows"] == rows
