"""Attention within rows of any length whose tokens lie one after the other: similar rows are computed at once.

For CPUs, where a batch padded to its longest row costs what that row's square says, once for each row. How rows are
grouped is decided once a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from data.plan import Bounds, cut
from train import dropout as draws

OVERHEAD = 2_000
"""What one more group costs, in pairs of tokens (of all heads) that could have been computed in that time."""


UNKNOWN = ("position_bias", "softcap", "cache")
"""Options of attention in transformers that are left to its own."""


@dataclass(frozen=True)
class Group:
    """R rows, none of them longer than W tokens."""

    rows: Tensor
    """int64 (R,), places in the batch."""
    columns: Tensor
    """int64 (R, W): where each token is in its row; that of the first one where there is none."""
    real: Tensor
    """bool (R, W)."""

    def mask(self, mask: Tensor) -> Tensor | None:
        """(B, heads or 1, T, T), which tokens see which → the same of these rows, (R, heads or 1, 1 or W, W).

        None where every token sees every other one.
        """
        rows, queries, keys = self.rows[:, None, None], self.columns[:, :, None], self.columns[:, None]
        seen = mask[rows, :, queries, keys].permute(0, 3, 1, 2) & self.real[:, None, None]
        if bool((seen | ~self.real[:, None, :, None] | ~self.real[:, None, None]).all()):
            return None if bool(self.real.all()) else self.real[:, None, None]
        return seen


@dataclass(frozen=True)
class Groups:
    """The rows of a batch, grouped: where each of their tokens is, one group after the other."""

    groups: list[Group]
    there: Tensor
    """int64 (P,): of each place in the groups, the token there; the row's first where there is none."""
    back: Tensor
    """int64 (N,): of each token, its place."""
    empty: Tensor
    """int64 (E,): places where no token is."""
    _masks: list[tuple[Tensor, list[Tensor | None]]] = field(default_factory=list)
    _moves: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def masks(self, mask: Tensor) -> list[Tensor | None]:
        """Return the mask of each group. Layers ask with the same few masks, which are taken apart once."""
        for known, masks in self._masks:
            if known is mask:
                return masks
        masks = [group.mask(mask) for group in self.groups]
        self._masks.append((mask, masks))
        return masks

    def moves(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return `there`, `back` and `empty` for tokens of several heads: (N, heads) ↔ groups of (R, heads, W)."""
        if heads not in self._moves:
            head, there, places, first = torch.arange(heads), list[Tensor](), list[Tensor](), 0
            for group in self.groups:
                rows, width = group.real.shape
                tokens = self.there[first // heads :][: rows * width].view(rows, 1, width)
                there.append((tokens * heads + head[:, None]).flatten())
                last = first + rows * width * heads
                places.append(torch.arange(first, last).view(rows, heads, width).mT.reshape(-1, heads))
                first = last
            place = torch.cat(places)
            self._moves[heads] = torch.cat(there), place[self.back].flatten(), place[self.empty].flatten()
        return self._moves[heads]


def group(mask: Tensor, overhead: int = OVERHEAD) -> Groups:
    """Group the rows of a batch at the least cost: sum(rows x longest²) + overhead x groups.

    mask: (B, T), 0 where no token is; at least one is somewhere.
    """
    real = mask.numpy() != 0
    lengths = real.sum(1)
    starts = np.cumsum(lengths) - lengths
    columns = np.nonzero(real)[1]
    filled = np.flatnonzero(lengths)
    groups, there, empty = list[Group](), list[Any](), list[Any]()
    for members in cut(lengths[filled].astype(np.int64) ** 2, Bounds(overhead=overhead)):
        rows = filled[members]
        steps = np.arange(lengths[rows[0]])
        inside = steps < lengths[rows, None]
        tokens = starts[rows, None] + np.where(inside, steps, 0)
        groups.append(Group(_tensor(rows), _tensor(columns[tokens]), _tensor(inside)))
        there.append(tokens.ravel())
        empty.append(~inside.ravel())
    places, nothing = np.concatenate(there), np.concatenate(empty)
    back = np.empty(len(columns), dtype=np.int64)
    back[places[~nothing]] = np.flatnonzero(~nothing)
    return Groups(groups, _tensor(places), _tensor(back), _tensor(np.flatnonzero(nothing)))


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array)


def can(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether `attend` knows what is asked for: a mask, as many heads of keys, nothing that is added to scores."""
    plain = mask is not None and mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[2] == mask.shape[3]
    return plain and query.shape[1] == key.shape[1] and not any(options.get(name) is not None for name in UNKNOWN)


def attend(
    groups: Groups, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, dropout: float, scaling: float | None
) -> Tensor:
    """(1, heads, N, d) each, and which tokens of a row see which, bool (B, heads or 1, T, T) → (1, N, heads, d)."""
    heads, size = query.shape[1], value.shape[3]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    there, back, empty = groups.moves(heads)
    sizes = [group.real.numel() * heads for group in groups.groups]
    shapes = [(len(group.rows), heads, group.real.shape[1], -1) for group in groups.groups]
    queries, keys, values = (
        [part.view(shape) for part, shape in zip(torch.split(each, sizes), shapes, strict=True)]
        for each in (_moved(_tokens(tensor), there, back, None) for tensor in (query, key, value))
    )
    found = [
        _within(*each, dropout, scale).reshape(-1, size)
        for each in zip(queries, keys, values, groups.masks(mask), strict=True)
    ]
    return _moved(torch.cat(found), back, there, empty).view(1, -1, heads, size)


def _tokens(tensor: Tensor) -> Tensor:
    """(1, heads, N, d) → (N x heads, d), which the projection has left so in memory."""
    return tensor[0].transpose(0, 1).flatten(0, 1)


def _within(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, dropout: float, scale: float) -> Tensor:
    """(R, heads, W, d) each → (R, heads, W, d)."""
    if not dropout:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    rows, heads = query.shape[:2]
    query, key, value = (each.flatten(0, 1) for each in (query, key, value))
    if seen is None:
        scores = torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scale)
    else:
        hidden = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
        hidden = hidden.expand(rows, heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(hidden, query, key.mT, alpha=scale)
    return draws.drop(scores.softmax(-1), dropout) @ value


def _moved(tensor: Tensor, there: Tensor, back: Tensor, empty: Tensor | None) -> Tensor:
    found: Tensor = _Moved.apply(tensor, there, back, empty)  # type: ignore[no-untyped-call]
    return found


class _Moved(torch.autograd.Function):
    """Rows at other places. The way back is known, so that it need not be added up: every row has one place at most."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: Tensor, back: Tensor, empty: Tensor | None) -> Tensor:
        """(P, d) → (Q, d). `there`: (Q,), `back`: (P,); `empty`: which of P have no place in Q, whose gradient is 0."""
        ctx.moves = back, empty
        return tensor.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """(Q, d) → (P, d)."""
        back, empty = ctx.moves
        found = gradient.index_select(0, back)
        return found if empty is None else found.index_fill_(0, empty, 0), None, None, None
