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
from train import dropping_attention
from train.dropping_attention import Places

OVERHEAD = 2_000
"""What one more group costs, in pairs of tokens (of all heads) that could have been computed in that time."""


FEW = 200_000
"""Pairs of tokens of all heads, up to which attention with dropout is computed in fp32 where all else is bf16: for
every size of a product in bf16 that is new oneDNN makes a kernel anew, which takes longer than these products do.
"""

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
    _places: dict[int, Places] = field(default_factory=dict)

    def masks(self, mask: Tensor) -> list[Tensor | None]:
        """Return the mask of each group. Layers ask with the same few masks, which are taken apart once."""
        for known, masks in self._masks:
            if known is mask:
                return masks
        masks = [group.mask(mask) for group in self.groups]
        self._masks.append((mask, masks))
        return masks

    def places(self, heads: int) -> Places:
        """Return where tokens of several heads are: (N, heads) ↔ groups of (R, heads, W)."""
        if heads not in self._places:
            head, there, places, first = torch.arange(heads), list[Tensor](), list[Tensor](), 0
            for group in self.groups:
                rows, width = group.real.shape
                tokens = self.there[first // heads :][: rows * width].view(rows, 1, width)
                there.append((tokens * heads + head[:, None]).flatten())
                last = first + rows * width * heads
                places.append(torch.arange(first, last).view(rows, heads, width).mT.reshape(-1, heads))
                first = last
            place = torch.cat(places)
            shapes = [(len(group.rows) * heads, group.real.shape[1]) for group in self.groups]
            back, empty = place[self.back].flatten(), place[self.empty].flatten()
            self._places[heads] = Places(torch.cat(there), back, empty, shapes)
        return self._places[heads]


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
    """(1, heads, M, d) each, and which tokens of a row see which, bool (B, heads or 1, T, T) → (1, M, heads, d).

    After the N tokens of the groups there may be others, of which 0 is found.
    """
    heads, size = query.shape[1], value.shape[3]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    places, seen = groups.places(heads), groups.masks(mask)
    tensors = [_tokens(each) for each in (query, key, value)]
    if dropout:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensors[0].dtype
        few = dtype == torch.bfloat16 and sum(rows * width**2 for rows, width in places.shapes) <= FEW
        tensors = [each.to(torch.float32 if few else dtype) for each in tensors]
        hidden = [_hidden(each, heads, tensors[0].dtype) for each in seen]
        with torch.autocast("cpu", enabled=False):
            found = dropping_attention.attend(places, tensors, hidden, dropout, scale)
        return found.to(dtype).view(1, -1, heads, size)
    count, more = len(places.back), len(tensors[0]) - len(places.back)
    tensors = [each[:count] for each in tensors]
    sizes = [rows * width for rows, width in places.shapes]
    shapes = [(rows // heads, heads, width, -1) for rows, width in places.shapes]
    queries, keys, values = (
        [part.view(shape) for part, shape in zip(torch.split(each, sizes), shapes, strict=True)]
        for each in (_moved(tensor, places.there, places.back, None) for tensor in tensors)
    )
    parts = [
        functional.scaled_dot_product_attention(*each[:3], attn_mask=each[3], scale=scale).reshape(-1, size)
        for each in zip(queries, keys, values, seen, strict=True)
    ]
    found = _moved(torch.cat(parts), places.back, places.there, places.empty)
    return (functional.pad(found, (0, 0, 0, more)) if more else found).view(1, -1, heads, size)


def _tokens(tensor: Tensor) -> Tensor:
    """(1, heads, M, d) → (M x heads, d), which the projection has left so in memory."""
    return tensor.squeeze(0).transpose(0, 1).flatten(0, 1)


def _hidden(seen: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """bool (R, heads or 1, 1 or W, W), which tokens see which → what is added to scores, (R x heads, 1 or W, W)."""
    if seen is None:
        return None
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return added.expand(-1, heads, -1, -1).flatten(0, 1)


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
