"""Where a new output layer begins: at what is best said of every row alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn


def log_odds(
    counts: Sequence[int], rows: int, smoothing: float = 0.0, weights: Sequence[float] | None = None
) -> list[float]:
    """Return the logit of each label at which the loss of labels given `counts` times in `rows` rows is least."""
    shares = (np.array(counts) + 0.5) / (rows + 1)  # a label that no row or every row has is finite too
    shares = shares * (1 - smoothing) + smoothing / 2
    odds = shares / (1 - shares) * np.array(weights if weights is not None else 1.0)
    return [float(odd) for odd in np.log(odds)]


def begin_at(model: nn.Module, fresh: Collection[str], outputs: Sequence[float]) -> None:
    """Set the bias of the output layer, if there is one and it is new, so that the model begins at `outputs` (L,).

    A rate of 1e-4 moves a bias by 1e-4 an update: what lies far from 0 is reached sooner by a body that makes every
    text the same, and a pretrained model has then forgotten what it knew. 28 labels, each on one row of 25, did that to
    MiniLM. (For rare classes: https://arxiv.org/abs/1708.02002, section 4.1.)
    """
    import torch

    there = [
        parameter
        for name, parameter in model.named_parameters()
        if name in fresh and name.endswith("bias") and parameter.shape == (len(outputs),)
    ]
    if there:
        with torch.no_grad():
            there[-1].copy_(torch.tensor(outputs, dtype=torch.float64))
