"""Floating point operations of what is learned: real tokens only, whatever a peer computes besides."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

PEAKS = {"H100": 989e12, "H200": 989e12}
"""Dense bf16 operations a second that are stated for a GPU of which the name says so."""
DECODERS = ("llama", "qwen3")


def matrices(shape: Any) -> int:
    """Return the parameters that a token is multiplied with: of the layers and, in a decoder, the output layer, which
    is as much work where it shares its matrix with the embedding."""
    head = shape.hidden_size * shape.vocab_size if shape.model_type in DECODERS else 0
    return int(shape.num_hidden_layers * sum(one * other for one, other in linears(shape)) + head)


def linears(shape: Any) -> list[tuple[int, int]]:
    """Return the sizes (in, out) of the linear layers of one block."""
    width, inner = shape.hidden_size, shape.intermediate_size
    if shape.model_type in DECODERS:
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        return [(width, queries), (width, keys), (width, keys), (queries, width), *[(width, inner)] * 2, (inner, width)]
    gates = 2 if shape.model_type == "modernbert" else 1
    return [(width, 3 * width), (width, width), (width, gates * inner), (inner, width)]


def flops(shape: Any, lengths: NDArray[np.int64], rank: int = 0) -> float:
    """Return the work of a forward and backward pass of texts of these lengths, each on its own.

    6 N Σ length + 12 L d Σ length², the second part halved where attention is causal, and of a layer that sees a window
    only what it sees (SPEED.md of the field: PaLM, appendix B). With LoRA 4 N + 6 N_lora: nothing is computed for the
    weights that do not learn. No embeddings, padding, nor anything computed twice.
    """
    real = lengths.astype(np.float64)
    causal = shape.model_type in DECODERS
    width = shape.num_attention_heads * shape.head_dim if causal else shape.hidden_size
    seen = 0.0
    for kind in getattr(shape, "layer_types", None) or ["full_attention"] * shape.num_hidden_layers:
        windowed = kind == "sliding_attention" and not causal
        pairs = _within(real, shape.local_attention // 2) if windowed else real**2
        seen += (6 if causal else 12) * width * float(pairs.sum())
    many = matrices(shape)
    learned = shape.num_hidden_layers * sum(rank * (one + other) for one, other in linears(shape))
    per_token = 4 * many + 6 * learned if rank else 6 * many
    return float(per_token * real.sum() + seen)


def _within(lengths: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Return how many pairs of tokens of a text are at most `reach` apart."""
    near = np.minimum(reach, lengths - 1)
    pairs: NDArray[np.float64] = lengths + 2 * (near * lengths - near * (near + 1) / 2)
    return pairs


def peak() -> float | None:
    """Return the operations a second that are stated for the GPU here."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((stated for part, stated in PEAKS.items() if part in name), None)


@lru_cache
def best_matmul(precision: str) -> float:
    """Return the operations a second of the best of some large multiplications here and now: on a GPU of 8,192 in
    bf16, else of 2,048 in this precision; in fp32 where a CPU does not know bf16, in which ten were not done after
    nine minutes."""
    import torch

    from train.hardware import resolve

    on_gpu = torch.cuda.is_available()
    size, device = (8192, "cuda") if on_gpu else (2048, "cpu")
    fast = on_gpu or (precision == "bf16" and resolve("auto", cpu=True) == "bf16")
    dtype = torch.bfloat16 if fast else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20 if on_gpu else 10):
        if on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        one @ other
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    del one, other
    if on_gpu:
        torch.cuda.empty_cache()
    return 2 * float(size) ** 3 / best
