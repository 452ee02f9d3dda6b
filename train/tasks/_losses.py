"""The loss of each token of a text that a model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.tasks.base import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**24  # logits put through the loss at once: 64 MB in fp32


def token_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy (B, T), 0 where the label is -100, of logits (B, T, V); half precision in fp32.

    Computed, and for the gradient computed again, in chunks of tokens: besides the logits and their gradient there is
    never a third tensor of their size. `smoothing` is the share of each target spread over the vocabulary.
    """
    import torch
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    def of(logits: Tensor, labels: Tensor) -> Tensor:
        exact = logits.float() if logits.dtype.itemsize < 4 else logits
        return functional.cross_entropy(
            exact, labels, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing
        )

    size = max(1, CHUNK // logits.shape[-1])
    chunks = zip(torch.split(logits.flatten(0, 1), size), torch.split(labels.flatten(), size), strict=True)
    parts = [checkpoint(of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(parts).view_as(labels)
