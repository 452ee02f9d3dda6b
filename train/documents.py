"""Attention of packed rows by a kernel that knows where documents begin: on GPUs of NVIDIA, in half precision.

Where it is on, no mask of (T, T) is made, and a document is multiplied with itself only. The model's own code does not
know: the attention is one that transformers asks for by name, and what it needs goes through the layers as arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from train import varlen

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "documents"
"""Of the attention, among those that transformers knows."""

LONGEST = "longest"
"""What sizes may say of themselves: how many tokens no document has more than. Where they lie on a GPU, to look is to
wait."""

_sizes: Tensor | None = None
"""Of the documents of the rows that are being computed, (B, P)."""

_most: int | None = None
"""How many tokens none of them has more than, as far as that is known."""

_seen: dict[nn.Module, int | None] | None = None
"""Where it is noted which modules attend by documents, and within what window, while that is tried."""

HARMLESS = ("sliding_window", "sliding_window_pattern", "max_window_layers", "chunk_size_feed_forward")
"""Numbers of configs whose names speak of windows or chunks, and that say nothing of masks, or are looked at."""


@contextmanager
def known(sizes: Tensor, most: int | None = None) -> Iterator[None]:
    """While this lasts, rows (B, T) that the model is given hold documents of `sizes` (B, P), then padding.

    It matters where `enable` has been called with success, and nowhere else. In every document the kernel looks for as
    many tokens as none has more than: `most`, or what `sizes` say (`LONGEST`), or as a row has. Of chats of up to 2,048
    in rows of 4,096 the backward pass takes 3.13 ms a layer where it is told, else 3.78 (32,768 tokens, H200).
    """
    global _sizes, _most
    _sizes, _most = sizes, getattr(sizes, LONGEST, None) if most is None else most
    try:
        yield
    finally:
        _sizes = _most = None


def offsets(sizes: Tensor, width: int) -> Tensor:
    """Return int32 (B x (P + 1) + 1): where each document begins if rows of `width` lie one after the other.

    Documents of size 0 are there too, and what is behind the last of a row, padding, is one more: so that the shape
    says nothing of the values, for which the host would have to wait.
    """
    import torch

    rows = torch.arange(len(sizes), device=sizes.device)[:, None]
    ends = torch.cat([rows * width + sizes.cumsum(1), (rows + 1) * width], dim=1).flatten()
    return torch.cat([ends.new_zeros(1), ends]).int()


def longest(sizes: Tensor, width: int) -> int:
    """Return the tokens of the longest document, or of what is behind the last of a row, if that is longer."""
    return int(max(sizes.max(), width - sizes.sum(1).min()))


def enable(model: Any) -> bool:
    """Let a model attend by documents, if its layers pass on what that takes; return whether.

    What is proved of packing afterwards is proved of this: it is the caller's to do. Called under the autocast in which
    the model will compute.
    """
    if model.config._attn_implementation != "sdpa" or not varlen.available(model):
        return False
    _register()
    model.set_attn_implementation(NAME)
    model.base_model.register_forward_pre_hook(_begin, with_kwargs=True)
    if _reached(model):
        return True
    disable(model)
    return False


def enabled(model: Any) -> bool:
    """Whether `enable` had success for it: for a model, or what a strategy makes of it."""
    inner = getattr(model, "module", model)
    return bool(inner.config._attn_implementation == NAME)


def disable(model: Any) -> None:
    """Let it attend as it did before."""
    model.set_attn_implementation("sdpa")
    hooks = model.base_model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _begin]:
        del hooks[key]


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for calls that know nothing of documents: texts are written so


def _reached(model: Any) -> bool:
    """Whether what goes in at the front comes out in every layer."""
    import torch

    global _seen
    training, _seen = model.training, {}
    model.eval()
    try:
        ids = torch.zeros(2, 8, dtype=torch.long, device=model.device)
        with torch.no_grad(), known(ids.new_tensor([[3, 4], [8, 0]])):
            model(input_ids=ids, use_cache=False)
        return _all_said(model.config.get_text_config(), list(_seen.values()))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an argument that a layer does not know, an attention of its own: many kinds
        return False
    finally:
        _seen = None
        model.train(training)


def _all_said(config: Any, windows: list[int | None]) -> bool:
    """Whether every layer was seen, and with its window as an argument: what stands in a mask alone is not known here.

    windows: of each layer that was seen, None for all that is before.
    """
    for name, value in vars(config).items():
        speaks = ("window" in name or "chunk" in name) and name not in HARMLESS
        if speaks and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return False
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    wanted = 0 if not window else kinds.count("sliding_attention") if kinds else config.num_hidden_layers
    return len(windows) == config.num_hidden_layers and sum(each is not None for each in windows) == wanted


def _begin(base: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Add where documents begin; and a mask of four dimensions, which transformers takes for one already made."""
    if _sizes is None:
        return None
    ids = named["input_ids"] if "input_ids" in named else given[0]
    made = ids.new_ones(1, 1, 1, 1).bool()
    width = ids.shape[1]
    added = {"cu_seq_lens_q": offsets(_sizes, width), "max_length_q": width if _most is None else _most}
    return given, {**named, "attention_mask": made, **added}


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents. query: (B, heads, T, d), key and value: (B, fewer heads, T, d) → (B, T, …).

    Without `cu_seq_lens_q`, as any model attends. Raises `ValueError` for what the kernel does not know.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found, None
    if _seen is not None:
        _seen[module] = options.get("sliding_window")
    if not getattr(module, "is_causal", True):
        raise ValueError("attention by documents only looks back")
    rows, _, width, size = query.shape
    query, key, value = (each.transpose(1, 2).reshape(rows * width, -1, size) for each in (query, key, value))
    found = varlen.attend(query, key, value, cu_seq_lens_q, max_length_q, causal=True, **options)
    return found.view(rows, width, -1, size), None
