"""Attention of packed rows by a kernel that knows where documents begin: on GPUs of NVIDIA, in half precision.

Where it is on, no mask of (T, T) is made, and a document is multiplied with itself only. The model's own code does not
know: the attention is one that transformers asks for by name, and what it needs goes through the layers as arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "documents"
"""Of the attention, among those that transformers knows."""

_sizes: Tensor | None = None
"""Of the documents of the rows that are being computed, (B, P)."""

_kernel: Any = None
"""`torch.nn.attention.varlen.varlen_attn`, once there is a model for it."""

_seen: list[nn.Module] | None = None
"""Where it is noted which modules attend by documents, while that is tried."""


@contextmanager
def known(sizes: Tensor) -> Iterator[None]:
    """While this lasts, rows (B, T) that the model is given hold documents of `sizes` (B, P), then padding.

    It matters where `enable` has been called with success, and nowhere else.
    """
    global _sizes
    _sizes = sizes
    try:
        yield
    finally:
        _sizes = None


def offsets(sizes: Tensor, width: int) -> Tensor:
    """Return int32 (B x (P + 1) + 1): where each document begins if rows of `width` lie one after the other.

    Documents of size 0 are there too, and what is behind the last of a row, padding, is one more: so that the shape
    says nothing of the values, for which the host would have to wait.
    """
    import torch

    rows = torch.arange(len(sizes), device=sizes.device)[:, None]
    ends = torch.cat([rows * width + sizes.cumsum(1), (rows + 1) * width], dim=1).flatten()
    return torch.cat([ends.new_zeros(1), ends]).int()


def enable(model: Any) -> bool:
    """Let a model attend by documents, if its layers pass on what that takes; return whether.

    What is proved of packing afterwards is proved of this: it is the caller's to do. Called under the autocast in which
    the model will compute.
    """
    if not _can(model):
        return False
    _register()
    model.set_attn_implementation(NAME)
    model.base_model.register_forward_pre_hook(_begin, with_kwargs=True)
    if _reached(model):
        return True
    disable(model)
    return False


def disable(model: Any) -> None:
    """Let it attend as it did before."""
    model.set_attn_implementation("sdpa")
    hooks = model.base_model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _begin]:
        del hooks[key]


def _can(model: Any) -> bool:
    """Half precision, and the kernel that PyTorch has from 2.11 on, in this form; nothing that it does not know."""
    import torch

    device, config = model.device, model.config.get_text_config()
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype
    drops = any(
        getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    )
    if dtype not in (torch.bfloat16, torch.float16) or drops or config._attn_implementation != "sdpa":
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    global _kernel
    _kernel = varlen_attn
    return {"window_size", "enable_gqa", "scale"} <= {*inspect.signature(varlen_attn).parameters}


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for calls that know nothing of documents: texts are written so


def _reached(model: Any) -> bool:
    """Whether what goes in at the front comes out in every layer."""
    import torch

    global _seen
    training, _seen = model.training, []
    model.eval()
    try:
        ids = torch.zeros(2, 8, dtype=torch.long, device=model.device)
        with torch.no_grad(), known(ids.new_tensor([[3, 4], [8, 0]])):
            model(input_ids=ids, use_cache=False)
        return bool(len({*_seen}) == model.config.get_text_config().num_hidden_layers)
    except Exception:  # an argument that a layer does not know, an attention of its own: many kinds
        return False
    finally:
        _seen = None
        model.train(training)


def _begin(base: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Add where documents begin; and a mask of four dimensions, which transformers takes for one already made."""
    if _sizes is None:
        return None
    ids = named["input_ids"] if "input_ids" in named else given[0]
    made = ids.new_ones(1, 1, 1, 1).bool()
    return given, {**named, "attention_mask": made, "cu_seq_lens_q": offsets(_sizes, ids.shape[1])}


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents. query: (B, heads, T, d), key and value: (B, fewer heads, T, d) → (B, T, …).

    Without `cu_seq_lens_q`, as any model attends. Raises `ValueError` for what the kernel does not know.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found, None
    return _apart(module, query, key, value, cu_seq_lens_q, **options), None


def _apart(
    module: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *, dropout: float = 0.0, **options: Any
) -> Tensor:
    if _seen is not None:
        _seen.append(module)
    strange = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if dropout or strange or not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise ValueError(f"attention by documents knows no {', '.join(strange) or 'dropout, and only looks back'}")
    (rows, heads, width, size), window = query.shape, options.get("sliding_window")
    query, key, value = (
        each.transpose(1, 2).reshape(rows * width, -1, size).to(value.dtype) for each in (query, key, value)
    )
    found: Any = _kernel(
        query, key, value, starts, starts, width, width,
        scale=options.get("scaling"), window_size=(window - 1 if window else -1, 0), enable_gqa=heads != key.shape[1],
    )  # fmt: skip
    return found.view(rows, width, heads, size)  # type: ignore[no-any-return]
