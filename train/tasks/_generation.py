"""Writing texts: how the config says it, and the same from a model in evaluation and from the exported one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data.section import Section
from train.tasks.base import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn


class Generation(Section):
    """How a text is written: greedily, or with several beams."""

    beams: int = Field(1, ge=1, description="Texts followed at the same time; 1: greedily, the likeliest token each.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest text. Default: task.max_target_length, or twice the longest target looked at."
    )
    min_new_tokens: int = Field(0, ge=0, description="Shortest text.")
    length_penalty: float = Field(1.0, description="With beams: above 1 for longer texts, below for shorter ones.")
    no_repeat_ngram: int = Field(0, ge=0, description="No sequence of so many tokens is written twice; 0: any is.")

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.beams} beams" if self.beams > 1 else "the likeliest token each"

    def settle(self, model: nn.Module, tokenizer: Any, longest: int, *, inherits: bool) -> None:
        """Make it the model's own way to write, which is exported with it.

        `inherits`: the tokens that a pretrained model forces or suppresses stay.
        """
        from transformers import GenerationConfig

        own: Any = model.generation_config
        settings = {
            **(own.to_diff_dict() if inherits else {}),
            "max_new_tokens": self.max_new_tokens or longest,
            "min_new_tokens": self.min_new_tokens or None,
            "num_beams": self.beams,
            "do_sample": False,
            "length_penalty": self.length_penalty if self.beams > 1 else None,
            "early_stopping": self.beams > 1,
            "no_repeat_ngram_size": self.no_repeat_ngram or None,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": getattr(model.config, "decoder_start_token_id", None),
        }
        for name in ("max_length", "min_length", "temperature", "top_k", "top_p", "transformers_version"):
            settings.pop(name, None)
        model.generation_config = GenerationConfig(**settings)  # type: ignore[assignment, no-untyped-call]


def written(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the tokens that the model writes after (B, S), with the one that it begins with: (B, W), -100 behind EOS.

    On one process or several, but not where the weights themselves are shared out.
    """
    owner = getattr(model, "module", model)
    found: Tensor = owner.generate(input_ids=ids, attention_mask=mask)
    settings = owner.generation_config
    ended = (found[:, 1:] == settings.eos_token_id).long().cumsum(1)
    behind = (ended - (found[:, 1:] == settings.eos_token_id).long()) > 0
    found = found.clone()
    found[:, 1:][behind] = IGNORED
    return found


def texts(written: NDArray[np.int64], tokenizer: Any) -> list[str]:
    """Return the texts of tokens (n, W), -100 for none, without special tokens."""
    return [tokenizer.decode(ids[ids != IGNORED], skip_special_tokens=True).strip() for ids in written]
