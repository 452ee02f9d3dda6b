"""What was learned, as named tensors in safetensors files that any number of processes writes and any other reads.

Names and files do not depend on how model and optimizer are held: by one process, a copy on each (DDP), or shared out
(FSDP2, HSDP, tensor parallel). Each process writes what it holds and reads what it needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train import together
from train.adapter_files import frozen

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

# That one process is alone is known. For good: what is filtered for a time is filtered for all threads.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing put into the names of parameters."""


AVERAGES = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What optimizers remember in a type of their own."""

FORMER = ("exp_avg_scale", "exp_avg_sq_scale")
"""What was remembered beside averages in 8 bits when their codes meant something else."""


class FormerError(ValueError):
    """Another version of this program wrote it, in a way that this one does not read."""


def plain(name: str) -> str:
    """Return the name of a parameter as the model has it before anything is wrapped around its parts."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def model_tensors(model: nn.Module, *, only_what_learns: bool = False) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of an unwrapped model by name, tied ones once, not copied.

    With `only_what_learns`, those that do not learn are left out.
    """
    every = model.state_dict(keep_vars=True)
    without = frozen(model, every) if only_what_learns else set()
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in every.items():
        if name not in without:
            found.setdefault(id(tensor), (plain(name), tensor.detach()))
    return dict(found.values())


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return what the optimizer knows of each parameter as PARAMETER.KEY, not copied."""
    return {
        f"{name}.{key}": value
        for name, parameter in _learning(optimizer, model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def dealt(tensors: Mapping[str, Tensor], world: int, process: int) -> dict[str, Tensor]:
    """Of tensors that all processes hold alike, return those that one of them writes: of about as many bytes each."""
    bytes_of = [0] * world
    found = {}
    for name, tensor in sorted(tensors.items(), key=lambda entry: -entry[1].nbytes):
        least = bytes_of.index(min(bytes_of))
        bytes_of[least] += tensor.nbytes
        if least == process:
            found[name] = tensor
    return found


def save(tensors: Mapping[str, Tensor], folder: Path, *, whole: bool = False, group: Any = None) -> None:
    """Write named tensors to `folder`, each process what it holds; called on all processes, which may hold copies.

    With `whole`, the files are joined to one that holds every tensor entire, as others read it, one piece after the
    other: no process holds more than its own share in memory. The processes agree in `group`; default: that of all.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    from train.shard_writer import Writer

    kind = HuggingFaceStorageWriter if whole else Writer
    writer = kind(str(folder), save_distributed=True, enable_consolidation=whole)
    with _plain_errors():
        alone = not torch.distributed.is_initialized()
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)


def load(tensors: Mapping[str, Tensor], folder: Path, *, some: bool = False) -> None:
    """Read the tensors of `folder` into those given, in place, each process its own share.

    Raises `ValueError` unless both hold the same names in the same sizes. With `some` there may be more in `folder`,
    and each process reads for itself.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Planner(DefaultLoadPlanner):
        """Gives a sign of life after each tensor."""

        def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
            together.goes_on()

    class Reader(HuggingFaceStorageReader):
        """Waits for all before the collective with which reading ends: some have much more to read."""

        def read_data(self, plan: Any, planner: Any) -> Any:
            try:
                return super().read_data(plan, planner)
            finally:
                if not some:
                    together.wait()

    stored, here = sizes(folder), {name: tensor.shape for name, tensor in tensors.items()}
    compare({name: size for name, size in stored.items() if name in here} if some else stored, here)
    reader, alone = Reader(str(folder)), some or not torch.distributed.is_initialized()
    with _plain_errors():
        load(dict(tensors), storage_reader=reader, planner=Planner(), no_dist=alone)


def compare(stored: Mapping[str, tuple[torch.Size, torch.dtype]], here: Mapping[str, torch.Size]) -> None:
    """Raise `ValueError` unless what is stored has the names and sizes of what is here."""
    for name in sorted(stored.keys() ^ here.keys()):
        raise ValueError(f"{name} is in one and not in the other")
    for name, size in here.items():
        if size != stored[name][0]:
            raise ValueError(f"{name} is of size {list(stored[name][0])} there and {list(size)} here")


def compare_type(entry: str, stored: torch.dtype, here: torch.dtype) -> None:
    """Raise `ValueError` where an average of an optimizer is stored in another type than it has here."""
    if entry.rpartition(".")[2] in FORMER:
        raise FormerError(f"{entry}: averages in 8 bits were rounded in another way")
    if entry.rpartition(".")[2] in AVERAGES and stored != here:
        raise ValueError(f"{entry} is {stored} there and {here} here: see optim.states")


def load_optimizer(optimizer: Optimizer, model: nn.Module, folder: Path) -> None:
    """Give the optimizer what `optimizer_tensors` found, once more, each process its own share.

    A parameter of which nothing is stored has not learned yet. Raises `ValueError` where something is stored of a
    parameter that does not learn here.
    """
    parameters = _learning(optimizer, model)
    states: dict[Any, dict[str, Tensor]] = {}
    targets: dict[str, Tensor] = {}
    for entry, (size, dtype) in sizes(folder).items():
        name, _, key = entry.rpartition(".")
        if name not in parameters:
            raise ValueError(f"{name} has learned there and does not learn here")
        parameter = parameters[name]
        expected = optimizer.dtype_of(parameter) if hasattr(optimizer, "dtype_of") else parameter.dtype
        compare_type(entry, dtype, expected)
        like = torch.empty_like(parameter, dtype=dtype)
        target = like if like.shape == size else torch.empty(size, dtype=dtype, device=parameter.device)
        targets[entry] = states.setdefault(parameter, {})[key] = target.detach()
    load(targets, folder)
    optimizer.state.clear()
    optimizer.state.update(states)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what went wrong itself, on whatever process, not torch's `BaseException` with all tracebacks in it."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def _learning(optimizer: Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the optimizer's parameters by name, in the model's order."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = {plain(name): each for name, each in model.named_parameters() if id(each) in held}
    assert len(named) == len(held), "the optimizer holds a parameter that the model does not have"
    return named


def sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return size and type of each tensor that the files of `folder` hold, from their headers."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (about.size, about.properties.dtype) for name, about in found.items()}


def size(tensor: Any) -> torch.Size:
    """Return the size of a whole tensor, also of one that DeepSpeed shares out."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))
