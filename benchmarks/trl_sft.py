"""The loss of chat beside TRL's SFTTrainer: `python -m benchmarks.trl_sft ROWS [--rows 24] [--longest 512]`.

ROWS is a source of conversations as in a config. Both get the same rows, the same tokenizer and chat template, and the
same weights of a small Llama (float64); printed are the mean losses over all tokens that the assistant writes, with and
without packing, and cut. TRL is installed for this only; its means are taken over the whole batch, as ours are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from data.encode import encode_sources
from data.source import Rows, Source, open_rows
from train.model import load_model
from train.model_config import ModelConfig
from train.tasks.chat import Chat, Config
from train.tokenizer import load_tokenizer

MODEL = {
    "config": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 4096, "initializer_range": 0.2,
    },
    "tokenizer": {"train": {"kind": "bpe", "size": 1000}},
    "add_tokens": ["<|im_start|>", "<|im_end|>"],
}  # fmt: skip
TOLERANCE = 1e-6


def ours(task: Chat, rows: Rows, model: Any, longest: int, cache: Path) -> tuple[float, int]:
    """Return our mean loss, and over how many tokens it is taken."""
    encoded = encode_sources([[rows]], task, task.tokenizer, longest, skip_bad=False, cache=cache)
    tensors = task.collate(encoded.features(np.arange(len(encoded.dataset))))
    with torch.no_grad():
        loss = task.loss(model, tensors).item()
    targets = int(encoded.column("targets").sum())
    return loss / targets, targets


def theirs(
    tokenizer: Any, given: Dataset, model: Any, longest: int, folder: Path, *, packed: bool
) -> tuple[float, int]:
    """Return TRL's mean loss of one batch of all rows, and over how many tokens it is taken."""
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, activation_checkpointing=False, report_to=[], seed=0,
        assistant_only_loss=True, packing=packed, max_length=longest + 1,  # it counts tokens, we those taken in
        per_device_train_batch_size=len(given), dataset_num_proc=None, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=settings, train_dataset=given, processing_class=tokenizer)
    (batch,) = list(trainer.get_train_dataloader())
    targets = int((batch["labels"][:, 1:] != -100).sum())
    model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch))
    return float(loss), targets


def compare(source: str, count: int, longest: int) -> bool:
    """Print both losses, uncut and cut, packed and not; say whether they agree."""
    agree = True
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        opened = open_rows(Source(path=source), "train", skip_bad=False, cache=cache, token=None)
        chosen = concatenate_datasets([rows.dataset for rows in opened]).select_columns(["messages"])
        given = Dataset.from_list([*chosen.select(range(min(count, len(chosen))))])
        rows = Rows(given, source)
        settings = ModelConfig.model_validate(MODEL)
        for packing in ("none", "documents"):
            task_settings = Config(template="chatml", packing=packing)
            tokenizer, known = load_tokenizer(settings, [rows], cache, None, task_settings.text_columns)
            task = Chat.prepare(task_settings, [rows], tokenizer)
            model, _ = load_model(
                settings, task.model_class, task.model_config, tokenizer,
                known=known, dtype=torch.float64, seed=0, token=None,
            )  # fmt: skip
            model.eval()
            task.check_model(model)
            for length in (4096, longest):
                mine, targets = ours(task, rows, model, length, cache)
                other, others = theirs(tokenizer, given, model, length, cache, packed=packing == "documents")
                agree = agree and targets == others and abs(mine - other) <= TOLERANCE
                print(
                    f"packing {packing:9}  rows up to {length:4}: ours {mine:.12f} over {targets:,} tokens, "
                    f"TRL {other:.12f} over {others:,}; difference {abs(mine - other):.1e}"
                )
    print("they agree" if agree else "they do not agree")
    return agree


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 if all losses agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="ROWS")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--longest", type=int, default=512)
    options = parser.parse_args(arguments)
    return 0 if compare(options.source, options.rows, options.longest) else 1


if __name__ == "__main__":
    sys.exit(main())
