"""A tiny pretrained model, small data and short runs, all made here: no network, no shared files."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml

WORDS = [f"w{number}" for number in range(60)]
SHARD = "shard-00001-model-00001-of-00001.safetensors"
"""What the only process writes of a checkpoint's model, or of its optimizer."""
SHAPES = ("single_label", "multi_label", "pair", "regression")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of two layers, 32 wide, with its tokenizer, as a folder of safetensors."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_decoder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 of two layers, 32 wide, with the words of `tiny_model` and an end token, as a folder of safetensors."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-decoder")
    specials = ["<pad>", "<unk>", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS) + 3, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_encoder_decoder(tiny_decoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A T5 of two layers on each side, 32 wide, with the tokenizer of `tiny_decoder`, as a folder of safetensors."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny-encoder-decoder")
    AutoTokenizer.from_pretrained(tiny_decoder).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS) + 3, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_models(tiny_model: str, tiny_decoder: str, tiny_encoder_decoder: str) -> dict[str, str]:
    """The folder of each of them, by kind."""
    return {"bert": tiny_model, "gpt2": tiny_decoder, "t5": tiny_encoder_decoder}


def rows(shape: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return learnable rows of very different lengths: low words speak for the first label."""
    generator = random.Random(f"{shape} {seed}")
    result = []
    for _ in range(count):
        low = generator.random() < 0.5
        words = [generator.choice(WORDS[:30] if low else WORDS[30:]) for _ in range(generator.randint(1, 24))]
        row: dict[str, Any] = {"text": " ".join(words)}
        if shape == "single_label":
            row["label"] = "low" if low else "high"
        elif shape == "multi_label":
            row["labels"] = [
                name for name, given in (("low", low), ("high", not low), ("long", len(words) > 12)) if given
            ]
        elif shape == "pair":
            row = {"sentence1": row["text"], "sentence2": generator.choice(WORDS), "label": generator.randint(0, 2)}
        else:
            row["label"] = round(len(words) / 12 + generator.random(), 3)
        result.append(row)
    return result


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: str) -> Callable[..., dict[str, Any]]:
    """Return a function that writes data of a shape and returns a config for it; dotted keys change it."""

    def make(shape: str = "single_label", train: int = 150, validation: int = 41, **changes: Any) -> dict[str, Any]:
        for name, count in (("train", train), ("validation", validation)):
            file = tmp_path / f"{shape}-{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows(shape, count, len(name))))
        config: dict[str, Any] = {
            "output": str(tmp_path / "out"),
            "seed": 3,
            "batch_size": 32,
            "updates": 20,
            "precision": "fp64",
            "task": {"name": "text_classification"},
            "data": {
                "train": str(tmp_path / f"{shape}-train.jsonl"),
                "validation": str(tmp_path / f"{shape}-validation.jsonl"),
                "cache": str(tmp_path / "cache"),
            },
            "model": {"path": tiny_model, "config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}},
            "optim": {"lr": 5e-3, "warmup": "10%"},
            "tracking": {"log_every": 1},
        }
        for key, value in changes.items():
            section = config
            *path, last = key.split("__")
            for name in path:
                section = section.setdefault(name, {})
            section[last] = value
        return config

    return make


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Let every test begin without the state that Accelerate keeps for the whole process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def write_config(config: dict[str, Any], file: Path) -> Path:
    """Write a config as YAML; return the file."""
    file.write_text(yaml.safe_dump(config))
    return file


def checkpoint(output: Path, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of the model, and those of the optimizer as PARAMETER.KEY, after update `number`.

    Of processes that hold whole copies: each tensor is in the file of one of them.
    """
    from safetensors.torch import load_file

    folder = output / "checkpoints" / f"update-{number:08d}"
    parts = [[load_file(file) for file in (folder / part).iterdir()] for part in ("model", "optimizer")]
    model, optimizer = ({name: each[name] for each in part for name in each} for part in parts)
    return model, optimizer


def figures(output: Path, name: str) -> dict[int, float]:
    """Return one figure of metrics.jsonl by update."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["update"]: line[name] for line in lines if name in line}
