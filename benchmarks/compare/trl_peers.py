"""TRL's SFTTrainer on the same conversations or documents: documented, tuned, packed, compiled.

All take about as many real tokens in an update as ours: `conversations` rows of their own length or, packed, `batch`
rows of `longest` tokens. `trl` is the example of its documentation: micro-batches of 8 (the default), activation
checkpointing. Those that are tuned leave that out, take micro-batches of rows of a length (`group_by_length`; on an
H200 eight an update 29,000 tokens/s, 17 of them 17,900, 17 by `batch_rebalance` 18,700; four do not fit by length), log
nothing, and use Liger's kernels where they are installed and there is a GPU, without `compile`. With LoRA they hold the
frozen weights in bf16. Attention is PyTorch's (sdpa): flash-attention is not installed. Packed rows go one at a time,
since TRL lays those of a micro-batch end to end and the mask is quadratic; without flash-attention transformers makes
that mask from the positions, so that no conversation sees another (`benchmarks.trl_sft` compares the losses).
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks.compare.meter import Meter
from benchmarks.compare.peers import counting, same_kernels, ticking
from benchmarks.compare.workloads import ALPHA, RATE, Workload, model_folder, write_rows

DEFAULT = 8
"""Of `per_device_train_batch_size`."""


def _train(work: Workload, folder: Path, meter: Meter, *, tuned: bool, **switches: Any) -> None:
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    place = model_folder(work, folder)
    rows = load_dataset(
        "json", data_files=str(write_rows(work, folder)), split="train", cache_dir=str(folder / "datasets")
    )
    adapter = None
    if work.rank:
        from peft import LoraConfig

        adapter = LoraConfig(r=work.rank, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
        if tuned and work.precision == "bf16":
            switches["model_init_kwargs"] = {"dtype": "bfloat16"}
    with tempfile.TemporaryDirectory(dir=folder) as output, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        arguments = SFTConfig(
            output_dir=output, max_steps=work.updates, learning_rate=RATE, weight_decay=0.01, save_strategy="no",
            report_to="none", use_cpu=not torch.cuda.is_available(), bf16=work.precision == "bf16",
            max_length=work.longest, assistant_only_loss=work.task == "chat", **switches,
        )  # fmt: skip
        trainer = counting(SFTTrainer, meter)(
            model=str(place), args=arguments, train_dataset=rows, callbacks=[ticking(meter)], peft_config=adapter,
            processing_class=AutoTokenizer.from_pretrained(place),  # type: ignore[no-untyped-call]
        )  # fmt: skip
        trainer.train()
    meter.told["switches"] = {name: str(value) for name, value in switches.items()}
    meter.told["parts"] = arguments.gradient_accumulation_steps


def _tuned(work: Workload, *, compiled: bool) -> dict[str, Any]:
    """Set and return every public switch that helps, but for how rows are put together."""
    import torch

    on_gpu = torch.cuda.is_available()
    same_kernels()
    liger = on_gpu and not compiled and importlib.util.find_spec("liger_kernel") is not None
    return {
        "gradient_checkpointing": False, "optim": "adamw_torch_fused", "logging_strategy": "no", "disable_tqdm": True,
        "logging_nan_inf_filter": False, "dataloader_pin_memory": on_gpu, "dataloader_num_workers": 2 if on_gpu else 0,
        "use_liger_kernel": liger, "torch_compile": compiled,
    }  # fmt: skip


def _apart(work: Workload) -> dict[str, Any]:
    rows, parts = work.conversations // work.parts, work.parts
    return {
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": parts,
        "train_sampling_strategy": "group_by_length",
    }  # fmt: skip


def _packed(work: Workload) -> dict[str, Any]:
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": work.batch, "packing": True}


def trl(work: Workload, folder: Path, meter: Meter) -> None:
    """SFTTrainer as its documentation has it."""
    rows = next(rows for rows in range(DEFAULT, 0, -1) if work.conversations % rows == 0)  # as many an update as ours
    _train(
        work, folder, meter, tuned=False, per_device_train_batch_size=rows,
        gradient_accumulation_steps=work.conversations // rows,
    )  # fmt: skip


def trl_tuned(work: Workload, folder: Path, meter: Meter) -> None:
    """Rows of their own length, those of a micro-batch alike."""
    _train(work, folder, meter, tuned=True, **_tuned(work, compiled=False), **_apart(work))


def trl_tuned_compiled(work: Workload, folder: Path, meter: Meter) -> None:
    """The same with `torch_compile`, without Liger."""
    _train(work, folder, meter, tuned=True, **_tuned(work, compiled=True), **_apart(work))


def trl_packed(work: Workload, folder: Path, meter: Meter) -> None:
    """Packed rows."""
    _train(work, folder, meter, tuned=True, **_tuned(work, compiled=False), **_packed(work))


def trl_packed_compiled(work: Workload, folder: Path, meter: Meter) -> None:
    """The same with `torch_compile`, without Liger."""
    _train(work, folder, meter, tuned=True, **_tuned(work, compiled=True), **_packed(work))


PEERS = (trl, trl_tuned, trl_packed, trl_tuned_compiled, trl_packed_compiled)
