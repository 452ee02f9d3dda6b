"""Dropout of our own: as often as asked for, a function of PyTorch's seed, and only where it belongs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from train import dropout, ingredients
from train.config import validate

COUNT = 1_000_003
"""No multiple of four."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("probability", [2**-8, 0.1, 0.5, 0.9])
def test_as_often_as_asked_for(probability: float, dtype: torch.dtype) -> None:
    """Within five standard deviations of a million draws, each alone and next to each other; the mean is 1."""
    torch.manual_seed(0)
    noise = dropout.noise((COUNT,), probability, dtype)
    assert noise.dtype == dtype
    kept = noise != 0
    spread = 5 * (probability * (1 - probability) / COUNT) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - probability)) < spread + 2**-17
    values = noise[kept].unique()
    rounding = torch.finfo(dtype).eps
    assert len(values) == 1 and abs(float(values) * (1 - probability) - 1) < rounding + 2**-9
    for apart in (1, 2, 3, 4):
        both = float((kept[apart:] & kept[:-apart]).double().mean())
        assert abs(both - (1 - probability) ** 2) < 3 * spread + 2**-16


def test_the_share_is_rounded_and_the_mean_is_not() -> None:
    """Kept of all 65,536 draws there are, times what they are multiplied by: 1 to the last bits."""
    dropped = round(0.1 * dropout.STEPS)
    assert dropped / dropout.STEPS == pytest.approx(0.1, abs=2**-17)
    torch.manual_seed(0)
    scale = float(dropout.noise((64,), 0.1, torch.float64).max())
    assert scale * (dropout.STEPS - dropped) / dropout.STEPS == pytest.approx(1, abs=1e-15)


def test_a_function_of_the_seed() -> None:
    layer, values = dropout.Dropout(0.3), torch.randn(5, 7)

    def drawn(seed: int) -> Any:
        torch.manual_seed(seed)
        return layer(values)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_its_gradient() -> None:
    values = torch.ones(100, requires_grad=True)
    torch.manual_seed(0)
    found = dropout.drop(values, 0.5)
    found.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, found.detach())
    assert set(found.tolist()) == {0.0, 2.0}


def test_a_layer_computed_twice_drops_the_same() -> None:
    """Checkpointing restores PyTorch's generator, from which it draws."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    dropout.enable(net)
    values = torch.randn(16, 8)

    def gradients(twice: bool) -> Any:
        net.zero_grad()
        torch.manual_seed(5)
        (checkpoint(net, values, use_reentrant=False) if twice else net(values)).square().sum().backward()
        return [parameter.grad for parameter in net.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(gradients(True), gradients(False), strict=True))


def test_evaluation_draws_nothing() -> None:
    layer, values = dropout.Dropout(0.3).eval(), torch.randn(5)
    state = torch.random.get_rng_state()
    assert layer(values) is values
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.999, 1.0])
def test_what_would_be_rounded_away_is_left_to_pytorch(probability: float) -> None:
    values = torch.randn(1000)
    torch.manual_seed(0)
    found = dropout.drop(values, probability)
    torch.manual_seed(0)
    assert torch.equal(found, nn.functional.dropout(values, probability))
    assert (found is values) == (probability == 0), "nothing is computed, nothing kept"


class Other(nn.Dropout):
    """Somebody's own."""


def test_what_is_enabled() -> None:
    """Plain dropout of models on a CPU; names, weights and copies stay."""
    made = [nn.Linear(2, 2), nn.Dropout(0.2), nn.Dropout(0.2, inplace=True), Other(0.2)]
    net, before = nn.Sequential(*made), str(nn.Sequential(*made))
    dropout.enable(net)
    kinds = [nn.Linear, dropout.Dropout, nn.Dropout, Other]
    assert [type(module) for module in net] == kinds == [type(module) for module in copy.deepcopy(net)]
    assert str(net) == before and isinstance(net[1], nn.Dropout) and net[1].p == 0.2
    elsewhere = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Dropout(0.2))
    dropout.enable(elsewhere)
    assert type(elsewhere[1]) is nn.Dropout


@pytest.mark.parametrize("compiled", [False, True])  # compiled or not, the same units are dropped
@pytest.mark.parametrize("adapter", [None, {"rank": 2, "dropout": 0.1}])
def test_all_models_of_runs_draw_so(
    adapter: Any, compiled: bool, make_config: Callable[..., dict[str, Any]], tiny_decoder: str
) -> None:
    """Decoders too, and what an adapter drops."""
    config = make_config(task={"name": "causal_lm"}, adapter=adapter, compile=compiled)
    config["model"] = {"path": tiny_decoder}
    model = ingredients.read(validate(config, "test")).model
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(kinds) > 3 and set(kinds) == {dropout.Dropout}
