"""Rows that cost next to nothing to make, and their tokens where a run looks for them: in its cache, as it writes it.

The rows themselves are never read: what would be made of them is there already, and found by what they are. The lengths
are those of the first thousand rows again and again, so that the sizes have the same mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.workloads import LENGTHS, RATE, minilm

BATCH = 32
WORDS = 30_000
BLOCK = 1_000_000  # rows drawn at once
AGAIN = 1_000  # rows after which the lengths come again: as many as the smallest size has
LABELS = ("bad", "good")


def folder_of(folder: Path, rows: int) -> Path:
    """Return where everything of a training set of so many rows is."""
    return folder / f"{rows}"


def config(folder: Path, rows: int, output: Path, updates: int) -> dict[str, Any]:
    """Return the config of a run over `rows` rows."""
    own = folder_of(folder, rows)
    return {
        "output": str(output),
        "seed": 0,
        "batch_size": BATCH,
        "updates": updates,
        "precision": "fp32",
        "task": {"name": "text_classification", "labels": list(LABELS)},
        "data": {"train": str(own / "rows.arrow"), "cache": str(own / "cache"), "max_length": 128},
        "model": {"path": str(minilm())},
        "optim": {"lr": RATE, "warmup": 0, "weight_decay": 0.01},
        "checkpoint": {"every": updates},
    }


def lay(folder: Path, rows: int) -> Path:
    """Write the rows and their tokens, unless they are there; return the file of the tokens."""
    from train.config import validate

    own = folder_of(folder, rows)
    if not (own / "rows.arrow").exists():
        own.mkdir(parents=True, exist_ok=True)
        _write_rows(own / "rows.arrow", rows)
    with _drawn():
        found = opened(validate(config(folder, rows, own / "run", 1), "growth"))
    (file,) = (Path(each["filename"]) for each in found.dataset.cache_files)  # beside it may be those of older code
    return file


def opened(settings: Any) -> Any:
    """Return the encoded rows of a config, opened as a run opens them; the model is left out."""
    from data.encode import encode_sources
    from data.source import open_rows
    from train import plugins, tasks
    from train.hardware import free_memory
    from train.ingredients import cache_folder
    from train.tokenizer import load_tokenizer

    cache = cache_folder(settings)
    sources = [open_rows(each, "train", skip_bad=False, cache=cache, token=None) for each in settings.data.train]
    rows = [part for source in sources for part in source]
    tokenizer, _ = load_tokenizer(settings.model, rows, cache, None, settings.task.text_columns)
    task = plugins.load(tasks, "task", settings.task.name).task.prepare(settings.task, rows, tokenizer)
    found = encode_sources(sources, task, tokenizer, settings.data.max_length, skip_bad=False, cache=cache)
    return replace(found, alone=found.size > free_memory())


def _write_rows(file: Path, rows: int) -> None:
    import pyarrow as pa

    writing, writer = file.with_suffix(".writing"), None
    with pa.OSFile(str(writing), "wb") as sink:
        for first in range(0, rows, BLOCK):
            count = min(BLOCK, rows - first)
            labels = pa.array(np.zeros(count, dtype=np.int8))
            table = pa.table({"text": pa.array(["x"] * count), "label": labels})
            writer = writer or pa.ipc.new_stream(sink, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
    writing.rename(file)


@contextmanager
def _drawn() -> Iterator[None]:
    """Let tokens be drawn, with the lengths of SST-2, where a run would make them of its rows."""
    from data import encode

    real = encode._encoded
    encode._encoded = _draw
    try:
        yield
    finally:
        encode._encoded = real


def _draw(rows: Any, work: Any, start: int, notes: dict[str, Any]) -> Iterator[Any]:
    """Yield tables as `data.encode` makes them."""
    import pyarrow as pa

    from data.encode import CHUNK

    lengths = np.repeat(*np.loadtxt(LENGTHS / "sst2.txt", dtype=np.int64).T)
    generator, whole = np.random.default_rng(0), len(rows.dataset)
    again = generator.choice(lengths, AGAIN).astype(np.int32)
    for first in range(0, whole, BLOCK):
        some = np.resize(again, min(BLOCK, whole - first))
        offsets = np.concatenate([[0], np.cumsum(some)]).astype(np.int32)
        tokens = generator.integers(1, WORDS, offsets[-1], dtype=np.int32)
        table = pa.table(
            {
                "row": np.arange(first, first + len(some)),
                "input_ids": pa.ListArray.from_arrays(offsets, tokens),
                "label": generator.integers(0, 2, len(some)).astype(np.int32),
                "length": some,
                "targets": np.ones(len(some), dtype=np.int32),
            }
        )
        notes["examples"] += len(some)
        yield from (table.slice(place, CHUNK) for place in range(0, len(some), CHUNK))
