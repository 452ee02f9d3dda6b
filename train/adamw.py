"""AdamW where weights are kept rounded beside those in fp32 (see `halves`): piece by piece, from cache to cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from train.halves import Halves, keep

PIECE = 2**20
"""Numbers of a piece, of each of which AdamW reads or writes 32 bytes; a multiple of what a vector holds."""


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW; but gradients of weights that are kept rounded may be in bf16.

    They are made fp32 a piece at a time, and weights are rounded while the piece is at hand. The numbers are the same.
    """

    def __init__(self, groups: Any, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self.halves = Halves()
        self._arranged: dict[int, tuple[list[int], list[Bundle]]] = {}

    def round_weights(self, model: nn.Module) -> Halves:
        """From now on round the weights of a model's linear layers as they move, where that can be; return them."""
        self.halves = keep(model)
        return self.halves

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient.

        `grad_scale` and `found_inf`, which are set from outside, are what PyTorch's kernels know: by what gradients are
        divided, and 1 where nothing is to move.
        """
        if not self.halves.kept:
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
                if bundle.rounded:
                    torch._foreach_copy_(bundle.rounded, bundle.values)
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
        known, bundles = self._arranged.get(number, ([], []))
        if known != held:
            bundles = list(self._arrange(moving))
            self._arranged[number] = held, bundles
        return bundles

    def _arrange(self, moving: list[nn.Parameter]) -> Iterator[Bundle]:
        """Yield pieces of large weights that are kept rounded, and small ones together; all else in one."""
        room = torch.empty(PIECE)
        others, some = Bundle(), Bundle()
        for parameter in moving:
            state, rounded = self.state[parameter], self.halves.rounded(parameter)
            held = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
            if rounded is None:
                others.add(parameter, None, held, state["step"])
                continue
            flat = [each.view(-1) for each in (*held, rounded)]
            for first in range(0, parameter.numel(), PIECE):
                part = slice(first, min(first + PIECE, parameter.numel()))
                if some.size + part.stop - first > PIECE:
                    yield some
                    some = Bundle()
                some.add(parameter, part, [each[part] for each in flat], state["step"], room)
        yield from (each for each in (some, others) if each.values)


class Bundle:
    """Parameters, or parts of them, that are moved at once."""

    def __init__(self) -> None:
        self.size = 0
        """Numbers."""
        self.values, self.averages, self.squares, self.steps, self.rounded = (list[Tensor]() for _ in range(5))
        self._sources = list[tuple[nn.Parameter, slice | None, Tensor | None]]()

    def add(
        self, parameter: nn.Parameter, part: slice | None, held: list[Tensor], step: Tensor, room: Tensor | None = None
    ) -> None:
        """held: values, averages, squares and, where kept, what is rounded, of this part; None: all, as it is."""
        wide = None if room is None else room[self.size : self.size + len(held[0])]
        self._sources.append((parameter, part, wide))
        self.size += held[0].numel()
        self.steps.append(step)
        for members, tensor in zip((self.values, self.averages, self.squares, self.rounded), held, strict=False):
            members.append(tensor)

    def gradients(self) -> list[Tensor]:
        """Return them in fp32. Each bundle's lie in the same room."""
        found = list[Any]()
        for parameter, part, wide in self._sources:
            grad = parameter.grad
            if wide is not None:
                assert grad is not None
                grad = grad.reshape(-1)[part]
                grad = grad if grad.dtype == wide.dtype else wide.copy_(grad)
            found.append(grad)
        return found
