"""The frozen linear layers of a model in 4 or 8 bits, with bitsandbytes: QLoRA, https://arxiv.org/abs/2305.14314."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from train.adapter import frozen_layers
from train.adapter_config import AdapterConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def quantize(
    model: PreTrainedModel, settings: AdapterConfig, new: Collection[str], device: torch.device, precision: str
) -> None:
    """Replace the linear layers that will not learn by quantized ones, on `device`, if the settings ask for it.

    Embeddings, the output layer, norms and what is new stay as they are. Raises `UserError` with the remedy where
    bitsandbytes is missing or does not run.
    """
    import torch

    if settings.quantize is None:
        return
    try:
        import bitsandbytes
    except Exception as error:  # missing, or made for another CUDA: several kinds
        raise UserError(
            f"adapter.quantize: {settings.quantize} needs bitsandbytes, which cannot be imported ({error}). Install it "
            "(pip install 'lockstep[quantization]'), or leave the key out"
        ) from error
    layers = {
        name: layer
        for name, layer in frozen_layers(model, new, settings.also_train).items()
        if isinstance(layer, torch.nn.Linear)
    }
    if not layers:
        raise UserError(
            f"adapter.quantize: a {type(model).__name__} has no linear layers that could be quantized; leave it out"
        )
    computes = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    try:
        for name, layer in layers.items():
            made = _quantized(bitsandbytes.nn, layer, settings.quantize, computes).to(device)
            with torch.no_grad():
                made(torch.zeros(1, layer.in_features, device=device, dtype=computes))
            model.set_submodule(name, made)
    except Exception as error:  # no kernel for this device, a size that it does not take: several kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"adapter.quantize: bitsandbytes {bitsandbytes.__version__} cannot hold {name} in {settings.quantize} on "
            f"{device}: {reason}. Leave the key out, or run on another device"
        ) from error
    setattr(model, f"is_loaded_in_{settings.quantize}", True)  # peft asks for it


def _quantized(kinds: Any, layer: torch.nn.Linear, bits: str, computes: torch.dtype) -> torch.nn.Module:
    """Return a layer that is quantized as it moves to its device."""
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    made: Any
    if bits == "4bit":
        made = kinds.Linear4bit(*sizes, bias=bias, compute_dtype=computes, quant_type="nf4")
        made.weight = kinds.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    else:
        made = kinds.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0)
        made.weight = kinds.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made  # type: ignore[no-any-return]
