"""Weights of linear layers in bf16, kept beside those in fp32 that they are rounded from: on CPUs under autocast.

Autocast rounds them anew in every micro-batch and lets their gradients be fp32 at once, so that all of them pass
through memory once more in an update. Here an optimizer that knows of them (`adamw`) rounds each piece of the weights
as it moves it, and reads gradients in bf16. The numbers are the same, but for a weight with which a model works in
several ways or calls in one micro-batch, whose gradients autocast adds up otherwise.

Who writes to a weight through `.data`, of which PyTorch tells nobody, is seen after the next update only: so it is not
for models that bring code of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.layers import is_compiled

HALF = torch.bfloat16


class Linear(nn.Linear):
    """`nn.Linear`, under autocast of its kept weights."""

    halves: tuple[Half, Half | None]

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != HALF:
            return super().forward(input)
        weight, bias = self.halves
        return functional.linear(input, weight.of(self.weight), None if bias is None else bias.of(self.bias))


@dataclass(eq=False)
class Half:
    """One parameter, rounded."""

    rounded: Tensor | None = None
    """A leaf of its own, whose gradient is that of the parameter; None before it is needed."""
    version: int = -1
    """Of the parameter's values."""

    def of(self, parameter: Tensor) -> Tensor:
        """Return the parameter as it is now: what others than the optimizer have changed since is rounded anew."""
        if self.rounded is None:
            self.rounded = torch.empty_like(parameter, dtype=HALF, requires_grad=True)
        if self.version != parameter._version:
            with torch.no_grad():
                self.rounded.copy_(parameter)
            self.version = parameter._version
        return self.rounded

    def clear(self) -> None:
        """Drop a gradient that nobody has collected."""
        if self.rounded is not None:
            self.rounded.grad = None

    def __deepcopy__(self, memo: Any) -> Half:
        """Of a copied parameter, whose versions are counted anew: nothing yet."""
        return Half()


@dataclass(frozen=True)
class Halves:
    """What is kept, by parameter."""

    kept: dict[nn.Parameter, Half] = field(default_factory=dict)

    def rounded(self, parameter: nn.Parameter) -> Tensor | None:
        """Return what is kept of a parameter, as values that may be written; None where nothing is."""
        half = self.kept.get(parameter)
        return None if half is None or half.rounded is None else half.rounded.detach()

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Surround forward and backward pass of a micro-batch, whose gradients are those of the parameters afterwards.

        last: whether no other will follow in this update. Then gradients may stay in bf16; those of several are added
        up in fp32. Of one that fails nothing stays.
        """
        try:
            self._clear()
            yield
            self._collect(last=last)
        except BaseException:
            self._clear()
            raise

    def _clear(self) -> None:
        for half in self.kept.values():
            half.clear()

    def _collect(self, *, last: bool) -> None:
        for parameter, half in self.kept.items():
            if half.rounded is None or half.rounded.grad is None:
                continue
            grad, half.rounded.grad = half.rounded.grad, None
            if parameter.grad is not None:  # of micro-batches before, or of some other use
                parameter.grad += grad
            else:
                parameter.grad = grad if last else grad.float()


def keep(model: nn.Module) -> Halves:
    """Keep the weights of a model's linear layers that learn in fp32 on a CPU, but for those that are others' too.

    Not of a model that is compiled, whose graphs would be made anew in every update, nor of one with code of its own;
    and not of an output layer that gives losses (`output_layer`), which has its own way to round.
    """
    modules = list(model.modules())
    own_code = any(type(module).__module__.startswith("transformers_modules") for module in modules)
    if own_code or any(map(is_compiled, modules)):
        return Halves()
    owners = [id(each) for module in modules for each in module.parameters(recurse=False)]
    found: dict[nn.Parameter, Half] = {}
    for module in modules:
        own = dict(module.named_parameters(recurse=False))
        if _linear(module) and all(_can(each) and owners.count(id(each)) == 1 for each in own.values()):
            layer = cast("Linear", module)
            layer.__class__, layer.halves = Linear, (Half(), Half() if "bias" in own else None)
            found.update({each: half for each, half in zip(own.values(), layer.halves, strict=False) if half})
    for parameter in found:
        parameter.grad_dtype = None  # it may have a gradient in bf16
    return Halves(found)


def _linear(module: nn.Module) -> bool:
    """Whether it is a linear layer as PyTorch makes it: no norm of its weight, no mask, no hook that answers for it."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    answered = any(hook.__module__ == "train.output_layer" for hook in module._forward_pre_hooks.values())
    return type(module) in (nn.Linear, Linear) and own in (["weight"], ["weight", "bias"]) and not answered


def _can(parameter: nn.Parameter) -> bool:
    plain = parameter.dtype == torch.float32 and parameter.is_contiguous()
    return plain and parameter.requires_grad and parameter.device.type == "cpu"
