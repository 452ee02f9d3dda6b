"""Ours and its peers on the same rows, interleaved, each time in a fresh process: `python -m benchmarks.compare`.

Peers take turns in every round, in alternating order, so that a busy machine is busy for all. Real tokens are counted,
end to end: data, forward, backward, clipping, optimizer, logging. What comes before the first counted updates is told
as the time to the first update, with warm caches. A peer that fails is left out of later rounds, its last lines are
printed, and the exit code is 1. Begins only on a machine that is idle, and tells what others took of its processors
while each peer learned. Writes the table, a plot (where matplotlib is installed) and what every round told to
benchmarks/results/, anew after each measurement.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.compare import plot, work
from benchmarks.compare.figures import Rounds, speed, table
from benchmarks.compare.machine import ROOT, Others, busy, where
from benchmarks.compare.options import HINT, can_be_measured, chosen, parse
from benchmarks.compare.peers import CACHE_OF, hand_over
from benchmarks.compare.workloads import Workload, model_folder, positions, write_rows

LAST_LINES = 15


@dataclasses.dataclass(frozen=True)
class Clock:
    """When to begin nothing more, and how long a peer may take."""

    end: float
    limit: float

    def left(self) -> float:
        """Return the seconds that a peer may take that begins now; 0 or less: none may."""
        return min(self.limit, self.end - time.monotonic())


def main() -> None:
    options = parse(__doc__ or "")
    workloads = chosen(options)
    if not options.busy and any(each.suite != "toy" for each in workloads) and (why := busy()):
        raise SystemExit(f"nothing is measured: {why}. Wait until it is idle, or measure all the same with `--busy`.")
    os.environ["HF_HUB_OFFLINE"] = "1"
    clock = Clock(time.monotonic() + options.seconds, options.limit)
    failed = []
    with ExitStack() as held:
        folder = options.folder or Path(held.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        print(where(), flush=True)
        for each in workloads:
            peers, lacking = can_be_measured(each, options.peers)
            told = compare(each, peers, lacking, options.rounds, clock, folder, options.results)
            failed += [f"{peer} ({each.name})" for peer, tellings in told.items() if None in tellings]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def compare(
    each: Workload, peers: list[str], lacking: list[str], rounds: int, clock: Clock, folder: Path, results: Path
) -> Rounds:
    """Measure one workload; print and write its table. Return what each peer told, of those that are lacking None."""
    work_per_token = _prepare(each, folder)
    told: dict[str, list[dict[str, Any] | None]] = {peer: [] for peer in peers} | {peer: [None] for peer in lacking}
    lines = _write(each, told, work_per_token, results)
    _warm(each, peers, clock, folder)
    for turn in range(rounds):
        for peer in peers if turn % 2 == 0 else reversed(peers):
            if clock.left() <= 0 or None in told[peer]:
                continue
            begun = time.monotonic()
            found = measure(peer, folder, clock.left())
            told[peer] += [None] * (turn - len(told[peer])) + [found]
            said = f"{speed(found):,.0f} tokens/s" if found else "failed"
            print(f"{each.name} round {turn + 1} {peer}: {said}; {time.monotonic() - begun:.0f} s in all", flush=True)
            lines = _write(each, told, work_per_token, results)
    print("\n".join(lines), flush=True)
    try:
        plot.draw(told, each.name, results / f"{each.name}.png")
    except ImportError:
        print(f"no plot: matplotlib is not installed ({HINT})", flush=True)
    return told


def _prepare(each: Workload, folder: Path) -> float:
    """Write rows and model; return the operations of a real token."""
    begun = time.monotonic()
    write_rows(each, folder)
    shape, lengths = _shape(each, folder), positions(each)
    work_per_token = work.flops(shape, lengths, each.rank) / int(lengths.sum())
    print(
        f"{each.name}: {len(lengths):,} rows, {int(lengths.sum()):,} tokens; {work.matrices(shape):,} parameters "
        f"multiplied, {work_per_token / 1e9:.3f} GFLOP a token; made in {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    if (each.updates - each.warm) % each.sorted_updates:
        print(
            f"{each.name}: {each.updates - each.warm} updates are counted, no multiple of {each.sorted_updates}: peers "
            "that use group_by_length are given rows longer or shorter than those of the data set",
            flush=True,
        )
    return work_per_token


def _warm(each: Workload, peers: list[str], clock: Clock, folder: Path) -> None:
    """Let what peers keep from one start to the next (encoded rows, compiled code) be there before the first round.

    One peer of each cache makes one update: else whoever is the first would pay for those after it.
    """
    hand_over(dataclasses.replace(each, updates=1, warm=0, size=each.rows), folder)
    for peer in dict.fromkeys(CACHE_OF.get(peer, peer) for peer in peers):
        if clock.left() > 0:
            begun = time.monotonic()
            measure(peer, folder, clock.left())
            print(f"{each.name}: caches of {peer} are warm; {time.monotonic() - begun:.0f} s", flush=True)
    hand_over(each, folder)


def _title(each: Workload, rounds: int) -> str:
    rows = f"batches of {each.batch}"
    if each.conversations:
        rows += f" packed rows of {each.longest}, or {each.conversations} apart"
    return f"## {each.name}: {rows}, {each.precision}, {each.updates - each.warm} updates counted, {rounds} rounds"


def _write(each: Workload, told: Rounds, work_per_token: float, results: Path) -> list[str]:
    """Write what was told so far, and the table, of which the lines are returned."""
    rounds = max(map(len, told.values()))
    lines = [_title(each, rounds), "", where(), "", *table(told, work_per_token, work.peak()), ""]
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{each.name}.md").write_text("\n".join(lines), encoding="utf-8")
    (results / f"{each.name}.json").write_text(json.dumps(told), encoding="utf-8")
    return lines


def measure(peer: str, folder: Path, limit: float) -> dict[str, Any] | None:
    """Let a peer learn in a fresh process; return what it told, or None after its last lines."""
    command = [sys.executable, "-m", "benchmarks.compare.peers", peer, str(folder)]
    environment = {"WANDB_MODE": "disabled", **os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # caches are warm: what is compiled once is not compiled again
    others = Others()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        print(f"{peer}: not done after {limit:.0f} s", flush=True)
        return None
    for line in done.stdout.splitlines():
        if line.startswith("FIGURES "):
            found: dict[str, Any] = json.loads(line.removeprefix("FIGURES "))
            return {**found, "others": others.part()}
    said = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    print(f"{peer} told nothing (exit code {done.returncode}):", *said[-LAST_LINES:], sep="\n  ", flush=True)
    return None


def _shape(each: Workload, folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_folder(each, folder))


if __name__ == "__main__":
    main()
