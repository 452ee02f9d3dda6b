"""Activation checkpointing: layers keep their inputs alone, and are computed again in the backward pass.

Chen et al., https://arxiv.org/abs/1604.06174. It costs a second forward pass of the layers, a quarter of an update and
more, so it is for what would not fit into memory otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.errors import UserError
from train import padding_free

if TYPE_CHECKING:
    from torch.optim import Optimizer

Choice = Literal["auto"] | bool

USABLE = 0.8
"""The part of a device's memory that is counted on: the rest is what is there for a moment, and what lies between."""

_said: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""What was decided of each model, and why."""


@dataclass(frozen=True)
class Kept:
    """What a forward pass keeps for its backward pass."""

    tokens: int
    size: float
    """Bytes."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that training takes on one device."""

    weights: int
    """Weights and buffers, gradients and the optimizer's states."""
    fixed: float
    """What a micro-batch keeps whatever its size: weights cast by autocast."""
    per_token: float
    """Infinite where a few rows were too many."""
    tokens: int
    """Tokens of the largest micro-batch."""

    @property
    def activations(self) -> float:
        """What the largest micro-batch keeps."""
        return self.fixed + self.per_token * self.tokens

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.activations


def estimate(model: nn.Module, optimizer: Optimizer, fewer: Kept, more: Kept, tokens: int, shares: int = 1) -> Estimate:
    """Estimate what training takes with `tokens` at once, from what two smaller micro-batches were seen to keep.

    M = (W + G + O) / shares + F + A x tokens. W: weights and buffers as they are held; G: a gradient for each weight
    that learns, of its type; O: the optimizer's states, two such for AdamW (see also `few_bytes`), one for SGD with
    momentum. A and F are
    slope and origin of the line through the two: what a layer keeps is linear in tokens, s x b x h x (34 + 5 a s / h)
    bytes in Korthikanti et al., https://arxiv.org/abs/2205.05198, section 4.1; the term in s², of attention without a
    fused kernel, counts as for rows like these. `shares`: processes that hold the model together.
    """
    every = [*model.parameters(), *model.buffers()]
    learning = [each for each in model.parameters() if each.requires_grad]
    states = 2 if "betas" in optimizer.defaults else bool(optimizer.defaults.get("momentum"))
    remembered: Callable[[Tensor], float] = getattr(optimizer, "bytes_of", lambda each: states * _size(each))
    apart = more.tokens - fewer.tokens
    per_token = (more.size - fewer.size) / apart if apart > 0 else more.size / more.tokens
    return Estimate(
        weights=int(sum(map(_size, every)) + sum(_size(each) + remembered(each) for each in learning)) // shares,
        fixed=max(0, fewer.size - per_token * fewer.tokens),
        per_token=per_token,
        tokens=tokens,
    )


def kept(model: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes that `forward()` keeps for a backward pass, weights as they are left out: in training, where
    dropout keeps something too."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it, for good

    training = model.training
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = forward()  # as long as it is there, so is what was kept, and no memory is two tensors'
    finally:
        model.train(training)
    del result
    return sum(found.values())


def choose(model: Any, choice: Choice, *, memory: int, needed: Callable[[], Estimate] | None) -> bool:
    """Let the layers of a model be computed twice, if that is asked for, or with "auto" if memory would not suffice.

    memory: bytes of the device's. `needed` is asked with "auto" alone; None where that never does it (on a CPU). Raises
    `UserError` where it is asked for and cannot be.
    """
    if choice is True:
        if not able(model):
            raise UserError(
                f"activation_checkpointing: transformers cannot compute the layers of a {_name(model)} twice; leave it "
                "out, and lower micro_batch_tokens or data.max_length"
            )
        _said[model] = "layers are computed again in the backward pass, as asked"
    elif choice is False or needed is None or not able(model):
        return False
    else:
        found = needed()
        twice = found.total > USABLE * memory
        size = "more than the" if math.isinf(found.total) else f"about {found.total / 1e9:,.1f} GB"
        _said[model] = (
            f"{size} of {memory / 1e9:,.1f} GB with {found.tokens:,} tokens at once: "
            f"{'layers are computed again in the backward pass' if twice else 'activations are kept'}"
        )
        if not twice:
            return False
    _enable(model)
    return True


def describe(model: nn.Module) -> str:
    """Return what was decided, and why; "" where there was nothing to decide."""
    return _said.get(model, "")


def able(model: Any) -> bool:
    """Whether the model's layers are of the kind that transformers computes twice."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    inner = _inner(model)
    return getattr(inner, "supports_gradient_checkpointing", False) and any(
        isinstance(module, GradientCheckpointingLayer) for module in inner.modules()
    )


def _enable(model: Any) -> None:
    """Switch it on as transformers does, but for two habits that its older way of computing twice needs.

    Inputs need not require a gradient: beneath the first layer that learns the backward pass would go on for nothing.
    And what lies within a layer is not told: T5's attention would let a mask learn, and so take another kernel.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = list(_inner(model).modules())
    layers = {module for module in modules if isinstance(module, GradientCheckpointingLayer)}
    within = {part for layer in layers for part in layer.modules()} - layers
    for module in modules:
        if hasattr(module, "gradient_checkpointing") and module not in within:
            module.gradient_checkpointing, module._gradient_checkpointing_func = True, _again


def _again(function: Callable[..., Any], *given: Any) -> Any:
    """Compute a layer, and again in the backward pass: with the same dropout, autocast, and knowledge of the batch."""
    return checkpoint(function, *given, use_reentrant=False, context_fn=_contexts)


_again.remembers = True  # type: ignore[attr-defined]  # see padding_free


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), padding_free.remembered()


def _inner(model: Any) -> Any:
    """Return the model inside of an adapter's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name(model: Any) -> str:
    return type(_inner(model)).__name__


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
