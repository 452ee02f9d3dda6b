"""Model and optimizer as a checkpoint holds them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from train import shards, strategy

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn


@dataclass(frozen=True)
class Learned:
    """What an update changes: model, optimizer and, in fp16, the scale of the loss. All methods are called on all
    processes; what one world and strategy wrote, any other reads."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    """As `accelerator.prepare` gave them."""
    only_what_learns: bool = False
    """Whether parameters that do not learn are kept out of all checkpoints: they are the starting model's."""

    def save(self, folder: Path) -> None:
        """Write everything to `folder`, each process what it holds."""
        net = self._net
        shards.save(shards.model_tensors(net, only_what_learns=self.only_what_learns), folder / "model")
        shards.save(shards.optimizer_tensors(self._optimizer, net), folder / "optimizer")
        if self.accelerator.scaler is not None:
            shards.save(self._scale(), folder / "scaler")

    def load(self, folder: Path) -> None:
        """Read everything back. Raises `ValueError` where `folder` holds another model or optimizer."""
        net = self._net
        shards.load(shards.model_tensors(net, only_what_learns=self.only_what_learns), folder / "model")
        shards.load_optimizer(self._optimizer, net, folder / "optimizer")
        if self.accelerator.scaler is not None and (folder / "scaler").is_dir():  # else of a run in another precision
            scale = self._scale()
            shards.load(scale, folder / "scaler")
            self.accelerator.scaler.load_state_dict({name: value.item() for name, value in scale.items()})

    def whole(self, scratch: Path) -> dict[str, Tensor]:
        """Return the state dict of the whole model on the main process, and nothing on the others.

        Where it is shared out it goes through files in `scratch`, which is removed again, and is mapped from them: no
        process ever holds more than its own share in memory.
        """
        every = {shards.plain(name): each for name, each in self._net.state_dict(keep_vars=True).items()}
        if not strategy.shared_out(every.values()):
            return {name: each.detach() for name, each in every.items()} if self.accelerator.is_main_process else {}
        if self.accelerator.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)  # of a kill
        self.accelerator.wait_for_everyone()
        first = {id(each): name for name, each in reversed(every.items())}  # of tied ones
        shards.save({name: every[name].detach() for name in first.values()}, scratch, whole=True)
        if not self.accelerator.is_main_process:
            return {}
        found = {name: tensor for file in scratch.glob("*.safetensors") for name, tensor in load_file(file).items()}
        shutil.rmtree(scratch)  # what is mapped stays until it is let go
        return {name: found[first[id(each)]] for name, each in every.items()}

    @property
    def _net(self) -> nn.Module:
        net: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return net

    @property
    def _optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # inside Accelerate's wrapper

    def _scale(self) -> dict[str, Tensor]:
        state = self.accelerator.scaler.state_dict()
        return {name: torch.tensor(value) for name, value in state.items()}
