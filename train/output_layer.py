"""The output layer, computed where there is a target and nowhere else, in chunks: a batch's logits are never all there.

Hooks around the layer take what the model gives it, and put in the place of logits what is asked. The model's own code
does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from train import trial

if TYPE_CHECKING:
    from torch import nn

CHUNK = {"cpu": 2**24, "cuda": 2**29}
"""Logits that are there at once, by kind of device: 64 MB and 2 GB in fp32."""


@dataclass
class Question:
    """What is to be found out about the rows (B, T) that are being computed."""

    targets: Tensor
    """The token that is right, (M,)."""
    places: Tensor
    """Where, if the rows lay one after the other, (M,)."""
    summed: bool
    """Whether the sum of their losses is wanted, (); else loss and hit of each, (2, M)."""
    answered: bool = False
    """Whether that is what the model gives in the place of logits."""
    hidden: Tensor = field(init=False)


_asked: Question | None = None


def enable(model: Any) -> bool:
    """Let a model that writes texts answer so, if that is tried and gives the same; return whether.

    Not where the logits are more than a linear layer gives (scaled, bounded), and not where the layer is of another
    kind. Called under the autocast in which the model will compute.
    """
    global losses_and_slopes
    losses_and_slopes = _losses_and_slopes  # until somebody compiles
    layer = model.get_output_embeddings()
    half = _precision(model.device.type, model.dtype)
    if type(layer) is not torch.nn.Linear or half == torch.float16:  # whose loss is scaled before gradients are rounded
        return False
    hooks = [layer.register_forward_pre_hook(_before), layer.register_forward_hook(_after)]
    if _proved(model):
        return True
    for hook in hooks:
        hook.remove()
    return False


def disable(model: nn.Module) -> None:
    """Let it give logits to everyone again."""
    trial.unhook(model, lambda hook: hook in (_before, _after))


@contextmanager
def asking(targets: Tensor, places: Tensor, *, summed: bool) -> Iterator[Question]:
    """While this lasts, a model for which `enable` had success answers this question."""
    global _asked
    _asked = Question(targets, places, summed)
    try:
        yield _asked
    finally:
        _asked = None


def _before(layer: nn.Module, given: tuple[Any, ...]) -> Any:
    """Keep what the layer is given, (B, T, d), and give it next to nothing."""
    if _asked is None:
        return None
    _asked.hidden = given[0]
    return (given[0][:, :1],)


def _after(layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> Any:
    if _asked is None:
        return None
    _asked.answered = True
    return _answer(_asked.hidden.flatten(0, -2)[_asked.places], layer, _asked.targets, summed=_asked.summed)


def _answer(hidden: Tensor, layer: Any, targets: Tensor, *, summed: bool) -> Tensor:
    """Return the summed loss, (), or loss and hit of each target, (2, M). hidden: (M, d); targets: (M,)."""
    kind = hidden.device.type
    dtype = _precision(kind, hidden.dtype)
    with torch.autocast(kind, enabled=False):
        if summed and torch.is_grad_enabled():
            found: Any = _Summed
            return found.apply(hidden, layer.weight, layer.bias, targets, dtype)  # type: ignore[no-any-return]
        added = None if layer.bias is None else layer.bias.to(dtype)
        chunks = _chunks(hidden, layer.weight.to(dtype), added, targets)
        scores = torch.cat([_scores(*each) for each in chunks], dim=1)
        return scores[0].sum() if summed else scores


def _precision(kind: str, otherwise: torch.dtype) -> torch.dtype:
    """Return that of autocast where it is on; some devices have none."""
    known = torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else otherwise


def _chunks(hidden: Tensor, matrix: Tensor, added: Tensor | None, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of some targets, in the precision of the layer, and these targets; all one after the other."""
    size = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // len(matrix))
    for start in range(0, max(1, len(targets)), size):
        part = slice(start, start + size)
        yield functional.linear(hidden[part].to(matrix.dtype), matrix, added), targets[part]


def _scores(logits: Tensor, targets: Tensor) -> Tensor:
    """(C, V), (C,) → loss and hit of each, (2, C)."""
    exact = logits.float() if logits.dtype.itemsize < 4 else logits
    losses = functional.cross_entropy(exact, targets, reduction="none")
    return torch.stack([losses, (exact.argmax(1) == targets).to(losses.dtype)])


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


class _Summed(torch.autograd.Function):
    """The summed cross entropy of a linear layer's outputs. Gradients are made in the same pass, chunk by chunk, so
    that no logits are kept and none computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """hidden: (M, d), weight: (V, d), bias: (V,), targets: (M,); products are made in `dtype`, sums in fp32."""
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        slopes = torch.empty_like(hidden) if of_hidden else None
        exact = torch.promote_types(weight.dtype, torch.float32)
        of = [torch.zeros_like(each, dtype=exact) if wanted and each is not None else None
              for each, wanted in ((weight, of_weight), (bias, of_bias))]  # fmt: skip
        losses, done, matrix = [], 0, weight.to(dtype)
        for logits, target in _chunks(hidden, matrix, None if bias is None else bias.to(dtype), targets):
            found, slope = losses_and_slopes(logits, target)
            losses.append(found)
            part = slice(done, done + len(target))
            if slopes is not None:
                slopes[part] = slope @ matrix
            if of[0] is not None:
                _add_product(of[0], slope, hidden[part].to(dtype))
            if of[1] is not None:
                of[1] += slope.sum(0)
            done += len(target)
        ctx.save_for_backward(slopes, *of)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Scale what was made."""
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if each is None else (each * grads[0]).to(dtype) for each, dtype in made), None, None


def _proved(model: Any) -> bool:
    """Whether it gives the losses and hits that follow from the model's logits."""
    generator = torch.Generator().manual_seed(0)  # its own: training's is left alone
    weight = model.get_input_embeddings().weight
    ids = torch.randint(len(weight), (2, 7), generator=generator).to(weight.device)
    places = torch.tensor([0, 2, 3, 8, 13], device=weight.device)
    targets = ids.flatten()[places]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(input_ids=ids, use_cache=False).logits
            with asking(targets, places, summed=True):
                summed = model(input_ids=ids, use_cache=False).logits
            with asking(targets, places, summed=False):
                each = model(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception:  # logits that are worked on after the layer, an argument it does not know: many kinds
        return False
    finally:
        model.train(training)
    expected = _scores(logits.flatten(0, 1)[places], targets)[0]
    half = torch.is_autocast_enabled(ids.device.type) or logits.dtype.itemsize < 4
    rounding = 2e-2 if half else 1e-4
    close = [(each[0], expected), (summed, expected.sum())] if each.shape == (2, len(places)) else []
    return bool(close) and all(
        torch.allclose(one.to(other.dtype), other, rtol=rounding, atol=rounding) for one, other in close
    )
