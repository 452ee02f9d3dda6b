"""What was asked of Accelerate and would have no effect, or another one, is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from data.errors import UserError
from train import evaluation, memory, strategy, update
from train.optim import OptimConfig, build_optimizer


@pytest.mark.parametrize(
    ("variable", "kind"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")]
)
def test_what_needs_gpus(variable: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    strategy.check(accelerator)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        UserError, match=f"asked for {kind}, which needs several processes with a GPU each; here are 1 on cpu"
    ):
        strategy.check(accelerator)


@pytest.mark.parametrize(
    ("kind", "sizes", "told"),
    [
        ("MEGATRON_LM", 1, "asked for MEGATRON_LM, which is not built in; use fsdp2.yaml"),
        ("MULTI_GPU", 2, "tensor, context or sequence parallelism, which is not built in"),
        ("FSDP", 1, "FSDP of version 1; set fsdp_version: 2"),
    ],
)
def test_what_is_not_built_in(kind: str, sizes: int, told: str) -> None:
    asked: Any = SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind), is_fsdp2=False, num_processes=2,
        parallelism_config=SimpleNamespace(non_data_parallel_size=sizes), gradient_accumulation_steps=1,
    )  # fmt: skip
    with pytest.raises(UserError, match=told):
        strategy.check(asked)


def test_layers_computed_again_with_another_dropout() -> None:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(activation_checkpointing=True))
    asked: Any = SimpleNamespace(
        distributed_type=SimpleNamespace(value="FSDP"), is_fsdp2=True, num_processes=2, parallelism_config=None,
        gradient_accumulation_steps=1, state=state,
    )  # fmt: skip
    with pytest.raises(UserError, match="leave it out, and say activation_checkpointing=true"):
        strategy.check(asked)


def test_gradients_divided_by_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="asked for 4 gradient accumulation steps, by which it would divide"):
        strategy.check(Accelerator(cpu=True))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_optimizer_remembers_what_it_learns(momentum: float) -> None:
    """FSDP2 puts other parameters in the place of those that the optimizer was made with."""
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(name="sgd", momentum=momentum))
    prepared = strategy.Prepared(Accelerator(cpu=True), model, optimizer)
    buffers = {id(state["momentum_buffer"]) for state in optimizer.state.values()}
    prepared.settle(lambda: torch.zeros(()))
    assert {id(state["momentum_buffer"]) for state in optimizer.state.values()} == buffers
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(each.detach().clone()) for each in group["params"]]
    learning = {each for group in optimizer.param_groups for each in group["params"]}
    prepared.settle(lambda: torch.zeros(()))
    assert set(optimizer.state) == (learning if momentum else set())
    assert all(torch.equal(state["momentum_buffer"], torch.zeros_like(each)) for each, state in optimizer.state.items())


@pytest.mark.parametrize(("kind", "whole"), [("MULTI_CPU", True), ("MULTI_GPU", True), ("FSDP", False), ("NO", False)])
def test_whether_processes_hold_copies_is_one_notion(kind: str, whole: bool) -> None:
    """What decides of unused parameters decides of memory too: `train.memory` has no notion of its own."""
    asked: Any = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    assert strategy.copies(asked) is whole
    assert evaluation.copies is update.copies is strategy.copies
    assert not hasattr(memory, "is_shared_out")


@pytest.mark.parametrize("loss", [1.0, torch.inf, torch.nan])
def test_in_fp16_an_update_whose_loss_is_not_finite_is_left_out(loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients may be finite, and the scaler looks at nothing else."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=8.0), True
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    before = copy.deepcopy(model.state_dict())
    spread = strategy.Prepared(accelerator, model, AcceleratedOptimizer(optimizer, scaler=accelerator.scaler))
    accelerator._optimizers.append(spread.optimizer)
    accelerator.scaler.scale(model(torch.ones(4, 3)).sum()).backward()
    norm, skipped = spread.step(torch.tensor(loss, dtype=torch.float64), 1.0)
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert same == bool(skipped) == (loss != 1.0) and torch.isfinite(norm) == (loss == 1.0)
    assert accelerator.scaler.get_scale() == (8.0 if loss == 1.0 else 4.0)


def test_accelerate_clips_the_parameters_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of FSDP2 in fp16 it would unscale others twice: those that learn, where something is frozen."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    accelerator, given = Accelerator(cpu=True), []
    monkeypatch.setattr(strategy.Prepared, "shares_out", True)
    monkeypatch.setattr(
        accelerator, "clip_grad_norm_", lambda these, norm: given.append((these, norm)) or torch.tensor(2.0)
    )
    spread = strategy.Prepared(accelerator, model, build_optimizer(model, OptimConfig()))
    assert spread._clip(1.5) == (torch.tensor(2.0), None)
    (these, norm), every = given[0], list(model.parameters())
    assert norm == 1.5 and len(these) == len(every)
    assert all(one is other for one, other in zip(these, every, strict=True))


@pytest.mark.parametrize("norm", [0.5, 1e6])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_gradients_are_clipped_as_torch_clips_them(name: Literal["adamw", "sgd"], norm: float) -> None:
    """In fp32 the kernel scales them on the way; where nothing is to be scaled, to the last bit."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(30, 20)
    theirs = copy.deepcopy(ours)
    settings = OptimConfig(name=name, lr=0.01, max_grad_norm=norm)
    spread = strategy.prepare(Accelerator(cpu=True), ours, build_optimizer(ours, settings), "fp32")
    peer = build_optimizer(theirs, settings)
    for number in range(3):
        rows = torch.randn(8, 30, generator=torch.Generator().manual_seed(number))
        loss = spread.model(rows).square().sum()
        spread.backward(loss)
        found, skipped = spread.step(loss.detach(), norm)
        theirs(rows).square().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), norm)
        peer.step()
        peer.zero_grad()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6) and skipped.item() == 0
        assert expected > 0.5
    tolerance = 0.0 if norm > 1 else 1e-6
    assert torch.allclose(ours.weight, theirs.weight, rtol=tolerance, atol=tolerance)
