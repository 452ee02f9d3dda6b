"""Shards: of every kind and at every address the rows of memory-mapped data, from any row on; broken ones are named."""

from __future__ import annotations

import gzip
import io
import json
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data import pulse, shard_files
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


@pytest.mark.parametrize("group", [1_000, 30_000])
def test_a_parquet_file_is_not_read_ahead(tmp_path: Path, group: int) -> None:
    """Many small row groups or one large one: a reader holds its buffer of each column, not the file."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [bytes(row).hex() for row in np.random.default_rng(0).integers(0, 256, (30_000, 200), dtype=np.uint8)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts, "label": range(30_000)}), file, row_group_size=group, use_dictionary=False)
    size, taken = file.stat().st_size, []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            taken.append(super().read(size))
            return taken[-1]

    before = pa.total_allocated_bytes()
    rows = shard_files.parquet_rows(Counted(file.read_bytes()), 0, ["text", "label"], "here")
    assert [next(rows)[1]["text"] for _ in range(1_000)] == texts[:1_000]  # type: ignore[index]
    assert size > 6 * shard_files.BUFFER
    assert sum(map(len, taken)) < 2.5 * shard_files.BUFFER
    assert pa.total_allocated_bytes() - before < 6 * shard_files.BUFFER
    assert [row["text"] for _, row in rows] == texts[1_000:]  # type: ignore[index]


def test_a_parquet_file_at_an_address_is_fetched_once(tmp_path: Path) -> None:
    """Two large columns far apart from each other, read by turns: no byte between them comes along."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [bytes(row).hex() for row in np.random.default_rng(0).integers(0, 256, (20_000, 200), dtype=np.uint8)]
    table = pa.table({"text": texts, "between": texts, "label": texts[::-1]})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    content, sent = (tmp_path / "a.parquet").read_bytes(), []

    class Store(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self) -> None:
            first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            sent.append(content[first : last + 1])
            self.send_response(206)
            self.send_header("Content-Length", str(len(sent[-1])))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            self.wfile.write(sent[-1])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        shard = one(f"http://127.0.0.1:{server.server_port}/a.parquet")
        assert [row["label"] for _, row in shard.rows(0, ["text", "label"])] == texts[::-1]  # type: ignore[index]
    finally:
        server.shutdown()
        server.server_close()
    assert sum(map(len, sent)) < 0.7 * len(content), "two columns of three, and the footer"


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


def test_a_server_that_is_away_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first row, which fsspec tells as a file that is not there, and on the way."""
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        closed = f"http://127.0.0.1:{server.server_address[1]}/a.jsonl"
    with pytest.raises(Unavailable, match=r"a\.jsonl cannot be reached: .*127\.0\.0\.1"):
        one(closed)
    monkeypatch.setattr(shards_module, "WAITS", ())
    shard = shards_module.FileShard(closed, "train", 10)
    with pytest.raises(Unavailable, match="cannot be read on from row 0"):
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
