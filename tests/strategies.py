"""Strategies without a GPU: what `accelerate launch` makes of a file in accelerate_configs/, on CPUs with gloo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from train.accelerate_file import find, variables


def environment(name: str, *arguments: str) -> dict[str, str]:
    """Return the variables by which `accelerate launch --config_file NAME.yaml ARGUMENTS` tells a program its strategy.

    Precision is left to the run's config.
    """
    found = variables(find(name), *arguments)
    return {key: value for key, value in found.items() if "MIXED_PRECISION" not in key}


@contextmanager
def strategy(variables: dict[str, str]) -> Iterator[None]:
    """Let Accelerate take the strategy that `variables` name, where it would take none on a CPU."""
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    before, shared = dict(os.environ), PartialState._shared_state
    os.environ.update(variables)
    if variables.get("ACCELERATE_USE_DEEPSPEED") == "true":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # for inference; it would be compiled, for a minute
    kind, there = PartialState(cpu=True).distributed_type, torch.accelerator.is_available
    try:
        if variables.get("ACCELERATE_USE_FSDP") == "true":
            shared["distributed_type"] = DistributedType.MULTI_XPU  # else it shards on GPUs only
        if variables.get("ACCELERATE_USE_DEEPSPEED") == "true":
            torch.accelerator.is_available = lambda: True  # else it is not asked for on a CPU
        yield
    finally:
        shared["distributed_type"] = kind
        torch.accelerator.is_available = there
        os.environ.clear()
        os.environ.update(before)
