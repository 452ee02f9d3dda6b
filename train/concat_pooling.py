"""Concat pooling, the classifier's input in ULMFiT (https://arxiv.org/abs/1801.06146, section 3.3), on any backbone.

This file is exported with each model that it makes, so that transformers can load them anywhere, told
`trust_remote_code=True`: it imports nothing of ours.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

DROPOUTS = (
    "classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "cls_dropout",  # of a head
    "hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "dropout",  # of layers
)  # fmt: skip
"""Where configs say how much dropout there is before the output layer: the first that is set counts."""


class ConcatPoolingConfig(PreTrainedConfig):
    """The backbone's config as `text_config`, and which token stands for the whole text: "first" or "last"."""

    model_type = "concat_pooling"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # so transformers has it

    def __init__(self, text_config: Any = None, token: str = "first", **others: Any) -> None:
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        self.token = token
        super().__init__(**others)

    @classmethod
    def around(cls, backbone: PreTrainedConfig) -> ConcatPoolingConfig:
        """Return the config of a head on this backbone, which hands its labels over.

        A decoder sums a text up in its last token, an encoder in its first. Raises `ValueError` for a backbone that
        cannot have this head.
        """
        kind = backbone.model_type
        if backbone.is_encoder_decoder or type(backbone).__module__.startswith("transformers_modules."):
            why = "is an encoder and a decoder" if backbone.is_encoder_decoder else "is defined by code of its own"
            raise ValueError(f"concat pooling is not for a {kind}, which {why}")
        last = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        last = last or getattr(backbone, "is_decoder", False)
        labels = {name: getattr(backbone, name) for name in ("id2label", "label2id", "problem_type")}
        backbone.id2label, backbone.problem_type = None, None
        backbone.num_labels = 2  # as in any backbone
        if hasattr(backbone, "use_cache"):
            backbone.use_cache = False  # nothing is generated
        return cls(backbone, "last" if last else "first", **labels)


class ConcatPoolingForSequenceClassification(PreTrainedModel):
    """A backbone, and a linear layer on [first or last state, maximum, mean] of the text's tokens."""

    config_class = ConcatPoolingConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # What the backbone can do, it is asked itself.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: ConcatPoolingConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.backbone = backbone or AutoModel.from_config(config.text_config)
        config.text_config = self.backbone.config
        config.text_config.name_or_path = ""  # where it once lay is nobody's business
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = None  # parameters without a gradient stop distributed training
        text = config.text_config.get_text_config()
        given = (getattr(text, name, None) for name in DROPOUTS)
        self.dropout = nn.Dropout(next((float(share) for share in given if share is not None), 0.0))
        self.classifier = nn.Linear(3 * text.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ConcatPoolingForSequenceClassification:
        """Return the head on a new backbone of this config, all of it random."""
        return cls(ConcatPoolingConfig.around(config))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Return the model saved there, or a new head on the backbone there, whatever other head it has.

        `config` is of the one or the other. With `output_loading_info=True` also {"missing_keys": what is new, ...}.
        """
        path = pretrained_model_name_or_path
        if config is None or isinstance(config, ConcatPoolingConfig):
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        told = kwargs.pop("output_loading_info", False)
        around = ConcatPoolingConfig.around(config)
        backbone, report = AutoModel.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
        model = cls(around, backbone)
        model.classifier.to(backbone.dtype)  # drawn in float32 whatever it computes in
        there = {f"backbone.{name}" for name in report["missing_keys"]} & model.state_dict().keys()
        report["missing_keys"] = there | {f"classifier.{name}" for name, _ in model.classifier.named_parameters()}
        return (model, report) if told else model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> SequenceClassifierOutput:
        """Return logits (B, labels) of `input_ids` (B, T); the loss too where `labels` (B,) or (B, labels) are given.

        Where `attention_mask` (B, T) is 0 there is padding, on whichever side: it changes nothing. It is moved to the
        right, where no backbone counts it as positions.
        """
        inputs = {"input_ids": input_ids}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            mask, order = attention_mask.sort(dim=1, descending=True, stable=True)
            inputs = {name: tensor.gather(1, order) for name, tensor in inputs.items()}
            inputs["attention_mask"], real = mask, mask.bool()
        found = self.backbone(**inputs, **others)
        pooled = pool(found.last_hidden_state, real, last=self.config.token == "last")
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(found, "hidden_states", None),
            attentions=getattr(found, "attentions", None),
        )


def pool(states: Tensor, real: Tensor, *, last: bool) -> Tensor:
    """Return [first or last state, maximum, mean], (B, 3 H), of states (B, T, H) where `real` (B, T), which is left."""
    count = real.sum(1)
    place = count - 1 if last else torch.zeros_like(count)
    one = states[torch.arange(len(states), device=states.device), place]
    padding = ~real.unsqueeze(2)
    highest = states.masked_fill(padding, -torch.inf).amax(1)
    mean = states.masked_fill(padding, 0.0).sum(1) / count.unsqueeze(1)
    return torch.cat((one, highest, mean), 1)


# What is saved says where its classes are, and this file goes with it.
ConcatPoolingConfig.register_for_auto_class()
ConcatPoolingForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
