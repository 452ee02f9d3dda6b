"""Attention with dropout, whose gradient is written by hand: what autograd makes of it, with the same units dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train import dropout, dropping_attention, row_attention
from train.dropping_attention import Places

HEADS, SIZE, LENGTHS = 3, 4, (7, 2, 11, 5, 5, 1)
SEED, SCALE = 7, 0.3


def places(overhead: int) -> Places:
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    return row_attention.group(mask, overhead).places(HEADS)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(LENGTHS) * HEADS, SIZE)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def masks(of: Places, dtype: torch.dtype) -> list[Tensor | None]:
    """Tokens do not see places where none is, nor, of groups with several rows, the second token."""
    real = torch.ones(len(of.there)).index_fill_(0, of.empty, 0)
    hidden, first = list[Tensor | None](), 0
    for rows, width in of.shapes:
        seen = real[first : first + rows * width].view(rows, 1, width).clone()
        seen[:, :, 1:2] = 0
        hidden.append(
            torch.zeros(seen.shape, dtype=dtype).masked_fill_(seen == 0, -torch.inf) if rows > HEADS else None
        )
        first += rows * width
    return hidden


def by_autograd(of: Places, given: list[Tensor], hidden: list[Tensor | None], probability: float) -> Tensor:
    torch.manual_seed(SEED)
    factors = dropout.noise((sum(rows * width**2 for rows, width in of.shapes),), probability, given[0].dtype)
    found, first, square = list[Tensor](), 0, 0
    for (rows, width), mask in zip(of.shapes, hidden, strict=True):
        query, key, value = (each[of.there[first : first + rows * width]].view(rows, width, SIZE) for each in given)
        scores = query @ key.mT * SCALE + (0 if mask is None else mask)
        kept = factors[square : square + rows * width**2].view(rows, width, width)
        found.append((scores.softmax(-1) * kept @ value).flatten(0, 1))
        first, square = first + rows * width, square + rows * width**2
    return torch.cat(found)[of.back]


def learned(found: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    return (found, *torch.autograd.grad((found * weights).sum(), given))


@pytest.mark.parametrize("probability", [0.1, 0.5, 1e-3, 1.0])
@pytest.mark.parametrize("overhead", [0, row_attention.OVERHEAD, 30, 10**9])
def test_it_is_what_autograd_makes_of_it(overhead: int, probability: float) -> None:
    """In float64 to 1e-9 with all gradients; also probabilities of which dropout leaves the draws to PyTorch."""
    of, given = places(overhead), inputs(torch.float64)
    hidden = masks(of, torch.float64)
    torch.manual_seed(SEED)
    found = learned(dropping_attention.attend(of, given, hidden, probability, SCALE), given)
    expected = learned(by_autograd(of, given, hidden, probability), given)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(found, expected, strict=True))
    assert bool(expected[0].any()) == (probability < 1)


def test_in_bf16() -> None:
    of, given = places(0), inputs(torch.bfloat16)
    torch.manual_seed(SEED)
    found = learned(dropping_attention.attend(of, given, [None] * len(of.shapes), 0.1, SCALE), given)
    wide = [each.detach().float().requires_grad_() for each in given]
    expected = learned(by_autograd(of, wide, [None] * len(of.shapes), 0.1), wide)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).abs().max() < 0.02 * other.abs().max()


def test_a_layer_that_is_computed_again_keeps_nothing_of_it() -> None:
    """What the gradient needs goes through autograd, so that recomputation can let go of it."""
    of, given, kept = places(0), inputs(torch.float32), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dropping_attention.attend(of, given, [None] * len(of.shapes), 0.1, SCALE)
    assert len(kept) == 3 + 1 + len(of.shapes)
