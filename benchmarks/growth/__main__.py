"""What a hundred million rows cost against a thousand: `python -m benchmarks.growth [--rounds 1] [--folder FOLDER]`.

Rows of SST-2's lengths, their tokens laid where a run of MiniLM finds them in its cache. Each figure is of a process of
its own. The sizes take turns, up in one round and down in the next: whole runs up to their last update, and the input
alone. FOLDER keeps rows and figures: the same command again adds rounds. With `--processes` on 10^6 rows instead: one
process with one thread, two with one thread each (by torchrun), one with two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.compare.machine import ROOT, where
from benchmarks.growth import in_turn, rows

Told = dict[str, list[dict[str, float]]]
"""The figures of each round, by what was measured."""

WAYS = {"1 process, 1 thread": (1, 1), "2 processes, 1 thread each": (2, 1), "1 process, 2 threads": (1, 2)}
TRAINING = (
    ("tokens", "tokens/s", 1), ("tokens_cpu", "tokens/s of processor time", 1), ("samples", "samples/s", 1),
    ("input_share", "input's part", 1), ("first_update", "first update, s", 1), ("own", "own memory, MB", 1),
    ("mapped", "mapped, MB", 1),
)  # fmt: skip
INPUT = (
    ("samples", "samples/s", 1), ("tokens", "tokens/s", 1), ("tokens_cpu", "tokens/s of processor time", 1),
    ("open_start", "opened, ms", 1e3), ("first_start", "first batch, ms", 1e3),
    ("first_late", "first batch, late in the epoch, ms", 1e3), ("own", "own memory, MB", 1),
    ("mapped", "mapped, MB", 1),
)  # fmt: skip


def main() -> None:
    """Measure, and print the table of all rounds that FOLDER knows."""
    options = _options()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with ExitStack() as held:
        folder = options.folder or Path(held.enter_context(tempfile.TemporaryDirectory()))
        sizes = [10**power for power in range(3, options.most + 1)] if not options.processes else [10**6]
        for size in sizes:
            rows.lay(folder, size)
        if options.in_turn:
            print("\n".join([where(), "", *in_turn.measure(folder, sizes, options.in_turn)]), flush=True)
            return
        file = folder / ("processes.json" if options.processes else "figures.json")
        told: Told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for _ in range(options.rounds):
            if options.processes:
                _round_of_processes(folder, told, options.updates)
            else:
                counts = {"training": options.updates, "input": options.batches}
                _round(folder, sizes, told, {options.only: counts[options.only]} if options.only else counts)
            file.write_text(json.dumps(told), encoding="utf-8")
        lines = _tables(told, sizes, options.processes)
        print("\n".join([where(), "", *lines]), flush=True)
        if options.results:
            options.results.write_text("\n".join([where(), "", *lines, ""]), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=8, help="10 to this power is the largest number of rows")
    parser.add_argument("--rounds", type=int, default=1, help="to add; 0: print what FOLDER knows")
    parser.add_argument("--updates", type=int, default=25, help="of a run, of which the first 5 are not counted")
    parser.add_argument("--batches", type=int, default=1_000, help="of the input alone")
    parser.add_argument("--only", choices=("training", "input"), help="measure this alone")
    parser.add_argument("--processes", action="store_true", help="one process against two")
    parser.add_argument("--in-turn", type=int, metavar="N", help="updates of each size, in one run")
    parser.add_argument("--folder", type=Path, help="rows (8 GB) and figures; else they are thrown away")
    parser.add_argument("--results", type=Path, help="write the table there, too")
    return parser.parse_args()


def _round(folder: Path, sizes: Sequence[int], told: Told, counts: Mapping[str, int]) -> None:
    """Measure each size once, with runs and with the input alone; up or down, by what there is of it."""
    for kind, count in counts.items():
        done = len(told.get(f"{kind} {sizes[0]}", []))
        for size in sizes if done % 2 == 0 else reversed(sizes):
            found = _measure([kind, str(folder), str(size), str(count)], 1, 1)
            told.setdefault(f"{kind} {size}", []).append(found)
            print(f"{kind}, 10^{len(str(size)) - 1} rows: {found['tokens']:,.0f} tokens/s", flush=True)


def _round_of_processes(folder: Path, told: Told, updates: int) -> None:
    done = len(next(iter(told.values()), []))
    for name in WAYS if done % 2 == 0 else reversed(WAYS):
        found = _measure(["training", str(folder), str(10**6), str(updates)], *WAYS[name])
        told.setdefault(name, []).append(found)
        print(f"{name}: {found['tokens']:,.0f} tokens/s", flush=True)


def _measure(arguments: list[str], processes: int, threads: int) -> dict[str, float]:
    """Return what a measurement in a process of its own, or in several, has told."""
    command = [sys.executable, "-m", "benchmarks.growth.worker", *arguments]
    if processes > 1:
        started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *started, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("FIGURES "):
            found: dict[str, float] = json.loads(line.removeprefix("FIGURES "))
            return found
    raise SystemExit(f"{' '.join(arguments)} told nothing:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _tables(told: Told, sizes: Sequence[int], processes: bool) -> list[str]:
    """Return the lines of the tables, in Markdown: medians of all rounds."""
    if processes:
        chosen = [column for column in TRAINING if column[0] != "tokens_cpu"]
        return _table("training", {name: told.get(name, []) for name in WAYS}, chosen)
    lines: list[str] = []
    for kind, columns in (("training", TRAINING), ("input", INPUT)):
        each = {f"10^{len(str(size)) - 1}": told.get(f"{kind} {size}", []) for size in sizes}
        lines += [*_table(kind, each, columns), ""]
    return lines


def _table(
    title: str, told: Mapping[str, list[dict[str, float]]], columns: Sequence[tuple[str, str, float]]
) -> list[str]:
    """Return a table, each row the medians of what was told; and how far the highest is above the lowest."""
    found = {name: [float(np.median([each[key] for each in each_round])) * scale for key, _, scale in columns]
             for name, each_round in told.items() if each_round}  # fmt: skip
    if not found:
        return []
    rounds = max(map(len, told.values()))
    lines = [f"| {title}, {rounds} rounds | {' | '.join(name for _, name, _ in columns)} |",
             "|---" * (len(columns) + 1) + "|"]  # fmt: skip
    lines += [f"| {name} | {' | '.join(map(_shown, values))} |" for name, values in found.items()]
    spread = [max(values) / min(values) - 1 for values in zip(*found.values(), strict=True)]
    return [*lines, f"| highest / lowest - 1 | {' | '.join(f'{each:.1%}' for each in spread)} |"]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
