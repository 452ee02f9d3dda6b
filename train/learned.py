"""Model and optimizer as a checkpoint holds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train import shards

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
