"""The optimizer, and the learning rate as a function of the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from data.errors import UserError
from data.section import Section
from train.durations import Duration, Interval

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
    min_lr_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The schedule falls towards lr times this, and ends there; inverse_sqrt and slanted_triangular "
        "come only near it.",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The rate of a layer is that of the layer above times this; the head (final norm, pooler, output "
        "layer, whatever is new) has lr, the top block lr x layer_decay, the embeddings the lowest. ULMFiT: 0.385.",
    )
    unfreeze: Interval | None = Field(
        None,
        description="At first only the head learns; after each such time so does the next layer below, the embeddings "
        "last. ULMFiT: 1 epoch. null: all learn from the start.",
    )
    weight_decay: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="Not applied to biases and norms (parameters of one dimension)."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adamw.")
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False, description="adamw.")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd.")
    states: Literal["fp32", "bf16", "8bit"] = Field(
        "fp32",
        description="adamw: what it remembers of each weight takes 8 bytes, 4 or 2, rounded at random (exact on "
        "average; biases and norms stay fp32). Of copies only: one process or ddp.",
    )
    parameters: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="adamw, with precision bf16: a weight and its gradient take 4 bytes instead of 8, rounded at "
        "random. Learns a little differently; not for adapters. Of copies only.",
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm; null: never.")
    max_nonfinite: int = Field(5, ge=1, description="Stop after so many updates in a row with a non-finite gradient.")

    @property
    def by_layer(self) -> bool:
        """Whether it matters which layer a parameter is of."""
        return self.layer_decay < 1 or self.unfreeze is not None

    @property
    def few_bytes(self) -> bool:
        """Whether anything is kept in less than fp32."""
        return (self.states, self.parameters) != ("fp32", "fp32")


def between_optim(optim: Any, adapter: Any) -> list[str]:
    """Return what is wrong between keys of the section `optim`, which is not checked yet, and `adapter`."""
    given = optim if isinstance(optim, Mapping) else {}
    problems = [
        f"optim.{key}: {given[key]} needs optim.name: adamw"
        for key in ("states", "parameters")
        if given.get(key) not in (None, "fp32") and given.get("name") == "sgd"
    ]
    if given.get("parameters") == "bf16" and adapter is not None:
        problems.append("optim.parameters: bf16 and adapter: what an adapter learns is small; leave one of them out")
    return problems


def build_optimizer(
    model: nn.Module, settings: OptimConfig, depths: Mapping[str, int] | None = None, seed: int = 0
) -> Optimizer:
    """Return the optimizer over the trainable parameters, weights apart from biases and norms. seed: of its rounding.

    `depths` (see `layers.depths`; {} is all 0) says how far below the head each named parameter is. Parameters of one
    depth are one group, or two, with that `depth` among its keys.
    """
    import torch

    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = depths[name] if depths else 0
            members.setdefault((depth, parameter.ndim <= 1), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": 0.0 if flat else settings.weight_decay, "depth": depth}
        for (depth, flat), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
    trainable = [parameter for parameters in members.values() for parameter in parameters]
    if settings.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=True)
        for parameter in trainable if settings.momentum else ():  # else the kernel takes memory as it finds it
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if settings.few_bytes:
        from train import few_bytes

        return few_bytes.AdamW(groups, settings.states, seed, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    from train.adamw import AdamW

    return AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def rate(settings: OptimConfig, updates: int, warmup: int, decay: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the update's number, from 1 to `updates`.

    It rises linearly over `warmup` updates, reaching `lr` in the last of them, then follows the schedule. Decaying
    schedules would reach lr x min_lr_ratio just after the last update, so that no update is without effect; but
    inverse_sqrt never does, and slanted_triangular ends a 32nd of the way above it. Never above lr. Raises `UserError`
    where warmup and decay do not fit into the run.
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


def scales(settings: OptimConfig, optimizer: Optimizer, every: int, updates: int) -> Callable[[int], list[float]]:
    """Return each parameter group's part of the rate as a function of the update's number; 0: it does not learn yet.

    Howard and Ruder, https://arxiv.org/abs/1801.06146: layer_decay ** depth (section 3.2: theirs is 1 / 2.6); with
    `every` > 0 (section 3.3) a group of depth d learns only after the first d x `every` updates. Raises `UserError`
    where there are no layers below the head, or where the lowest would not come to learn.
    """
    depths = [group["depth"] for group in optimizer.param_groups]
    if settings.by_layer and max(depths) == 0:
        raise UserError(
            "optim.layer_decay, optim.unfreeze: all parameters that learn are of the head or new, so there are no "
            "layers below it; leave these keys out"
        )
    if every * max(depths) >= updates:
        raise UserError(
            f"optim.unfreeze: {settings.unfreeze} is {every} updates, so that the lowest of {max(depths)} layers below "
            f"the head would begin to learn after update {every * max(depths)}, but the run has only {updates}. "
            "Unfreeze faster, or train longer"
        )
    full = [settings.layer_decay**depth for depth in depths]

    def at(number: int) -> list[float]:
        lowest = (number - 1) // every if every else max(depths)
        return [scale if depth <= lowest else 0.0 for scale, depth in zip(full, depths, strict=True)]

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
