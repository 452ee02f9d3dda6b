"""The cross entropy of a linear layer's outputs, a chunk of them at a time: they are never all there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = {"cpu": 2**24, "cuda": 2**29}
"""Logits that are there at once, by kind of device: 64 MB and 2 GB in fp32."""

Wanted = Literal["sum", "losses", "hits"]
"""Of the targets: the sum of their losses, (); the loss of each, (M,); or loss and hit of each, (2, M), of which
nothing is learned."""


def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wanted: Wanted) -> Tensor:
    """Return what is wanted of the layer's outputs. hidden: (M, d), weight: (V, d), bias: (V,), targets: (M,)."""
    kind = hidden.device.type
    dtype = precision(kind, hidden.dtype)
    with torch.autocast(kind, enabled=False):
        if wanted != "hits" and torch.is_grad_enabled():
            way: Any = _Summed if wanted == "sum" else _Each
            return way.apply(hidden, weight, bias, targets, dtype)  # type: ignore[no-any-return]
        found = torch.cat([scores(*each) for each in _chunks(_Layer.of(weight, bias, dtype), hidden, targets)], dim=1)
        return found if wanted == "hits" else found[0] if wanted == "losses" else found[0].sum()


def precision(kind: str, otherwise: torch.dtype) -> torch.dtype:
    """Return that of autocast where it is on; some devices have none."""
    known = torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else otherwise


def scores(logits: Tensor, targets: Tensor) -> Tensor:
    """(C, V), (C,) → loss and hit of each, (2, C)."""
    exact = logits.float() if logits.dtype.itemsize < 4 else logits
    losses = functional.cross_entropy(exact, targets, reduction="none")
    return torch.stack([losses, (exact.argmax(1) == targets).to(losses.dtype)])


@dataclass(frozen=True)
class _Layer:
    """A linear layer in the precision in which its products are made."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> _Layer:
        return cls(weight.to(dtype), None if bias is None else bias.to(dtype))


def _chunks(layer: _Layer, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of some targets, in the precision of the layer, and these targets; all one after the other."""
    size = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // len(layer.weight))
    for start in range(0, max(1, len(targets)), size):
        part = slice(start, start + size)
        yield functional.linear(hidden[part].to(layer.weight.dtype), layer.weight, layer.bias), targets[part]


def _losses_and_slopes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(C, V), (C,) → the loss of each, (C, 1), in fp32 at least, and its gradient, (C, V), in the place of logits."""
    exact = logits.float() if logits.dtype.itemsize < 4 else logits
    whole, right = exact.logsumexp(1, keepdim=True), exact.gather(1, targets[:, None])
    losses = whole - right
    slopes = exact.sub_(whole).exp_()
    slopes.scatter_(1, targets[:, None], slopes.gather(1, targets[:, None]) - 1)
    return losses, slopes.to(logits.dtype)


def _fused(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same, as a compiler makes two passes over the logits of it."""
    exact = logits.float() if logits.dtype.itemsize < 4 else logits
    whole, right = exact.logsumexp(1, keepdim=True), exact.gather(1, targets[:, None])
    there = torch.arange(logits.shape[1], device=logits.device)[None] == targets[:, None]
    return whole - right, ((exact - whole).exp() - there.to(exact.dtype)).to(logits.dtype)


losses_and_slopes = _losses_and_slopes
"""What is used of the two."""


def compile_arithmetic(backend: str) -> None:
    """From here on what follows the product with the weights is compiled: some passes over memory fewer."""
    global losses_and_slopes
    losses_and_slopes = torch.compile(_fused, backend=backend, dynamic=True)


def as_written() -> None:
    """From here on it is not."""
    global losses_and_slopes
    losses_and_slopes = _losses_and_slopes


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add one.T @ other, which may be of half the precision, to `total`, without rounding in between where that can be.

    one: (C, V), other: (C, d), total: (V, d).
    """
    if total.dtype == one.dtype:
        total.addmm_(one.T, other)
    elif total.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, one.T, other, total.dtype, out=total)
    else:
        total += one.T @ other


@dataclass(frozen=True)
class _Slopes:
    """Gradients of a layer, summed up over chunks in fp32 at least; None of what does not learn."""

    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, learning: tuple[bool, bool]) -> _Slopes:
        exact, both = torch.promote_types(weight.dtype, torch.float32), zip((weight, bias), learning, strict=True)
        return cls(*(torch.zeros_like(each, dtype=exact) if learns and each is not None else None
                     for each, learns in both))  # fmt: skip

    def add(self, slope: Tensor, hidden: Tensor) -> None:
        """slope: (C, V), hidden: (C, d)."""
        if self.weight is not None:
            _add_product(self.weight, slope, hidden)
        if self.bias is not None:
            self.bias.add_(slope.sum(0))


def _pass(
    layer: _Layer, hidden: Tensor, targets: Tensor, learned: _Slopes, *, back: bool, scales: Tensor | None = None
) -> tuple[Any, Any]:
    """Return the losses, (M,), and with `back` their gradients of `hidden`, (M, d); add those of the layer.

    scales: what each loss is multiplied by in what is learned, (M, 1).
    """
    losses, done, slopes = [], 0, torch.empty_like(hidden) if back else None
    for logits, target in _chunks(layer, hidden, targets):
        found, slope = losses_and_slopes(logits, target)
        losses.append(found)
        part = slice(done, done + len(target))
        slope = slope if scales is None else (slope * scales[part]).to(slope.dtype)
        if slopes is not None:
            slopes[part] = slope @ layer.weight
        learned.add(slope, hidden[part].to(slope.dtype))
        done += len(target)
    return torch.cat(losses)[:, 0], slopes


class _Summed(torch.autograd.Function):
    """The sum of all losses. Gradients are made in the same pass: no logits are kept, and none computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Products are made in `dtype`, sums in fp32."""
        learned = _Slopes.of(weight, bias, ctx.needs_input_grad[1:3])
        layer = _Layer.of(weight, bias, dtype)
        losses, slopes = _pass(layer, hidden, targets, learned, back=ctx.needs_input_grad[0])
        ctx.save_for_backward(slopes, learned.weight, learned.bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        total: Tensor = losses.sum()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Scale what was made."""
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if each is None else (each * grads[0]).to(dtype) for each, dtype in made), None, None


class _Each(torch.autograd.Function):
    """The loss of each target, whose weights in what is learned are known when all of them are.

    What goes back to hidden states is made in the first pass, and scaled later; for a layer that learns logits are
    computed a second time, since none are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """As `_Summed`, but (M,)."""
        layer, nothing = _Layer.of(weight, bias, dtype), _Slopes(None, None)
        losses, slopes = _pass(layer, hidden, targets, nothing, back=ctx.needs_input_grad[0])
        ctx.save_for_backward(slopes, *((hidden, weight, bias, targets) if any(ctx.needs_input_grad[1:3]) else ()))
        ctx.dtype, ctx.dtypes = dtype, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        found: Tensor = losses
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Scale what was made, and make what the layer learns."""
        scales, (slopes, *again), learned = grads[0][:, None], ctx.saved_tensors, _Slopes(None, None)
        if again:
            hidden, weight, bias, targets = again
            learned = _Slopes.of(weight, bias, ctx.needs_input_grad[1:3])
            with torch.autocast(hidden.device.type, enabled=False):
                _pass(_Layer.of(weight, bias, ctx.dtype), hidden, targets, learned, back=False, scales=scales)
        made = (None if slopes is None else slopes * scales, learned.weight, learned.bias)
        return (
            *(None if each is None else each.to(kind) for each, kind in zip(made, ctx.dtypes, strict=True)),
            None,
            None,
        )
