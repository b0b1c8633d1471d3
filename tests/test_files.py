"""Rows of data files: each is read as it was written, with its number, or reported with its place; nothing raises."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from qwentune.data.reading import files, json_rows
from qwentune.data.reading.files import COMPRESSIONS, READERS, content_of, read_rows
from qwentune.data.reading.strict_json import DEEPEST_NESTING
from qwentune.data.sample import Json
from qwentune.errors import DataError, Problem

SHIPPED = Path(__file__).parents[1] / "data_templates" / "chat.jsonl"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
MARK = "\N{BYTE ORDER MARK}".encode()

Read = tuple[list[tuple[int, Json]], list[Problem]]


def read(file: Path, data: bytes | str) -> Read:
    """The numbered rows and the problems of a file that holds these bytes; the problems' places without the folder."""
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return read_path(file)


def read_path(file: Path) -> Read:
    problems: list[Problem] = []
    rows = [(row.source.line, row.value) for row in read_rows(str(file), problems)]
    assert all(problem.where.startswith(str(file)) for problem in problems)
    folder = f"{file.parent}/"
    return rows, [Problem(problem.where.removeprefix(folder), problem.what, problem.fix) for problem in problems]


def the_only_problem(file: Path, data: bytes | str) -> Problem:
    rows, problems = read(file, data)
    assert rows == []
    assert len(problems) == 1
    return problems[0]


texts = st.text(max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
objects = st.dictionaries(texts, values, max_size=4)
endings = st.sampled_from([ending + compression for ending in READERS for compression in COMPRESS])
jsonish = st.text("{}[]\",:\\udc8e0f1.-+ntrueNaI'\n\r\t ", max_size=60).map(str.encode)


# --- what is read ---


@given(rows=st.lists(objects, min_size=1, max_size=5), compression=st.sampled_from(list(COMPRESS)), ascii=st.booleans())
def test_json_lines_read_back_as_written(session_folder: Path, rows: list[Json], compression: str, ascii: bool) -> None:
    data = "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows).encode()
    read_back = read(session_folder / f"rows.jsonl{compression}", COMPRESS[compression](data))
    assert read_back == (list(enumerate(rows, start=1)), [])


@given(
    rows=st.lists(values, min_size=1, max_size=5),
    indent=st.none() | st.integers(0, 2),
    compression=st.sampled_from(list(COMPRESS)),
    chunk_characters=st.integers(1, 30),
)
def test_an_array_reads_back_as_written_wherever_its_chunks_are_cut(
    session_folder: Path, rows: list[Json], indent: int | None, compression: str, chunk_characters: int
) -> None:
    data = COMPRESS[compression](json.dumps(rows, indent=indent, ensure_ascii=False).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK_CHARACTERS", chunk_characters)
        read_back = read(session_folder / f"rows.json{compression}", data)
    assert read_back == (list(enumerate(rows, start=1)), [])


@pytest.mark.parametrize("number", ["1.5", "-1e5", "12e+3", "1E-7", "0"])
def test_a_number_that_a_chunk_cuts_is_read_whole(tmp_path: Path, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk_characters in range(1, 12):
        monkeypatch.setattr(json_rows, "CHUNK_CHARACTERS", chunk_characters)
        assert read(tmp_path / "rows.json", f"[{number},{number}]")[0] == [(1, float(number)), (2, float(number))]


def test_an_array_is_not_read_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[" + ",\n".join(["{}"] * (json_rows.CHUNK_CHARACTERS)) + "] and a broken end")
    problems: list[Problem] = []
    rows = read_rows(str(file), problems)
    assert next(rows).source.line == 1
    assert problems == []
    rows.close()


def test_rows_are_numbered_by_line_and_blank_lines_count(tmp_path: Path) -> None:
    assert read(tmp_path / "rows.jsonl", '\n{"a": 1}\n   \n\n{"a": 2}\n\n') == ([(2, {"a": 1}), (5, {"a": 2})], [])


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path: Path, ending: str) -> None:
    data = {
        "jsonl": '{"a": "1"}\r\n{"a": "2"}\r\n',
        "json": '[\r\n{"a": "1"},\r\n{"a": "2"}\r\n]',
        "csv": "a\r\n1\r\n2\r\n",
    }
    rows, problems = read(tmp_path / f"rows.{ending}", MARK + data[ending].encode())
    assert [value for _, value in rows] == [{"a": "1"}, {"a": "2"}]
    assert problems == []


def test_the_first_character_tells_an_array_from_lines_whatever_the_ending(tmp_path: Path) -> None:
    assert read(tmp_path / "rows.jsonl", ' \n[{"a": 1}]')[0] == [(1, {"a": 1})]
    assert read(tmp_path / "rows.json", '{"a": 1}\n{"a": 2}')[0] == [(1, {"a": 1}), (2, {"a": 2})]


def test_unusual_line_separators_inside_a_text_end_no_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x7f"
    assert read(tmp_path / "rows.jsonl", f'{{"a": "{text}"}}') == ([(1, {"a": text})], [])


def test_frames_of_compressed_data_may_follow_each_other(tmp_path: Path) -> None:
    for compression in COMPRESSIONS:
        data = COMPRESS[compression](b'{"a": 1}\n') + COMPRESS[compression](b'{"a": 2}\n')
        assert read(tmp_path / f"rows.jsonl{compression}", data) == ([(1, {"a": 1}), (2, {"a": 2})], [])


# --- rows that are reported, while reading goes on ---


@pytest.mark.parametrize(
    ("line", "column", "what"),
    [
        ('{"a": NaN}', None, "NaN is not a finite number"),
        ('{"a": -Infinity}', None, "-Infinity is not a finite number"),
        ('{"a": 1e999}', None, "1e999 is not a finite number"),
        ('{"a": 1, "b": 2, "a": 1}', None, "the key 'a' stands twice in one object"),
        ('{"a": "\\ud83d"}', None, "the escape \\ud83d is half of a character"),
        ('{"\\ude00": 1}', None, "the escape \\ude00 is half of a character"),
        ('{"a": ' + "9" * 5000 + "}", None, "a number has thousands of digits"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", None, f"nested more than {DEEPEST_NESTING} deep"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", None, f"nested more than {DEEPEST_NESTING} deep"),
        ('{"a": 1} {"a": 2}', 10, "several values on one line"),
        ('{"a": 1},', 9, "a comma after the row"),
        ('{"a": 1} # one', 10, "something follows the first value"),
        ("{'a': 1}", 2, "a single quote where a double quote is needed"),
        ('{"a": True}', 7, "True is Python, not JSON"),
        ('{"a": None}', 7, "None is Python, not JSON"),
        ('{"a": "x\ty"}', 9, "a raw control character '\\t' inside a text"),
        ('{"a": 1', 8, "the value ends before it is complete"),
        ('{"a": 1, "b', 10, "the value ends before it is complete: the row is cut"),
        ('{"a": [1, {"a": 2}', 11, "the row is cut, and the next one begins in the same line"),
        ("plain words", 1, "expecting value"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_line_that_is_no_row_is_reported_and_the_next_is_read(
    tmp_path: Path, line: str, column: int | None, what: str
) -> None:
    rows, problems = read(tmp_path / "rows.jsonl", f'{{"ok": 1}}\n{line}\n{{"ok": 3}}\n')
    assert rows == [(1, {"ok": 1}), (3, {"ok": 3})]
    (problem,) = problems
    assert problem.where == ("rows.jsonl:2" if column is None else f"rows.jsonl:2:{column}")
    assert what in problem.what


@pytest.mark.parametrize(
    "row",
    ["NaN", '{"a": 1, "a": 1}', '"\\ud83d"', "9" * 5000, "[" * 300 + "]" * 300],
    ids=["not finite", "duplicate key", "half a character", "many digits", "deep"],
)
def test_a_wrong_row_of_an_array_is_reported_and_the_next_is_read(tmp_path: Path, row: str) -> None:
    rows, problems = read(tmp_path / "rows.json", f'["ok",\n{row},\n"ok"]')
    assert rows == [(1, "ok"), (3, "ok")]
    assert [problem.where for problem in problems] == ["rows.json:2"]


def test_escapes_that_pair_to_a_character_are_that_character(tmp_path: Path) -> None:
    assert read(tmp_path / "rows.jsonl", '{"a": "\\ud83d\\ude00"}')[0] == [(1, {"a": "😀"})]


def test_nesting_is_allowed_up_to_the_limit(tmp_path: Path) -> None:
    lists = DEEPEST_NESTING - 1
    rows, problems = read(tmp_path / "rows.jsonl", '{"a": ' + "[" * lists + "]" * lists + "}")
    assert len(rows) == 1
    assert problems == []


def test_a_byte_that_is_not_utf_8_is_reported_with_line_and_column(tmp_path: Path) -> None:
    rows, problems = read(tmp_path / "rows.jsonl", b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}\n')
    assert rows == [(1, {"a": 1}), (3, {"a": 3})]
    assert [(problem.where, problem.what) for problem in problems] == [("rows.jsonl:2:8", "the byte 0xff is not UTF-8")]


def test_a_byte_that_is_not_utf_8_costs_one_row_of_an_array_or_of_a_table(tmp_path: Path) -> None:
    rows, problems = read(tmp_path / "rows.json", b'["a", "\xff", "c"]')
    assert rows == [(1, "a"), (3, "c")]
    assert [(problem.where, problem.what) for problem in problems] == [("rows.json:2", "the row is not UTF-8")]
    rows, problems = read(tmp_path / "rows.csv", b"text\na\n\xff\nc\n")
    assert rows == [(2, {"text": "a"}), (4, {"text": "c"})]
    assert [(problem.where, problem.what) for problem in problems] == [("rows.csv:3", "the row is not UTF-8")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_utf_16_file_is_named_as_such(tmp_path: Path, encoding: str) -> None:
    problem = the_only_problem(tmp_path / "rows.jsonl", '\N{BYTE ORDER MARK}{"a": 1}\n'.encode(encoding))
    assert (problem.what, problem.fix) == ("the file is UTF-16", "Save the file as UTF-8.")


@given(row=objects, ascii=st.booleans(), data=st.data())
def test_a_file_cut_anywhere_in_its_last_line_is_named_as_such(
    session_folder: Path, row: Json, ascii: bool, data: st.DataObject
) -> None:
    line = json.dumps(row, ensure_ascii=ascii).encode()
    kept = data.draw(st.integers(1, len(line) - 1))
    rows, problems = read(session_folder / "cut.jsonl", b'{"ok": 1}\n' + line[:kept])
    assert rows == [(1, {"ok": 1})]
    (problem,) = problems
    assert problem.where.startswith("cut.jsonl:2:")
    assert problem.what == "the file ends in the middle of this row"


@given(rows=st.lists(objects, min_size=1, max_size=3), data=st.data())
def test_an_array_cut_anywhere_is_one_problem_with_its_place(
    session_folder: Path, rows: list[Json], data: st.DataObject
) -> None:
    text = json.dumps(rows, indent=1)
    kept = text[: data.draw(st.integers(1, len(text) - 1))]
    read_back, problems = read(session_folder / "cut.json", kept)
    assert read_back == list(enumerate(rows, start=1))[: len(read_back)]
    (problem,) = problems
    _, line, column = problem.where.split(":")
    lines = kept.split("\n")
    assert 1 <= int(line) <= len(lines)
    assert 1 <= int(column) <= len(lines[int(line) - 1]) + 1
    assert "the array is broken at its row" in problem.what


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('[{"a": 1}\n {"a": 2}]', "rows.json:2:2", "a comma or the closing bracket of the array is missing"),
        ('[{"a": 1},\n]', "rows.json:2:1", "expecting value"),
        ('[{"a": 1}]\n{"a": 2}\n', "rows.json:2:1", "something follows the array"),
        ("[{\"a\": 1},\n {'a': 2}]", "rows.json:2:3", "a single quote where a double quote is needed"),
        ('[{"a": 1},\n {"a": tru}]', "rows.json:2:8", "expecting value"),
    ],
)
def test_a_broken_array_is_reported_where_it_breaks(
    tmp_path: Path, text: str, where: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chunk_characters in (1, 7, json_rows.CHUNK_CHARACTERS):
        monkeypatch.setattr(json_rows, "CHUNK_CHARACTERS", chunk_characters)
        rows, problems = read(tmp_path / "rows.json", text)
        assert rows == [(1, {"a": 1})]
        assert [problem.where for problem in problems] == [where]
        assert what in problems[0].what


def test_one_object_over_many_lines_is_one_problem(tmp_path: Path) -> None:
    problem = the_only_problem(tmp_path / "rows.jsonl", json.dumps({"a": 1, "b": [2, 3]}, indent=2))
    assert problem.where == "rows.jsonl:1"
    assert "goes on in the next line" in problem.what


def test_a_line_that_is_too_long_is_reported_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "LARGEST_ROW_BYTES", 100)
    rows, problems = read(tmp_path / "rows.jsonl", json.dumps({"a": "x" * 1000}) + '\n{"a": 2}\n')
    assert rows == [(2, {"a": 2})]
    assert [problem.where for problem in problems] == ["rows.jsonl:1"]
    assert "the line is longer than" in problems[0].what


# --- tables ---


@given(cells=st.lists(st.lists(texts, min_size=3, max_size=3), min_size=1, max_size=4))
def test_csv_cells_stay_the_texts_they_are_and_empty_ones_are_absent(
    session_folder: Path, cells: list[list[str]]
) -> None:
    written = io.StringIO(newline="")
    csv.writer(written).writerows([["a", "b", "c"], *cells])
    rows, problems = read(session_folder / "rows.csv", written.getvalue())
    expected = [{name: cell for name, cell in zip("abc", row, strict=True) if cell} for row in cells]
    assert [value for _, value in rows] == expected
    assert problems == []


def test_csv_retypes_nothing(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "rows.csv", "instruction,output\n007,NA\ntrue,1.0\nnull,2024-01-02\n")
    assert rows == [
        (2, {"instruction": "007", "output": "NA"}),
        (3, {"instruction": "true", "output": "1.0"}),
        (4, {"instruction": "null", "output": "2024-01-02"}),
    ]


def test_a_csv_row_is_numbered_by_the_line_it_begins_in(tmp_path: Path) -> None:
    rows, problems = read(tmp_path / "rows.csv", 'a,b\n"1\n1",2\n\n3\n4,5\n')
    assert rows == [(2, {"a": "1\n1", "b": "2"}), (6, {"a": "4", "b": "5"})]
    assert [(problem.where, problem.what) for problem in problems] == [
        ("rows.csv:5", "1 cells stand under 2 column names")
    ]


@pytest.mark.parametrize("header", ["a,a", "a,", "\xff"], ids=["twice", "unnamed", "not UTF-8"])
def test_a_csv_header_that_names_no_columns_is_an_error(tmp_path: Path, header: str) -> None:
    assert the_only_problem(tmp_path / "rows.csv", f"{header}\n1,2\n".encode("latin-1")).where == "rows.csv:1"


def test_a_csv_file_that_ends_inside_a_quoted_cell_is_an_error(tmp_path: Path) -> None:
    rows, problems = read(tmp_path / "rows.csv", 'text\nwhole\n"half')
    assert rows == [(2, {"text": "whole"})]
    assert [problem.where for problem in problems] == ["rows.csv:3"]


def parquet_bytes(table: Any) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written)
    return written.getvalue()


@pytest.mark.parametrize("compression", COMPRESS)
def test_parquet_structs_do_not_gain_the_fields_of_other_rows(tmp_path: Path, compression: str) -> None:
    rows: list[Json] = [
        {"calls": [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g", "arguments": {"x": 1}}]},
        {"calls": [{"name": "h"}], "note": "n"},
        {"calls": ["", None][:0]},
    ]
    data = parquet_bytes(pyarrow.Table.from_pylist(rows, schema=pyarrow.Table.from_pylist(rows[:2][::-1]).schema))
    read_back, problems = read(tmp_path / f"rows.parquet{compression}", COMPRESS[compression](data))
    assert read_back == list(enumerate(rows, start=1))
    assert problems == []


def test_parquet_maps_are_objects_and_a_repeated_key_is_an_error(tmp_path: Path) -> None:
    maps = pyarrow.array([[("a", 1)], [("a", 1), ("a", 2)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    rows, problems = read(tmp_path / "rows.parquet", parquet_bytes(pyarrow.table({"map": maps})))
    assert rows == [(1, {"map": {"a": 1}}), (3, {"map": {}})]
    assert [problem.where for problem in problems] == ["rows.parquet:2"]


def test_a_parquet_text_that_is_not_utf_8_costs_one_row(tmp_path: Path) -> None:
    offsets, data = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, data])})
    rows, problems = read(tmp_path / "rows.parquet", parquet_bytes(table))
    assert rows == [(1, {"text": "a"})]
    assert [problem.where for problem in problems] == ["rows.parquet:2"]


@pytest.mark.parametrize(
    "column",
    [pyarrow.array([b"bytes"]), pyarrow.array([float("nan")]), pyarrow.array([2**62], pyarrow.timestamp("us"))],
    ids=["bytes", "not finite", "date"],
)
def test_a_parquet_value_that_json_does_not_have_is_an_error(tmp_path: Path, column: Any) -> None:
    assert the_only_problem(tmp_path / "rows.parquet", parquet_bytes(pyarrow.table({"a": column}))).where == (
        "rows.parquet:1"
    )


def test_two_parquet_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    columns = [pyarrow.array(["kept"]), pyarrow.array(["lost"])]
    data = parquet_bytes(pyarrow.Table.from_arrays(columns, names=["text", "text"]))
    assert "two columns have the same name" in the_only_problem(tmp_path / "rows.parquet", data).what


def test_a_parquet_file_that_is_cut_is_an_error(tmp_path: Path) -> None:
    data = parquet_bytes(pyarrow.table({"text": ["a", "b"]}))
    for kept in (0, 3, len(data) // 2, len(data) - 1):
        the_only_problem(tmp_path / "rows.parquet", data[:kept])


# --- files ---


def test_a_missing_file_is_reported_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    rows, problems = read_path(tmp_path / "trian.jsonl")
    assert rows == []
    assert problems == [Problem("trian.jsonl", "there is no such file", "Did you mean 'train.jsonl'?")]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (problem,) = read_path(tmp_path / "nowhere" / "train.jsonl")[1]
    assert f"no folder '{tmp_path}/nowhere'" in problem.what


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (problem,) = read_path(tmp_path)[1]
    assert problem.what == "this is a folder, no regular file"


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (problem,) = read_path(tmp_path / "pipe.jsonl")[1]
    assert problem.what == "this is a pipe, no regular file"


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.gz", "rows.jsonl.gz.zst", "rows.JSONL"])
def test_an_unknown_ending_is_reported_with_those_that_are_known(tmp_path: Path, name: str) -> None:
    problem = the_only_problem(tmp_path / name, "{}")
    assert "names no kind of data file" in problem.what
    assert all(ending in problem.fix for ending in (*READERS, *COMPRESSIONS))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", b""),
        ("rows.jsonl", b"\n \r\n"),
        ("rows.json", b" [ ]\n"),
        ("rows.csv", b"a,b\n"),
        ("rows.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("rows.jsonl.zst", zstandard.compress(b"")),
        ("rows.parquet", parquet_bytes(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}))),
    ],
    # Compressed bytes hold the time, and the two test processes must agree on the names of their tests.
    ids=["empty", "blank lines", "json", "csv", "gzip", "zstd", "parquet"],
)
def test_a_file_without_rows_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    assert the_only_problem(tmp_path / name, data) == Problem(name, "the file holds no rows", "Write at least one row.")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_data_that_ends_too_early_is_an_error(tmp_path: Path, compression: str) -> None:
    rows = "".join(f'{{"a": "{hashlib.sha256(bytes([i])).hexdigest()}"}}\n' for i in range(200))
    data = COMPRESS[compression](rows.encode())
    for kept in (len(data) - 1, len(data) // 2):
        read_back, problems = read(tmp_path / f"rows.jsonl{compression}", data[:kept])
        assert read_back == list(enumerate(map(json.loads, rows.splitlines()), start=1))[: len(read_back)]
        assert [problem.where for problem in problems] == [f"rows.jsonl{compression}"]
        assert "the file cannot be read to its end" in problems[0].what


def test_shipped_rows_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problems: list[Problem] = []
    rows = list(read_rows("data_templates/chat.jsonl", problems))
    assert [row.value for row in rows] == [json.loads(line) for line in SHIPPED.read_text().splitlines()]
    assert str(rows[0].source) == "data_templates/chat.jsonl:1"
    assert problems == []


def test_an_own_file_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_templates").mkdir()
    (tmp_path / "data_templates" / "chat.jsonl").write_text('{"own": true}')
    assert [row.value for row in read_rows("data_templates/chat.jsonl", [])] == [{"own": True}]


def test_the_fingerprint_is_that_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(data: bytes) -> str:
        (tmp_path / "rows.jsonl").write_bytes(data)
        return content_of(str(tmp_path / "rows.jsonl")).fingerprint

    monkeypatch.setattr(files, "BLOCK_BYTES", 4)
    contents = (b"", b"\0", b"abcd", b"abcd\0", b"abcdabcd", b"abcdabce", b"ebcdabcd", b"abcdabcdab")
    assert len({fingerprint(data) for data in contents}) == len(contents)
    assert fingerprint(b"abcdabcd") == fingerprint(b"abcdabcd")
    monkeypatch.chdir(tmp_path)
    shipped = content_of("data_templates/chat.jsonl").fingerprint
    assert shipped == fingerprint(SHIPPED.read_bytes())


def test_the_hash_of_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        content_of(str(tmp_path / "rows.jsonl"))


# --- anything at all ---


@settings(max_examples=300)
@given(ending=endings, data=st.binary(max_size=60) | jsonish, is_compressed=st.booleans(), is_marked=st.booleans())
def test_arbitrary_bytes_never_raise_and_are_never_passed_over_in_silence(
    session_folder: Path, ending: str, data: bytes, is_compressed: bool, is_marked: bool
) -> None:
    data = MARK + data if is_marked else data
    compress = COMPRESS[Path("x" + ending).suffix if ending.endswith(COMPRESSIONS) else ""]
    rows, problems = read(session_folder / f"any{ending}", compress(data) if is_compressed else data)
    assert rows or problems
    json.dumps(rows, allow_nan=False).encode()
    "".join(map(str, problems)).encode()  # can be printed


PARQUET = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), PARQUET)
LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "data", "what", "fix"),
    [
        ("rows.jsonl", gzip.compress(LINE, mtime=0), "it holds gzip data", "Rename it to 'rows.jsonl.gz'."),
        ("rows.csv", zstandard.compress(LINE), "it holds zstd data", "Rename it to 'rows.csv.zst'."),
        ("rows.jsonl", PARQUET.getvalue(), "it holds a Parquet file", "Rename it to 'rows.parquet'."),
        ("rows.jsonl.gz", PARQUET.getvalue(), "it holds a Parquet file", "Rename it to 'rows.parquet'."),
        ("rows.jsonl.gz", LINE, "it holds no gzip data", "Rename it to 'rows.jsonl'."),
        ("rows.jsonl.zst", gzip.compress(LINE, mtime=0), "it holds gzip data", "Rename it to 'rows.jsonl.gz'."),
        ("rows.parquet", LINE, "it holds no Parquet file", "Write the file again, or name it as what it is."),
        ("rows.csv", b"PK\x03\x04 a workbook", "it holds a ZIP archive, such as an Excel workbook", "Save it as CSV"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_name_that_does_not_fit_what_the_file_holds_is_said(
    tmp_path: Path, name: str, data: bytes, what: str, fix: str
) -> None:
    problem = the_only_problem(tmp_path / name, data)
    assert (problem.where, what in problem.what, problem.fix.startswith(fix)) == (name, True, True), problem


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_file_with_other_separators_is_named_as_such(tmp_path: Path, separator: str) -> None:
    problem = the_only_problem(tmp_path / "rows.csv", f"instruction{separator}output\nq{separator}a\n")
    assert f"its columns are separated by {separator!r}" in problem.what


def test_a_number_that_json_does_not_have_is_named_with_its_column(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a"], "score": [float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    _, (problem,) = read_path(tmp_path / "rows.parquet")
    assert "'score' holds the number nan" in problem.what
    assert "leave the column out" in problem.fix
