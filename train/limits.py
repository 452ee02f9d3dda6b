"""How much text a model takes, of one example and of several at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.plan import Bounds

if TYPE_CHECKING:
    from torch import device
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CUT_OVERHEAD = {"cpu": 12, "cuda": 2048}
"""What one more micro-batch costs, in tokens that could be computed in that time; by kind of device."""

PADDING_FREE_OVERHEAD = {"cpu": 1000, "cuda": 2**20}
"""The same where padding costs next to nothing, and on a GPU nothing at all: a batch is cut only to bound it."""


def at_once(tokens: int, device: device, *, padding_free: bool) -> Bounds:
    """Return the bounds of micro-batches of at most so many tokens on a device."""
    costs = PADDING_FREE_OVERHEAD if padding_free else CUT_OVERHEAD
    return Bounds(tokens=tokens, overhead=costs.get(device.type, costs["cuda"]), padding_free=padding_free)


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the model can take; a model or tokenizer that sets no limit counts for nothing."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0
    if positions < 1 or not getattr(config, "position_biased_input", True):
        positions = 10**9  # DeBERTa-v3 knows only the distance between tokens, in buckets that have no end
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa counts positions from there
    return int(min(positions, tokenizer.model_max_length))


def longest_output(model: PreTrainedModel) -> int:
    """Return how many tokens the decoder of an encoder and decoder can write: one at each of its positions.

    One that knows only the distance between tokens (T5's) sets no limit.
    """
    config = model.config.get_text_config(decoder=True)
    names = ("max_decoder_position_embeddings", "max_position_embeddings")  # LED has one for each side
    positions = next((found for name in names if (found := getattr(config, name, None))), 0)
    return int(positions) if positions > 0 else 10**9
