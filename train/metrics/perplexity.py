"""Perplexity: how many tokens, equally likely, would be as hard to guess as the text was for the model."""

from __future__ import annotations

from typing import Final

import numpy as np

from data.section import Section
from train.metrics._counting import Reals, total

KINDS: Final = ("masked_tokens", "next_tokens")
TAKES: Final = "losses"
AGAINST: Final = "targets"
HIGHER_IS_BETTER: Final = False


class Options(Section):
    """None."""


def compute(losses: Reals, targets: Reals, options: Options) -> dict[str, float]:
    """Return {"perplexity": 1.0 or more}: exp(sum of all losses / number of all tokens), never a mean of means.

    losses: (n,) negative log likelihoods in nats, each summed over the tokens of an example; targets: (n,) how many
    tokens that were. inf where the exponential overflows, nan where a loss is nan.
    """
    with np.errstate(over="ignore"):
        return {"perplexity": float(np.exp(total(losses) / total(targets)))}
