"""For how long a checkpoint holds training up: `python -m benchmarks.checkpoints [--shape minilm|bert-base|llama-1b]`.

A shape with random weights learns random tokens by AdamW, as a run does, on the device that is here. Checkpoints are
written in turns while training waits and while it goes on, to `--folder`; each is told once all is on the disk:

blocked     seconds in which no update could begin
written     seconds until the checkpoint was whole, with nothing beside it where training waits
slowed      seconds that the updates beside the writing took more than as many do alone
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    "bert-base": {},
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
}  # fmt: skip


def main() -> None:
    """Print a line for each checkpoint and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="default: a temporary one; its disk is a part of the figures")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        _measure(options.shape, options.rounds, folder)
    finally:
        shutil.rmtree(folder)


def _measure(shape: str, rounds: int, folder: Path) -> None:
    from train import hardware
    from train.checkpoint import Checkpoints
    from train.learned import Learned

    accelerator, _ = hardware.build_accelerator("auto")
    strategy, update = _training(shape, accelerator)
    ways = {
        name: Checkpoints(
            folder / name, accelerator, Learned(strategy),
            keep=1, best=None, higher_is_better=True, patience=None, in_background=name == "goes on",
        )
        for name in ("waits", "goes on")
    }  # fmt: skip
    for _ in range(3):
        update()
    alone = median(_timed(update) for _ in range(9))
    size = sum(each.nbytes for of in Learned(strategy).tensors().values() for each in of.values())
    print(f"{shape} on {hardware.describe(accelerator.device)}: {size / 1e6:,.0f} MB, an update takes {alone:.3f} s")
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(1, rounds + 2):
        for name in ways if number % 2 else reversed(ways):
            figures = _one(ways[name], number, update, alone)
            print(f"{name:8} blocked {figures[0]:.3f}  written {figures[1]:.3f}  slowed {figures[2]:.3f}", flush=True)
            if number > 1:  # the first takes the memory for its copies
                found[name].append(figures)
    for name, each in found.items():
        blocked, written, slowed = (median(column) for column in zip(*each, strict=True))
        print(f"median   {name:8} blocked {blocked:.3f}  written {written:.3f}  slowed {slowed:.3f}")
    ratio = median(each[0] for each in found["goes on"]) / median(each[0] for each in found["waits"])
    print(f"blocked for {ratio:.1%} of the time of one that training waits for")


def _one(checkpoints: Any, number: int, update: Any, alone: float) -> tuple[float, float, float]:
    """Return the three figures of one checkpoint."""
    began = time.perf_counter()
    checkpoints.save(number)
    blocked, updates = time.perf_counter() - began, 0
    while checkpoints._background.busy and checkpoints._background._thread.is_alive():
        update()
        updates += 1
    over = time.perf_counter() - began
    checkpoints.settle()
    assert not checkpoints.failed
    return blocked, over, max(0.0, over - blocked - updates * alone)


def _timed(update: Any) -> float:
    began = time.perf_counter()
    update()
    return time.perf_counter() - began


def _training(shape: str, accelerator: Any) -> tuple[Any, Any]:
    """Return the strategy, and a function that makes one update and waits for it."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = shape.startswith("llama")
    config: Any = (LlamaConfig if llama else BertConfig)(**SHAPES[shape])
    with torch.device(accelerator.device):
        model: Any = (LlamaForCausalLM if llama else BertForMaskedLM)(config)
    from train import strategy

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    spread = strategy.prepare(accelerator, model, optimizer, "fp32")
    ids = torch.randint(config.vocab_size, (4, 512) if accelerator.device.type == "cuda" else (8, 32))
    ids = ids.to(accelerator.device)

    def update() -> None:
        loss = spread.model(input_ids=ids, labels=ids).loss
        spread.backward(loss)
        spread.step(loss.detach(), 1.0)
        loss.item()

    return spread, update


if __name__ == "__main__":
    main()
