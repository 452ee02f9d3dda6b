"""How evenly processes share an update on lengths of chats: ours, random dealing, Trainer's `batch_rebalance`.

    python -m benchmarks.balance [--padding-free]

Lengths are lognormal(5, 1), at most 2,048; 40 updates a line. The cost of a process is the sum over its micro-batches
of rows x longest row; `sum` is the mean (and `worst` the worst) over updates of max/mean over processes of that cost,
what counts for DDP, and `least` what it could not be below: max(longest row, mean)/mean; `each` the same as `sum` where
processes wait for each other in every micro-batch. These say nothing of padding and the number of micro-batches, so
`time` is what counts in the end: the busiest process's cost and the overhead of its micro-batches, over an equal share
of the real tokens. `padding` is real over computed tokens; `count` micro-batches a process; `ms` what planning takes.
Random dealing and `batch_rebalance` get as many micro-batches as ours. With `--padding-free` a process has as much to
do as its rows have tokens, bounds are those of an encoder on a CPU, and `by padding` is ours as it is where padding
costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from transformers.trainer_pt_utils import BatchRebalanceSampler

from data.plan import Bounds, Indices, plan_batch

BOUNDS = Bounds(tokens=8192, overhead=100)
ENCODER = Bounds(tokens=16_384, overhead=1000, padding_free=True)
Groups = list[list[Indices]]
"""For each process its micro-batches, as indices into the batch."""


def plans(lengths: Indices, bounds: Bounds, world: int, generator: np.random.Generator) -> Iterator[tuple[str, Groups]]:
    """Yield each way to share a batch, by name."""
    ours = _ours(lengths, bounds, world)
    yield "ours", ours
    if bounds.padding_free:
        yield "by padding", _ours(lengths, replace(bounds, padding_free=False), world)
    steps = min(len(ours[0]), len(lengths) // world)
    dealt = generator.permutation(len(lengths))
    yield "random", [np.array_split(dealt[process::world], steps) for process in range(world)]
    settings = {"effective_batch_size": len(lengths), "dp_size": world, "grad_accum": steps, "shuffle": False}
    samplers = [BatchRebalanceSampler(lengths.tolist(), rank=rank, **settings) for rank in range(world)]
    yield "batch_rebalance", [[np.array(rows) for rows in sampler] for sampler in samplers]


def _ours(lengths: Indices, bounds: Bounds, world: int) -> Groups:
    return [[part.rows for part in share] for share in plan_batch(lengths, bounds, world)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--padding-free", action="store_true")
    bounds = ENCODER if parser.parse_args().padding_free else BOUNDS
    titles = ("sum", "worst", "least", "each", "time", "padding", "count", "ms")
    print(f"{'batch':>5} {'world':>5}  {'plan':16}" + "".join(f" {title:>7}" for title in titles))
    for batch in (16, 32, 64, 128, 256, 512):
        for world in (2, 4, 8, 16):
            generator = np.random.default_rng(0)
            found: dict[str, list[list[float]]] = {}
            for _ in range(40):
                lengths = np.clip(generator.lognormal(5, 1, batch).astype(np.int64), 1, 2048)
                began = time.process_time()
                plan_batch(lengths, bounds, world)
                spent = (time.process_time() - began) * 1e3
                for name, plan in plans(lengths, bounds, world, generator):
                    found.setdefault(name, []).append(
                        [*judge(lengths, plan, bounds), spent if name == "ours" else np.nan]
                    )
            for name, figures in found.items():
                means = np.mean(figures, axis=0)
                means[1] = max(figure[1] for figure in figures)
                print(f"{batch:5} {world:5}  {name:16}" + "".join(f" {figure:7.3f}" for figure in means))


def judge(lengths: Indices, plan: Groups, bounds: Bounds) -> list[float]:
    """Return the figures of one update, in the order of the table."""

    def cost(rows: Indices) -> int:
        return int(lengths[rows].sum()) if bounds.padding_free else len(rows) * int(lengths[rows].max())

    costs = np.array([sorted(map(cost, share), reverse=True) for share in plan])
    sums = costs.sum(axis=1)
    ratio, count = sums.max() / sums.mean(), costs.shape[1]
    least = max(lengths.max(), sums.mean()) / sums.mean()
    each = costs.max(axis=0).sum() / costs.mean(axis=0).sum()
    busy = (sums.max() + bounds.overhead * count) / (lengths.sum() / len(plan))
    return [ratio, ratio, least, each, busy, lengths.sum() / costs.sum(), count]


if __name__ == "__main__":
    main()
