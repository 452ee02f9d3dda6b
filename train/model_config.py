"""What the config says of the model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from data.section import Section
from data.tokenizer_training import TokenizerTraining
from train.scratch import KIND


def _different(tokens: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [token for place, token in enumerate(tokens) if token in tokens[:place]]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return tokens


class TrainedTokenizer(Section):
    """A tokenizer that is made from the training rows."""

    train: TokenizerTraining = Field(description="Kind, size and text of the tokenizer.")


class ModelConfig(Section):
    """Which model learns: one that has learned already (path), or one from scratch (config.model_type)."""

    path: str | None = Field(
        None, description="Hub name, folder (of an adapter, too), or package:NAME/path; none for one from scratch."
    )
    revision: str | None = Field(None, description="Revision on the Hub.")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Of model.safetensors; checked if given.")
    tokenizer: str | TrainedTokenizer | None = Field(
        None, description="Where the tokenizer is, if not beside the model; or {train: ...}: made from the rows."
    )
    add_tokens: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AfterValidator(_different)] = Field(
        (), description="Texts that become tokens of their own; they begin as the mean of the others."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="Keys of the model's own config to change; all of them, from scratch."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Read that code first.")

    @property
    def origin(self) -> str:
        """What the model comes from, in words."""
        return self.path or f"from scratch ({self.config.get(KIND)})"


def between(section: Any) -> Iterator[str]:
    """Yield what is wrong between the keys that say what the model is. The section is not checked: anything may be in
    it."""
    if not isinstance(section, Mapping):
        return
    path, settings, tokenizer = section.get("path"), section.get("config"), section.get("tokenizer")
    kind = settings.get(KIND) if isinstance(settings, Mapping) else None
    if path is None and kind is None:
        yield (
            "model.path: must be given: a Hub name, a folder or package:NAME/path; or, for a model from scratch, "
            "model.config.model_type, such as gpt2"
        )
    elif path is not None and kind is not None:
        yield "model.path, model.config.model_type: give one of them: a model that has learned, or one from scratch"
    elif kind is not None and tokenizer is None:
        yield (
            "model.tokenizer: must be given for a model from scratch: a path, or {train: {kind: bpe}} to make one from "
            "data.train"
        )
    elif kind is not None and section.get("sha256") is not None:
        yield "model.sha256: cannot take effect: a model from scratch (model.config.model_type) has no file"
    elif kind is None and tokenizer is not None and not isinstance(tokenizer, str):
        yield (
            "model.tokenizer: cannot be made for model.path, whose weights know the tokens of their own one; leave it "
            "out, add to it with model.add_tokens, or begin from scratch with model.config.model_type"
        )
