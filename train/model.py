"""The pretrained model and its tokenizer: from a Hub name, a folder or a package; and back to a folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from data import package
from data.errors import UserError, nearest
from data.order import derive
from data.section import Section
from train.weights import digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelConfig(Section):
    """Which model learns."""

    path: str = Field(description="Hub name, folder, or package:NAME/path.")
    revision: str | None = Field(None, description="Revision on the Hub.")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Of model.safetensors; checked if given.")
    tokenizer: str | None = Field(None, description="Where the tokenizer is, if not beside the model.")
    config: dict[str, Any] = Field(default_factory=dict, description="Keys of the model's own config to change.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Read that code first.")


def load_tokenizer(settings: ModelConfig, token: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a padding token (its end token, where it has none of its own)."""
    from transformers import AutoTokenizer

    path = package.resolve(settings.tokenizer or settings.path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=settings.revision, trust_remote_code=settings.trust_remote_code, token=token
        )
    except (OSError, ValueError) as error:
        raise _unreachable("tokenizer", settings.tokenizer or settings.path, error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {settings.path} has neither a padding nor an end token; give it one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    settings: ModelConfig,
    model_class: str,
    from_task: dict[str, Any],
    *,
    dtype: torch.dtype,
    seed: int,
    token: str | None,
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model in `dtype` and the names of the parameters that are new, drawn from `seed` alone.

    Only safetensors are read, never pickles. Raises `UserError` with the remedy.
    """
    import torch
    import transformers

    path = package.resolve(settings.path)
    if settings.sha256:
        _check_hash(Path(path), settings.sha256)
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code, "token": token}
    torch.manual_seed(derive(seed, "model"))
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its report of new layers is ours
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(path, **source)
        for key, value in {**settings.config, **from_task}.items():
            if key in settings.config and not hasattr(config, key):
                raise UserError(f"model.config: {path} has no such key {key!r}{nearest(key, config.to_dict())}")
            setattr(config, key, value)
        model, report = getattr(transformers, model_class).from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
        )
    except UserError:
        raise
    except Exception as error:  # a damaged file, a size that does not fit, a config that cannot be: many kinds
        raise _unreachable("model", settings.path, error) from error
    return model, sorted(report["missing_keys"])


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the model can take; a tokenizer that sets no limit counts for nothing."""
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa counts positions from there
    return int(min(positions, tokenizer.model_max_length))


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str, state: Any) -> None:
    """Write model, tokenizer and card to `folder`: whole, or not at all; a folder of that name is replaced."""
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    model.save_pretrained(writing, state_dict=state)
    tokenizer.save_pretrained(writing)
    (writing / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(writing, folder)


def _check_hash(folder: Path, expected: str) -> None:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"model.sha256 is given, but {weights} is no local file; leave the key out for models of the Hub"
        )
    if (found := digest(weights)) != expected:
        raise UserError(f"{weights} is not the model that the config names: its sha256 is {found}, not {expected}")


def _unreachable(what: str, path: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"model.path: cannot load the {what} {path!r}: {reason} (looked from {Path.cwd()}; "
        "a Hub name needs the network; weights must be safetensors)"
    )
