"""DeepSpeed: what is asked of it and cannot be is refused, by the key that says it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.errors import UserError
from train import zero


def asked(**changes: Any) -> Any:
    """An Accelerator that was asked for ZeRO."""
    settings = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}, "gradient_clipping": "auto"}
    plugin = SimpleNamespace(deepspeed_config={**settings, **changes}, zero3_init_flag=changes.pop("init", False))
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it is."""
    monkeypatch.setattr(zero, "installed", lambda: True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_stage: 1 is not built in; choose 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            "offload_param_device: cpu is not built in; set none",
        ),
        ({"zero_optimization": {"stage": 3}, "init": True}, "zero3_init_flag: .* set false"),
        ({"optimizer": {"type": "Lion"}}, "says optimizer; leave it out: the optimizer is that of the config: optim"),
        ({"gradient_clipping": 0.5}, "says gradient_clipping; leave it out: that is optim.max_grad_norm"),
        ({"fp16": {"enabled": True}}, "says fp16; leave it out"),
        ({"communication_data_type": "bf16"}, "says communication_data_type; leave it out: gradients are reduced in"),
        (
            {"gradient_accumulation_steps": 8},
            "says gradient_accumulation_steps; leave it out: see micro_batch_size",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "says zero_quantized_weights; leave it out",
        ),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], told: str) -> None:
    zero.check(asked())
    zero.check(asked(fp16={"enabled": False}))
    with pytest.raises(UserError, match=told):
        zero.check(asked(**changes))


def test_parameters_that_no_loss_uses() -> None:
    zero.check_used([])
    with pytest.raises(UserError, match=r"must be used by the loss; a, … is not \(2 in all\)"):
        zero.check_used(["b", "a"])


def test_compiled_layers() -> None:
    with pytest.raises(UserError, match=r"compile was not tried under DeepSpeed"):
        zero.check(asked(), compiles=True)


def test_layers_computed_twice() -> None:
    with pytest.raises(UserError, match=r"activation_checkpointing was not tried under DeepSpeed"):
        zero.check(asked(), recomputes=True)


def test_layers_one_after_the_other() -> None:
    with pytest.raises(UserError, match=r"optim\.unfreeze is not built in under DeepSpeed"):
        zero.check(asked(), unfreezes=True)


@pytest.mark.parametrize("precision", ["fp16", "fp64"])
def test_precisions_that_it_would_change(precision: str) -> None:
    with pytest.raises(UserError, match=f"precision: {precision} is not built in under DeepSpeed; use bf16 or fp32"):
        zero.settle(asked(), torch.nn.Linear(1, 1), precision, 1.0)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "installed", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'lockstep\[deepspeed\]'"):
        zero.check(asked())
