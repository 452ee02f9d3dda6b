"""How model and gradients are spread over processes: what Accelerate needs to be told, and what it leaves to us."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from data.errors import UserError
from train import gradients, shards, zero
from train.adamw import AdamW
from train.gradients import Tables, sparse_tables
from train.halves import Halves
from train.layers import named_layers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

SHARES = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}
"""Strategies that share a model out, by Accelerate's name, and the variables by which it is asked for them."""


class Strategy(Protocol):
    """How one update's gradients are made, met and applied; called on all processes in the same order."""

    @property
    def accelerator(self) -> Accelerator:
        """What prepared the two below."""

    @property
    def model(self) -> nn.Module:
        """As `accelerator.prepare` gave it."""

    @property
    def optimizer(self) -> Any:
        """As `accelerator.prepare` gave it."""

    @property
    def net(self) -> nn.Module:
        """The model itself, without what was wrapped around it."""

    @property
    def shares_out(self) -> bool:
        """Whether no process holds the whole model, or not as it is trained."""

    @property
    def copies(self) -> bool:
        """Whether `model_tensors` and `optimizer_tensors` return copies, which no update changes."""

    def settle(self, nothing: Callable[[], Tensor]) -> None:
        """Do what must be done once, before anything is loaded or learned. `nothing` computes a loss of zero."""

    def part(self, *, last: bool) -> AbstractContextManager[None]:
        """Return what must surround a micro-batch, forward and backward: gradients meet in the last one alone."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, which are averaged over processes when they meet."""

    def step(self, loss: Tensor, max_grad_norm: float | None) -> tuple[Tensor, Tensor]:
        """Clip, apply and clear the gradients, unless they or the whole batch's `loss` are not finite.

        Returns their norm before clipping, and 1 where nothing was applied; both still on the device.
        """

    def model_tensors(self, *, only_what_learns: bool = False) -> dict[str, Tensor]:
        """Return the parameters and persistent buffers by name, tied ones once, or this process's share of them."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return what the optimizer remembers of each parameter as PARAMETER.KEY, or this process's share of it."""

    def load(self, model: Path, optimizer: Path, *, only_what_learns: bool = False) -> None:
        """Read both back from the folders to which they were saved (see `shards`), by whatever strategy and world.

        Raises `ValueError` where they are of another model or optimizer.
        """


@dataclass(frozen=True)
class Prepared:
    """One process, DDP, FSDP2 or HSDP: the optimizer's own kernels leave everything as it is where told to."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    tables: Tables = field(default_factory=Tables)
    halves: Halves = field(default_factory=Halves)

    @contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        with nullcontext() if last else self.accelerator.no_sync(self.model), self.halves.micro_batch(last=last):
            yield

    @property
    def net(self) -> nn.Module:
        """See `Strategy`. Accelerate's own way to it would import DeepSpeed, which takes seconds, if it is here."""
        inner = getattr(self.model, "_orig_mod", self.model)
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
        net: nn.Module = getattr(inner, "_orig_mod", inner)
        return net

    @property
    def shares_out(self) -> bool:
        """See `Strategy`."""
        return any(hasattr(parameter, "full_tensor") for parameter in self._learning)

    @property
    def copies(self) -> bool:
        """See `Strategy`."""
        return False

    def settle(self, nothing: Callable[[], Tensor]) -> None:
        """See `Strategy`. FSDP2 has put other parameters in the place of those that the optimizer knew.

        DDP arranges its buckets after its first backward pass.

        The arrangement decides in which order more than two processes are summed: a resumed run would differ in the
        last bits from one that went on. So it would with a static graph, whatever is settled before (torch 2.13, four
        processes): DDP is not told that it has one.
        """
        if self._kernels.state and self._kernels.state.keys() != set(self._learning):  # SGD's momentum, of zeros
            keys = {key for state in self._kernels.state.values() for key in state}
            self._kernels.state.clear()
            self._kernels.state.update({each: {key: torch.zeros_like(each) for key in keys} for each in self._learning})
        if self.accelerator.num_processes > 2 and isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.accelerator.backward(nothing())
            self.model.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        self.accelerator.backward(loss)
        self.tables.bound()

    def step(self, loss: Tensor, max_grad_norm: float | None) -> tuple[Tensor, Tensor]:
        """See `Strategy`. One process waits for the device nowhere."""
        if self.accelerator.scaler is not None:
            self._show(loss)
        self.tables.spread()
        norm, divisor = self._clip(max_grad_norm)
        skip = (~(torch.isfinite(norm) & torch.isfinite(loss))).to(torch.float32)
        kernels = self._kernels
        kernels.grad_scale, kernels.found_inf = divisor, skip  # fused kernels leave everything as it is where 1
        self.optimizer.step()
        self.tables.clear()
        self.optimizer.zero_grad()
        return norm, skip

    def _show(self, loss: Tensor) -> None:
        """Let a gradient be infinite where the loss is not finite: the scaler of fp16 looks at gradients alone."""
        for parameter in self.model.parameters():
            grad: Any = getattr(parameter.grad, "_local_tensor", parameter.grad)
            if grad is not None and grad.numel():
                grad[(0,) * grad.ndim].add_(torch.where(torch.isfinite(loss), 0.0, torch.inf))
                return

    def _clip(self, max_grad_norm: float | None) -> tuple[Tensor, Tensor | None]:
        """Return the norm of the gradients, and by what fused kernels have yet to divide them.

        So they pass through memory once less: of MiniLM's update on SST-2 on two cores, 2 %. The kernels take what to
        divide by in fp32 alone, and in fp16 it is the scale of the loss.
        """
        every = self._learning
        if self.shares_out or self.accelerator.scaler is not None or any(each.dtype != torch.float32 for each in every):
            every = list(self.model.parameters())  # as Accelerate knows them: others it would unscale twice
            return gradients.whole(self.accelerator.clip_grad_norm_(every, max_grad_norm or torch.inf)), None
        parts = [self.tables.part(parameter) for parameter in every]
        norm = gradients.norm([part for part in parts if part is not None])
        return norm, None if max_grad_norm is None else ((norm + 1e-6) / max_grad_norm).clamp(min=1.0)

    def model_tensors(self, *, only_what_learns: bool = False) -> dict[str, Tensor]:
        """See `Strategy`. Nothing is copied."""
        return shards.model_tensors(self.net, only_what_learns=only_what_learns)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Strategy`. Nothing is copied."""
        return shards.optimizer_tensors(self._kernels, self.net)

    def load(self, model: Path, optimizer: Path, *, only_what_learns: bool = False) -> None:
        """See `Strategy`."""
        shards.load(self.model_tensors(only_what_learns=only_what_learns), model)
        shards.load_optimizer(self._kernels, self.net, optimizer)

    @property
    def _learning(self) -> list[nn.Parameter]:
        return [parameter for group in self._kernels.param_groups for parameter in group["params"]]

    @property
    def _kernels(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # inside Accelerate's wrapper


def check(
    accelerator: Accelerator,
    *,
    merges: bool = False,
    unfreezes: bool = False,
    compiles: bool = False,
    few_bytes: bool = False,
    recomputes: bool = False,
) -> None:
    """Refuse a strategy that was asked of `accelerate` and that it would pass over in silence, or that cannot be.

    `merges`: whether an adapter is to be merged into the model at the end; `unfreezes`: whether layers are to learn
    one after the other; `compiles`: whether they are to be compiled; `recomputes`: computed again in the backward pass;
    `few_bytes`: whether the optimizer is to keep anything in less than fp32.
    """
    if few_bytes and (accelerator.is_fsdp2 or accelerator.distributed_type.value == "DEEPSPEED"):
        raise UserError(
            "optim.states, optim.parameters: what is shared out stays fp32; leave them out, or use ddp.yaml"
        )
    if merges and (accelerator.is_fsdp2 or accelerator.distributed_type.value == "DEEPSPEED"):
        raise UserError(
            "adapter.merge: weights that are shared out cannot be merged; leave it out. A run that starts from the "
            "exported adapter merges it, and so does train.predict"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"accelerate was asked for {accelerator.gradient_accumulation_steps} gradient accumulation steps, by which "
            "it would divide every gradient; leave them out: micro_batch_size says how a batch is cut"
        )
    for kind, variable in SHARES.items():
        if os.environ.get(variable, "false").lower() == "true" and accelerator.distributed_type.value != kind:
            raise UserError(
                f"accelerate was asked for {kind}, which needs several processes with a GPU each; here are "
                f"{accelerator.num_processes} on {accelerator.device.type}, and it would do nothing. Use ddp.yaml, "
                "single_gpu.yaml or torchrun"
            )
    if accelerator.distributed_type.value == "DEEPSPEED":
        zero.check(accelerator, unfreezes=unfreezes, compiles=compiles, recomputes=recomputes)
    if accelerator.distributed_type.value == "MEGATRON_LM":
        raise UserError("accelerate was asked for MEGATRON_LM, which is not built in; use fsdp2.yaml")
    parallel: Any = accelerator.parallelism_config
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise UserError(
            "accelerate was asked for tensor, context or sequence parallelism, which is not built in: its processes "
            "would have to share their examples. Use fsdp2.yaml or hsdp.yaml"
        )
    if accelerator.distributed_type.value == "FSDP" and not accelerator.is_fsdp2:
        raise UserError(
            "accelerate was asked for FSDP of version 1; set fsdp_version: 2 as in accelerate_configs/fsdp2.yaml"
        )
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise UserError(
            "accelerate was asked for fsdp_activation_checkpointing, under which a layer that is computed again drops "
            "other units; leave it out, and say activation_checkpointing=true in the config of the run"
        )


def copies(accelerator: Accelerator) -> bool:
    """Whether processes hold a whole copy of the model each, and meet in its gradients (DDP): also one that a launcher
    started alone."""
    return accelerator.distributed_type.value not in ("NO", *SHARES)


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, precision: str, max_grad_norm: float | None = None
) -> Strategy:
    """Let Accelerate prepare model and optimizer, and return the strategy that it was asked for."""
    if accelerator.distributed_type.value == "DEEPSPEED":
        zero.settle(accelerator, model, precision, max_grad_norm)
        return zero.Zero(accelerator, *accelerator.prepare(model, optimizer))
    if accelerator.is_fsdp2:
        _settle_fsdp2(accelerator, model, precision)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # Accelerate knows no other name yet
        prepared = Prepared(accelerator, *accelerator.prepare(model, optimizer))
    if accelerator.distributed_type.value != "NO":
        return prepared
    if not isinstance(optimizer, AdamW):
        return replace(prepared, tables=sparse_tables(model))
    tables, halves = optimizer.take(model, rounded=precision == "bf16")
    return replace(prepared, tables=tables, halves=halves)


def _settle_fsdp2(accelerator: Accelerator, model: nn.Module, precision: str) -> None:
    """Say which layers are shared out one by one, and in what precision they are computed.

    Gradients are reduced in fp32, where Accelerate by itself would take the precision of the computation.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin: Any = accelerator.state.fsdp_plugin
    computed = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(precision)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=computed, reduce_dtype=torch.float32 if computed else None
    )
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in named_layers(model)})
