"""Model and optimizer as a checkpoint holds them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from train import shards
from train.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Learned:
    """What an update changes: model, optimizer and, in fp16, the scale of the loss. All methods are called on all
    processes; what one world and strategy wrote, any other reads."""

    strategy: Strategy
    only_what_learns: bool = False
    """Whether parameters that do not learn are kept out of all checkpoints: they are the starting model's."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that this process has to write, by part of a checkpoint and name; copied if `copied`."""
        found = {
            "model": self.strategy.model_tensors(only_what_learns=self.only_what_learns),
            "optimizer": self.strategy.optimizer_tensors(),
        }
        accelerator = self.strategy.accelerator
        if not self.strategy.shares_out:
            world, process = accelerator.num_processes, accelerator.process_index
            found = {part: shards.dealt(tensors, world, process) for part, tensors in found.items()}
        if self._scaler is not None:
            found["scaler"] = self._scale()
        return found

    @property
    def copied(self) -> bool:
        """Whether training does not change what `tensors` returns."""
        return self.strategy.copies

    def load(self, folder: Path) -> None:
        """Read everything back. Raises `ValueError` where `folder` holds another model or optimizer."""
        self.strategy.load(folder / "model", folder / "optimizer", only_what_learns=self.only_what_learns)
        if self._scaler is not None and (folder / "scaler").is_dir():  # else of a run in another precision
            scale = self._scale()
            shards.load(scale, folder / "scaler")
            self._scaler.load_state_dict({name: value.item() for name, value in scale.items()})

    def whole(self, scratch: Path) -> dict[str, Tensor]:
        """Return the state dict of the whole model on the main process, and nothing on the others.

        Where it is shared out it goes through files in `scratch`, which is removed again, and is mapped from them: no
        process ever holds more than its own share in memory.
        """
        accelerator, named = self.strategy.accelerator, self.strategy.net.state_dict(keep_vars=True)
        every = {shards.plain(name): each for name, each in named.items()}
        if not self.strategy.shares_out:
            return {name: each.detach() for name, each in every.items()} if accelerator.is_main_process else {}
        if accelerator.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)  # of a kill
        accelerator.wait_for_everyone()
        shards.save(self.strategy.model_tensors(), scratch, whole=True)
        if not accelerator.is_main_process:
            return {}
        found = {name: tensor for file in scratch.glob("*.safetensors") for name, tensor in load_file(file).items()}
        shutil.rmtree(scratch, ignore_errors=True)  # what is mapped stays; NFS keeps the folder
        first = {id(each): name for name, each in reversed(every.items())}  # of tied ones
        return {name: found[first[id(each)]] for name, each in every.items()}

    @property
    def _scaler(self) -> Any:
        return self.strategy.accelerator.scaler

    def _scale(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self._scaler.state_dict().items()}
