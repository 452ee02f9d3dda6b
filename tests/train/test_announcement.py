"""What a run says before it begins, of what was asked of it and cannot be."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.worker import carry_out
from train import hardware
from train.announcement import computed_padding
from train.config import RunConfig, validate
from train.ingredients import _leave_padding_out

Make = Callable[..., dict[str, Any]]

COMPILED = "compile is on, and layers that are compiled for a CPU compute padding"
DEBERTA = {"model_type": "deberta-v2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
           "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
EAGER = "DebertaV2ForSequenceClassification is eager, and padding is left out of PyTorch's own (sdpa) only"


@pytest.fixture(autouse=True)
def forget() -> None:
    hardware.forget()


def test_padding_that_is_computed_although_it_was_asked_not_to_be(
    make_config: Make, tiny_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, by the run, which knows the model. By default it is no news, and a model that can is none."""
    cannot = {"model": {"config": DEBERTA, "tokenizer": tiny_model}}
    for number, settings in enumerate(({"padding_free": True, **cannot}, cannot, {"padding_free": True})):
        config = make_config(updates=1, precision="fp32", **settings)
        assert carry_out({**config, "output": f"{config['output']}-{number}"}) == 0
        hardware.forget()
    said = [message for message in caplog.messages if message.startswith("padding_free")]
    assert said == [f"padding_free: the attention of this {EAGER}, so padding is computed; it has no effect"]


def test_who_has_asked(make_config: Make) -> None:
    """Nobody, where a resolved config (output/config.yaml) has all keys."""

    def told(config: RunConfig, *, can: bool = False, why: str = "why") -> str:
        found: Any = SimpleNamespace(padding_free=can, padded=why)
        return computed_padding(config, found)

    asked = validate(make_config(padding_free=True), "test")
    assert (told(asked), told(asked, can=True)) == ("why", "")
    assert told(asked, why="").startswith("adapter.also_train copies parts")
    assert told(validate(asked.dump(), "test")) == ""
    for others in ({}, {"padding_free": False}):
        assert told(validate(make_config(**others), "test")) == ""


def test_a_cpu_compiles_with_padding(make_config: Make) -> None:
    """Other devices do not: `tests/test_compilation.py`."""
    config, on_a_cpu = validate(make_config(compile=True), "test"), SimpleNamespace(device=torch.device("cpu"))
    assert _leave_padding_out(config, on_a_cpu) == COMPILED
