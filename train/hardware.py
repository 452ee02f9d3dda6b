"""Where a run happens: precision, the Accelerator, threads, and the seed of dropout."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.errors import UserError
from data.order import derive
from train import network

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

CPUS, GROUPS = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")
"""Where Linux says which processors are one core, and what control groups may take."""

SMALL = 2**29
"""Bytes of a model for which memory is kept: BERT-base has 440 MB."""

Precision = Literal["auto", "fp32", "bf16", "fp16", "fp64"]


def build_accelerator(precision: str, timeout: float = 600.0) -> tuple[Accelerator, str]:
    """Return the Accelerator and the precision it computes in; starts the process group if there are several.

    A mixed precision that `accelerate` itself was told (its config file or --mixed_precision) wins over `precision`.
    A collective that takes `timeout` seconds and a little more fails: the little is for `watch`, which says more.
    Raises `UserError` for a precision that this hardware would silently not use.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    chosen = told if told != "no" else resolve(precision, cpu=cpu)
    if chosen == "fp16" and cpu:
        raise UserError("precision: fp16 needs a GPU (on CPU it would have no effect); use bf16 or fp32")
    if chosen == "fp8":
        _check_fp8(cpu=cpu)
    network.choose_interface()
    threads = _threads() if cpu else 0
    if cpu:
        torch.set_num_threads(threads)
    else:
        _choose_kernels()
    # buffers are the same everywhere, and to send them would make an update's first forward pass a collective
    reduction = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout + 30))
    mixed = chosen if chosen in ("bf16", "fp16", "fp8") else "no"
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed, kwargs_handlers=[reduction, group])
    if cpu and torch.get_num_threads() != threads:  # under srun or mpirun Accelerate sets a share of the whole machine
        torch.set_num_threads(threads)
    return accelerator, chosen


def forget() -> None:
    """Let go of the Accelerator, so that another can be made, perhaps of another precision.

    The process group stays: it can be made only once, and `Accelerator.end_training` would destroy it. What Accelerate
    has noted in its place, that it is FSDP's, has to go: of that it would not make FSDP a second time.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    GradientState._reset_state()
    shared = PartialState._shared_state
    if shared.get("distributed_type") is DistributedType.FSDP:
        device = shared["device"].type
        shared["distributed_type"] = DistributedType[f"MULTI_{'GPU' if device == 'cuda' else device.upper()}"]


def _check_fp8(*, cpu: bool) -> None:
    """Refuse fp8, which only `accelerate` can be told, where it cannot be: Accelerate's own words do not help."""
    import torch
    from accelerate.utils import is_torchao_available

    capability = (0, 0) if cpu or not torch.cuda.is_available() else torch.cuda.get_device_capability()
    if capability < (8, 9):
        found = "a CPU" if cpu else f"one of {'.'.join(map(str, capability))}"
        raise UserError(
            "accelerate was asked for mixed precision fp8, which needs a GPU of compute capability 8.9 or more (L4, "
            f"H100, B200); here is {found}. Use bf16"
        )
    if not is_torchao_available():
        raise UserError(
            "accelerate was asked for mixed precision fp8, which needs torchao 0.6.1 or newer: pip install torchao, or "
            "use bf16"
        )
    if os.environ.get("ACCELERATE_FP8_BACKEND", "NO").upper() not in ("AO", "NO"):  # NO: torchao, where it is
        raise UserError(
            "accelerate was asked for fp8 by another library than torchao, which would put other layers into the model "
            "and its checkpoints; say fp8_config: {backend: AO} as in accelerate_configs/fp8.yaml"
        )


def resolve(precision: str, *, cpu: bool) -> str:
    """Return "auto" as bf16 where the hardware is fast at it, else fp32; other precisions unchanged."""
    import torch

    if precision != "auto":
        return precision
    if not cpu:
        fast = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        return "bf16" if fast else "fp32"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def _threads() -> int:
    """Return how many threads this process computes with: its share of the cores, for spinning threads slow each other
    down tenfold; or what the user has said, but that OMP_NUM_THREADS of several processes is torchrun's."""
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if os.environ.get("MKL_NUM_THREADS") or (local == 1 and os.environ.get("OMP_NUM_THREADS")):
        return torch.get_num_threads()  # heeds them, MKL's before the other
    return max(1, int(min(_cores(), _quota())) // local)


def _cores() -> int:
    """Return the cores that this process may use, hyperthreads of one counted once: a product of matrices fills it.

    As PyTorch counts them: https://pytorch.org/tutorials/intermediate/torchserve_with_ipex
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found = set[str]()
    for number in allowed:
        siblings = CPUS / f"cpu{number}" / "topology" / "thread_siblings_list"
        found.add(siblings.read_text(encoding="ascii") if siblings.exists() else str(number))
    return len(found)


def _quota() -> float:
    """Return how many cores' time this process's control groups of version 2 are given, as a container's limit is."""
    found = [math.inf]
    for group in _control_groups():
        with suppress(OSError, ValueError):  # not there, or "max"
            granted, period = map(int, (group / "cpu.max").read_text(encoding="ascii").split())
            found.append(granted / period)
    return min(found)


def _control_groups(kind: str = "") -> list[Path]:
    """Return the control groups that this process is in: of version 2, where one tree knows everything, and of version
    1 what one `kind` of tree says."""
    own = Path("/proc/self/cgroup")
    lines = own.read_text(encoding="ascii").splitlines() if own.exists() else []
    found = list[Path]()
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", kind):
            inside = GROUPS / kinds / path.lstrip("/")
            found += [inside, *inside.parents]
    return found


def keep_memory(size: int) -> None:
    """Let the C library keep the memory of one update for the next, as PyTorch does on GPUs, for a small model.

    Otherwise it returns every tensor of more than 32 MB, and the system clears each page anew: of MiniLM's update on
    SST-2, 6 %, of BERT-base's 10 %. size: of the model, in bytes. Until what is kept suffices, it may be some times the
    largest tensor: too much where that is large, and there the products take the time.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.malloc_trim(0)  # what an earlier stage has left
        library.mallopt(-4, 0 if size <= SMALL else 65_536)  # M_MMAP_MAX: whether a tensor is a mapping of its own
        library.mallopt(-1, 2**31 - 1 if size <= SMALL else 2**25)  # M_TRIM_THRESHOLD


def free_memory() -> int:
    """Return the bytes that may still be taken: of the machine, and of the control groups that this process is in.

    A container's or Slurm's limit ends a process that passes it, whatever else the machine has. Files that are cached
    count as free.
    """
    import psutil

    found: list[int] = [psutil.virtual_memory().available]
    found += [left for group in _control_groups("memory") if (left := _left(group)) is not None]
    return max(0, min(found))


CONTROLS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""The files in which a control group of version 2 and of version 1 says what it may take and has taken; and what the
system would take back of that."""


def _left(group: Path) -> int | None:
    """Return what a control group may still take, or None if it may take everything, or does not say."""
    for limit, taken, cached in CONTROLS:
        try:
            most, now = ((group / name).read_text(encoding="ascii").strip() for name in (limit, taken))
            about = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue
        return None if most == "max" else int(most) - int(now) + int(about.get(cached, 0))
    return None


def _choose_kernels() -> None:
    """Take cuDNN's attention out of the choice: it plans anew for each shape, and our batches have many.

    MiniLM on SST-2 (H200, bf16, 300 updates of 128 examples): 9,000 tokens/s with it, 36,000 without.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    _never_ask()


def _never_ask() -> None:
    """Let transformers make a mask of what it is given without asking the GPU whether all of it is ones, nor, where
    none is given, whether there is padding all the same, to warn of it: it would wait for the answer in every
    micro-batch. Who has no padding gives no mask. Decoders that do not learn, as where texts are written, may ask."""
    import torch
    from transformers import AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    def made(**options: Any) -> torch.Tensor | None:
        if options.get("attention_mask") is not None:
            options["allow_is_bidirectional_skip"] = False
            if torch.is_grad_enabled():
                options["allow_is_causal_skip"] = False
        return sdpa_mask(**options)

    AttentionMaskInterface.register("sdpa", made)
    PreTrainedModel.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]


def seed_dropout(seed: int, update: int, process: int) -> None:
    """Make everything random in the model's forward pass depend on (seed, update, process) alone.

    As `torch.manual_seed` does, which writes down the stack each time for devices that may come: 0.3 ms, and more with
    its depth.
    """
    import torch

    derived = derive(seed, "dropout", update, process)
    torch.default_generator.manual_seed(derived)
    device: Any = torch.get_device_module()
    if torch.accelerator.is_available() and hasattr(device, "manual_seed"):  # where DeepSpeed runs on a CPU it has none
        device.manual_seed(derived)


def describe(device: torch.device) -> str:
    """Name the device as its owner would: the GPU's name, or the processor's and its cores."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
