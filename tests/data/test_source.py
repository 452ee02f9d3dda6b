"""Where rows come from, and what is said when they do not come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pydantic import ValidationError

from data.errors import Unavailable, UserError
from data.source import DataConfig, Rows

Read = Callable[..., list[Rows]]

TEXTS = ["a", "b", "c"]


def texts(opened: list[Rows]) -> list[str]:
    return [text for rows in opened for text in rows.dataset["text"]]


def labelled(count: int = 3) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    return Dataset.from_dict({"text": TEXTS[:count], "label": [0, 1, 0][:count]}, features=features)


def write(folder: Path, name: str) -> Path:
    """Write three rows in the format that the name ends with."""
    file = folder / name
    table = labelled().data.table
    lines = "".join(json.dumps({"text": text, "label": 0}) + "\n" for text in TEXTS)
    {
        ".csv": lambda: file.write_text("text,label\na,0\nb,1\nc,0\n"),
        ".tsv": lambda: file.write_text("text\tlabel\na\t0\nb\t1\nc\t0\n"),
        ".json": lambda: file.write_text(f"[{','.join(lines.splitlines())}]"),
        ".jsonl": lambda: file.write_text(lines),
        ".txt": lambda: file.write_text("a\nb\nc\n"),
        ".parquet": lambda: pa.parquet.write_table(table, file),
        ".arrow": lambda: pa.ipc.new_stream(str(file), table.schema).write_table(table),
    }[file.suffix.lower()]()
    return file


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.json", "x.jsonl", "x.txt", "x.parquet", "x.arrow", "X.CSV"])
def test_local_files(read: Read, tmp_path: Path, name: str) -> None:
    (rows,) = read(write(tmp_path, name))
    assert texts([rows]) == TEXTS
    assert rows.name == name
    assert rows.where(1) == {
        "x.json": "x.json, item 2", "x.jsonl": "x.jsonl, line 2", "x.txt": "x.txt, line 2",
        "x.parquet": "x.parquet, row 1 (from 0)", "x.arrow": "x.arrow, row 1 (from 0)",
    }.get(name, f"{name}, line 3")  # fmt: skip


def test_arrow_files_in_the_file_format(read: Read, tmp_path: Path) -> None:
    pyarrow.feather.write_feather(pa.table({"text": TEXTS}), tmp_path / "x.arrow", compression="uncompressed")
    assert texts(read(tmp_path / "x.arrow")) == TEXTS


def test_names_of_labels_are_kept_from_parquet_and_arrow(read: Read, tmp_path: Path) -> None:
    labelled().to_parquet(tmp_path / "x.parquet")
    for name in ("x.parquet", "y.arrow"):
        (rows,) = read(tmp_path / name if name[0] == "x" else write(tmp_path, name))
        assert rows.dataset.features["label"].names == ["no", "yes"]


def test_globs_are_read_in_the_order_of_names(read: Read, tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    (tmp_path / "folder.txt").mkdir()
    assert texts(read(tmp_path / "*.txt")) == ["a", "b"]
    assert texts(read(tmp_path / "**" / "*.txt")) == ["a", "b", "deep/c"]
    assert [rows.name for rows in read(tmp_path / "[ab].txt")] == ["a.txt", "b.txt"]


def test_a_file_whose_name_looks_like_a_pattern(read: Read, tmp_path: Path) -> None:
    assert texts(read(write(tmp_path, "rows[1].csv"))) == TEXTS


def test_empty_files_among_others_do_not_matter(read: Read, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("text,label\n")
    (tmp_path / "c.csv").write_text("text,label\nx\n")
    (tmp_path / "d.csv").write_text("text,label\ny,1\ny\n")
    (rows,) = read(tmp_path / "*.csv", skip_bad=True)
    assert texts([rows]) == ["y"]
    assert [note.split(":")[0] for note in rows.skipped] == ["c.csv, line 2", "d.csv, line 3"]


@pytest.mark.parametrize("change", ["none", "select", "shuffle", "format", "shards"])
def test_saved_data_sets(read: Read, tmp_path: Path, change: str) -> None:
    saved = {
        "none": lambda rows: rows,
        "select": lambda rows: rows.select([2, 0]),
        "shuffle": lambda rows: rows.shuffle(seed=0),
        "format": lambda rows: rows.with_format("numpy"),
        "shards": lambda rows: rows,
    }[change](labelled())
    expected = list(saved["text"])
    saved.save_to_disk(tmp_path / "saved", num_shards=2 if change == "shards" else 1)
    (rows,) = read(tmp_path / "saved")
    assert texts([rows]) == expected
    assert rows.dataset.features["label"].names == ["no", "yes"]
    assert type(rows.dataset[0]["label"]) is int
    assert rows.dataset.cache_files  # memory-mapped


def test_saved_splits(read: Read, tmp_path: Path) -> None:
    splits = {"train": labelled(), "validation": labelled().select([1]), "extra": labelled().select([2])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert texts(read(tmp_path / "saved")) == TEXTS
    assert texts(read(tmp_path / "saved", role="validation")) == ["b"]
    assert texts(read(tmp_path / "saved", role="validation", split="extra")) == ["c"]
    with pytest.raises(UserError, match=r"has no split 'test'; it has train, validation, extra") as raised:
        read(tmp_path / "saved", role="test")
    assert "data.test.split" in str(raised.value)


def test_files_of_packages(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carrier_of_texts").mkdir()
    (tmp_path / "carrier_of_texts" / "__init__.py").write_text("raise RuntimeError('imported')")
    write(tmp_path / "carrier_of_texts", "x.jsonl")
    monkeypatch.syspath_prepend(tmp_path)
    assert texts(read("package:carrier_of_texts/x.jsonl")) == TEXTS
    assert texts(read("package:carrier_of_texts/*.jsonl")) == TEXTS
    with pytest.raises(UserError, match=r"package:carrier_of_texts/y.jsonl"):
        read("package:carrier_of_texts/y.jsonl")


def test_a_hub_that_is_away_is_nothing_to_mend(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'some/rows' on the Hub (ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(Unavailable, match=r"'some/rows' is no local file .* failed: Couldn't reach"):
        read("some/rows")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.csv", "data.train: there is no file 'missing.csv' .looked from "),
        ("*.ods", "data.train: no file matches '.*ods' .looked from "),
        ("x.xlsx", "data.train: cannot read 'x.xlsx': known endings are .csv, .tsv, .json, .jsonl"),
        ("folder", "folder' is no saved data set .* give a glob such as folder/.*parquet"),
        ("empty.csv", "data.train: empty.csv holds no rows$"),
        (
            "no/such_name",
            "'no/such_name' is no local file .*, and loading it from the Hub failed: .*check name and net",
        ),
        ("broken.parquet", "data.train: broken.parquet is not a readable parquet file: "),
        ("cut.parquet", "data.train: cut.parquet is not a readable parquet file: "),
        ("broken.arrow", "data.train: broken.arrow is not a readable arrow file: "),
        ("zero.arrow", "data.train: zero.arrow is not a readable arrow file: "),
        ("zero.parquet", "data.train: zero.parquet is not a readable parquet file: "),
    ],
)
def test_what_cannot_be_read(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.xlsx").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.csv").write_text("text,label\n")
    for name in ("broken.parquet", "broken.arrow"):
        (tmp_path / name).write_bytes(b"nonsense")
    for name in ("zero.parquet", "zero.arrow"):
        (tmp_path / name).write_bytes(b"")
    whole = write(tmp_path, "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.parquet").unlink()
    with pytest.raises(UserError, match=message):
        read(path)
    assert not list((tmp_path / "cache").rglob("*.writing"))
    assert not list((tmp_path / "cache" / "parquet").rglob("*.arrow"))


def test_damage_inside_a_parquet_file(read: Read, tmp_path: Path) -> None:
    content = bytearray(write(tmp_path, "x.parquet").read_bytes())
    content[4:60] = b"\xff" * 56  # the first page; the footer still reads well
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"x.parquet is not a readable parquet file: (?!An error occurred)"):
        read(tmp_path / "x.parquet")


def test_a_file_of_bad_rows_only_names_the_first(read: Read, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{\n[\n")
    with pytest.raises(UserError, match=r"holds no usable rows; 2 were skipped, the first: x\.jsonl, line 1: malf"):
        read(tmp_path / "x.jsonl", skip_bad=True)


@pytest.mark.parametrize("key", ["name", "split", "revision"])
def test_keys_of_the_hub_are_refused_on_local_paths(read: Read, tmp_path: Path, key: str) -> None:
    labelled().save_to_disk(tmp_path / "saved")
    for path in (write(tmp_path, "x.csv"), tmp_path / "saved"):
        with pytest.raises(UserError, match=f"data.train: {key} cannot take effect on the local path"):
            read(path, **{key: "x"})


@pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.arrow"])
def test_a_changed_file_is_read_again(read: Read, tmp_path: Path, name: str) -> None:
    first = read(write(tmp_path, name))
    assert read(tmp_path / name)[0].dataset._fingerprint == first[0].dataset._fingerprint
    (tmp_path / name).unlink()
    if name == "x.csv":
        (tmp_path / name).write_text("text,label\nnew,0\n")
    else:
        table = pa.table({"text": ["new"], "label": [0]})
        writers = {".parquet": pa.parquet.ParquetWriter, ".arrow": pa.ipc.new_stream}
        with writers[Path(name).suffix](str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    second = read(tmp_path / name)
    assert texts(second) == ["new"]
    assert second[0].dataset._fingerprint != first[0].dataset._fingerprint


def test_sources_are_a_path_a_mapping_or_a_list_of_them() -> None:
    assert [source.path for source in DataConfig(train="a.csv").train] == ["a.csv"]
    mixed = DataConfig(train=["a.csv", {"path": "b.csv", "weight": 2}]).train
    assert [(source.path, source.weight) for source in mixed] == [("a.csv", None), ("b.csv", 2.0)]
    assert DataConfig(train={"path": "org/name", "split": "x"}).train[0].split == "x"
    wrong: list[object] = [[], {"path": "a", "weight": 0}, {"pth": "a"}, {"path": "a", "weight": -1}]
    for value in wrong:
        with pytest.raises(ValidationError):
            DataConfig(train=value)
