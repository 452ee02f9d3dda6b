"""Rows on which a model is tried, and what surrounds a trial: whether something else computed gives the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIED = (9, 4, 6)
"""Tokens of the rows on which a model is tried."""


def rows(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return ids and mask of some rows of several lengths, (B, T) each: always the same of one vocabulary."""
    embedding: Any = model.get_input_embeddings()
    device, tried = embedding.weight.device, (*TRIED, *_beyond_windows(model))
    generator = torch.Generator().manual_seed(0)  # its own: training's is left alone
    ids = torch.randint(len(embedding.weight), (len(tried), max(tried)), generator=generator).to(device)
    return ids, (torch.arange(max(tried))[None] < torch.tensor(tried)[:, None]).long().to(device)


def rounding(found: Tensor) -> float:
    """Return how far apart, of their size, two ways to compute the same may end."""
    device = found.device.type
    dtypes = [torch.float32, found.dtype]  # norms and rotations of many models are fp32 in any dtype
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.6)


def _beyond_windows(model: Any) -> list[int]:
    """Return the length of a row in which some tokens are too far apart to see each other, if that can be."""
    window = max((getattr(model.config, name, None) or 0 for name in ("sliding_window", "local_attention")), default=0)
    longest = getattr(model.config, "max_position_embeddings", 2 * window + 9)
    return [min(2 * window + 9, longest)] if window else []


def unhook(model: nn.Module, ours: Callable[[Any], bool]) -> None:
    """Take from all parts of a model the hooks of which `ours` says so."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if ours(hook)]:
                del hooks[key]


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """While this lasts, nothing is dropped, learned or drawn."""
    training = base.training
    base.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        base.train(training)
