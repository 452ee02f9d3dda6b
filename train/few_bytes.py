"""AdamW with its states, and the weights themselves, in fewer bytes than fp32's four.

What an update changes by less than a number can tell would be lost if it were rounded to the nearest: of bf16 weights
almost every change, of averages that fade by 0.001 an update each. So it is rounded at random, up as often as it is
near: exact on average. The draws depend on (seed, update) alone; of gradients, on the process and the cut too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim import adamw

from data.errors import UserError
from data.order import derive

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

AT_ONCE = 2**24
"""Numbers that are fp32 at a time; a multiple of BLOCK."""

BLOCK = 256
"""Numbers in 8 bits that share a base. They may be of rows as different as a frequent word's and a rare one's."""

BF16, EIGHT = 16, 20
"""Bits of fp32 that bf16 and 8 bits do not have; the last ones."""

LEAST = 2.0**-126
"""The least of fp32 that has all its bits; of bases too."""

AVERAGES = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, computed by its kernel in fp32; weights of two dimensions or more are kept as they are given,
    fp32 or bf16, and their averages in bf16 or 8 bits. All of biases and norms is fp32.

    8 bits: see `to_8bit`. Of the mean of squares, which divides, the least root is 2**-15.5 of its block's largest or
    more, and of the mean of gradients the first step from 0 is 2**-17 of the largest or less: so what is rounded up
    from nearly 0 moves a weight by about a third of what the block's fastest is moved by, at most, and soon fades. Both
    means are kept exactly on average. The squares' deviates by about 20 %, so that steps are about 1.5 % longer.

    `grad_scale` and `found_inf` are those of fused kernels: where there is a 1, nothing changes. Parameters are whole
    and contiguous, and each group has the number of the `update`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], states: str, seed: int, **settings: Any) -> None:
        """states: "fp32", "bf16" or "8bit"."""
        super().__init__(groups, fused=True, **settings)
        self.states = states
        self.seed = seed

    def bytes_of(self, parameter: Tensor) -> float:
        """Return what is remembered of a parameter."""
        small = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 8 / BLOCK}[self.states]
        return parameter.numel() * (small if parameter.ndim > 1 else 8.0)

    def dtype_of(self, parameter: Tensor) -> torch.dtype:
        """Return the type of the averages of a parameter."""
        states = self.states if parameter.ndim > 1 else "fp32"
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[states]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make the update `update`. Waits for the device nowhere."""
        assert closure is None
        generators: dict[torch.device, Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if (generator := generators.get(parameter.device)) is None:
                    generator = generators[parameter.device] = torch.Generator(parameter.device)
                    generator.manual_seed(derive(self.seed, "rounding", group["update"]))
                self._learn(parameter, group, generator)

    def _learn(self, parameter: Tensor, group: dict[str, Any], generator: Generator) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        step, size = state["step"], parameter.numel()
        for start in range(0, size, AT_ONCE):
            part = slice(start, min(size, start + AT_ONCE))
            weight, grad = parameter.view(-1)[part], cast("Tensor", parameter.grad).reshape(-1)[part]
            kept = {key: _part(value, part, size) for key, value in state.items() if key != "step"}
            averages = [_widened(kept, key) for key in AVERAGES]
            wide = weight.float()
            self._compute(wide, grad.float(), averages, step.clone(), group)
            if weight.dtype is torch.bfloat16:
                weight.copy_(to_bf16(wide, generator))
            for key, value in zip(AVERAGES, averages, strict=True):
                self._keep(kept, key, value, generator)
        found = getattr(self, "found_inf", None)
        step.add_(1 if found is None else 1 - found)

    def _begin(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        """Remember zeros."""
        dtype = self.dtype_of(parameter)
        state["step"] = torch.zeros((), device=parameter.device)
        for key in AVERAGES:
            state[key] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
            if dtype is torch.uint8:
                blocks = -(-parameter.numel() // BLOCK)
                state[f"{key}_base"] = torch.full((blocks,), LEAST, device=parameter.device)

    def _compute(
        self, weight: Tensor, grad: Tensor, averages: list[Tensor], step: Tensor, group: dict[str, Any]
    ) -> None:
        """Change all of them, in fp32, unless `found_inf`."""
        beta1, beta2 = group["betas"]
        adamw.adamw(
            [weight], [grad], [averages[0]], [averages[1]], [], [step], fused=True,
            grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip

    def _keep(self, kept: dict[str, Tensor], key: str, value: Tensor, generator: Generator) -> None:
        """Round `value` into `kept`. bf16 that has not changed is rounded to itself; the base of 8 bits may not be."""
        if kept[key].dtype is torch.bfloat16:
            kept[key].copy_(to_bf16(value, generator))
        elif kept[key].dtype is torch.uint8:
            made = to_8bit(value, generator, signed=key == "exp_avg")
            found = getattr(self, "found_inf", None)
            for name, new in zip((key, f"{key}_base"), made, strict=True):
                kept[name].copy_(new if found is None else torch.where(found > 0, kept[name], new))


def settle(model: nn.Module, parameters: str, precision: str) -> None:
    """Let a model's weights of two dimensions or more be bf16, if `parameters` are to be; before it is prepared.

    So are their gradients. Those of micro-batches are added rounded at random too: of many, each less than the sum can
    tell, the nearest would lose all.

    Raises `UserError` for a precision of the run in which that, or averages in fewer bytes, cannot be.
    """
    if precision == "fp64":
        raise UserError("optim.states, optim.parameters: updates in fewer bytes are computed in fp32, not in fp64")
    if parameters != "bf16":
        return
    if precision != "bf16":
        raise UserError(
            f"optim.parameters: bf16 needs precision: bf16, and here it is {precision} (auto is bf16 where the "
            "hardware is fast at it). Set precision=bf16, or leave it out"
        )
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
            if parameter.requires_grad:
                parameter.register_hook(partial(_with_what_is_there, parameter))  # type: ignore[no-untyped-call]
    if hasattr(model, "generate"):  # which nobody else computes in the run's precision, as they do `forward`
        kind = next(model.parameters()).device.type
        model.generate = torch.autocast(kind, torch.bfloat16)(model.generate)


def _with_what_is_there(parameter: Tensor, grad: Tensor) -> Tensor | None:
    """Return the sum of a parameter's gradients, to be added to zeros, of which only memory is left."""
    if parameter.grad is None:
        return None
    total = to_bf16(parameter.grad.float() + grad.float(), None)
    parameter.grad.zero_()
    return total


def to_bf16(values: Tensor, generator: Generator | None) -> Tensor:
    """(…) in fp32 → (…) in bf16, the neighbour above or below at random: the mean is what was given.

    Without a generator, by PyTorch's own.
    """
    return _cut(values, BF16, generator).to(torch.bfloat16)


def to_8bit(values: Tensor, generator: Generator, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(N,) in fp32 → (N,) in uint8, and (N / BLOCK rounded up,) bases, powers of two: the mean is what was given.

    A code counts the steps that a number is above the base: eight, of equal size, to each doubling. signed: the highest
    bit is the sign, and the base, 2**-14 of the block's largest or down to half of that, is added before, so that steps
    go on evenly down to 0, an eighth of the base each. Rounded to the nearest, what is that small would stay for ever.
    Else nothing is negative, and what is less than the base, 2**-30 of the largest or down to half, becomes the base.
    """
    blocks = _blocks(values)
    sizes = blocks.abs() if signed else blocks
    exponents = sizes.amax(1, keepdim=True).view(torch.int32).bitwise_right_shift(23)
    bits = exponents.sub_(14 if signed else 30).clamp_(min=1).bitwise_left_shift_(23)
    base = bits.view(torch.float32)
    moved = _moved(sizes.add_(base) if signed else sizes.clamp(min=base), EIGHT, generator)
    codes = moved.sub_(bits).bitwise_right_shift_(EIGHT).to(torch.uint8)  # at most 121 with a sign, 248 without
    if signed:
        codes.add_(blocks.signbit(), alpha=128)
    return codes.view(-1)[: len(values)], base.view(-1)


def from_8bit(codes: Tensor, bases: Tensor, *, signed: bool) -> Tensor:
    """Return what `to_8bit` was given, as far as it was kept."""
    blocks, base = _blocks(codes), bases[:, None]
    eighths = (blocks.bitwise_and(127) if signed else blocks).int()
    wide = eighths.bitwise_left_shift_(EIGHT).add_(base.view(torch.int32)).view(torch.float32)
    if signed:
        wide.sub_(base).copysign_(blocks.view(torch.int8))
    return wide.view(-1)[: len(codes)]


def _blocks(values: Tensor) -> Tensor:
    """(N,) → (N / BLOCK rounded up, BLOCK), filled with zeros."""
    missing = -len(values) % BLOCK
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def _cut(values: Tensor, bits: int, generator: Generator | None) -> Tensor:
    """Return fp32 with the last `bits` (16 or more) 0, the next number away from 0 by the part that they make of it."""
    return _moved(values, bits, generator).bitwise_and_(-(1 << bits)).view(torch.float32)


def _moved(values: Tensor, bits: int, generator: Generator | None) -> Tensor:
    """Return the bits of fp32, plus anything from 0 to less than 1 of what is left without the last `bits`."""
    count = values.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=values.device)
    drawn.random_(-(2**63), None, generator=generator)  # all 64 bits: four draws
    noise = drawn.view(torch.int16)[:count].view(values.shape)  # from -2**15 on
    return torch.add(values.view(torch.int32), noise, alpha=1 << (bits - 16)).add_(1 << (bits - 1))


def _part(value: Tensor, part: slice, size: int) -> Tensor:
    """Return the part of something of a parameter of `size` numbers: of the numbers, or of their bases."""
    if value.numel() == size:
        return value.view(-1)[part]
    return value[part.start // BLOCK : -(-part.stop // BLOCK)]


def _widened(kept: dict[str, Tensor], key: str) -> Tensor:
    """Return an average in fp32: itself, if it is kept so."""
    if kept[key].dtype is not torch.uint8:
        return kept[key].float()
    return from_8bit(kept[key], kept[f"{key}_base"], signed=key == "exp_avg")
