"""What `data.grouping: window` brings in speed: the same examples with and without it, turn by turn in one process.

    python -m benchmarks.grouping CONFIG [key=value ...] [--windows 4]

A window of updates is made by a plain loop over the run's batches, once as drawn and once grouped (the other way round
every second time): the same model, examples and number of updates. Real tokens a second, by the clock and by the time
of the processor, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from data.batches import Batches
from train import announcement, config, ingredients, run


def main() -> None:
    """Print tokens a second of each window, with and without grouping, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--windows", type=int, default=4, help="that are measured, after one update of each that is not"
    )
    options = parser.parse_intermixed_args()
    settings = config.read(options.config, [*options.overrides, "data.grouping=window"])
    found = ingredients.read(settings)
    grouped, _ = run.plan_batches(settings, found)
    assert isinstance(grouped, Batches)
    print(f"{announcement.describe(settings, found, replace(grouped, window=None))}; {torch.get_num_threads()} threads")
    print(announcement.describe(settings, found, grouped))
    learner = _Learner(found)
    speeds: dict[str, list[tuple[float, float]]] = {"none": [], "window": []}
    kinds = {"none": replace(grouped, window=None), "window": grouped}
    for batches in kinds.values():
        learner.make(batches, range(1, 2))
    for number in range(options.windows):
        first = number * settings.data.window + 1
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            speeds[kind].append(learner.make(kinds[kind], range(first, first + settings.data.window)))
            clock, processor = speeds[kind][-1]
            print(f"window {number + 1} {kind}: {clock:,.0f} tokens/s, {processor:,.0f} of processor time", flush=True)
    for place, name in enumerate(("clock", "processor")):
        ratios = [other[place] / one[place] for one, other in zip(*speeds.values(), strict=True)]
        medians = ", ".join(
            f"{kind} {statistics.median(each[place] for each in told):,.0f}" for kind, told in speeds.items()
        )
        print(
            f"{name}: {medians} tokens/s; window / none {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


class _Learner:
    """A plain PyTorch loop."""

    def __init__(self, found: ingredients.Ingredients) -> None:
        self.task, self.model = found.task, found.model.train()
        self.device = next(self.model.parameters()).device
        self.mixed: Any = nullcontext()
        if found.precision == "bf16":
            self.mixed = torch.autocast(self.device.type, torch.bfloat16)
        self.learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-5, fused=True)

    def make(self, batches: Batches, numbers: range) -> tuple[float, float]:
        """Make these updates; return real tokens a second, by the clock and of processor time."""
        tokens, begun, used = 0, time.perf_counter(), time.process_time()
        for _, batch in batches.between(numbers.start - 1, numbers.stop - 1):
            for part in batch.parts:
                tensors = {name: tensor.to(self.device) for name, tensor in part.tensors.items()}
                with self.mixed:
                    loss = self.task.loss(self.model, tensors)
                (loss / batch.targets).backward()
            torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            tokens += batch.tokens
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return tokens / (time.perf_counter() - begun), tokens / (time.process_time() - used)


if __name__ == "__main__":
    main()
