"""The last layer computes what the head reads, and gives what it gives from all tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.test_padding_free import LENGTHS, batch, make
from train import adapter, last_layer, padding_free
from train.adapter_config import AdapterConfig

HEAD = "ForSequenceClassification"
NARROWED = ("Bert", "Roberta", "Electra")
WHOLE = ("Albert", "DistilBert", "ModernBert")
"""A stack of one layer, and residuals that are added where no module begins."""


def learned(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(**given).logits
    (logits**2).sum().backward()
    return logits.detach(), [each.grad.clone() for each in model.parameters() if each.grad is not None]


def hooks(model: Any) -> int:
    """Of this module."""
    found = [hook for each in model.modules() for hook in (each._forward_pre_hooks | each._forward_hooks).values()]
    return sum(isinstance(getattr(hook, "__self__", None), last_layer._Narrow) for hook in found)


def computed(model: Any) -> list[int]:
    """Note how many tokens the last layer's last projection is given in each pass."""
    seen = list[int]()
    last = [each for each in model.base_model.encoder.layer[-1].modules() if isinstance(each, torch.nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("kind", NARROWED)
def test_it_is_the_same(kind: str, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and every gradient, float64 to 1e-9, from 4 tokens of 25; also of 32, as in bf16."""
    monkeypatch.setattr(padding_free, "_size", lambda count, device: -(-count // multiple) * multiple)
    model, given = make(kind, HEAD), batch()
    logits, gradients = learned(model, given)
    assert last_layer.enable(model)
    seen = computed(model)
    found, others = learned(model, given)
    assert seen == [len(LENGTHS)]
    assert torch.allclose(found, logits, rtol=1e-9, atol=1e-12)
    assert len(others) == len(gradients) >= 20
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(others, gradients, strict=True))


@pytest.mark.parametrize("kind", WHOLE)
def test_where_it_does_not_work_all_tokens_are_computed(kind: str) -> None:
    model, given = make(kind, HEAD), batch()
    logits, _ = learned(model, given)
    assert last_layer.enable(model) and hooks(model) == 0
    assert torch.allclose(learned(model, given)[0], logits, rtol=1e-9, atol=1e-12)


def test_a_head_that_reads_other_tokens_gets_them() -> None:
    """Of every token; of the last one; or of any that is the largest."""
    tokens = make("Bert")
    assert last_layer.enable(tokens) and hooks(tokens) == 0
    for read in (lambda states: states[:, 8], lambda states: states.amax(1)):
        model = make("Bert", HEAD)
        model.bert.pooler.forward = lambda states, read=read: read(states)
        assert last_layer.enable(model) and hooks(model) == 0


def test_who_asks_for_more_gets_it() -> None:
    """The encoder alone, hidden states between layers, rows without padding; also after a pass that failed."""
    model, given = make("Bert", HEAD), batch()
    rows = given["attention_mask"].bool()
    expected = model.bert(**given).last_hidden_state
    between = model(**given, output_hidden_states=True).hidden_states
    full = model(given["input_ids"]).logits
    assert last_layer.enable(model) and hooks(model) == 5
    seen = computed(model)
    with pytest.raises(IndexError):
        model(input_ids=given["input_ids"] + 1000, attention_mask=given["attention_mask"])
    assert torch.allclose(model.bert(**given).last_hidden_state[rows], expected[rows], rtol=1e-9, atol=1e-12)
    found = model(**given, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(found, between, strict=True))
    assert torch.equal(model(given["input_ids"]).logits, full)
    assert seen == [sum(LENGTHS), rows.numel(), rows.numel()]


def test_an_empty_row() -> None:
    mask = batch()["attention_mask"]
    mask[1] = 0
    given = {"input_ids": batch()["input_ids"], "attention_mask": mask}
    model, other = make("Bert", HEAD), make("Bert", HEAD)
    assert last_layer.enable(model) and padding_free.enable(other)
    found, expected = model(**given).logits, other(**given).logits
    assert torch.allclose(found[mask.any(1)], expected[mask.any(1)], rtol=1e-9, atol=1e-12)
    assert torch.isfinite(found).all()


def test_dropout_is_what_the_seed_says() -> None:
    model = make("Bert", HEAD, hidden_dropout_prob=0.5).train()
    assert last_layer.enable(model) and model.training
    one, other, third = (_seeded(model, seed) for seed in (3, 3, 4))
    assert torch.equal(one, other) and not torch.equal(one, third)


def _seeded(model: Any, seed: int) -> Tensor:
    torch.manual_seed(seed)
    logits: Tensor = model(**batch()).logits
    return logits


def test_it_leaves_no_trace() -> None:
    model, state = make("Bert", HEAD), torch.random.get_rng_state()
    expected = model.config.to_dict()
    assert last_layer.enable(model)
    assert torch.equal(torch.random.get_rng_state(), state) and model.config.to_dict() == expected
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("also", ["classifier", "attention.output", "layer.1.attention", "layer.1"])
def test_with_what_an_adapter_copies(also: str) -> None:
    """PEFT copies what learns as a whole, hooks and all: inside a layer, nothing is left out then."""
    results = []
    for enabled in (False, True):
        model, given = make("Bert", HEAD), batch()
        assert not enabled or last_layer.enable(model)
        settings = AdapterConfig(also_train=(also,), target_modules=("query",), dropout=0.0)
        adapted = adapter.attach(model, settings, [], 60, 0, SimpleNamespace(path="nowhere", revision=None)).eval()
        results.append(learned(adapted, given))
        assert last_layer.enabled(adapted) == (enabled and also == "classifier")
    (logits, gradients), (found, others) = results
    assert torch.allclose(found, logits, rtol=1e-9, atol=1e-12) and len(others) == len(gradients) > 0
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(others, gradients, strict=True))
