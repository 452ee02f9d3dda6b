"""What was asked of Accelerate and would have no effect, or another one, is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from data.errors import UserError
from train import evaluation, memory, strategy, update


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
        parallelism_config=SimpleNamespace(non_data_parallel_size=sizes),
    )  # fmt: skip
    with pytest.raises(UserError, match=told):
        strategy.check(asked)


@pytest.mark.parametrize(("kind", "whole"), [("MULTI_CPU", True), ("MULTI_GPU", True), ("FSDP", False), ("NO", False)])
def test_whether_processes_hold_copies_is_one_notion(kind: str, whole: bool) -> None:
    """What decides of unused parameters decides of memory too: `train.memory` has no notion of its own."""
    asked: Any = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    assert strategy.copies(asked) is whole
    assert evaluation.copies is update.copies is strategy.copies
    assert not hasattr(memory, "is_shared_out")
