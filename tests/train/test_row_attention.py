"""Attention in groups of similar rows is what it is with every row padded to the longest, however they are grouped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train import dropping_attention, row_attention

HEADS, SIZE = 3, 4
LAYOUTS = {
    "many lengths": (7, 2, 11, 5, 5, 1),
    "one length": (4, 4, 4),
    "one row": (6,),
    "an empty row": (3, 0, 8),
    "far apart": (40, 1, 1, 2, 39),
}
OVERHEADS = {"each length alone": 0, "as it is": row_attention.OVERHEAD, "some together": 30, "all together": 10**9}


def tokens(lengths: tuple[int, ...], side: str) -> Tensor:
    """int64 (B, T + 1)."""
    mask = (torch.arange(max(lengths) + 1)[None] < torch.tensor(lengths)[:, None]).long()
    return mask if side == "right" else mask.flip(1)


def visible(mask: Tensor, reach: int | None) -> Tensor:
    """Which token sees which: all real ones of its row, or those within reach; bool (B, 1, T, T)."""
    place = torch.arange(mask.shape[1])
    near = torch.ones(1, dtype=torch.bool) if reach is None else (place[:, None] - place[None]).abs() <= reach
    return (mask.bool()[:, None, :] & near).expand(len(mask), mask.shape[1], mask.shape[1])[:, None]


def inputs(mask: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values of real tokens, (1, heads, N, d), in memory as projections leave them."""
    generator = torch.Generator().manual_seed(0)
    count = int(mask.sum())
    made = [torch.randn(1, count, HEADS, SIZE, generator=generator, dtype=dtype) for _ in range(3)]
    return [each.transpose(1, 2).requires_grad_() for each in made]


def padded(mask: Tensor, given: list[Tensor], seen: Tensor, scale: float | None) -> Tensor:
    """The reference: (1, heads, N, d) each → (1, N, heads, d)."""
    places = mask.flatten().nonzero().flatten()

    def rows(tensor: Tensor) -> Tensor:
        whole = tensor.new_zeros(mask.numel(), HEADS, SIZE).index_copy(0, places, tensor[0].transpose(0, 1))
        return whole.view(*mask.shape, HEADS, SIZE).transpose(1, 2)

    query, key, value = map(rows, given)
    scores = (query @ key.mT * (SIZE**-0.5 if scale is None else scale)).masked_fill(~seen, -1e300)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(0, 1)[places][None]


def learned(found: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    return (found, *torch.autograd.grad((found * weights).sum(), given))


def undropped(shape: tuple[int, ...], probability: float, dtype: torch.dtype) -> Tensor:
    assert probability == 0.5
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reach", [None, 2])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("overhead", OVERHEADS)
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_the_same(
    lengths: tuple[int, ...], overhead: str, side: str, reach: int | None, dropout: float, monkeypatch: Any
) -> None:
    """In float64 to 1e-9 with all gradients; also where it goes the way of dropout, which here drops nothing."""
    monkeypatch.setattr(dropping_attention.draws, "noise", undropped)
    mask = tokens(lengths, side)
    given, seen = inputs(mask), visible(mask, reach)
    groups = row_attention.group(mask, OVERHEADS[overhead])
    scale = None if reach else 0.3
    expected = learned(padded(mask, given, seen, scale), given)
    found = learned(row_attention.attend(groups, *given, seen, dropout=dropout, scaling=scale), given)
    assert found[0].shape == (1, sum(lengths), HEADS, SIZE)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(found, expected, strict=True))


def test_groups_are_few_or_without_padding() -> None:
    mask = tokens(LAYOUTS["many lengths"], "right")
    shapes = {name: [tuple(group.real.shape) for group in row_attention.group(mask, overhead).groups]
              for name, overhead in OVERHEADS.items()}  # fmt: skip
    assert shapes["each length alone"] == [(1, 11), (1, 7), (2, 5), (1, 2), (1, 1)]
    assert shapes["all together"] == [(6, 11)]
    assert 1 < len(shapes["some together"]) < 5
    assert len(row_attention.group(mask, 0).empty) == 0


def test_rows_of_one_length_need_no_mask() -> None:
    """And masks are taken apart once, for all layers."""
    mask = tokens(LAYOUTS["many lengths"], "right")
    groups, seen, near = row_attention.group(mask, 0), visible(mask, None), visible(mask, 1)
    assert groups.masks(seen) == [None] * 5
    assert groups.masks(seen) is groups.masks(seen) and groups.masks(near) is not groups.masks(seen)
    assert [each is None for each in groups.masks(near)] == [False, False, False, True, True]
    together = row_attention.group(mask, OVERHEADS["all together"]).masks(seen)[0]
    assert together is not None and together.shape == (6, 1, 1, 11)


def test_dropout_is_what_the_seed_says() -> None:
    mask = tokens(LAYOUTS["many lengths"], "right")
    given, seen, groups = inputs(mask, torch.float32), visible(mask, None), row_attention.group(mask)

    def found(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return learned(row_attention.attend(groups, *given, seen, dropout=0.5, scaling=None), given)

    assert all(torch.equal(one, other) for one, other in zip(found(3), found(3), strict=True))
    assert not torch.equal(found(3)[0], found(4)[0])
    mean = torch.stack([found(seed)[0] for seed in range(400)]).mean(0)
    whole = row_attention.attend(groups, *given, seen, dropout=0.0, scaling=None)
    assert (mean - whole).abs().max() < 0.4 and (mean - whole).abs().mean() < 0.05


@pytest.mark.parametrize("few", [0, 10**9])
def test_in_bf16(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a few short rows are computed in fp32."""
    monkeypatch.setattr(row_attention, "FEW", few)
    asked = list[torch.dtype]()
    real = dropping_attention.attend

    def noting(places: Any, tensors: list[Tensor], *others: Any) -> Tensor:
        asked.extend({each.dtype for each in tensors})
        return real(places, tensors, *others)

    monkeypatch.setattr(dropping_attention, "attend", noting)
    mask = tokens(LAYOUTS["many lengths"], "right")
    given, seen, groups = inputs(mask, torch.float32), visible(mask, None), row_attention.group(mask)
    whole = row_attention.attend(groups, *given, seen, dropout=0.0, scaling=None)
    with torch.autocast("cpu", torch.bfloat16):
        for dropout in (0.0, 2**-8):
            found = row_attention.attend(groups, *given, seen, dropout=dropout, scaling=None)
            assert found.dtype == torch.bfloat16
    assert asked == [torch.float32 if few else torch.bfloat16]
    assert functional.mse_loss(found.float(), whole) < 0.02
    learned = torch.autograd.grad(found.float().square().sum(), given)
    expected = torch.autograd.grad(whole.square().sum(), given)
    for one, other in zip(learned, expected, strict=True):
        assert one.dtype == torch.float32 and functional.mse_loss(one, other) < 0.02 * other.square().mean().clamp(1)


def test_what_it_does_not_know() -> None:
    mask = tokens((3, 2), "right")
    query, key, _ = inputs(mask)
    seen = visible(mask, None)
    assert row_attention.can(query, key, seen, {"dropout": 0.1, "softcap": None})
    assert not row_attention.can(query, key, None, {})
    assert not row_attention.can(query, key, seen.double(), {})
    assert not row_attention.can(query, key[:, :1], seen, {})
    assert not row_attention.can(query, key, seen, {"position_bias": seen.double()})
