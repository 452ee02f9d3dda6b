"""When the memory does not suffice: micro-batches are halved, by all processes alike, and nothing else changes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from numpy.typing import NDArray

from data.batches import Batch, Batches
from data.errors import UserError
from data.plan import Bounds, MicroBatch, cost
from train import files
from train.signals import Again

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

log = logging.getLogger("train")

T = TypeVar("T")

ONE_ROW = (
    "out of memory with a single example at once: lower data.max_length, take precision=bf16, a smaller model or an "
    "adapter, or share the model out (accelerate_configs/fsdp2.yaml)"
)


def is_lacking(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on the device or for the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def take_part(accelerator: Accelerator, model: nn.Module) -> None:
    """Go through the collectives of an update's last micro-batch, under DDP, with gradients of zero.

    So the other processes, which know nothing yet, are not left waiting. It needs no activations.
    """
    clear_device_cache(garbage_collection=True)
    model = getattr(model, "_orig_mod", model)  # nothing is compiled for this
    inside: Any = model.module
    own = vars(inside).get("forward")
    learning = [parameter for parameter in inside.parameters() if parameter.requires_grad]
    inside.forward = lambda _: torch.stack([parameter.sum().double() * 0 for parameter in learning]).sum()
    try:
        nothing = model(torch.zeros((), device=accelerator.device))  # on GPUs DDP looks at its first argument
    finally:
        del inside.forward
        if own is not None:
            inside.forward = own
    accelerator.backward(nothing)


class Memory:
    """How far the micro-batches of a run have been halved; `output/memory.json` keeps it over resumptions.

    A halving holds from its update on, so that whatever is made again after a kill is cut as it was before.
    """

    def __init__(self, accelerator: Accelerator, batches: Batches, output: Path) -> None:
        """Take up what was noted under the same bounds; nothing of other bounds, which the user has changed since."""
        self.accelerator = accelerator
        self.batches = batches
        self.file = output / "memory.json"
        noted = [self._read() if accelerator.is_main_process else []]
        broadcast_object_list(noted)
        batches.smaller.extend(noted[0])

    def smaller(self, number: int, batch: Batch) -> Batch:
        """Return the batch of update `number` again, in micro-batches of half the size; later ones will be cut like it.

        Called on all processes. Raises `UserError` on all of them where an example goes alone already.
        """
        clear_device_cache(garbage_collection=True)
        told = self._halve(number, batch)
        if self.accelerator.is_main_process:
            self._write()
            log.warning("update %d: %s The update is made again, and learns the same", number, told)
        return batch.recut()

    def lost(self, number: int, batch: Batch) -> None:
        """End this process, since the others wait for what it cannot compute; when the run goes on it is smaller."""
        told = self._halve(number, batch)
        with contextlib.suppress(FileNotFoundError):  # another process in the same state has just written the same
            self._write()
        raise Again(f"update {number}: {told} The same command goes on so from the newest checkpoint")

    def figures(self, number: int) -> dict[str, float]:
        """Return what update `number` was halved to; {} for almost all of them."""
        return {f"train/{key}": value for update, bounds in self.batches.smaller if update == number
                for key, value in [_named(bounds)]}  # fmt: skip

    def _halve(self, number: int, batch: Batch) -> str:
        before = self.batches.bounds_of(number)
        key, value = _named(self.batches.halve(number, batch.lengths, ONE_ROW))
        limit = _named(before)[1]
        unit = "examples" if key == "micro_batch_size" else "tokens"
        return f"out of memory with up to {limit:,} {unit} at once; now {value:,}. Set {key}={value} to begin so."

    def _read(self) -> list[tuple[int, Bounds]]:
        """Return the halvings that are noted. A note that was lost or damaged costs no more than to find out anew."""
        try:
            noted = json.loads(self.file.read_text(encoding="utf-8"))
            if (noted["bounds"], noted["padding_free"]) != self._bounded:  # tokens of another kind
                return []
            return [(entry["update"], _bounds(self.batches.bounds, entry["limit"])) for entry in noted["halved"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _write(self) -> None:
        halved = [{"update": update, "limit": _named(bounds)[1]} for update, bounds in self.batches.smaller]
        bounds, padding_free = self._bounded
        files.write_json(self.file, {"bounds": bounds, "padding_free": padding_free, "halved": halved})

    @property
    def _bounded(self) -> tuple[list[str | int], bool]:
        return list(_named(self.batches.bounds)), self.batches.bounds.padding_free


@dataclass
class Fitting:
    """Computes micro-batches that nothing is learned from: those that the memory does not hold, in pieces."""

    key: str
    """What the user may set: `evaluate.batch_tokens`."""
    bounds: Bounds
    whole: bool = True
    """Whether each process computes without the others. Else it cannot compute more often than they do."""
    limit: int | None = None
    """Tokens of what is known to fit; padding counts where it is computed."""

    def __call__(self, part: MicroBatch, lengths: NDArray[Any], compute: Callable[[MicroBatch], T]) -> list[T]:
        """Return what `compute` says of `part`, or of its pieces in order. lengths: tokens of every example; those of
        `part` begin with the longest.

        Raises `UserError` for a single example that does not fit.
        """
        ahead, found = [part], []
        while ahead:
            piece = ahead.pop()
            rows, tokens = piece.rows, cost(lengths, piece.rows, self.bounds)
            if self.limit is not None and tokens > self.limit and len(rows) > 1:
                halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
                ahead += [MicroBatch(half, piece.filler) for half in reversed(halves)]
                continue
            try:
                found.append(compute(piece))
            except RuntimeError as error:
                if not is_lacking(error):
                    raise
                if not self.whole:
                    raise UserError(f"out of memory with {tokens:,} tokens at once: lower {self.key}") from error
                if len(rows) == 1:
                    raise UserError(ONE_ROW) from error
                self.limit = tokens // 2
                ahead.append(piece)
            else:
                continue
            clear_device_cache(garbage_collection=True)
            log.warning(
                "out of memory with %d tokens at once; at most %d from here on. Set %s=%d to begin so",
                tokens, self.limit, self.key, self.limit,
            )  # fmt: skip
        return found


def _named(bounds: Bounds) -> tuple[str, int]:
    """Return the key of the config that a bound is of, and its value."""
    if bounds.rows is not None:
        return "micro_batch_size", bounds.rows
    return "micro_batch_tokens", bounds.tokens or 0


def _bounds(like: Bounds, limit: int) -> Bounds:
    return replace(like, tokens=limit) if like.rows is None else replace(like, rows=limit)
