"""What compile: true brings and costs: updates of one encoder, compiled and not, turn by turn in one process.

    python benchmarks/compile.py [--layers 6] [--width 384] [--rows 32] [--updates 30]

The shape of MiniLM-L6 by default, fp32, lengths of 16 to 64 tokens, AdamW. Two CPU cores that were busy with other
things as well (load 4 to 7), 2026-11-26, median of an update 1.670 s not compiled, 1.653 s compiled (ratio 1.01);
first update 8 s and 57 s, one graph for all lengths. Not measured on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from train import compilation


def main() -> None:
    """Print the seconds that compiling takes, and the median of an update, compiled and not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 6), ("width", 384), ("rows", 32), ("updates", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    config = BertConfig(
        hidden_size=asked.width, num_hidden_layers=asked.layers, num_attention_heads=asked.width // 32,
        intermediate_size=4 * asked.width,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = torch.randint(16, 65, (asked.updates,), generator=torch.Generator().manual_seed(0)).tolist()
    updates = []
    for compiled in (False, True):
        model: Any = BertForSequenceClassification(config).to(device).train()
        if compiled:
            compilation.compile_layers(model)
        updates.append((model, torch.optim.AdamW(model.parameters(), lr=1e-5)))
    for place, name in enumerate(("first update, not compiled", "first update, compiled")):
        print(f"{name}: {_seconds(*updates[place], asked.rows, lengths[0]):.1f} s", flush=True)
    times = [[_seconds(*update, asked.rows, length) for update in updates] for length in lengths]
    for place, name in enumerate(("not compiled", "compiled")):
        print(f"{name}: median {statistics.median(pair[place] for pair in times):.3f} s an update")
    ratios = [plain / compiled for plain, compiled in times]
    print(f"not compiled / compiled, turn by turn: median {statistics.median(ratios):.2f}")
    print(f"graphs: {torch._dynamo.utils.counters['stats']['unique_graphs']}")


def _seconds(model: Any, optimizer: Any, rows: int, length: int) -> float:
    ids = torch.randint(5, 1000, (rows, length), device=model.device)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    begun = time.perf_counter()
    loss = model(input_ids=ids, attention_mask=mask, labels=ids[:, 0] % 2).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # waits for the device
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
