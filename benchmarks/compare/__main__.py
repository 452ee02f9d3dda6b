"""Ours and its peers on the same rows, interleaved, each time in a fresh process: `python -m benchmarks.compare`.

Peers take turns in every round, in alternating order, so that a busy machine is busy for all. Real tokens are counted,
end to end: data, forward, backward, clipping, optimizer, logging. What comes before the first counted updates is told
as the time to the first update. A peer that fails is left out of later rounds, and its last lines are printed. Writes
the table, a plot (where matplotlib is installed) and what every round told to benchmarks/results/, anew after each
measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.compare import plot, work
from benchmarks.compare.figures import Machine, Rounds, speed, table
from benchmarks.compare.peers import hand_over
from benchmarks.compare.workloads import WORKLOADS, Workload, model_folder, positions, write_rows

RESULTS = Path(__file__).parent.parent / "results"
ROOT = Path(__file__).parents[2]
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
    options = _options()
    os.environ["HF_HUB_OFFLINE"] = "1"
    clock = Clock(time.monotonic() + options.seconds, options.limit)
    chosen = options.workloads or [name for name, each in WORKLOADS.items() if each.suite == options.suite]
    with ExitStack() as held:
        folder = options.folder or Path(held.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        print(where(), flush=True)
        for name in chosen:
            each = WORKLOADS[name]
            if options.precision not in (None, each.precision):
                each = dataclasses.replace(each, precision=options.precision, name=f"{name}-{options.precision}")
            if options.updates:
                each = dataclasses.replace(each, updates=options.updates, warm=min(each.warm, options.updates - 1))
            if options.micro:
                each = dataclasses.replace(each, micro=options.micro)
            peers = [peer for peer in options.peers or each.peers if peer in each.peers]
            compare(each, peers, options.rounds, clock, folder, options.results)


def _options() -> argparse.Namespace:
    known = sorted({peer for each in WORKLOADS.values() for peer in each.peers})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("cpu", "gpu", "toy"), default="cpu")
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), help="only these")
    parser.add_argument("--peers", nargs="+", choices=known, help="only these; the first must be ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="of each peer, instead of the workload's; at least 2")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of all peers, instead of the workload's")
    parser.add_argument("--micro", type=int, help="tokens in a micro-batch of ours and the plain loop")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no peer after so many in all")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that a peer may take")
    parser.add_argument("--folder", type=Path, help="keep rows, weights and caches here, for the next time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.peers and options.peers[0] != "ours":
        parser.error("--peers: the first must be ours, to which the others are held")
    if options.updates is not None and options.updates < 2:
        parser.error("--updates: at least 2, of which the first is not counted")
    return options


def compare(each: Workload, peers: list[str], rounds: int, clock: Clock, folder: Path, results: Path) -> None:
    """Measure one workload; print and write its table."""
    begun, machine = time.monotonic(), Machine(work.peak(), work.best_matmul(each.precision))
    write_rows(each, folder)
    shape = _shape(each, folder)
    hand_over(each, folder)
    lengths = positions(each)
    work_per_token = work.flops(shape, lengths, each.rank) / int(lengths.sum())
    print(
        f"{each.name}: {len(lengths):,} rows, {int(lengths.sum()):,} tokens; {work.matrices(shape):,} parameters "
        f"multiplied, {work_per_token / 1e9:.3f} GFLOP a token; best matmul in {each.precision} "
        f"{machine.matmul / 1e12:.3f} TFLOP/s; made in {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    told: dict[str, list[dict[str, Any] | None]] = {peer: [] for peer in peers}
    lines: list[str] = []
    for turn in range(rounds):
        for peer in peers if turn % 2 == 0 else reversed(peers):
            if clock.left() <= 0 or None in told[peer]:
                continue
            begun = time.monotonic()
            found = measure(peer, folder, clock.left())
            told[peer] += [None] * (turn - len(told[peer])) + [found]
            said = f"{speed(found):,.0f} tokens/s" if found else "failed"
            print(f"{each.name} round {turn + 1} {peer}: {said}; {time.monotonic() - begun:.0f} s in all", flush=True)
            lines = [_title(each, max(map(len, told.values()))), "", where(), "",
                     *table(told, work_per_token, machine), ""]  # fmt: skip
            _write(each.name, lines, told, results)
    print("\n".join(lines), flush=True)
    try:
        plot.draw(told, each.name, results / f"{each.name}.png")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'lockstep[benchmarks]')", flush=True)


def _title(each: Workload, rounds: int) -> str:
    rows = f"batches of {each.batch}"
    if each.conversations:
        rows += f" packed rows of {each.longest}, or {each.conversations} apart"
    return f"## {each.name}: {rows}, {each.precision}, {each.updates - each.warm} updates counted, {rounds} rounds"


def _write(name: str, lines: list[str], told: Rounds, results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    (results / f"{name}.json").write_text(json.dumps(told), encoding="utf-8")


def measure(peer: str, folder: Path, limit: float) -> dict[str, Any] | None:
    """Let a peer learn in a fresh process; return what it told, or None after its last lines."""
    command = [sys.executable, "-m", "benchmarks.compare.peers", peer, str(folder)]
    environment = {"WANDB_MODE": "disabled", **os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # caches are warm: what is compiled once is not compiled again
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        print(f"{peer}: not done after {limit:.0f} s", flush=True)
        return None
    for line in done.stdout.splitlines():
        if line.startswith("FIGURES "):
            found: dict[str, Any] = json.loads(line.removeprefix("FIGURES "))
            return found
    said = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    print(f"{peer} told nothing (exit code {done.returncode}):", *said[-LAST_LINES:], sep="\n  ", flush=True)
    return None


def where() -> str:
    """Say on what, with what and when this was measured."""
    import torch
    import transformers

    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, commit {_commit()}, {time.strftime('%Y-%m-%d')}."
    )


def _commit() -> str:
    """Return the commit: as `COMMIT` says it, on a machine that has a copy of the files only, or as git does."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        return os.environ.get("COMMIT") or told or "unknown"
    return os.environ.get("COMMIT", "unknown")


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _shape(each: Workload, folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_folder(each, folder))


if __name__ == "__main__":
    main()
