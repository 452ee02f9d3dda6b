"""States and weights in fewer bytes: exact on average, bit-equal where nothing may change, kept by checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import nn

from data.errors import UserError
from tests.conftest import checkpoint, figures
from tests.distributed import launch
from tests.every_task._runs import builder
from tests.worker import carry_out
from train import few_bytes, hardware, manifest, shards, strategy
from train.config import validate
from train.optim import OptimConfig, build_optimizer
from train.recomputation import Kept, estimate

MakeConfig = Callable[..., dict[str, Any]]
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"optim__states": "bf16"},
    "8bit": {"optim__states": "8bit"},
    "all": {"optim__states": "8bit", "optim__parameters": "bf16", "precision": "bf16", "micro_batch_size": 5},
}


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bf16_is_exact_on_average_and_what_it_has_stays() -> None:
    values = torch.tensor([1.0, -3.14159, 1e-3, 1e-30, -7.7e8, 0.0]).repeat_interleave(40_000).view(6, -1)
    rounded = few_bytes.to_bf16(values, drawn()).float()
    assert all(len(row.unique()) <= 2 for row in rounded)  # the neighbours
    assert rounded.mean(1, dtype=torch.float64).tolist() == pytest.approx(values[:, 0].tolist(), rel=1e-4)
    assert ((rounded - values).abs() <= values.abs() * 2**-7).all()
    assert torch.equal(few_bytes.to_bf16(rounded, drawn(1)).float(), rounded)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [0, 1, 255, 256, 1000])
def test_8_bits_are_exact_on_average(size: int, signed: bool) -> None:
    """Within what chance leaves of it, also of what is far less than the largest of its block."""
    values = torch.randn(size, generator=drawn()) * torch.logspace(-9, 3, size)
    values = values[torch.randperm(size, generator=drawn())]
    values = (values if signed else values.square()).float()
    rounds, total = 2000, torch.zeros(size, dtype=torch.float64)
    for seed in range(rounds):
        codes, bases = few_bytes.to_8bit(values, drawn(seed), signed=signed)
        assert codes.dtype is torch.uint8 and codes.shape == (size,) and bases.shape == (-(-size // 256),)
        found = few_bytes.from_8bit(codes, bases, signed=signed)
        total += found
    base = bases.repeat_interleave(256)[:size]
    step = (values.abs() + base) / 8
    assert ((found - values).abs() <= step).all() if signed else (found >= base).all()
    expected = values if signed else values.maximum(base)
    chance = (step * values.abs().minimum(step) / rounds).sqrt()
    assert ((total / rounds - expected).abs() <= 5 * chance + 4 * step / rounds).all()
    assert not signed or size < 255 or (found == 0).sum() >= size // 4


def test_a_divisor_is_never_zero() -> None:
    values = torch.tensor([0.0, 1e-12, 1.0])
    found = few_bytes.from_8bit(*few_bytes.to_8bit(values, drawn(), signed=False), signed=False)
    assert found.tolist() == [2**-30, 2**-30, 1.0]
    for signed, least in ((True, 0.0), (False, 2**-126)):
        for shape in ((3,), (256,)):
            codes, bases = few_bytes.to_8bit(torch.zeros(shape), drawn(), signed=signed)
            assert (few_bytes.from_8bit(codes, bases, signed=signed) == least).all()
            assert (codes == 0).all() and (bases == 2**-126).all(), "as it begins"


def moved(states: str, grads: list[torch.Tensor], **settings: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return (updates, …), where each weight is after each update from 0, and what is remembered in the end."""
    weight, found = nn.Parameter(torch.zeros_like(grads[0])), []
    optimizer = few_bytes.AdamW([{"params": [weight]}], states, 0, weight_decay=0.0, **settings)
    for number, grad in enumerate(grads, 1):
        weight.grad = grad
        optimizer.param_groups[0]["update"] = number
        optimizer.step()
        found.append(weight.detach().clone())
    return torch.stack(found), optimizer.state[weight]


@pytest.mark.parametrize("width", [384, 896])
def test_a_row_without_gradient_stays(width: int) -> None:
    """Its block and base are those of the row before it too. Squares fade ten times faster here than by default."""
    grads = [torch.randn(2, width, generator=drawn(number)) * 1e-3 for number in range(3000)]
    for grad in grads[20:]:
        grad[1] = 0
    found, _ = moved("8bit", grads, lr=5e-5, betas=(0.9, 0.99))
    assert torch.equal(found[-1, 1], found[400, 1]), "0.01 from there when what is small was rounded to the nearest"
    expected, _ = moved("fp32", grads[:400], lr=5e-5, betas=(0.9, 0.99))
    assert (found[400, 1] - expected[-1, 1]).std() < 0.1 * expected[-1, 1].std()


def test_what_is_rounded_moves_little_beside_much_larger_gradients() -> None:
    """Columns of one block from 1 to 1e-9, the small ones' gradients in every seventh update, all once a thousand times
    as large. In no update is a weight moved twice as far as the fastest in fp32, and none further on average.
    """
    sizes, grads = torch.logspace(0, -9, 256).expand(64, 256), []
    for number in range(600):
        grad = torch.randn(64, 256, generator=drawn(number)) * sizes * (1000 if number == 147 else 1)
        grads.append(grad if number % 7 == 0 else torch.where(sizes > 0.1, grad, 0))
    (found, _), (expected, _) = (moved(states, grads, lr=1.0, eps=1e-30) for states in ("8bit", "fp32"))
    steps, exact = (path.diff(dim=0).abs() for path in (found, expected))
    assert (steps.amax((1, 2)) < 2 * exact.amax((1, 2))).all(), "3.4 times with roots in fp8"
    assert (steps.mean((0, 1)) < 1.1 * exact.mean((0, 1))).all(), "1.4 times"


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99)])
def test_averages_are_exact_on_average(betas: tuple[float, float]) -> None:
    """Over updates too: squares kept as rounded roots were 4 % too large. What moves is 1.5 % faster, as they vary."""
    sizes, ratios = torch.logspace(-2, 0, 256), []
    grads = [(torch.randn(64, 256, generator=drawn(number)) + 0.2) * sizes for number in range(1500)]
    (found, kept), (expected, exact) = (moved(states, grads, lr=1e-3, betas=betas) for states in ("8bit", "fp32"))
    for key in few_bytes.AVERAGES:
        mine, theirs = ({name: value.view(-1) for name, value in state.items()} for state in (kept, exact))
        each = sizes.repeat(64) ** (2 if key == "exp_avg_sq" else 1)
        ratios.append(((few_bytes._widened(mine, key) / each).mean() / (theirs[key] / each).mean()).item())
    assert ratios == pytest.approx([1, 1], abs=0.01)
    assert (found[-1].mean() / expected[-1].mean()).item() == pytest.approx(1.015, abs=0.01)


def learned(states: str, parameters: str = "fp32", updates: int = 100) -> tuple[list[float], Any, nn.Module]:
    """Return the losses of a small regression, the optimizer and the model."""
    torch.manual_seed(0)
    net, losses = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 1)), []
    if parameters == "bf16":
        few_bytes.settle(net, "bf16", "bf16")
    settings = OptimConfig.model_validate({"lr": 1e-2, "states": states, "parameters": parameters})
    optimizer = build_optimizer(net, settings, seed=3)
    inputs = torch.randn(64, 40, generator=drawn(5))
    for number in range(1, updates + 1):
        for group in optimizer.param_groups:
            group["update"] = number
        with torch.autocast("cpu", torch.bfloat16, enabled=parameters == "bf16"):
            loss = (net(inputs).float().squeeze(1) - inputs[:, 0]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer, net


def test_in_fp32_and_in_parts_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _, reference = learned("fp32")
    monkeypatch.setattr(few_bytes, "AT_ONCE", 512)
    monkeypatch.setattr(OptimConfig, "few_bytes", True)
    losses, optimizer, net = learned("fp32")
    assert type(optimizer) is few_bytes.AdamW and losses == expected
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize(("states", "each", "wrong"), [("bf16", 4, 0.01), ("8bit", 2 + 8 / 256, 0.1)])
def test_what_is_remembered(states: str, each: float, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In so many bytes, in parts or at once, and nearly the same as in fp32; of biases and norms just that."""
    losses, optimizer, net = learned(states)
    expected, _, _ = learned("fp32")
    assert losses[-1] < 0.01 and losses == pytest.approx(expected, abs=0.05)
    weight, bias = net[0].weight, net[0].bias
    state = optimizer.state[weight]
    assert sum(value.nbytes for key, value in state.items() if key != "step") <= each * weight.numel() + 8
    assert {value.dtype for value in optimizer.state[bias].values()} == {torch.float32}
    wide = [
        few_bytes._widened(state, key)
        if states == "bf16"
        else few_bytes.from_8bit(state[key].view(-1), state[f"{key}_base"], signed=key == "exp_avg")
        for key in few_bytes.AVERAGES
    ]
    assert torch.isfinite(torch.stack([each.view(-1) for each in wide])).all()
    monkeypatch.setattr(few_bytes, "AT_ONCE", 512)
    assert learned(states)[0][-1] < 0.01


def test_bf16_weights_learn_what_the_nearest_would_not() -> None:
    losses, _, net = learned("bf16", "bf16", 200)
    assert {parameter.dtype for parameter in net.parameters() if parameter.ndim > 1} == {torch.bfloat16}
    assert {parameter.dtype for parameter in net.parameters() if parameter.ndim == 1} == {torch.float32}
    assert losses[-1] < 0.03
    weight = nn.Parameter(torch.ones(300, 100, dtype=torch.bfloat16))
    optimizer = few_bytes.AdamW([{"params": [weight]}], "8bit", 0, lr=1e-4, weight_decay=0.0)
    for number in range(1, 101):
        weight.grad = torch.ones_like(weight)
        optimizer.param_groups[0]["update"] = number
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(0.99, abs=2e-4)  # a bf16 below 1 is 0.004 away


def test_gradients_of_many_micro_batches_are_added_up() -> None:
    """To the nearest bf16 the sum of ones would stay at 256."""
    net = nn.Linear(50, 400)
    few_bytes.settle(net, "bf16", "bf16")
    parts = torch.rand(600, 50, generator=drawn()).to(torch.bfloat16)
    torch.manual_seed(0)
    for part in parts:
        nn.functional.linear(part, net.weight).sum().backward()
    found, expected = net.weight.grad, parts.float().sum(0)
    assert found is not None and found.dtype is torch.bfloat16
    assert found.float().mean(0).tolist() == pytest.approx(expected.tolist(), rel=0.01)
    assert (found.float() / expected).std() < 0.05  # of each number by itself, at random


def test_texts_are_written_in_the_runs_precision(tiny_models: dict[str, str], tmp_path: Path) -> None:
    """`generate` does not go through `forward`, and norms and biases are still fp32."""
    build = builder(tmp_path, tiny_models)
    config = build("seq2seq", "few", precision="bf16", optim__parameters="bf16", optim__states="8bit")
    assert carry_out(config) == 0
    assert figures(Path(config["output"]), "validation/chrf")


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_nothing_changes_where_it_may_not(states: str) -> None:
    _, optimizer, net = learned(states, "bf16", 5)
    before = [tensor.clone() for tensor in held(optimizer, net)]
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(held(optimizer, net), before, strict=True))
    optimizer.found_inf = torch.zeros(())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(net.parameters(), before, strict=False))


def held(optimizer: Any, net: nn.Module) -> list[torch.Tensor]:
    return [*net.parameters(), *(value for state in optimizer.state.values() for value in state.values())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_left_out_stopped_and_gone_on(kind: str, make_config: MakeConfig, tmp_path: Path) -> None:
    """Update 4 is left out bit for bit; stopped after 6 of 10 and gone on, it ends as one that was not."""
    settings = {"updates": 10, "precision": "fp32", "model__config": {}, "data__validation": None, **KINDS[kind]}
    settings |= {"checkpoint__every": 1, "checkpoint__keep": 11}
    whole, stopped = (make_config(output=str(tmp_path / name), **settings) for name in ("whole", "stopped"))
    assert carry_out(whole, poison=(4,)) == 0
    for after, before in zip(checkpoint(tmp_path / "whole", 4), checkpoint(tmp_path / "whole", 3), strict=True):
        assert after and all(torch.equal(after[name], before[name]) for name in after)
    assert carry_out(stopped, poison=(4,), stop_after=6) == 0
    assert carry_out(stopped) == 0
    for one, other in zip(*(checkpoint(tmp_path / name, 10) for name in ("whole", "stopped")), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    kinds = {
        tensor.dtype for name, tensor in other.items() if name.endswith("encoder.layer.0.output.dense.weight.exp_avg")
    }
    assert kinds == {torch.bfloat16 if kind == "bf16" else torch.uint8}


@pytest.mark.whole_run
def test_two_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    """Both round alike; beside one process only what bf16 and 8 bits cannot tell apart differs."""
    jobs = []
    for kind, changes in KINDS.items():
        settings = {"updates": 10, "precision": "fp32", "data__validation": None, **changes}
        assert carry_out(make_config(output=str(tmp_path / f"{kind}-1"), **settings)) == 0
        hardware.forget()
        jobs.append({"config": make_config(output=str(tmp_path / f"{kind}-2"), **settings)})
    launch(jobs, 2, tmp_path)
    for kind in KINDS:
        one, two = (figures(tmp_path / f"{kind}-{world}", "train/loss") for world in (1, 2))
        assert len(one) == 10 and two == pytest.approx(one, rel=1e-3 if kind == "all" else 1e-5)  # 1e-4 and 3e-7 found


def test_what_cannot_be(make_config: MakeConfig, tmp_path: Path) -> None:
    for changes, told in (
        ({"optim__name": "sgd", "optim__states": "8bit"}, "optim.states: 8bit needs optim.name: adamw"),
        ({"adapter": {"rank": 4}, "optim__parameters": "bf16"}, "optim.parameters: bf16 and adapter"),
    ):
        with pytest.raises(UserError, match=told):
            validate(make_config(**changes), "test")
    for precision in ("fp32", "fp64"):
        with pytest.raises(UserError, match=f"optim.parameters.*{precision}"):
            few_bytes.settle(nn.Linear(2, 2), "bf16", precision)
    with pytest.raises(UserError, match=r"optim\.parameters: bf16 needs precision: bf16, and here it is fp32"):
        carry_out(make_config(precision="fp32", optim__parameters="bf16"))
    assert not (tmp_path / "out").exists()
    shared: Any = SimpleNamespace(is_fsdp2=True, distributed_type=SimpleNamespace(value="FSDP"))
    with pytest.raises(UserError, match=r"what is shared out stays fp32.*ddp.yaml"):
        strategy.check(shared, few_bytes=True)


@pytest.mark.parametrize(("states", "bytes_each"), [("fp32", 8.0), ("bf16", 4.0), ("8bit", 2 + 8 / 256)])
def test_what_is_remembered_is_counted(states: Literal["fp32", "bf16", "8bit"], bytes_each: float) -> None:
    """As it is, and as it is foretold of training's memory."""
    model = nn.Linear(256, 64)
    settings = OptimConfig(states=states, parameters="bf16" if states == "fp32" else "fp32")
    optimizer: Any = build_optimizer(model, settings, seed=0)
    for group in optimizer.param_groups:
        group["update"] = 1
    model(torch.ones(2, 256)).sum().backward()
    optimizer.step()
    held = sum(
        value.nbytes for state in optimizer.state.values() for key, value in state.items() if key.startswith("exp_avg")
    )
    assert held == model.weight.numel() * bytes_each + model.bias.numel() * 8
    kept = Kept(1, 0.0)
    weights = model.weight.nbytes + model.bias.nbytes
    assert estimate(model, optimizer, kept, kept, 1).weights == 2 * weights + held


def test_states_of_another_kind_are_refused(tmp_path: Path) -> None:
    """They would be gone on with as they are, whatever the config says, or end in an error of the kernel's."""
    model = nn.Linear(256, 64)
    shards.save({f"weight.{key}": torch.zeros(64, 256) for key in ("exp_avg", "exp_avg_sq")}, tmp_path / "optimizer")
    optimizer = build_optimizer(model, OptimConfig(states="bf16"), seed=0)
    told = r"is torch.float32 there and torch.bfloat16 here: see optim.states"
    with pytest.raises(ValueError, match=told):
        shards.load_optimizer(optimizer, model, tmp_path / "optimizer")
    with pytest.raises(ValueError, match=told):  # so does DeepSpeed's strategy ask
        shards.compare_type("weight.exp_avg", torch.float32, torch.bfloat16)
    shards.compare_type("weight.exp_avg_base", torch.float32, torch.bfloat16)
    shards.compare_type("weight.exp_avg", torch.bfloat16, torch.bfloat16)


def test_8_bits_of_another_version_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """Their codes would be read as other numbers."""
    config = make_config(updates=2, precision="fp32", data__validation=None, optim__states="8bit")
    assert carry_out(config, stop_after=1) == 0
    folder = tmp_path / "out" / "checkpoints" / "update-00000001"
    _, optimizer = checkpoint(tmp_path / "out", 1)
    shutil.rmtree(folder / "optimizer")
    shards.save({name.replace("_base", "_scale"): each for name, each in optimizer.items()}, folder / "optimizer")
    (folder / manifest.NAME).unlink()
    folder.rename(writing := folder.with_name("again"))
    manifest.publish(writing, folder)
    with pytest.raises(UserError, match=r"another version of this program wrote it .*_scale: averages in 8 bits"):
        carry_out(config)
