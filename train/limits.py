"""How much text a model takes at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
