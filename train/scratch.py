"""A model from scratch: its kind and sizes from `model.config`, before there are weights."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KIND = "model_type"
ASKED = re.compile(r"""(?:getattr\(\s*config,|kwargs\.(?:pop|get)\()\s*["'](\w+)["']""")


def blank_config(settings: Mapping[str, Any], decided: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Return the config of a model from scratch: the defaults of `model_type` with `settings`, then `decided`, on top.

    Raises `UserError` for a kind, key or value that cannot be, with the nearest name: some config classes would keep
    a misspelt key without a word.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(settings[KIND])
    if kind not in CONFIG_MAPPING:
        raise UserError(f"model.config.{KIND}: transformers has no {kind!r}{nearest(kind, CONFIG_MAPPING)}")
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), *default.attribute_map, *_read_by_code(default)} - {KIND, "transformers_version"}
    given = {key: value for key, value in settings.items() if key != KIND}
    for key in given:
        if key not in known:
            raise UserError(f"model.config: {kind} has no such key {key!r}{nearest(key, known)}")
    try:
        return AutoConfig.for_model(kind, **{**given, **(decided or {})})
    except Exception as error:  # a wrong type, sizes that do not go together: many kinds
        raise UserError(f"model.config: no {kind} can be made from this: {' '.join(str(error).split())}") from error


def _read_by_code(config: PreTrainedConfig) -> set[str]:
    """Return the keys that the code of this kind asks for without naming them in its config class: half of what makes
    DeBERTa-v3 a v3, and the rhythm of ModernBERT's layers."""
    configuration = type(config).__module__
    found: set[str] = set()
    for module in (configuration, configuration.replace(".configuration_", ".modeling_")):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            found.update(ASKED.findall(Path(spec.origin).read_text(encoding="utf-8")))
    return found


def reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether models of this kind have an encoder, whose texts stand between two special tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return bool(getattr(config, "is_encoder_decoder", False)) or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
