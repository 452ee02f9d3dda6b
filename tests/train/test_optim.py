"""Every schedule against its formula, and the groups of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest

from data.errors import UserError
from train.optim import OptimConfig, Schedule, build_optimizer, rate

LR, UPDATES, WARMUP, DECAY = 3e-4, 1000, 100, 200
NAMES = get_args(Schedule)
Rate = Callable[[int], float]


def rates(
    schedule: str, updates: int = UPDATES, warmup: int = WARMUP, decay: int = DECAY, **changes: Any
) -> list[float]:
    """Return the rates of updates 1, 2, ... (so item 0 is that of update 1)."""
    settings = OptimConfig.model_validate({"lr": LR, "schedule": schedule, **changes})
    at = rate(settings, updates, warmup, decay)
    return [at(number) for number in range(1, updates + 1)]


def left(number: int) -> float:
    """The share of the updates after the warmup that are still to be made, this one included."""
    return (UPDATES - number + 1) / (UPDATES - WARMUP)


def slanted(number: int) -> float:
    """Equation 3 of https://arxiv.org/abs/1801.06146 with cut_frac 0.1, ratio 32 and t = number - 1."""
    time, cut_fraction, ratio = number - 1, WARMUP / UPDATES, 32
    cut = math.floor(UPDATES * cut_fraction)
    height = time / cut if time < cut else 1 - (time - cut) / (cut * (1 / cut_fraction - 1))
    return (1 + height * (ratio - 1)) / ratio


def one_cycle(number: int) -> float:
    done = number - 1
    if done < WARMUP:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / WARMUP))
    return 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (UPDATES - WARMUP)))


FORMULAS: dict[str, Callable[[int], float]] = {
    "constant": lambda number: 1.0,
    "linear": left,
    "cosine": lambda number: 0.5 * (1 + math.cos(math.pi * (1 - left(number)))),
    "polynomial": lambda number: left(number) ** 2,
    "inverse_sqrt": lambda number: math.sqrt(WARMUP / number),
    "wsd": lambda number: min(1.0, (UPDATES - number + 1) / DECAY),
    "slanted_triangular": slanted,
    "one_cycle": one_cycle,
}
OWN_RISE = ("slanted_triangular", "one_cycle")


def test_every_schedule_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(NAMES) and len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [1, 2, 50, 99, 100, 101, 102, 350, 550, 800, 801, 802, 999, 1000])
def test_formula(name: str, number: int) -> None:
    height = number / WARMUP if number <= WARMUP and name not in OWN_RISE else FORMULAS[name](number)
    assert rates(name)[number - 1] == pytest.approx(LR * height, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "updates, warmup, decay", [(1000, 100, 200), (1000, 0, 0), (7, 3, 3), (2, 1, 1), (3, 0, 1), (1, 0, 0), (1, 1, 0)]
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_rises_then_never_rises_and_is_never_zero_nor_above_lr(
    name: str, updates: int, warmup: int, decay: int, floor: float
) -> None:
    found = rates(name, updates, warmup, decay, min_lr_ratio=floor)
    peak = found.index(max(found))
    assert all(0 < value <= LR for value in found)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert updates == 1 or max(found) == LR
    if name not in OWN_RISE and warmup:
        assert found[warmup - 1] == LR, "the last update of the warmup has the full rate"


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "wsd", "one_cycle"])
def test_decays_to_the_floor(name: str) -> None:
    found = rates(name, min_lr_ratio=0.1)
    assert LR * 0.1 < found[-1] < LR * 0.11
    assert rates(name)[-1] < LR * 0.01


def test_rise_of_one_cycle_and_slanted_triangular_by_default() -> None:
    assert rates("one_cycle", warmup=0).index(LR) == 300
    assert rates("slanted_triangular", warmup=0).index(LR) == 100
    assert rates("slanted_triangular", warmup=0)[0] == pytest.approx(LR / 32, rel=1e-12)
    assert rates("one_cycle", warmup=0)[0] == pytest.approx(LR / 25, rel=1e-12)


def test_inverse_sqrt_goes_on_from_its_warmup() -> None:
    found = rates("inverse_sqrt")
    assert found[99] == LR
    assert found[399] == pytest.approx(LR / 2, rel=1e-12)
    assert rates("inverse_sqrt", warmup=0)[3] == pytest.approx(LR / 2, rel=1e-12)


def test_power_of_polynomial() -> None:
    assert rates("polynomial", power=1.0) == pytest.approx(rates("linear"), rel=1e-12)
    assert rates("polynomial", power=3.0)[549] == pytest.approx(LR * left(550) ** 3, rel=1e-12)


def test_what_does_not_fit_into_the_run() -> None:
    for warmup in (10, 11):
        with pytest.raises(UserError, match=r"optim\.warmup: .* but the run has only 10"):
            rates("linear", updates=10, warmup=warmup)
    with pytest.raises(UserError, match=r"optim\.decay: .* only 5 left"):
        rates("wsd", updates=10, warmup=5, decay=7)
    assert rates("wsd", updates=3, warmup=2, decay=2)[1:] == [LR, LR], "rounding up both is forgiven"
    assert len(rates("linear", updates=10, warmup=5, decay=7)) == 10


def model() -> Any:
    from torch import nn

    frozen = nn.Linear(3, 3)
    frozen.requires_grad_(False)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3), frozen)


def test_groups_decay_weights_but_neither_biases_nor_norms() -> None:
    learner = model()
    groups = build_optimizer(learner, OptimConfig(weight_decay=0.1)).param_groups
    named = {parameter: name for name, parameter in learner.named_parameters()}
    assert [[named[p] for p in group["params"]] for group in groups] == [
        ["0.weight", "1.weight"],
        ["1.bias", "2.weight", "2.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(group["fused"] for group in groups)


def test_settings_reach_the_optimizer() -> None:
    adamw = build_optimizer(model(), OptimConfig(betas=(0.8, 0.9), eps=1e-6, lr=1e-3))
    assert [(group["betas"], group["eps"], group["lr"]) for group in adamw.param_groups] == [
        ((0.8, 0.9), 1e-6, 1e-3)
    ] * 2
    sgd = build_optimizer(model(), OptimConfig(name="sgd", momentum=0.5))
    assert type(sgd).__name__ == "SGD"
    assert [(group["momentum"], group["fused"]) for group in sgd.param_groups] == [(0.5, True)] * 2


def test_one_step_of_adamw_is_the_textbooks() -> None:
    """Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, algorithm 2, in float64."""
    import torch

    weight = torch.nn.Linear(1, 1, bias=False).double()
    weight.weight.data.fill_(2.0)
    optimizer = build_optimizer(weight, OptimConfig(lr=0.1, weight_decay=0.5))
    expected, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0), 1):
        weight.weight.grad = torch.full_like(weight.weight, gradient)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        expected *= 1 - 0.1 * 0.5
        expected -= 0.1 * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        assert weight.weight.item() == pytest.approx(expected, rel=1e-12)
