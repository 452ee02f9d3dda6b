"""Shards: of every kind and at every address the rows of memory-mapped data, from any row on; broken ones are named."""

from __future__ import annotations

import gzip
import json
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data import pulse
from data import shards as shards_module
from data.errors import Unavailable, UserError
from data.find_shards import find, spread
from data.shards import Shard
from data.source import Source

ROWS = [{"text": f"t{row}", "label": row % 3} for row in range(25)]


def write(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "a.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS))
    (folder / "a.json").write_text(json.dumps(ROWS))
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=6)


def rows(shard: Shard, start: int = 0) -> list[Any]:
    return [{**row, "label": int(row["label"])} for _, row in shard.rows(start, ["text", "label"])]  # type: ignore[dict-item]


def one(path: str, **settings: Any) -> Shard:
    (found,) = find(Source(path=path, **settings), "train", None)
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.json", "a.parquet", "a.arrow"])
def test_rows_from_any_row_on(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    for start in (0, 1, 6, 7, 24, 25):
        assert rows(one(str(tmp_path / name)), start) == ROWS[start:]


def test_other_addresses(tmp_path: Path) -> None:
    """http, a file system of fsspec with a glob, and a folder as `datasets` streams it."""
    import fsspec

    write(tmp_path)
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        for name in ("a.jsonl", "a.jsonl.gz"):
            assert rows(one(f"{address}/{name}"), 3) == ROWS[3:]
        with pytest.raises(UserError, match="there is no"):
            one(f"{address}/b.jsonl")
    finally:
        server.shutdown()
        server.server_close()
    memory = fsspec.filesystem("memory")
    for name in ("a.parquet", "a.csv"):
        memory.pipe(f"/shards/{name}", (tmp_path / name).read_bytes())
    for shard in find(Source(path="memory://shards/*"), "train", None):
        assert rows(shard, 8) == ROWS[8:]
    (tmp_path / "hub").mkdir()
    (tmp_path / "a.parquet").rename(tmp_path / "hub" / "train.parquet")
    assert rows(one(str(tmp_path / "hub"), split="train"), 8) == ROWS[8:]


def test_broken_shards_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "b.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-40])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    for name in ("b.jsonl.gz", "b.parquet"):
        with pytest.raises(UserError, match=f"{name}: cannot be read on from row"):
            rows(one(str(tmp_path / name)))
    shard = one(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="has 3 bytes now"):
        rows(shard)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="there is no shard"):
        rows(shard)
    for name, problem in (("a.*", "cannot read"), ("c.csv", "there is no file"), ("samples:reviews", "is small")):
        (tmp_path / "a.zip").touch()
        with pytest.raises(UserError, match=problem):
            find(Source(path=name if ":" in name else str(tmp_path / name)), "train", None)


def test_the_network_gets_more_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that breaks off goes on at the row it had come to."""
    import fsspec

    write(tmp_path)
    fsspec.filesystem("memory").pipe("/flaky/a.jsonl", (tmp_path / "a.jsonl").read_bytes())
    monkeypatch.setattr(shards_module, "WAITS", (0, 0))
    shard = one("memory://flaky/a.jsonl")
    real, broken = shards_module.shard_files.text_rows, iter(range(3))

    def flaky(reader: Any, file: Any, start: int) -> Any:
        for number, placed in enumerate(real(reader, file, start)):
            if number == 5 and next(broken, None) is not None:
                raise ConnectionResetError("reset")
            yield placed

    monkeypatch.setattr(shards_module.shard_files, "text_rows", flaky)
    assert rows(shard) == ROWS


def test_a_data_set_of_the_hub_gets_more_tries_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets` streams it; after the last try it is told that no one need mend anything."""
    (tmp_path / "hub").mkdir()
    write(tmp_path)
    (tmp_path / "a.parquet").rename(tmp_path / "hub" / "train.parquet")
    shard = replace(one(str(tmp_path / "hub"), split="train"), path="somebody/rows")  # type: ignore[type-var]
    monkeypatch.setattr(shards_module, "WAITS", (0, 0))
    real = shards_module.shard_files.hub_rows
    broken = [True, True]

    def flaky(dataset: Any, start: int, *rest: Any) -> Any:
        for number, placed in enumerate(real(dataset, start, *rest)):
            if number == 5 and broken and broken.pop():
                raise ConnectionResetError("reset")
            yield placed

    monkeypatch.setattr(shards_module.shard_files, "hub_rows", flaky)
    assert rows(shard) == ROWS
    broken.append(True)
    monkeypatch.setattr(shards_module, "WAITS", ())
    with pytest.raises(Unavailable, match=r"somebody/rows, shard 0: cannot be read on from row 5 .*reset"):
        rows(shard)


def test_what_is_replaced_while_a_run_reads_is_seen(tmp_path: Path) -> None:
    """By its tag, though it is as long as before, whenever the shard is opened: not only when a run goes on."""
    import fsspec

    write(tmp_path)
    memory, tags = fsspec.filesystem("memory"), {"ETag": "1"}
    memory.pipe("/tagged/a.jsonl", (tmp_path / "a.jsonl").read_bytes())
    real = type(memory).info
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(memory), "info", lambda self, path, **rest: {**real(self, path, **rest), **tags})
        shard = one("memory://tagged/a.jsonl")
        assert rows(shard) == ROWS
        tags["ETag"] = "2"
        with pytest.raises(UserError, match="was replaced: its store names another version"):
            rows(shard)


@pytest.mark.parametrize("name", ["a.jsonl", "a.arrow", "hub"])
def test_reading_over_rows_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Else who waits for a run that goes on in the middle of a large shard would take it for dead."""
    write(tmp_path)
    (tmp_path / "hub").mkdir()
    (tmp_path / "a.parquet").rename(tmp_path / "hub" / "train.parquet")
    shard = one(str(tmp_path / name), **({"split": "train"} if name == "hub" else {}))
    monkeypatch.setattr(shards_module.shard_files, "READ", 5)
    beats: list[bool | None] = []
    pulse.listen(beats.append)
    try:
        assert rows(shard) == ROWS and not beats
        assert rows(shard, 21) == ROWS[21:]
    finally:
        pulse.listen()
    assert len(beats) >= 3


def test_names_with_a_range() -> None:
    assert spread("s3://x/{08..11}.csv") == [f"s3://x/{number:02}.csv" for number in (8, 9, 10, 11)]
    assert spread("x.csv") == ["x.csv"]
