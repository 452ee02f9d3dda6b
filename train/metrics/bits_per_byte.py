"""Bits per byte: what a language model needs to write down a text, whatever its tokenizer."""

from __future__ import annotations

import math
from typing import Final

from data.errors import UserError
from data.section import Section
from train.metrics._counting import Reals, total

KINDS: Final = ("next_tokens",)
TAKES: Final = "losses"
AGAINST: Final = "bytes"
HIGHER_IS_BETTER: Final = False


class Options(Section):
    """None."""


def compute(losses: Reals, sizes: Reals, options: Options) -> dict[str, float]:
    """Return {"bits_per_byte": 0.0 or more}: all losses (n,), in nats, over all sizes (n,), in bytes of UTF-8.

    Comparable between tokenizers, which perplexity is not (https://arxiv.org/abs/2101.00027, section 3.1). Where the
    tokenizer has no BOS token, nothing predicts a document's first token, and its bytes are left out.
    """
    size = total(sizes)
    if size <= 0:
        raise UserError("metric 'bits_per_byte': the texts hold no bytes; give a split that has some")
    return {"bits_per_byte": total(losses) / math.log(2) / size}
