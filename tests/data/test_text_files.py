"""Text files: what is read, what cannot be, and that a file is converted once and whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from data.errors import UserError
from data.text_files import CHUNK, LINE, convert

Read = Callable[..., tuple[list[dict[str, Any]], tuple[str, ...]]]


@pytest.fixture
def rows_of(tmp_path: Path) -> Read:
    """Write a file and return its rows, and what was skipped of it."""

    def read(
        name: str, content: str | bytes, *, skip_bad: bool = False
    ) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        arrow, skipped = convert(file, tmp_path / "cache", skip_bad=skip_bad)
        return Dataset.from_file(str(arrow)).to_list(), skipped

    return read


def values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != LINE} for row in rows]


def places(rows: list[dict[str, Any]]) -> list[str]:
    return [row[LINE] for row in rows]


A, B = {"text": "a", "label": 1}, {"text": "b", "label": 0}


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("x.jsonl", json.dumps(A) + "\n\n" + json.dumps(B), ["line 1", "line 3"]),
        ("x.ndjson", json.dumps(A) + "\r\n" + json.dumps(B) + "\r\n", ["line 1", "line 2"]),
        ("x.json", json.dumps([A, B], indent=1), ["item 1", "item 2"]),
        ("x.json", json.dumps({"version": 1, "data": [A, B]}), ["item 1", "item 2"]),
        ("x.json", json.dumps(A) + "\n" + json.dumps(B) + "\n", ["line 1", "line 2"]),
        ("x.JSONL", "\ufeff" + json.dumps(A) + "\n" + json.dumps(B), ["line 1", "line 2"]),
    ],
)
def test_json_in_all_its_forms(rows_of: Read, name: str, content: str, where: list[str]) -> None:
    rows, skipped = rows_of(name, content)
    assert values(rows) == [A, B]
    assert places(rows) == where
    assert skipped == ()


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cells_stay_text(rows_of: Read, name: str, start: str, end: str) -> None:
    lines = ["text,label", "NA,007", "", "null,1e3", " a ,"]
    content = start + end.join(lines)
    rows, _ = rows_of(name, content.replace(",", "\t") if name == "x.tsv" else content)
    expected = [("NA", "007"), ("null", "1e3"), (" a ", "")]
    assert values(rows) == [{"text": text, "label": label} for text, label in expected]
    assert places(rows) == ["line 2", "line 4", "line 5"]


def test_lines_of_text(rows_of: Read) -> None:
    rows, _ = rows_of("x.txt", '\ufeffone\r\n\n  \n two, "three"\u2028four\n')
    assert values(rows) == [{"text": "one"}, {"text": ' two, "three"\u2028four'}]
    assert places(rows) == ["line 1", "line 4"]


def test_quotes_and_line_breaks_in_csv_cells(rows_of: Read) -> None:
    rows, _ = rows_of("x.csv", 'text,label\n"a, ""b""\nc",1\nd "e" f,0\n')
    assert values(rows) == [{"text": 'a, "b"\nc', "label": "1"}, {"text": 'd "e" f', "label": "0"}]
    assert places(rows) == ["line 2", "line 4"]  # where a row begins


def test_a_column_without_a_name_is_numbered(rows_of: Read) -> None:
    rows, _ = rows_of("x.csv", ",text\n0,a\n")  # as pandas writes an index
    assert values(rows) == [{"column 1": "0", "text": "a"}]


def test_stray_quotes_in_tsv_cells_swallow_no_line(rows_of: Read) -> None:
    rows, _ = rows_of("x.tsv", 'text\tlabel\n"a b\t1\nc" d\t0\n"Yes"\t1\n"Yes" or "no"\t0\n')
    assert [row["text"] for row in rows] == ['"a b', 'c" d', '"Yes"', '"Yes" or "no"']
    assert [row["label"] for row in rows] == ["1", "0", "1", "0"]


def test_what_a_csv_writer_quoted_in_a_tsv_is_unquoted(rows_of: Read) -> None:
    assert rows_of("minimal.tsv", 'text\tlabel\n"He said ""hi"""\t1\n')[0][0]["text"] == 'He said "hi"'
    assert values(rows_of("all.tsv", '"text"\t"label"\n"a"\t"1"\n')[0]) == [{"text": "a", "label": "1"}]


def test_a_quoted_line_break_in_a_tsv_is_named(rows_of: Read) -> None:
    with pytest.raises(UserError, match=r"line 2: 1 cells where the header names 2 columns .*quotes cannot hold"):
        rows_of("x.tsv", 'text\tlabel\n"a\nb"\t1\n')


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": 2\n{"a": 3}\n', r"x.jsonl, line 2: malformed JSON \(.* at column 8\)"),
        ("x.jsonl", '{"a": 1}\n[2]\n{"a": 3}\n', r"line 2: a row must be a JSON object, not '\[2\]'"),
        ("x.jsonl", '{"a": 1}\n{"a": "x"}\n{"a": 3}\n', r"line 2: 'a' holds text \('x'\) where earlier rows hold a"),
        ("x.jsonl", '{"a": 1}\n{"a": true}\n{"a": 3}\n', "line 2: 'a' holds true or false"),
        ("x.jsonl", '{"a": [1]}\n{"a": ["x"]}\n{"a": []}\n', r"line 2: 'a\[\]' holds text"),
        ("x.jsonl", '{"a": {"b": 1}}\n{"a": {"b": "x"}}\n{"a": {"b": 2}}\n', r"line 2: 'a\.b' holds text"),
        ("x.jsonl", '{"a": 1}\n{"a": 99999999999999999999}\n{"a": 3}\n', "line 2: 'a' holds a number of more than 64"),
        ("x.jsonl", '{"a": "1"}\n{"a": "\\ud800"}\n{"a": "3"}\n', "line 2: 'a' holds half a character"),
        ("x.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + '}\n{"a": 3}\n', "line 2: unusable JSON"),
        ("x.jsonl", '{"a": "1"}\n{"a": "\0"}\n{"a": "3"}\n', "line 2: malformed JSON"),
        ("x.json", '[{"a": 1}, 2, {"a": 3}]', "x.json, item 2: a row must be a JSON object, not '2'"),
        ("x.csv", "a,b\n1,2\n3\n4,5\n", "line 3: 1 cells where the header names 2 columns"),
        ("x.csv", "a,b\n1,2\n3,4,5\n4,5\n", "line 3: 3 cells where the header names 2 columns"),
        ("x.csv", 'a,b\n1,2\n"x\ny"z,4\n4,5\n', "lines 3 to 4: not a readable row .*a quote is out of place"),
        ("x.csv", 'a,b\n1,2\n4,5\n"x,4\n6,7\n', "lines 4 to 5: not a readable row"),
        ("x.csv", "a,b\n1,2\nx\0y,3\n4,5\n", "line 3: holds a NUL character"),
        ("x.tsv", "a\tb\n1\t2\n3\n4\t5\n", "line 3: 1 cells where the header names 2 columns"),
        ("x.txt", "1\nx\0y\n3\n", "line 2: holds a NUL character"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_and_can_be_skipped(
    rows_of: Read, tmp_path: Path, name: str, content: str, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as raised:
        rows_of(name, content)
    assert str(tmp_path / name) in str(raised.value)
    assert "Mend it, or set data.on_bad_row=skip" in str(raised.value)
    assert not [file for file in (tmp_path / "cache").rglob("*.*") if file.suffix != ".lock"]
    rows, skipped = rows_of(name, content, skip_bad=True)
    assert len(rows) == 2
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{name}, ")


@pytest.mark.parametrize("content", ['{"a": 1', '[{"a": 1}\n{"a": 2}]', '[{"a": 1}]\n]', "", "nonsense"])
def test_a_malformed_json_document_names_its_line(rows_of: Read, content: str) -> None:
    with pytest.raises(UserError, match=r"line \d: malformed JSON"):
        rows_of("x.json", content)


def test_a_json_document_with_an_endless_number(rows_of: Read) -> None:
    with pytest.raises(UserError, match=r"unusable JSON"):
        rows_of("x.json", "[" + "9" * 5000 + "]")


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json", "x.txt"])
def test_text_that_is_not_utf8_names_the_line(rows_of: Read, name: str) -> None:
    good = {"x.json": b'[{"a": "x"}]', "x.jsonl": b'{"a": "x"}'}.get(name, b"x")
    content = b"\n".join([good] * 50_000 + [b"caf\xe9"])  # far beyond the first block that is decoded
    with pytest.raises(UserError, match=r"is not UTF-8 text \(line 50001, byte 4\): save it as UTF-8"):
        rows_of(name, content)


def test_utf16_is_named(rows_of: Read) -> None:
    with pytest.raises(UserError, match=r"is not UTF-8 text \(line 1, byte 1\)"):
        rows_of("x.csv", "text,label\na,1\n".encode("utf-16"))


@pytest.mark.parametrize(("name", "title"), [("x.csv", "a,b,a"), ("x.tsv", "a\tb\ta")])
def test_a_header_must_name_columns_apart(rows_of: Read, name: str, title: str) -> None:
    with pytest.raises(UserError, match=r"line 1: the header needs a different name for each column, not a, b, a"):
        rows_of(name, f"{title}\n1\n", skip_bad=True)


def test_an_unreadable_header(rows_of: Read) -> None:
    with pytest.raises(UserError, match=r"line 1: not a readable header"):
        rows_of("x.csv", '"a"b,c\n1,2\n')


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.txt"])
def test_an_empty_file_has_no_rows(rows_of: Read, name: str) -> None:
    assert rows_of(name, "") == ([], ())


def test_types_are_found_over_all_rows(rows_of: Read) -> None:
    lines = ['{"a": 1, "b": null, "c": {"x": 1}, "d": []}'] * (CHUNK + 1)
    lines += ['{"a": 0.5, "b": "late", "c": {"y": "z"}, "d": ["l"], "e": true}']
    rows, _ = rows_of("x.jsonl", "\n".join(lines))
    assert len(rows) == CHUNK + 2
    assert values(rows)[0] == {"a": 1.0, "b": None, "c": {"x": 1, "y": None}, "d": [], "e": None}
    assert values(rows)[-1] == {"a": 0.5, "b": "late", "c": {"x": None, "y": "z"}, "d": ["l"], "e": True}
    assert places(rows)[-1] == f"line {CHUNK + 2}"


def test_nulls_and_missing_keys_are_no_conflict(rows_of: Read) -> None:
    rows, _ = rows_of("x.jsonl", '{"a": null}\n{"b": 1}\n{"a": "x", "b": null}\n')
    assert values(rows) == [{"a": None, "b": None}, {"a": None, "b": 1}, {"a": "x", "b": None}]


def test_a_file_is_converted_once_and_again_when_it_changed(tmp_path: Path) -> None:
    file, cache = tmp_path / "x.txt", tmp_path / "cache"
    file.write_text("a\n")
    first, _ = convert(file, cache, skip_bad=False)
    made = first.stat().st_mtime_ns
    assert convert(file, cache, skip_bad=False)[0] == first
    assert first.stat().st_mtime_ns == made
    file.write_text("b\n")
    assert convert(file, cache, skip_bad=False)[0] != first


@pytest.mark.parametrize("damage", ["truncated", "emptied", "notes lost", "notes truncated"])
def test_a_damaged_conversion_is_made_again(rows_of: Read, tmp_path: Path, damage: str) -> None:
    expected = rows_of("x.txt", "a\nb\n\0\n", skip_bad=True)
    (arrow,), (notes,) = (tmp_path / "cache").rglob("*.arrow"), (tmp_path / "cache").rglob("*.json")
    if damage == "notes lost":
        notes.unlink()
    else:
        file = notes if damage == "notes truncated" else arrow
        file.write_bytes(file.read_bytes()[: 0 if damage == "emptied" else file.stat().st_size // 2])
    path, skipped = convert(tmp_path / "x.txt", tmp_path / "cache", skip_bad=True)
    assert path == arrow
    assert (Dataset.from_file(str(path)).to_list(), skipped) == expected
    assert len(skipped) == 1


def test_what_a_killed_writer_left_is_written_over(rows_of: Read, tmp_path: Path) -> None:
    expected, _ = rows_of("x.txt", "a\nb\n")
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    arrow.unlink()
    arrow.with_suffix(".writing").write_bytes(b"half" * 10_000)
    assert convert(tmp_path / "x.txt", tmp_path / "cache", skip_bad=False)[0] == arrow
    assert Dataset.from_file(str(arrow)).to_list() == expected
    assert not list(tmp_path.rglob("*.writing"))


def test_processes_that_convert_at_once_share_one_file(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text,label\n" + "a,1\n" * 30_000)
    program = (
        "import sys; from pathlib import Path; from data.text_files import convert;"
        "path, _ = convert(Path(sys.argv[1]), Path(sys.argv[2]), skip_bad=False); print(path, path.stat().st_mtime_ns)"
    )
    command = [sys.executable, "-c", program, str(file), str(tmp_path / "cache")]
    root = Path(__file__).parents[2]
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate()[0] for process in running}
    assert len(found) == 1
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
    assert not list((tmp_path / "cache").rglob("*.writing"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\n")
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    with pytest.raises(UserError, match=r"data\.cache: cannot write to .*Choose another folder"):
        convert(tmp_path / "x.txt", tmp_path / "cache", skip_bad=False)
