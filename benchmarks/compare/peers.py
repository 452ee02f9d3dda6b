"""Ours and its peers, each as its users would write it: `python -m benchmarks.compare.peers PEER FOLDER`.

FOLDER holds `workload.json`, and what all peers share: rows, weights, caches.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from benchmarks.compare.meter import Meter
from benchmarks.compare.work import best_matmul
from benchmarks.compare.workloads import RATE, Workload, config, model_folder, write_rows

FILE = "workload.json"
CACHE_OF = {"raw": "ours", "trainer_fp32": "trainer", "usual": "trainer", "trl_tuned": "trl"}
"""Who else keeps the same from one start to the next: rows as they are encoded."""
Peer = Callable[[Workload, Path, Meter], None]


class Over(BaseException):
    """All updates are made: what a run writes at its end is not waited for."""


def ours(work: Workload, folder: Path, meter: Meter, *, compiled: bool = False) -> None:
    """The whole run, as `python -m train` makes it, up to its last update."""
    import yaml

    from train import __main__ as program
    from train import imports

    imports.slow()  # as the program does, so that there is what is to be timed
    from train import update

    real = update.Learner.update

    def timed(self: update.Learner, number: int, batch: Any) -> update.Report:
        found = real(self, number, batch)
        meter.lose(found.loss / found.targets)
        meter.saw(batch.tokens, batch.computed, found.targets)
        meter.tick()
        meter.told["parts"] = len(batch.parts)
        if number == work.updates:
            raise Over
        return found

    update.Learner.update = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=folder) as output, suppress(Over):
        file = Path(output) / "run.yaml"
        file.write_text(yaml.safe_dump(config(work, folder, Path(output) / "run", compiled=compiled)), encoding="utf-8")
        program.main([str(file)])


def ours_compiled(work: Workload, folder: Path, meter: Meter) -> None:
    """The same with `compile: true`."""
    ours(work, folder, meter, compiled=True)


def raw(work: Workload, folder: Path, meter: Meter) -> None:
    """A loop in plain PyTorch over our batches: what our own loop costs beside it."""
    import torch

    from train import dropout
    from train.config import validate
    from train.hardware import seed_dropout
    from train.ingredients import read
    from train.run import plan_batches

    with tempfile.TemporaryDirectory(dir=folder) as output:
        settings = validate(config(work, folder, Path(output)), "compare")
        ingredients = read(settings)
    batches, _ = plan_batches(settings, ingredients)
    model: Any = ingredients.model
    dropout.enable(model)  # as a run's: the same draws, at the same cost
    model.train()
    device = next(model.parameters()).device
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.01, fused=True)
    mixed = torch.autocast(device.type, torch.bfloat16) if work.precision == "bf16" else nullcontext()
    for number, batch in batches.between(0, work.updates):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - (number - 1) / work.updates)
        seed_dropout(settings.seed, number, 0)  # both drop the same units: the same losses
        total = torch.zeros((), device=device)
        for part in batch.parts:
            tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in part.tensors.items()}
            with mixed:
                loss: Any = ingredients.task.loss(model, tensors)
            (loss / batch.targets).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.lose(total / batch.targets)
        meter.saw(batch.tokens, batch.computed, batch.targets)
        meter.tick()
    meter.told["parts"] = len(batch.parts)


def _tokenized(work: Workload, folder: Path, *, lengths: bool = False) -> tuple[Any, Any]:
    """Return the rows as the documentation of transformers makes them (kept by `datasets` from one start to the next),
    and the tokenizer. `lengths`: with a column of them, which spares a Trainer that sorts looking at each row."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(work, folder))  # type: ignore[no-untyped-call]
    file = str(write_rows(work, folder))
    rows = load_dataset("json", data_files=file, split="train", cache_dir=str(folder / "datasets"))

    longest = work.longest  # alone: `datasets` keeps what is encoded by all that this function knows (and `lengths`)

    def encode(batch: Any) -> Any:
        found = tokenizer(batch["text"], truncation=True, max_length=longest)
        beside = {"length": [len(ids) for ids in found["input_ids"]]} if lengths else {}
        return {**found, **beside, "labels": [("good", "bad").index(label) for label in batch["label"]]}

    return rows.map(encode, batched=True, remove_columns=["text", "label"]), tokenizer


def _classifier(work: Workload, folder: Path) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    place = model_folder(work, folder)
    return AutoModelForSequenceClassification.from_pretrained(place, num_labels=2, dtype=torch.float32)


def counting(trainer: Any, meter: Meter) -> Any:
    """Return this class of Trainer with the meter in it; it sees each micro-batch where it is learned.

    The loss is what Trainer adds up itself: kept here and not read, which would cost it what it was told not to do.
    """

    class Counting(trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
            meter.saw(*counts(inputs))
            loss = super().training_step(model, inputs, *others, **named)
            meter.lose(loss)
            return loss

    return Counting


def counts(inputs: Any) -> tuple[Any, Any, Any]:
    """Return real tokens, tokens with padding and targets of a micro-batch, without waiting for a GPU.

    Of texts that are predicted, the tokens that another follows: so they are counted in ours too. TRL gives packed rows
    positions that begin anew, and no mask.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    texts = labels.dim() == 1
    if "attention_mask" in inputs:
        real = inputs["attention_mask"].sum()
        return (real, ids.numel(), len(labels)) if texts else (real - len(ids), ids.numel(), _predicted(labels))
    return (inputs["position_ids"] != 0).sum(), ids.numel(), _predicted(labels)


def _predicted(labels: Any) -> Any:
    return (labels[:, 1:] != -100).sum()


def ticking(meter: Meter) -> Any:
    """Return a callback that tells the meter of each update."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.tick()

    return Ticks()


def _trainer(work: Workload, folder: Path, meter: Meter, *, parts: int = 1, **switches: Any) -> None:
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    rows, tokenizer = _tokenized(work, folder, lengths="train_sampling_strategy" in switches)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        arguments = TrainingArguments(
            output_dir=output, per_device_train_batch_size=work.batch // parts, gradient_accumulation_steps=parts,
            max_steps=work.updates, learning_rate=RATE, weight_decay=0.01, save_strategy="no", report_to="none",
            use_cpu=not torch.cuda.is_available(), bf16=work.precision == "bf16", **switches,
        )  # fmt: skip
        trainer = counting(Trainer, meter)(
            model=_classifier(work, folder), args=arguments, train_dataset=rows, callbacks=[ticking(meter)],
            data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        meter.told["switches"] = {"parts": str(parts), **{name: str(value) for name, value in switches.items()}}


def trainer(work: Workload, folder: Path, meter: Meter) -> None:
    """transformers' Trainer as its documentation has it."""
    _trainer(work, folder, meter)


def trainer_fp32(work: Workload, folder: Path, meter: Meter) -> None:
    """The same in fp32, as it computes by itself, where the others compute in bf16."""
    _trainer(dataclasses.replace(work, precision="fp32"), folder, meter)


def trainer_tuned(work: Workload, folder: Path, meter: Meter, **switches: Any) -> None:
    """The same with every public switch that helps here.

    Long rows go through the model a few at a time (`parts`): padding less, and out of the processor's caches less, of
    IMDb's on two cores 1.8 times as fast. Short rows do not: 0.7 of SST-2's speed in two parts. `group_by_length` sorts
    as far as the data set is large (`Workload.sorted_updates`), the parts of an update too: of IMDb's 0.99 is not
    padding, with `batch_rebalance`, which sorts within an update, 0.96.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    same_kernels()
    _trainer(
        work, folder, meter, parts=work.parts,
        train_sampling_strategy="group_by_length",
        logging_nan_inf_filter=False, optim="adamw_torch_fused", disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=on_gpu, dataloader_num_workers=2 if on_gpu else 0, **switches,
    )  # fmt: skip


def trainer_tuned_compiled(work: Workload, folder: Path, meter: Meter) -> None:
    """The same with `torch_compile`."""
    trainer_tuned(work, folder, meter, torch_compile=True)


def same_kernels() -> None:
    """Leave cuDNN's attention out, as ours does: it plans anew for each shape."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def usual(work: Workload, folder: Path, meter: Meter) -> None:
    """A loop on Accelerate as its examples have it."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding, get_scheduler

    accelerator = Accelerator(mixed_precision="bf16" if work.precision == "bf16" else "no")
    rows, tokenizer = _tokenized(work, folder)
    model = _classifier(work, folder)
    loader = DataLoader(rows, shuffle=True, batch_size=work.batch, collate_fn=DataCollatorWithPadding(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=work.updates)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        meter.lose(loss.detach())
        meter.saw(*counts(batch))
        meter.tick()
        if len(meter.ticks) == work.updates:
            break


def peers() -> dict[str, Peer]:
    from benchmarks.compare import trl_peers

    texts = (ours, raw, trainer, trainer_fp32, trainer_tuned, trainer_tuned_compiled, usual)
    return {each.__name__: each for each in (*texts, ours_compiled, *trl_peers.PEERS)}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    os.environ["HF_HUB_OFFLINE"] = "1"
    work = Workload(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    meter = Meter(work.warm, work.updates)
    peers()[name](work, folder, meter)
    meter.report(best_matmul(work.precision))


def hand_over(work: Workload, folder: Path) -> None:
    """Let the peers know what to learn."""
    (folder / FILE).write_text(json.dumps(dataclasses.asdict(work)), encoding="utf-8")


if __name__ == "__main__":
    main()
