"""Weights of linear layers in bf16, kept beside those in fp32 that they are rounded from: on CPUs under autocast.

Autocast rounds them anew in every micro-batch and lets their gradients be fp32 at once, so that all of them pass
through memory once more in an update. Here an optimizer that knows of them (`adamw`) rounds each piece of the weights
as it moves it, and reads gradients in bf16. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

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


@dataclass(frozen=True)
class Halves:
    """What is kept, by parameter."""

    kept: dict[nn.Parameter, Half] = field(default_factory=dict)

    def rounded(self, parameter: nn.Parameter) -> Tensor | None:
        """Return what is kept of a parameter, as values that may be written; None where nothing is."""
        half = self.kept.get(parameter)
        return None if half is None or half.rounded is None else half.rounded.detach()

    @contextmanager
    def micro_batch(self, *, only: bool) -> Iterator[None]:
        """Surround forward and backward pass of a micro-batch, whose gradients are those of the parameters afterwards.

        only: whether no other will follow in this update; then they may stay in bf16, else they are added up in fp32.
        """
        try:
            yield
        except BaseException:
            for half in self.kept.values():
                if half.rounded is not None:
                    half.rounded.grad = None
            raise
        self._collect(only=only)

    def _collect(self, *, only: bool) -> None:
        for parameter, half in self.kept.items():
            if half.rounded is None or half.rounded.grad is None:
                continue
            grad, half.rounded.grad = half.rounded.grad, None
            if parameter.grad is not None:  # of micro-batches before, or of some other use
                parameter.grad += grad
            else:
                parameter.grad = grad if only else grad.float()


def keep(model: nn.Module) -> Halves:
    """Keep the weights of a model's linear layers that learn in fp32 on a CPU, but for those that are others' too.

    Not of a model that is compiled, whose graphs would be made anew in every update.
    """
    modules = list(model.modules())
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in modules):
        return Halves()
    owners = [id(each) for module in modules for each in module.parameters(recurse=False)]
    found: dict[nn.Parameter, Half] = {}
    for module in modules:
        own = list(module.parameters(recurse=False))
        if type(module) is nn.Linear and all(_can(each) and owners.count(id(each)) == 1 for each in own):
            weight, bias = Half(), None if module.bias is None else Half()
            module.__class__, module.halves = Linear, (weight, bias)  # type: ignore[assignment]
            found[cast("nn.Parameter", module.weight)] = weight
            if bias is not None:
                found[module.bias] = bias
    for parameter in found:
        parameter.grad_dtype = None  # it may have a gradient in bf16
    return Halves(found)


def _can(parameter: nn.Parameter) -> bool:
    plain = parameter.dtype == torch.float32 and parameter.is_contiguous()
    return plain and parameter.requires_grad and parameter.device.type == "cpu"
