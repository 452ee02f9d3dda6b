"""Does what makes encoders fast on a CPU change what is learned? `python -m benchmarks.same CONFIG [key=value ...]`.

Runs of a config with `--updates` updates, once as they are and once in the padded way: rows padded to the longest of
their micro-batch, PyTorch's attention and dropout, every token through every layer. Without dropout the losses of each
update are compared, in fp32 and bf16; with it the accuracy at the end, in both, over `--seeds` seeds, since they draw
other units. A thread or two of a CPU; each run in this process, one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from train import config, hardware
from train.imports import slow

NO_DROPOUT = ["model.config.hidden_dropout_prob=0", "model.config.attention_probs_dropout_prob=0"]


def main() -> None:
    """Print the differences of losses, and the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of a run of an encoder")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3, help="0: losses alone")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--figure", default="validation/accuracy")
    options = parser.parse_intermixed_args()
    common = [*options.overrides, "epochs=null", f"updates={options.updates}", "tracking.log_every=1"]
    slow()
    for precision in options.precisions:
        fast, padded = (
            _losses([options.config, *common, *NO_DROPOUT, f"precision={precision}"], padded=padded)
            for padded in (False, True)
        )
        worst = max(abs(one - other) for one, other in zip(fast, padded, strict=True))
        print(
            f"{precision}: losses of {len(fast)} updates {fast[0]:.4f} to {fast[-1]:.4f}, apart by {worst:.2e} at most"
        )
    for precision, padded in itertools.product(options.precisions if options.seeds else (), (False, True)):
        runs = (
            _run([options.config, *common, f"seed={seed}", f"precision={precision}"], padded=padded)
            for seed in range(options.seeds)
        )
        found = [run["metrics"][options.figure] for run in runs]
        figures, way = " ".join(f"{each:.4f}" for each in found), "padded" if padded else "ours  "
        print(f"{precision}, {way}: {options.figure} {figures}, mean {mean(found):.4f}", flush=True)


def _losses(arguments: list[str], *, padded: bool) -> list[float]:
    return [line["train/loss"] for line in _run(arguments, padded=padded)["lines"] if "train/loss" in line]


def _run(arguments: list[str], *, padded: bool) -> dict[str, Any]:
    """Carry out a run; return its result, with the lines of its figures."""
    from train.run import run

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        how = f"padding_free={str(not padded).lower()}"
        assert run(config.read(arguments[0], [*arguments[1:], how, f"output={output}"])) == 0
        hardware.forget()
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return {**json.loads((output / "result.json").read_text()), "lines": [json.loads(line) for line in lines]}


if __name__ == "__main__":
    main()
