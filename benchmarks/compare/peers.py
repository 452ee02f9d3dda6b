"""Ours and its peers, each as its users would write it: `python -m benchmarks.compare.peers PEER WORKLOAD FOLDER`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.compare.meter import Meter
from benchmarks.compare.workloads import RATE, WORKLOADS, Workload, config, model_folder, write_rows


def ours(work: Workload, folder: Path, meter: Meter) -> None:
    """The whole run, as `python -m train` makes it."""
    from train import run, update
    from train.config import validate

    real = update.Learner.update

    def timed(self: update.Learner, number: int, batch: Any) -> update.Report:
        found = real(self, number, batch)
        meter.losses.append(float(found.loss) / found.targets)
        meter.real.append(batch.tokens)
        meter.computed.append(batch.tokens if padding_free(self.model) else batch.computed)
        meter.tick()
        return found

    update.Learner.update = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        run.run(validate(config(work, folder, Path(output) / "run"), "compare"))


def padding_free(model: Any) -> bool:
    return any(hook.__module__ == "train.padding_free" for hook in model.base_model._forward_pre_hooks.values())


def raw(work: Workload, folder: Path, meter: Meter) -> None:
    """A loop in plain PyTorch over our batches: what our own loop costs beside it."""
    import torch

    from train.config import validate
    from train.ingredients import read
    from train.run import plan_batches

    with tempfile.TemporaryDirectory(dir=folder) as output:
        settings = validate(config(work, folder, Path(output)), "compare")
        ingredients = read(settings)
    batches, _ = plan_batches(settings, ingredients)
    model: Any = ingredients.model
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    for number, batch in batches.between(0, work.updates):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - (number - 1) / work.updates)
        total = 0.0
        for part in batch.parts:
            loss = ingredients.task.loss(model, part.tensors)
            (loss / batch.targets).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.losses.append(total / batch.targets)
        meter.real.append(batch.tokens)
        meter.computed.append(batch.tokens if padding_free(model) else batch.computed)
        meter.tick()


def _tokenized(work: Workload, folder: Path) -> tuple[Any, Any]:
    """Return the rows as the documentation of transformers makes them (kept by `datasets` from one start to the next),
    and the tokenizer."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(work, folder))  # type: ignore[no-untyped-call]
    file = str(write_rows(work, folder))
    rows = load_dataset("json", data_files=file, split="train", cache_dir=str(folder / "datasets"))

    def encode(batch: Any) -> Any:
        found = tokenizer(batch["text"], truncation=True, max_length=work.longest)
        return {**found, "labels": [("good", "bad").index(label) for label in batch["label"]]}

    return rows.map(encode, batched=True, remove_columns=["text", "label"]), tokenizer


def _counting(collator: Callable[[Any], Any], meter: Meter) -> Callable[[Any], Any]:
    def collate(rows: Any) -> Any:
        batch = collator(rows)
        meter.real.append(int(batch["attention_mask"].sum()))
        meter.computed.append(batch["attention_mask"].numel())
        return batch

    return collate


def _trainer(work: Workload, folder: Path, meter: Meter, **switches: Any) -> None:
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.tick()

    rows, tokenizer = _tokenized(work, folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(work, folder), num_labels=2)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        arguments = TrainingArguments(
            output_dir=output, per_device_train_batch_size=work.batch, max_steps=work.updates, learning_rate=RATE,
            weight_decay=0.01, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
            bf16=work.precision == "bf16", **switches,
        )  # fmt: skip
        collator = _counting(DataCollatorWithPadding(tokenizer), meter)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[Ticks()],
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        meter.losses.append(trainer.state.log_history[-1]["train_loss"])


def trainer(work: Workload, folder: Path, meter: Meter) -> None:
    """transformers' Trainer as its documentation has it."""
    _trainer(work, folder, meter)


def trainer_tuned(work: Workload, folder: Path, meter: Meter) -> None:
    """The same with every public switch that helps here."""
    _trainer(
        work, folder, meter, train_sampling_strategy="group_by_length", logging_nan_inf_filter=False,
        optim="adamw_torch_fused", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip


def usual(work: Workload, folder: Path, meter: Meter) -> None:
    """A loop on Accelerate as its examples have it."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, get_scheduler

    accelerator = Accelerator(mixed_precision="bf16" if work.precision == "bf16" else "no")
    rows, tokenizer = _tokenized(work, folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(work, folder), num_labels=2)
    collator = _counting(DataCollatorWithPadding(tokenizer), meter)
    loader = DataLoader(rows, shuffle=True, batch_size=work.batch, collate_fn=collator)
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
        meter.losses.append(loss.item())
        meter.tick()


PEERS = {each.__name__: each for each in (ours, raw, trainer, trainer_tuned, usual)}


def main() -> None:
    name, work, folder = sys.argv[1], WORKLOADS[sys.argv[2]], Path(sys.argv[3])
    os.environ["HF_HUB_OFFLINE"] = "1"
    meter = Meter(work.warm)
    PEERS[name](work, folder, meter)
    meter.report()


if __name__ == "__main__":
    main()
