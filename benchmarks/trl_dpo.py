"""The losses of the task `preference` beside TRL's. `python -m benchmarks.trl_dpo`, where TRL 1.16 can be imported.

The same pairs, weights and starting weights; each framework tokenizes for itself. Prints a line for each loss and
precision, and fails where the two differ by more than 1e-6 (relative): TRL's fused output layer computes DPO and IPO in
fp32, whatever the model is in. TRL takes the mean over the tokens of a whole
batch for the SFT term and for ORPO's likelihood, so that a pair's loss depends on its company; there each pair is a
batch of its own, and the mean over them is what a run of ours divides by.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

from data.encode import encode_sources
from data.source import Rows
from train.tasks.preference import Config, Preference

PAIRS = 24
LENGTH = 48
WORDS = ("yes", "no", "never", "often", "the", "end", "of", "42", "über")
BETA = 0.3
CASES: tuple[tuple[str, dict[str, Any], dict[str, Any], bool], ...] = (
    ("DPO", {"loss": "dpo"}, {"loss_type": ["sigmoid"]}, False),
    ("IPO", {"loss": "ipo"}, {"loss_type": ["ipo"]}, False),
    (
        "DPO + 0.5 SFT",
        {"loss": "dpo", "sft_weight": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        True,
    ),
    ("ORPO", {"loss": "orpo"}, {}, True),
    ("reward", {"loss": "reward"}, {}, False),
)
"""Name, our config, TRL's, and whether each pair is a batch of its own."""


def tokenizer_of_bytes() -> Any:
    """Return a tokenizer of bytes that puts BOS before each text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({piece: place for place, piece in enumerate([*special, *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def pairs() -> list[dict[str, str]]:
    """Return pairs of very different lengths, some longer than LENGTH."""
    generator = random.Random(0)

    def text(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))

    made = ({"prompt": text(4), "chosen": " " + text(8), "rejected": " " + text(8)} for _ in range(10 * PAIRS))
    return [row for row in made if row["chosen"][:9] != row["rejected"][:9]][:PAIRS]


def ours(config: dict[str, Any], rows: list[dict[str, str]], model: Any, start: Any, tokenizer: Any) -> float:
    """Return the mean loss of the pairs."""
    settings = {**config, **({} if config["loss"] == "reward" else {"beta": BETA})}
    opened = [Rows(Dataset.from_list(rows), "rows")]
    task = Preference.prepare(Config(**settings), opened, tokenizer)
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        encoded = encode_sources([opened], task, tokenizer, LENGTH, skip_bad=False, cache=Path(cache))
        tensors = task.collate(encoded.features(np.arange(len(rows))))
        if task.config.refers:
            tensors["reference"] = task.reference(start, tensors)
        return task.loss(model, tensors).item() / len(rows)


def theirs(
    name: str, config: dict[str, Any], rows: list[dict[str, str]], model: Any, start: Any, tokenizer: Any
) -> float:
    """Return TRL's loss of the pairs as one batch."""
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder, "per_device_train_batch_size": len(rows), "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "max_length": LENGTH, "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        data = Dataset.from_list(rows)
        if name == "reward":
            from trl import RewardConfig, RewardTrainer

            long = common | {"max_length": None}  # it leaves long pairs out
            trainer: Any = RewardTrainer(
                model=model, args=RewardConfig(**long), train_dataset=data, processing_class=tokenizer
            )
        elif name == "ORPO":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            trainer = ORPOTrainer(
                model=model,
                args=ORPOConfig(beta=BETA, remove_unused_columns=False, **common),
                train_dataset=data,
                processing_class=tokenizer,
            )
        else:
            from trl import DPOConfig, DPOTrainer

            trainer = DPOTrainer(
                model=model, ref_model=start, args=DPOConfig(beta=BETA, **config, **common), train_dataset=data,
                processing_class=tokenizer,
            )  # fmt: skip
        trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[place] for place in range(len(rows))])
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model, batch))


def main() -> int:
    """Print the comparison; return 1 where a loss differs."""
    disable_progress_bars()
    tokenizer, rows, failed = tokenizer_of_bytes(), pairs(), False
    settings = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, num_labels=1, initializer_range=0.2,
    )  # fmt: skip
    for dtype in (torch.float64, torch.float32):
        for name, config, peer, alone in CASES:
            builder: Any = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
            models = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                models.append(builder.from_config(settings).to(dtype).eval())
            short = [row for row in rows if max(map(len, (row["chosen"], row["rejected"]))) + len(row["prompt"]) < 40]
            given = short if name == "reward" else rows
            assert len(given) >= PAIRS // 4, "too few pairs to show anything"
            mine = ours(config, given, *models, tokenizer)
            batches = [[row] for row in given] if alone else [given]
            other = sum(theirs(name, peer, batch, *models, tokenizer) for batch in batches) / len(batches)
            difference = abs(mine - other) / abs(other)
            failed |= not difference <= 1e-6
            print(
                f"{name:14} {str(dtype)[6:]:8} ours {mine:.12f}  TRL {other:.12f}  relative difference {difference:.1e}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
