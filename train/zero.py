"""DeepSpeed's ZeRO as a strategy: its engine keeps gradients, optimizer and (stage 3) weights in shares of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import convert_to_fp32

from data.errors import UserError
from train import shards

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

OWN = {
    "optimizer": "the optimizer is that of the config: optim",
    "scheduler": "the learning rate is that of the config: optim",
    "gradient_clipping": "that is optim.max_grad_norm",
    "fp16": "that is precision: fp16, and it needs another strategy: fsdp2.yaml",
    "torch_autocast": "that is precision: bf16",
    "communication_data_type": "gradients are reduced in fp32",
    "data_types": "gradients are added up in fp32",
}
"""What a file for DeepSpeed may not say, and who says it."""

AT_ONCE = 2**28
"""Bytes that a process reads whole at a time."""


def installed() -> bool:
    """Whether DeepSpeed is here."""
    return importlib.util.find_spec("deepspeed") is not None


def check(
    accelerator: Accelerator, *, unfreezes: bool = False, compiles: bool = False, recomputes: bool = False
) -> None:
    """Refuse what DeepSpeed can and this module cannot, or what it would decide against the config.

    From here on transformers loads models whole, also under stage 3: they are looked at before they are shared out.
    """
    from transformers.integrations import deepspeed

    if not installed():
        raise UserError("accelerate was asked for DEEPSPEED, which is not here: pip install 'lockstep[deepspeed]'")
    plugin: Any = accelerator.state.deepspeed_plugin
    settings: Any = plugin.deepspeed_config
    sharing = settings["zero_optimization"]
    if sharing.get("stage") not in (2, 3):
        raise UserError(f"deepspeed_config.zero_stage: {sharing.get('stage')} is not built in; choose 2 or 3")
    for kind in ("optimizer", "param"):
        device = (sharing.get(f"offload_{kind}") or {}).get("device", "none")
        if device not in ("none", None):
            raise UserError(
                f"deepspeed_config.offload_{kind}_device: {device} is not built in; set none, or use more GPUs"
            )
    if plugin.zero3_init_flag and sharing["stage"] == 3:
        raise UserError("deepspeed_config.zero3_init_flag: the model is looked at whole first; set false")
    if unfreezes:
        raise UserError("optim.unfreeze is not built in under DeepSpeed, which clips and remembers every gradient")
    if compiles:
        raise UserError("compile was not tried under DeepSpeed; leave it out, or use fsdp2.yaml")
    if recomputes:
        raise UserError("activation_checkpointing was not tried under DeepSpeed; leave it out, or use fsdp2.yaml")
    if settings.get("gradient_accumulation_steps") not in (None, "auto", 1):
        raise UserError("the file for DeepSpeed says gradient_accumulation_steps; leave it out: see micro_batch_size")
    for key in sharing:
        if key.startswith("zero_quantized") and sharing[key]:
            raise UserError(f"the file for DeepSpeed says {key}; leave it out: nothing is sent in less than fp32")
    for key, who in OWN.items():
        if settings.get(key) not in (None, "auto") and not (key == "fp16" and not settings[key].get("enabled")):
            raise UserError(f"the file for DeepSpeed says {key}; leave it out: {who}")
    unset: Any = deepspeed.unset_hf_deepspeed_config
    unset()


def check_used(unused: Collection[str]) -> None:
    """Refuse a model with parameters that a loss does not use: DeepSpeed takes their gradients for zero, and lets
    weight decay and momentum change what every other strategy leaves as it is."""
    if unused:
        raise UserError(
            f"under DeepSpeed every parameter must be used by the loss; {min(unused)}{', …' * (len(unused) > 1)} is "
            f"not ({len(unused)} in all). Use fsdp2.yaml or ddp.yaml"
        )


def settle(accelerator: Accelerator, model: nn.Module, precision: str, max_grad_norm: float | None) -> None:
    """Tell DeepSpeed, before it prepares the model, what else it would decide by itself.

    Weights stay in fp32 and are computed in the precision of the run, as under every other strategy; DeepSpeed's own
    bf16 would round buffers, and gradients before they are added up, too. What the model gives is fp32, for the loss.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision: {precision} is not built in under DeepSpeed; use bf16 or fp32")
    model.register_forward_hook(lambda module, given, output: convert_to_fp32(output))
    plugin: Any = accelerator.state.deepspeed_plugin
    plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=1,  # what one counts there has no meaning here, but must be said
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,  # an update is over when we say so
        gradient_clipping=max_grad_norm or 0.0,
        bf16={"enabled": False},
        torch_autocast={"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    )


@dataclass
class Zero:
    """See `strategy.Strategy`. Gradients meet in each micro-batch: shares of them are all that is kept."""

    accelerator: Accelerator
    model: Any
    """DeepSpeed's engine."""
    optimizer: Any
    shares_out: ClassVar[bool] = True
    copies: ClassVar[bool] = True
    nothing: Callable[[], Tensor] = field(init=False)
    """A loss of zero."""

    @property
    def net(self) -> nn.Module:
        """See `strategy.Strategy`."""
        net: nn.Module = self.model.module
        return net

    def part(self, *, last: bool) -> AbstractContextManager[None]:
        """See `strategy.Strategy`."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `strategy.Strategy`."""
        self.model.backward(loss)

    def step(self, loss: Tensor, max_grad_norm: float | None) -> tuple[Tensor, Tensor]:
        """See `strategy.Strategy`. Waits for the device. Raises `UserError` where the loss alone is not finite."""
        self.model.step()  # clips to the norm of `settle`, and leaves out a gradient that is not finite
        norm = torch.as_tensor(self.model.get_global_grad_norm(), dtype=torch.float32, device=loss.device)
        if bool(torch.isfinite(norm)) and not bool(torch.isfinite(loss)):
            raise UserError(
                "the loss of an update is not finite, and its gradient is: DeepSpeed cannot leave such an update out. "
                "Go on from the newest checkpoint with fsdp2.yaml or ddp.yaml"
            )
        return norm, (~torch.isfinite(norm)).to(torch.float32)

    def settle(self, nothing: Callable[[], Tensor]) -> None:
        """See `strategy.Strategy`. DeepSpeed knows what the optimizer remembers only after a first step."""
        self.nothing = nothing
        self.model.optimizer.optimizer.state.clear()  # SGD's, of parameters that are shares now
        self._publish()
        self._link()
        self._forget()

    def model_tensors(self, *, only_what_learns: bool = False) -> dict[str, Tensor]:
        """See `strategy.Strategy`. In fp32; each is gathered by itself, and kept in memory by one process in turn."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = shards.model_tensors(self.net, only_what_learns=only_what_learns)
        for mine, name, parameter in self._parameters(set(found)):
            del found[name]
            value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else _gathered(parameter)
            if mine:
                found[name] = value.detach().to("cpu", copy=True)
        return found

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `strategy.Strategy`. In turn, as the model's."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for mine, name, parameter in self._parameters():
            for key in self._moments if parameter.requires_grad else ():
                value = safe_get_full_optimizer_state(parameter, key)
                if mine:
                    found[f"{name}.{key}"] = value.detach().to("cpu", copy=True)
            for key, value in self._counters.items() if mine and parameter.requires_grad else ():
                found[f"{name}.{key}"] = value.detach().to("cpu", copy=True)
        return found

    def load(self, model: Path, optimizer: Path, *, only_what_learns: bool = False) -> None:
        """See `strategy.Strategy`. Each process reads everything, some of it at a time, and keeps its share."""
        from deepspeed.utils import safe_set_full_fp32_param

        found = shards.model_tensors(self.net, only_what_learns=only_what_learns)
        parameters = {name: parameter for _, name, parameter in self._parameters(set(found))}
        here = {name: shards.size(parameters.get(name, each)) for name, each in found.items()}
        shards.compare(shards.sizes(model), here)
        shards.load({name: each for name, each in found.items() if name not in parameters}, model, some=True)
        for name, value in self._read(model, {name: here[name] for name in parameters}):
            if parameters[name].requires_grad:
                safe_set_full_fp32_param(parameters[name], value)
            else:
                with _whole(parameters[name], changed_by=0):
                    parameters[name].data.copy_(value)
        self._publish()
        self._forget()
        self._remember(optimizer)

    def _remember(self, folder: Path) -> None:
        """Give the optimizer what `optimizer_tensors` found. A parameter of which nothing is stored has not learned."""
        from deepspeed.utils import safe_set_full_optimizer_state

        kept = shards.sizes(folder)
        parameters = {name: parameter for _, name, parameter in self._parameters() if parameter.requires_grad}
        for entry, (_, dtype) in kept.items():
            shards.compare_type(entry, dtype, torch.float32)
            if (name := entry.rpartition(".")[0]) not in parameters:
                raise ValueError(f"{name} has learned there and does not learn here")
        moments = {f"{name}.{key}": shards.size(each) for name, each in parameters.items() for key in self._moments}
        for entry, value in self._read(folder, {entry: size for entry, size in moments.items() if entry in kept}):
            name, _, key = entry.rpartition(".")
            safe_set_full_optimizer_state(parameters[name], value, key)
        for key, value in self._counters.items():  # one for all parameters of a share
            for entry in [entry for entry in kept if entry.endswith(f".{key}")][:1]:
                shards.load({entry: value}, folder, some=True)
            for state in self._states:
                state[key].copy_(value)

    def _read(self, folder: Path, wanted: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors of `folder`; little more than `AT_ONCE` bytes of them are in memory at a time."""
        reading: dict[str, Tensor] = {}
        for place, (name, size) in enumerate(wanted.items(), 1):
            reading[name] = torch.empty(size, device=self.accelerator.device)
            if place == len(wanted) or sum(each.nbytes for each in reading.values()) >= AT_ONCE:
                shards.load(reading, folder, some=True)
                yield from reading.items()
                reading.clear()

    def _publish(self) -> None:
        """Let all compute with the weights that the shares hold: by a step that changes none of them."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.model.backward(self.nothing())
        self.model.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _link(self) -> None:
        """Show stage 2 what the optimizer remembers of all groups: it looked once it had stepped the first alone."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        sharing = self.model.optimizer
        groups = getattr(sharing, "single_partition_of_fp32_groups", ())
        for parameters, flat in zip(getattr(sharing, "bit16_groups", ()), groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, sharing.optimizer.state)

    def _forget(self) -> None:
        """Let the optimizer remember nothing of any step."""
        for state in self._states:
            for value in state.values():
                value.zero_()

    def _parameters(self, among: Container[str] | None = None) -> Iterator[tuple[bool, str, Any]]:
        """Yield whether this process keeps it in memory, name and parameter, in the same order everywhere."""
        world, mine = self.accelerator.num_processes, self.accelerator.process_index
        named = [(shards.plain(name), parameter) for name, parameter in self.net.named_parameters()]
        for place, (name, parameter) in enumerate(each for each in named if among is None or each[0] in among):
            yield place % world == mine, name, parameter

    @property
    def _states(self) -> list[dict[str, Tensor]]:
        """What torch's optimizer remembers of each flat share."""
        return [state for state in self.model.optimizer.optimizer.state.values() if state]

    @property
    def _moments(self) -> list[str]:
        return [key for key, value in self._states[0].items() if value.dim()] if self._states else []

    @property
    def _counters(self) -> dict[str, Tensor]:
        return {key: value for key, value in self._states[0].items() if not value.dim()} if self._states else {}


def _gathered(parameter: Any) -> Tensor:
    """Return a whole copy, in fp32, of a parameter that does not learn."""
    with _whole(parameter):
        copied: Tensor = parameter.detach().to(torch.float32, copy=True)
        return copied


def _whole(parameter: Any, changed_by: int | None = None) -> AbstractContextManager[None]:
    """Return what surrounds the use of a whole parameter; what the process `changed_by` makes of it holds for all."""
    from deepspeed.runtime.zero import GatheredParameters

    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    gathered: AbstractContextManager[None] = GatheredParameters([parameter], modifier_rank=changed_by)
    return gathered
