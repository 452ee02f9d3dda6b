"""What an evaluation costs beside the forward pass: `python -m benchmarks.evaluation [--workload reviews|chat]`.

reviews: MiniLM with a classifier on the shipped reviews. chat: a decoder of 4 layers, 256 wide, that also writes the
last turn of each of 40 conversations. The model is asked by its evaluator, figures and all, and bare: the same
micro-batches, made before time is taken, through the model alone (chat: forward pass and `generate`). Both take turns,
A B B A, in one process. Also counts what is read from the device: on a GPU each such reading is a wait.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.machine import where
from benchmarks.compare.workloads import WORKLOADS, config, minilm, write_rows

SAMPLES = Path(__file__).parent.parent / "data" / "samples" / "reviews"
NEW_TOKENS = 16


def main() -> None:
    """Print ratios and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("reviews", "chat"), default="reviews")
    parser.add_argument("--rows", type=int, default=400, help="of the shipped reviews, at most")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        settings = _reviews(Path(folder), options.rows) if options.workload == "reviews" else _chat(Path(folder))
        evaluator, bare = _ways(settings)
        evaluator(0)  # metrics are loaded, kernels chosen
        bare()
        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        used: dict[str, list[float]] = {"ours": [], "bare": []}
        ways: list[tuple[str, Callable[[], Any]]] = [("ours", lambda: evaluator(0)), ("bare", bare)]
        for turn in range(options.rounds):
            for name, way in ways if turn % 2 == 0 else reversed(ways):
                begun, spent = time.perf_counter(), time.process_time()
                way()
                seconds[name].append(time.perf_counter() - begun)
                used[name].append(time.process_time() - spent)
        print(f"{where()} {len(evaluator.encoded.dataset)} examples in {len(evaluator._parts)} micro-batches")
        for what, times in (("wall", seconds), ("processor", used)):
            ratios = np.array(times["bare"]) / np.array(times["ours"])
            ours, alone = (float(np.median(times[name])) for name in ("ours", "bare"))
            print(
                f"{what} time: bare {alone:.3f} s, ours {ours:.3f} s; bare / ours by round "
                f"{np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})"
            )
        print("read from the device, one evaluation:", dict(_readings(lambda: evaluator(0))))


def _reviews(folder: Path, rows: int) -> dict[str, Any]:
    lines = (SAMPLES / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    data = {"train": str(folder / "rows.jsonl"), "validation": str(folder / "rows.jsonl"), "max_length": 128}
    return {
        "output": str(folder / "run"), "precision": "fp32", "updates": 1, "task": {"name": "text_classification"},
        "data": {**data, "cache": str(folder / "cache")}, "model": {"path": str(minilm())},
    }  # fmt: skip


def _chat(folder: Path) -> dict[str, Any]:
    work = dataclasses.replace(
        WORKLOADS["toy-chat"], name="small-chat", model="small-llama", updates=5, precision="fp32"
    )
    found = config(work, folder, folder / "run")
    found["task"]["generation"] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    found["data"]["validation"] = str(write_rows(work, folder))
    return found


def _ways(settings: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
    """Return the evaluator, and what puts its micro-batches through the model alone."""
    import torch

    from data.order import example_keys
    from train.config import validate
    from train.preparation import judging, prepared
    from train.run import _evaluators

    checked = validate(settings, "evaluation")
    ingredients = prepared(checked)
    model: Any = ingredients.accelerator.prepare_model(ingredients.model, evaluation_mode=True)
    evaluator = _evaluators(checked, ingredients, model, judging(checked, ingredients))["validation"]
    encoded = evaluator.encoded
    given = [
        ingredients.task.collate({**encoded.features(part.rows), "key": example_keys(part.rows, "evaluation")})
        for part in evaluator._parts
    ]
    asked = [{name: each[name] for name in ("input_ids", "attention_mask", "position_ids") if name in each}
             for each in given]  # fmt: skip
    prompts = [_prompts(each, ingredients.tokenizer) for each in given if "pieces" in each]

    def bare() -> None:
        model.eval()
        with torch.no_grad():
            for each, prompt in itertools.zip_longest(asked, prompts):
                model(**each, **({"use_cache": False} if prompt else {}))
                if prompt:
                    model.generate(**prompt)

    return evaluator, bare


def _prompts(tensors: Any, tokenizer: Any) -> dict[str, Any]:
    from data.collate import mask, pad
    from train.tasks._turns import prompts

    before = prompts(tensors)
    return {"input_ids": pad(before, tokenizer.pad_token_id, left=True), "attention_mask": mask(before, left=True)}


def _readings(evaluate: Callable[[], Any]) -> Counter[str]:
    """Return how often values were read from tensors that may be on a device, by how."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = Counter[str]()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = called.overloadpacket.__name__
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
                counts[{"_local_scalar_dense": "item, int or bool"}.get(name, name)] += 1
            return called(*args, **(kwargs or {}))

    real = torch.Tensor.tolist
    torch.Tensor.tolist = lambda self: (counts.update(["tolist"]), real(self))[1]  # type: ignore[method-assign]
    try:
        with Counting():
            evaluate()
    finally:
        torch.Tensor.tolist = real  # type: ignore[method-assign]
    return counts


if __name__ == "__main__":
    main()
