"""The output layer where there are targets: losses, hits and gradients are those of whole logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from train import adapter, chunked_loss, output_layer
from train.adapter_config import AdapterConfig
from train.tasks import _packed
from train.tasks.base import IGNORED

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "attention_dropout": 0.0,
}  # fmt: skip
LINEAR: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "phi": {},  # an output layer with a bias
    "gpt_neox": {},
    "cohere": {"logit_scale": 1.0},
}
MORE: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
}


def build(kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).train()


def tensors(targets: float = 0.6) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    ids = generator.integers(1, 50, (3, 11))
    labels = np.where(generator.random((3, 11)) < targets, generator.integers(1, 50, (3, 11)), IGNORED)
    found = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    return {**found, "places": _packed.places(labels)}


def learned(model: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of what learns, of a loss that is scaled as an update scales it."""
    model.zero_grad()
    loss = _packed.loss(model, given)
    (loss * 0.125).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss.detach(), {name: grad.clone() for name, grad in named.items() if grad is not None}


@pytest.mark.parametrize("chunk", [1, 50 * 4, 2**24])
@pytest.mark.parametrize("kind", LINEAR)
def test_losses_and_gradients(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked_loss.CHUNK, "cpu", chunk)
    model, given = build(kind, LINEAR[kind]), tensors()
    expected, slopes = learned(model, given)
    expected_each = [each.detach() for each in _packed.losses_and_hits(model, given)]
    assert output_layer.enable(model)
    loss, found = learned(model, given)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-9, atol=1e-12, msg=name)
    each = [each.detach() for each in _packed.losses_and_hits(model, given)]
    torch.testing.assert_close(each[0], expected_each[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(each[1][given["labels"] != IGNORED], expected_each[1][given["labels"] != IGNORED])
    assert not each[1][given["labels"] == IGNORED].any()


def weighed(model: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of each target, and the gradients of a sum in which each has a weight that depends on all."""
    model.zero_grad()
    targets = given["labels"].flatten()[given["places"]]
    with output_layer.asking(targets, given["places"], "losses") as question:
        found = model(input_ids=given["input_ids"], use_cache=False).logits
    if not question.answered:
        logits = found.flatten(0, 1)[given["places"]]
        found = torch.nn.functional.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, targets,
                                                  reduction="none")  # fmt: skip
    (found.softmax(0) * found).sum().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found.detach(), {name: grad.clone() for name, grad in named.items() if grad is not None}


@pytest.mark.parametrize("chunk", [1, 50 * 4, 2**24])
@pytest.mark.parametrize("kind", LINEAR)
def test_each_loss(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loss of each target is worth is known later: gradients are right all the same."""
    monkeypatch.setitem(chunked_loss.CHUNK, "cpu", chunk)
    model, given = build(kind, LINEAR[kind]), tensors()
    expected, slopes = weighed(model, given)
    assert output_layer.enable(model)
    losses, found = weighed(model, given)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-9, atol=1e-12, msg=name)
    with torch.no_grad(), output_layer.asking(given["labels"].flatten()[given["places"]], given["places"], "losses"):
        torch.testing.assert_close(model(input_ids=given["input_ids"]).logits, expected, rtol=1e-12, atol=1e-12)


def test_each_loss_of_what_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's gradient is made where it learns, and logits are computed a second time for nothing else."""
    model, given = build("phi", {}), tensors()
    model.lm_head.requires_grad_(False)
    _, slopes = weighed(model, given)
    assert output_layer.enable(model)
    passes, real = [], chunked_loss.losses_and_slopes
    monkeypatch.setattr(chunked_loss, "losses_and_slopes", lambda *each: passes.append(1) or real(*each))
    _, found = weighed(model, given)
    assert len(passes) == 1 and found.keys() == slopes.keys()
    assert all(torch.allclose(found[name], slope, rtol=1e-9, atol=1e-12) for name, slope in slopes.items())
    model.requires_grad_(False)
    model.lm_head.bias.requires_grad_(True)
    _, alone = weighed(model, given)
    assert alone.keys() == {"lm_head.bias"} and alone["lm_head.bias"].abs().sum() > 0


def test_each_loss_in_half_precision() -> None:
    """Products in bf16; losses, and gradients of weights, in fp32."""
    model, given = build("llama", {}, torch.float32), tensors()
    expected, slopes = weighed(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert output_layer.enable(model)
        found, half = weighed(model, given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    for name, slope in slopes.items():
        assert half[name].dtype == torch.float32 and (half[name] - slope).norm() <= 5e-2 * slope.norm(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_compiled_is_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(5, 50)).to(dtype), torch.randint(50, (5,))
    expected, found = (of(logits.clone(), targets) for of in (chunked_loss._losses_and_slopes, chunked_loss._fused))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build("llama", {}), tensors()
    expected, slopes = learned(model, given)
    assert output_layer.enable(model)
    chunked_loss.compile_arithmetic("aot_eager")
    monkeypatch.setitem(chunked_loss.CHUNK, "cpu", 50 * 4)  # the last is smaller
    loss, found = learned(model, given)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert all(torch.allclose(found[name], slope, rtol=1e-9, atol=1e-12) for name, slope in slopes.items())
    assert output_layer.enable(build("llama", {})) and chunked_loss.losses_and_slopes is chunked_loss._losses_and_slopes


def test_logits_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those of a chunk, and the few that the layer itself makes of nothing."""
    model, given = build("llama", {}), tensors()
    assert output_layer.enable(model)
    monkeypatch.setitem(chunked_loss.CHUNK, "cpu", 50 * 4)
    sizes, real = [], torch.nn.functional.linear

    def watched(value: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if len(weight) == 50:
            sizes.append(value.numel() // value.shape[-1])
        return real(value, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    _packed.loss(model, given).backward()
    assert sizes and max(sizes) <= 4
    assert model(input_ids=given["input_ids"]).logits.shape == (3, 11, 50)  # to anyone else


@pytest.mark.parametrize("kind", MORE)
def test_logits_that_are_worked_on_are_left_alone(kind: str) -> None:
    model, given = build(kind, MORE[kind]), tensors()
    expected, slopes = learned(model, given)
    assert not output_layer.enable(model)
    loss, found = learned(model, given)
    assert loss == expected and all(torch.equal(found[name], slope) for name, slope in slopes.items())


def test_frozen() -> None:
    """What does not learn is given no gradient, and none is computed for it."""
    model, given = build("phi", {}), tensors()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    _, slopes = learned(model, given)
    assert output_layer.enable(model)
    _, found = learned(model, given)
    assert found.keys() == slopes.keys() and model.lm_head.weight.grad is None
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-9, atol=1e-12)
    model.requires_grad_(False)
    model.lm_head.bias.requires_grad_(True)
    assert learned(model, given)[1]["lm_head.bias"].abs().sum() > 0


def test_half_precision() -> None:
    """Products in bf16, as autocast has them; losses and gradients of weights in fp32."""
    model, given = build("llama", {}, torch.float32), tensors()
    expected, slopes = learned(model, given)
    assert output_layer.enable(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = learned(model, given)
    assert loss.dtype == torch.float32 and loss == pytest.approx(expected.item(), rel=1e-2)
    for name, slope in slopes.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - slope).norm() <= 2e-2 * slope.norm(), name


def test_without_targets() -> None:
    model, given = build("llama", {}), tensors(targets=0.0)
    assert output_layer.enable(model)
    loss, found = learned(model, given)
    assert loss == 0 and not any(slope.any() for slope in found.values())


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"also_train": ["lm_head"]}, {}])
def test_with_adapters(settings: dict[str, Any]) -> None:
    """What PEFT wraps or copies, it may: losses and gradients are those of whole logits."""
    results = []
    for enabled in (False, True):
        model, given = build("llama", {"tie_word_embeddings": False}), tensors()
        assert not enabled or output_layer.enable(model)
        origin = SimpleNamespace(path="nowhere", revision=None)
        adapted: Any = adapter.attach(model, AdapterConfig(dropout=0.0, **settings), [], 50, 0, origin)
        for number, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
        results.append((*learned(adapted.train(), given), _packed.losses_and_hits(adapted, given)[0].detach()))
    (expected, slopes, each), (loss, found, others) = results
    assert loss == pytest.approx(expected.item(), rel=1e-12) and found.keys() == slopes.keys() and slopes
    assert all(torch.allclose(found[name], slope, rtol=1e-9, atol=1e-12) for name, slope in slopes.items())
    torch.testing.assert_close(others, each, rtol=1e-9, atol=1e-12)
