"""How evenly processes share an update on lengths of chats: ours, random dealing, Trainer's `batch_rebalance`.

    python -m benchmarks.balance

Lengths are lognormal(5, 1), at most 2,048; 40 updates a line. The cost of a process is the sum over its micro-batches
of rows x longest row; `sum` is the mean (and the worst) over updates of max/mean over processes of that cost, what
counts for DDP; `each` the same where processes wait for each other in every micro-batch; `padding` is real over
computed tokens. Random dealing and `batch_rebalance` get as many micro-batches as ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from transformers.trainer_pt_utils import BatchRebalanceSampler

from data.plan import Bounds, Indices, plan_batch

BOUNDS = Bounds(tokens=8192, overhead=100)
Groups = list[list[Indices]]
"""For each process its micro-batches, as indices into the batch."""


def plans(lengths: Indices, world: int, generator: np.random.Generator) -> Iterator[tuple[str, Groups]]:
    """Yield each way to share a batch, by name."""
    ours = [[part.rows for part in share] for share in plan_batch(lengths, BOUNDS, world)]
    yield "ours", ours
    steps = min(len(ours[0]), len(lengths) // world)
    dealt = generator.permutation(len(lengths))
    yield "random", [np.array_split(dealt[process::world], steps) for process in range(world)]
    settings = {"effective_batch_size": len(lengths), "dp_size": world, "grad_accum": steps, "shuffle": False}
    samplers = [BatchRebalanceSampler(lengths.tolist(), rank=rank, **settings) for rank in range(world)]
    yield "batch_rebalance", [[np.array(rows) for rows in sampler] for sampler in samplers]


def main() -> None:
    """Print the table."""
    print(f"{'batch':>5} {'world':>5}  {'plan':16} {'sum':>6} {'worst':>6} {'each':>6} {'padding':>7}")
    for batch in (64, 128, 256, 512):
        for world in (2, 4, 8, 16):
            generator = np.random.default_rng(0)
            found: dict[str, list[tuple[float, float, float]]] = {}
            for _ in range(40):
                lengths = np.clip(generator.lognormal(5, 1, batch).astype(np.int64), 1, 2048)
                for name, plan in plans(lengths, world, generator):
                    costs = np.array([[len(rows) * int(lengths[rows].max()) for rows in share] for share in plan])
                    sums = costs.sum(axis=1)
                    each = costs.max(axis=0).sum() / costs.mean(axis=0).sum()
                    found.setdefault(name, []).append((sums.max() / sums.mean(), each, lengths.sum() / costs.sum()))
            for name, figures in found.items():
                (ratio, each, padding), worst = np.mean(figures, axis=0), max(figure[0] for figure in figures)
                print(f"{batch:5} {world:5}  {name:16} {ratio:6.3f} {worst:6.3f} {each:6.3f} {padding:7.3f}")


if __name__ == "__main__":
    main()
