"""Models of other families, and what is said of those that cannot be used."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from tests.conftest import WORDS
from tests.worker import carry_out
from train.model import ModelConfig, load_model, longest_input

MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture
def family(tiny_model: str, tmp_path: Path) -> Callable[..., str]:
    """Return a function that makes a tiny model of a family, with the tests' tokenizer less some of its keys."""

    def make(name: str, **config: Any) -> str:
        import json

        import transformers

        folder = tmp_path / name
        settings = getattr(transformers, f"{name}Config")(vocab_size=len(WORDS) + 5, **config)
        getattr(transformers, f"{name}Model")(settings).save_pretrained(folder)
        for file in Path(tiny_model).glob("tokenizer*"):
            shutil.copy(file, folder)
        if name == "GPT2":  # no padding token of its own
            described = json.loads((folder / "tokenizer_config.json").read_text())
            described.pop("pad_token", None)
            (folder / "tokenizer_config.json").write_text(json.dumps({**described, "eos_token": "[SEP]"}))
        return str(folder)

    return make


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3}),
        ("Roberta", {**SMALL, "max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}),
        ("DistilBert", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64}),
    ],
)
def test_other_families_train_and_resume(
    name: str, config: dict[str, Any], family: Callable[..., str], make_config: MakeConfig, tmp_path: Path
) -> None:
    path, exported = family(name, **config), []
    for place, stop in enumerate((None, 3)):
        run = make_config(
            updates=6, output=str(tmp_path / str(place)), model__path=path, precision="fp32",
            model__config={}, micro_batch_size=8,
        )  # fmt: skip
        if stop:
            assert carry_out(run, stop_after=stop) == 0
        assert carry_out(run) == 0
        exported.append((tmp_path / str(place) / "model" / "model.safetensors").read_bytes())
    assert exported[0] == exported[1]


def test_the_padding_offset_of_positions_counts(family: Callable[..., str]) -> None:
    import torch
    from transformers import AutoTokenizer

    path = family("Roberta", **SMALL, max_position_embeddings=20, pad_token_id=1, type_vocab_size=1)
    model, new = load_model(
        ModelConfig(path=path), "AutoModelForSequenceClassification", {}, dtype=torch.float32, seed=0, token=None
    )
    assert longest_input(model, AutoTokenizer.from_pretrained(path)) == 18
    assert all(name.startswith("classifier.") for name in new)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__config": {"hidden_dropout": 0.1}}, r"model.config: .* did you mean 'hidden_dropout_prob'"),
        ({"model__config": {"hidden_size": 64}}, "cannot load the model"),
        ({"model__sha256": "0" * 64}, "is not the model that the config names"),
        ({"data__max_length": 65}, "65 is more than the 64 tokens"),
        ({"model__path": "no/such-model"}, "a Hub name needs the network"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(
    changes: dict[str, Any], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        carry_out(make_config(**changes))
    assert not (tmp_path / "out").exists()


def test_a_right_hash_is_accepted_and_a_damaged_file_is_named(
    tiny_model: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    digest = hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()
    assert carry_out(make_config(updates=1, model__path=str(copy), model__sha256=digest)) == 0
    (copy / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot load the model"):
        carry_out(make_config(updates=1, model__path=str(copy), output=str(tmp_path / "other")))
