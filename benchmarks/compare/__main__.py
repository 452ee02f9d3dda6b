"""Ours and its peers on the same rows, interleaved, each time in a fresh process: `python -m benchmarks.compare`.

Peers take turns in every round, in alternating order, so that a busy machine is busy for all. Real tokens are counted,
end to end: data, forward, backward, clipping, optimizer, logging. What comes before the first counted updates is told
as the time to the first update. Writes the table, and what every round told, to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.figures import speed, table
from benchmarks.compare.workloads import WORKLOADS, Workload, draw, flops, model_folder, write_rows

PEERS = ("ours", "raw", "trainer", "trainer_tuned", "usual")
RESULTS = Path(__file__).parent.parent / "results"
ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("cpu", "toy"), default="cpu")
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), help="only these")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.peers[0] != "ours":
        parser.error("--peers: the first must be ours, to which the others are held")
    chosen = options.workloads or [name for name, work in WORKLOADS.items() if work.suite == options.suite]
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            compare(WORKLOADS[name], options.peers, options.rounds, Path(folder), options.results)


def compare(work: Workload, peers: list[str], rounds: int, folder: Path, results: Path) -> None:
    """Measure one workload; print and write its table."""
    write_rows(work, folder)
    shape = _shape(work, folder)
    told: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    for turn in range(rounds):
        for peer in peers if turn % 2 == 0 else reversed(peers):
            found = measure(peer, work, folder)
            told[peer].append(found)
            print(f"{work.name} round {turn + 1} {peer}: {speed(found):,.0f} tokens/s", flush=True)
    lengths = draw(work)
    lines = [
        f"## {work.name}: batches of {work.batch}, {work.precision}, {work.updates - work.warm} updates counted, "
        f"{rounds} rounds",
        "", where(), "", *table(told, flops(work, shape, lengths) / int(lengths.sum()), best_matmul()), "",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{work.name}.md").write_text("\n".join(lines), encoding="utf-8")
    (results / f"{work.name}.json").write_text(json.dumps(told), encoding="utf-8")


def measure(peer: str, work: Workload, folder: Path) -> dict[str, Any]:
    """Let a peer learn in a fresh process; return what it told."""
    command = [sys.executable, "-m", "benchmarks.compare.peers", peer, work.name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("FIGURES "):
            found: dict[str, Any] = json.loads(line.removeprefix("FIGURES "))
            return found
    raise SystemExit(f"{peer} told nothing:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def best_matmul() -> float:
    """Return the operations a second of the best of some large multiplications in fp32, here and now."""
    import torch

    one, other, best = torch.randn(2048, 2048), torch.randn(2048, 2048), float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        one @ other
        best = min(best, time.perf_counter() - begun)
    return 2 * 2048.0**3 / best


def where() -> str:
    """Say on what, with what and when this was measured."""
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return (
        f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, commit {commit.strip()}, {time.strftime('%Y-%m-%d')}."
    )


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _shape(work: Workload, folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_folder(work, folder))


if __name__ == "__main__":
    main()
