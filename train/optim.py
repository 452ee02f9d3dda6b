"""The optimizer, and the learning rate as a function of the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from data.errors import UserError
from data.section import Section
from train.durations import Duration

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Schedule = Literal[
    "constant", "linear", "cosine", "polynomial", "inverse_sqrt", "one_cycle", "wsd", "slanted_triangular"
]

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """How parameters move. All of it is independent of how many processes take part."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="Both fused: one kernel for all parameters.")
    lr: float = Field(5e-5, gt=0, allow_inf_nan=False, description="The highest learning rate of the schedule.")
    schedule: Schedule = Field("linear", description="Shape of the learning rate after the warmup.")
    warmup: Duration = Field(
        0, description="Rises linearly for so long. Of slanted_triangular and one_cycle: the rise."
    )
    decay: Duration = Field("20%", description="wsd: length of the final linear decay.")
    power: float = Field(2.0, gt=0, allow_inf_nan=False, description="polynomial: the exponent.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="The schedule ends at lr times this.")
    weight_decay: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="Not applied to biases and norms (parameters of one dimension)."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adamw.")
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False, description="adamw.")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm; null: never.")
    max_nonfinite: int = Field(5, ge=1, description="Stop after so many updates in a row with a non-finite gradient.")


def build_optimizer(model: nn.Module, settings: OptimConfig) -> Optimizer:
    """Return the optimizer over the trainable parameters, weights apart from biases and norms."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=True)
        for parameter in trainable if settings.momentum else ():  # else the kernel takes memory as it finds it
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def rate(settings: OptimConfig, updates: int, warmup: int, decay: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the update's number, from 1 to `updates`.

    It rises linearly over `warmup` updates, reaching `lr` in the last of them, then follows the schedule. Decaying
    schedules would reach lr x min_lr_ratio just after the last update, so that no update is without effect. Never above
    lr. Raises `UserError` where warmup and decay do not fit into the run.
    """
    if warmup >= updates > 1:
        raise UserError(f"optim.warmup: {settings.warmup} is {warmup} updates, but the run has only {updates}")
    if settings.schedule == "wsd" and warmup + decay > updates + 1:  # each may have been rounded up
        raise UserError(
            f"optim.decay: {settings.decay} is {decay} updates; after a warmup of {warmup} the run of {updates} has "
            f"only {updates - warmup} left for it"
        )
    shape = _shape(settings, updates, warmup, decay)

    def at(number: int) -> float:
        assert 1 <= number <= updates, f"update {number} of {updates}"
        if number <= warmup and settings.schedule not in ("one_cycle", "slanted_triangular"):
            return settings.lr * number / warmup
        return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * shape(number - 1))

    return at


def _shape(settings: OptimConfig, updates: int, warmup: int, decay: int) -> Callable[[int], float]:
    """Return the height, 0 to 1, after `done` updates."""
    after = max(1, updates - warmup)

    def progress(done: int) -> float:
        return (done - warmup) / after

    def slanted_triangular(done: int, ratio: float = 32) -> float:
        """Howard and Ruder, https://arxiv.org/abs/1801.06146, section 3.2; a tenth of the run rises by default."""
        peak = warmup or max(1, updates // 10)
        height = done / peak if done < peak else 1 - (done - peak) / max(1, updates - peak)
        return (1 + height * (ratio - 1)) / ratio

    def one_cycle(done: int, start: float = 25) -> float:
        """Smith and Topin, https://arxiv.org/abs/1708.07120: a cosine up from 1/25, and down; 30 % rise by default."""
        peak = warmup or max(1, round(0.3 * updates))
        if done < peak:
            return 1 / start + (1 - 1 / start) * (1 - math.cos(math.pi * done / peak)) / 2
        return (1 + math.cos(math.pi * (done - peak) / max(1, updates - peak))) / 2

    shapes: dict[str, Callable[[int], float]] = {
        "constant": lambda done: 1.0,
        "linear": lambda done: 1 - progress(done),
        "cosine": lambda done: (1 + math.cos(math.pi * progress(done))) / 2,
        "polynomial": lambda done: (1 - progress(done)) ** settings.power,
        "inverse_sqrt": lambda done: math.sqrt(max(1, warmup) / max(1, warmup, done + 1)),
        "wsd": lambda done: min(1.0, (updates - done) / max(1, min(decay, after))),
        "slanted_triangular": slanted_triangular,
        "one_cycle": one_cycle,
    }
    return shapes[settings.schedule]
