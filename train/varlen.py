"""Attention of sequences of any lengths that lie one after the other: PyTorch's kernel for GPUs of NVIDIA."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""As configs of models call it."""

UNKNOWN = ("softcap", "s_aux", "position_bias", "attention_bias")
"""What some models ask of attention, and the kernel does not know."""

NEEDED = (
    "one of NVIDIA of compute capability 8.0 or more, PyTorch 2.11 or newer, precision bf16 or fp16, and attention "
    f"without dropout (in model.config, as far as there is one: {', '.join(f'{name}: 0' for name in DROPOUT)})"
)
"""What has to be there for it, to be said to users."""

_kernel: Any = None
"""`torch.nn.attention.varlen.varlen_attn`, once there is a model for it."""

_asks_for_groups = False
"""Whether it must be told where there are fewer keys than queries: from PyTorch 2.12 on."""


def available(model: Any) -> bool:
    """Whether `model` may attend so: on such a GPU, in half precision, without dropout of attention.

    Called under the autocast in which it will compute.
    """
    import torch

    global _kernel, _asks_for_groups
    device, config = model.device, model.config.get_text_config()
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype
    if dtype not in (torch.bfloat16, torch.float16) or any(getattr(config, name, 0) for name in DROPOUT):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    parameters = inspect.signature(varlen_attn).parameters
    _kernel, _asks_for_groups = varlen_attn, "enable_gqa" in parameters
    return "window_size" in parameters  # from PyTorch 2.11 on


def attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, *, causal: bool, **options: Any
) -> Tensor:
    """Return the attention within each of S sequences, (N, heads, d).

    query (N, heads, d); key and value (N, as many or fewer heads, d); starts, int32 (S + 1), from 0 to N; no sequence
    is longer than `longest`. `options` are those that transformers gives to any attention: `scaling`;
    `sliding_window`, how far a token sees, itself counted, back and, where it is not causal, ahead. Raises `ValueError`
    for what the kernel does not know.
    """
    strange = [name for name in UNKNOWN if options.get(name) is not None]
    if options.get("dropout") or strange or options.get("is_causal") not in (None, causal):
        raise ValueError(f"attention by this kernel knows no {', '.join(strange) or 'dropout, no other direction'}")
    window = options.get("sliding_window")
    far = window - 1 if window else -1
    groups = {"enable_gqa": True} if _asks_for_groups and query.shape[1] != key.shape[1] else {}
    found: Tensor = _kernel(
        query.to(value.dtype), key.to(value.dtype), value, starts, starts, longest, longest,
        scale=options.get("scaling"), window_size=(far, 0 if causal else far), **groups,
    )  # fmt: skip
    return found
