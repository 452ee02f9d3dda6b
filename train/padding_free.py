"""Encoders that compute no padding: between their first and their last layer there are real tokens only.

Hooks around the stack of layers take (B, T, d) apart into (1, N, d), the N real tokens of the batch, and put it
together again; under autocast on a CPU they are M, with some zeros (see `ROUNDED`). The model's own code does not know.
Its embeddings are of real tokens too, where that gives the same; between the two are rows, of which it makes masks.
Attention is that of a kernel for rows of any lengths (`varlen`), or where there is none computed on padded rows, which
the other kernels need.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from train import row_attention, trial, varlen
from train.layers import stacks
from train.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME, FLAT = "padding_free", "padding_free_flat"
"""Of the attention on padded rows, and of that without, among those that transformers knows."""

COUNT = "real_tokens"
"""What a mask may say of itself: how many ones it has. Where it lies on a GPU, to count them is to wait."""

ROUNDED = 16
"""Under autocast on a CPU there are so many tokens or a multiple: zeros that nobody reads are added. For every size
that is new oneDNN makes kernels anew, and most updates of SST-2 would have a new one: to fill up saves 1 to 2 %.
"""


_named: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""The attention of each model."""

_layout: Layout | None = None
"""Of the batch that is being computed; None for one that has no padding."""


def layout() -> Layout | None:
    """Return where the real tokens are of the batch that is being computed; None for one that has no padding."""
    return _layout


def remembered() -> AbstractContextManager[None]:
    """Return a context in which the batch is known that is computed now: where layers are computed again later."""
    return nullcontext() if _layout is None else _again(_layout)


@contextmanager
def _again(known: Layout) -> Iterator[None]:
    global _layout
    before, asked, _layout = _layout, known.config._attn_implementation_internal, known
    known.config._attn_implementation_internal = known.attention
    try:
        yield
    finally:
        _layout, known.config._attn_implementation_internal = before, asked


def enable(model: PreTrainedModel) -> bool:
    """Let a model that writes no text compute real tokens only, if that is tried and gives the same; return whether.

    Not where layers are computed a second time in the backward pass by somebody who does not know the batch
    (`recomputation` does). Called under the autocast in which it will compute.
    """
    base: Any = model.base_model
    blocks = list(stacks(base))
    if _hindrance(model):
        return False
    _named[base] = FLAT if varlen.available(model) else NAME
    hooks, of_embeddings = _hook(base, list(blocks[0][1])), _hook_embeddings(base, list(blocks[0][1]))
    proved = bool(of_embeddings) and _proved(model, base)
    if not proved:  # of the shape of words DistilBERT makes positions, others look at the mask or at neighbours
        _remove(of_embeddings)
        proved = _proved(model, base)
    if not proved:
        _remove(hooks)
    return proved


def look_up_rows(model: nn.Module) -> None:
    """Let embeddings be of rows again: before a table is replaced by what looks up the ids itself."""
    trial.unhook(model, lambda hook: hook in (_look_up, _pad_embedded))


def obstacle(model: PreTrainedModel) -> str:
    """Return why `enable` has said no, and what is so instead: for who asked for it."""
    why = _hindrance(model) or f"tried on a few rows, a {type(model).__name__} does not give the same without padding"
    return why if _writes(model) else f"{why}, so padding is computed"


def _writes(model: Any) -> bool:
    config = model.config
    return bool(config.is_encoder_decoder or getattr(config, "is_decoder", False) or model.can_generate())


def _hindrance(model: Any) -> str:
    """Return why it need not be tried, or an empty text."""
    config, kind, count = model.config, type(model).__name__, len(list(stacks(model.base_model)))
    if _writes(model):  # with a cache
        return f"a {kind} writes text, and its task alone decides what is padded"
    if config._attn_implementation != "sdpa":
        own = config._attn_implementation
        return f"the attention of this {kind} is {own}, and padding is left out of PyTorch's own (sdpa) only"
    if _twice(model):
        return "the model's own gradient checkpointing is on; set activation_checkpointing: true instead of it"
    if count != 1:
        return f"a {kind} has {count} stacks of layers, not one"
    if model.device.type != "cpu" and not varlen.available(model):  # padded rows would be made again and again
        return f"on a GPU it takes {varlen.NEEDED}"
    return ""


def _twice(model: Any) -> bool:
    return any(
        getattr(module, "gradient_checkpointing", False)
        and not hasattr(module._gradient_checkpointing_func, "remembers")
        for module in model.modules()
    )


def _hook(base: nn.Module, blocks: list[nn.Module]) -> list[Any]:
    _register()
    hooks = [base.register_forward_pre_hook(_begin, with_kwargs=True),
             base.register_forward_hook(_end, always_call=True)]  # fmt: skip
    hooks += [block.register_forward_pre_hook(_flatten, with_kwargs=True) for block in blocks]
    return [*hooks, blocks[-1].register_forward_hook(_pad)]


def _hook_embeddings(base: nn.Module, blocks: list[nn.Module]) -> list[Any]:
    """Hook parts of the model that hold tables beside others, as norms and dropout, which then see real tokens only."""
    hooks = list[Any]()
    for child in base.children():
        inside = set(child.modules()) - {child}
        tables = [module for module in inside if isinstance(module, nn.Embedding)]
        if tables and inside.isdisjoint(blocks):
            hooks += [table.register_forward_pre_hook(_look_up) for table in tables]
            hooks.append(child.register_forward_hook(_pad_embedded))
    return hooks


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionInterface.register(FLAT, _flat_attention)  # without a mask
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _begin(base: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Note where the tokens are, if there is padding at all, and let the model ask for our attention."""
    global _layout
    known = inspect.signature(base.forward).bind_partial(*given, **named).arguments
    known.update(known.pop("kwargs", {}))
    mask, asked, by_ids = (known.get(name) for name in ("attention_mask", "output_hidden_states", "input_ids"))
    _layout = None
    if mask is None or mask.dim() != 2 or _twice(base):
        return
    if asked or base.config.output_hidden_states:  # of layers between, as rows
        return
    count = _known(mask)
    count = int(mask.sum()) if count is None else count
    size = _size(count, mask.device.type)
    some = count < mask.numel() or _named[base] == FLAT  # a batch without padding would be a graph of its own
    if count > 0 and some and mask.shape[1] not in (count, size):  # else what is flat would look like rows
        places = torch.nonzero_static(mask.flatten(), size=count).flatten()
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        groups = row_attention.group(mask) if mask.device.type == "cpu" else None
        _layout = Layout(len(mask), mask.shape[1], places, size, starts, groups, by_ids is not None, base.config,
                         _named[base])  # fmt: skip
        base.config._attn_implementation_internal = _named[base]


def _known(mask: Tensor) -> int | None:
    """Return how many ones a mask says that it has; or what it is a view of, all of it: multiple choice has (1, N, T),
    of which the model makes (N, T)."""
    whole: Any = mask if hasattr(mask, COUNT) or mask._base is None else mask._base
    all_of_it = mask.numel() == whole.numel() and mask.is_contiguous() and whole.is_contiguous()
    return getattr(whole, COUNT, None) if all_of_it else None


def _size(count: int, device: str) -> int:
    return -(-count // ROUNDED) * ROUNDED if device == "cpu" and torch.is_autocast_enabled(device) else count


def _end(base: Any, given: Any, output: Any) -> None:
    global _layout
    _layout = None
    base.config._attn_implementation_internal = "sdpa"


def _look_up(table: nn.Module, given: tuple[Any, ...]) -> Any:
    """(B or 1, T), or (T,) → (1, M)."""
    ids = given[0][None] if given[0].dim() == 1 else given[0]
    if _layout is None or not _layout.by_ids or ids.shape[1:] != (_layout.width,):
        return None
    return (_layout.flat(ids), *given[1:])


def _pad_embedded(embeddings: nn.Module, given: Any, output: Any) -> Any:
    """(1, M, d) → (B, T, d)."""
    return None if _layout is None or not _layout.by_ids else _pad(embeddings, given, output)


def _flatten(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Take apart what has a place for each token: hidden states before the first block, rotations before each."""
    if _layout is None:
        return None
    return tuple(map(_flattened, given)), {name: _flattened(value) for name, value in named.items()}


def _flattened(value: Any) -> Any:
    assert _layout is not None
    if isinstance(value, tuple):
        return tuple(map(_flattened, value))
    if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == _layout.width:
        return _layout.flat(value) if value.requires_grad else _layout.flat_once(value)
    return value


def _pad(block: nn.Module, given: Any, output: Any) -> Any:
    if _layout is None:
        return None
    return (_layout.padded(output[0]), *output[1:]) if isinstance(output, tuple) else _layout.padded(output)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """(1, heads, M, d) each → (1, M, heads, d)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout = _layout
    assert layout is not None
    if layout.groups is not None and row_attention.can(query, key, attention_mask, options):
        assert attention_mask is not None
        chosen = {"dropout": options.get("dropout", 0.0), "scaling": options.get("scaling")}
        return row_attention.attend(layout.groups, query, key, value, attention_mask, **chosen), None
    query, key, value = (layout.padded(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value))
    found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return layout.flat(found), None


def _flat_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """(1, heads, N, d) each → (1, N, heads, d). Of a decoder that classifies, to what is before."""
    layout = _layout
    assert layout is not None
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    causal = bool(getattr(module, "is_causal", False))
    return varlen.attend(query, key, value, layout.starts, layout.width, causal=causal, **options)[None], None


def _proved(model: PreTrainedModel, base: Any) -> bool:
    """Whether real tokens come out as they do with padding, and nothing comes out elsewhere."""
    ids, mask = trial.rows(model)
    with trial.evaluating(base):
        try:
            found = base(input_ids=ids, attention_mask=mask).last_hidden_state
            with _off(base):
                expected = base(input_ids=ids, attention_mask=mask).last_hidden_state
        except Exception:  # an attention of its own, an argument of another shape: many kinds
            return False
    real = mask.bool()
    apart, size = (found - expected)[real].abs().max(), expected[real].abs().max()
    untouched = bool((found[~real] != expected[~real]).any())  # else nothing was taken apart
    return bool(apart <= trial.rounding(expected) * size) and untouched


@contextmanager
def _off(base: Any) -> Iterator[None]:
    """Compute with padding."""
    hooks = base._forward_pre_hooks
    own = [key for key, hook in hooks.items() if hook is _begin]
    kept = {key: hooks.pop(key) for key in own}
    try:
        yield
    finally:
        hooks.update(kept)


HOOKS = (_begin, _end, _flatten, _pad, _look_up, _pad_embedded)
"""What is hung on a model."""
