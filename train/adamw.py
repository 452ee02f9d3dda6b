"""AdamW: PyTorch's own, which on CPUs can take gradients in bf16 and as rows, piece by piece, from cache to cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from train.gradients import Tables, sparse_tables
from train.halves import Halves, keep

PIECE = 2**20
"""Numbers of a piece: 12 MB of values and averages, and 4 MB for the gradient, which the next piece takes again."""


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, which may be told of weights that are kept rounded, and of tables whose rows are touched.

    Gradients are made fp32 and whole for a piece at a time, and weights are rounded while the piece is at hand. The
    numbers are the same.
    """

    def __init__(self, groups: Any, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self.halves, self._tables = Halves(), Tables()
        self._arranged: dict[int, tuple[list[int], list[Bundle]]] = {}
        self._room, self._zeros = torch.empty(0), torch.empty(0)

    def take(self, model: nn.Module, *, rounded: bool) -> tuple[Tables, Halves]:
        """From now on take the gradients of a model's large tables by rows, and, if asked for, keep weights rounded."""
        self._tables, self.halves = sparse_tables(model, by_rows=True), keep(model) if rounded else Halves()
        self._room, self._zeros = torch.empty(PIECE), torch.zeros(PIECE)  # of all groups, one after the other
        return self._tables, self.halves

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient.

        `grad_scale` and `found_inf`, which are set from outside, are what PyTorch's kernels know: by what gradients are
        divided, and 1 where nothing is to move.
        """
        if not self.halves.kept and not self._tables.touched:
            return super().step(closure)
        told = vars(self)
        for number, group in enumerate(self.param_groups):
            moving = [each for each in group["params"] if each.grad is not None]
            if moving:
                steps = [self._remembered(each)["step"] for each in moving]
                torch._foreach_add_(steps, 1 - told["found_inf"])
            for bundle in self._bundles(number, moving):
                torch._fused_adamw_(
                    bundle.values, bundle.gradients(), bundle.averages, bundle.squares, [], bundle.steps,
                    lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                    weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
                    grad_scale=told.get("grad_scale"), found_inf=told["found_inf"],
                )  # fmt: skip
                bundle.moved()
        return None

    def _remembered(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _bundles(self, number: int, moving: list[nn.Parameter]) -> list[Bundle]:
        """Return what of a group is moved at once; arranged anew where anything is elsewhere in memory than it was."""
        held = [each.data_ptr() for parameter in moving for each in (parameter, *self.state[parameter].values())]
        held += [rounded.data_ptr() for each in moving if (rounded := self.halves.rounded(each)) is not None]
        held += [id(table) for table in self._tables.touched]
        known, bundles = self._arranged.get(number, ([], []))
        if known != held:
            bundles = list(self._arrange(moving))
            self._arranged[number] = held, bundles
        return bundles

    def _arrange(self, moving: list[nn.Parameter]) -> Iterator[Bundle]:
        """Yield pieces of tables and of large weights that are kept rounded, small ones together; all else at once."""
        others, some = Bundle(), Bundle()
        for parameter in moving:
            state, rounded = self.state[parameter], self.halves.rounded(parameter)
            held = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
            if parameter in self._tables.touched:
                for first, rows in _parts(len(parameter), PIECE // parameter.shape[1]):
                    piece = Bundle()
                    values = held[0][rows]
                    clear = self._zeros[: values.numel()].view_as(values)
                    piece.add([each[rows] for each in held], state["step"], Rows(parameter, self._tables, first, clear))
                    yield piece
            elif rounded is None:
                others.add(held, state["step"], Whole(parameter))
            else:
                flat = [each.view(-1) for each in (*held, rounded)]
                for _, part in _parts(parameter.numel(), PIECE):
                    size = len(flat[0][part])
                    if some.size + size > PIECE:
                        yield some
                        some = Bundle()
                    wide = self._room[some.size : some.size + size]
                    some.add([each[part] for each in flat], state["step"], Part(parameter, part, wide))
        yield from (each for each in (some, others) if each.values)


def _parts(size: int, at_once: int) -> Iterator[tuple[int, slice]]:
    """Yield where each part begins, and the part."""
    for first in range(0, size, at_once):
        yield first, slice(first, min(first + at_once, size))


class Source(Protocol):
    """Where the gradient of a piece comes from."""

    def gradient(self) -> Tensor:
        """Return it in fp32."""

    def moved(self) -> None:
        """Afterwards: leave its memory to the next piece."""


@dataclass(frozen=True)
class Whole:
    """That of a whole parameter, as it is."""

    parameter: nn.Parameter

    def gradient(self) -> Tensor:
        """See `Source`."""
        return cast("Tensor", self.parameter.grad)

    def moved(self) -> None:
        """See `Source`."""


@dataclass(frozen=True)
class Part:
    """That of a part, perhaps in bf16, which is made fp32 in room for it."""

    parameter: nn.Parameter
    part: slice
    room: Tensor

    def gradient(self) -> Tensor:
        """See `Source`."""
        grad = cast("Tensor", self.parameter.grad).reshape(-1)[self.part]
        return grad if grad.dtype == self.room.dtype else self.room.copy_(grad)

    def moved(self) -> None:
        """See `Source`."""


@dataclass
class Rows:
    """That of some rows of a table, those touched put among zeros."""

    table: nn.Parameter
    tables: Tables
    first: int
    zeros: Tensor
    places: Tensor | None = None

    def gradient(self) -> Tensor:
        """See `Source`."""
        rows, values = self.tables.touched[self.table]
        begin, end = np.searchsorted(rows.numpy(), [self.first, self.first + len(self.zeros)])
        self.places = rows[begin:end] - self.first
        return self.zeros.index_copy_(0, self.places, values[begin:end])

    def moved(self) -> None:
        """See `Source`. Rows that are not numbers are cleared too."""
        if self.places is not None:
            self.zeros.index_fill_(0, self.places, 0)


class Bundle:
    """Parameters, or pieces of them, that are moved at once."""

    def __init__(self) -> None:
        self.size = 0
        """Numbers."""
        self.values, self.averages, self.squares, self.rounded, self.steps = (list[Tensor]() for _ in range(5))
        self.sources = list[Source]()

    def add(self, held: list[Tensor], step: Tensor, source: Source) -> None:
        """held: values, averages, squares and, where kept, what is rounded."""
        for members, tensor in zip((self.values, self.averages, self.squares, self.rounded), held, strict=False):
            members.append(tensor)
        self.steps.append(step)
        self.sources.append(source)
        self.size += held[0].numel()

    def gradients(self) -> list[Tensor]:
        """Return them in fp32. Those that had to be made lie where the bundle before had its own."""
        return [source.gradient() for source in self.sources]

    def moved(self) -> None:
        """Round what has moved, where it is kept rounded."""
        if self.rounded:
            torch._foreach_copy_(self.rounded, self.values)
        for source in self.sources:
            source.moved()
