"""Layers that are computed twice: the same losses and gradients to the last bit, in less memory; and when they are."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data.errors import UserError
from tests.conftest import checkpoint, figures
from tests.distributed import launch
from tests.strategies import environment
from tests.train.test_adapter import FROM, tiny
from tests.worker import carry_out
from train import compilation, last_layer, recomputation, rehearsal
from train.adapter import attach
from train.adapter_config import AdapterConfig
from train.layers import is_compiled
from train.recomputation import Estimate, Kept, choose, estimate, kept

pytestmark = pytest.mark.filterwarnings("ignore:::torch", "ignore:The .grad attribute")  # its compiler's own
LENGTHS = (9, 4, 6, 7)


def build(family: str) -> Any:
    """Return a small model in training: families of `tiny`, or an encoder that computes no padding."""
    if family in ("Bart", "GPT2", "Llama", "Qwen3", "T5"):
        return tiny(family).train()
    torch.manual_seed(0)
    sizes = {"vocab_size": 63, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    settings = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4} if family == "DistilBert" else sizes
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    assert last_layer.enable(model)
    return model.train()


def forward(model: Any, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    rows = torch.arange(len(lengths))
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.where(real, (rows[:, None] * 7 + torch.arange(max(lengths))) % 50 + 5, 0)
    writes = model.config.is_encoder_decoder or model.can_generate()
    labels = ids if writes else rows % 2
    torch.manual_seed(5)
    options = {"use_cache": False} if writes else {}
    found: torch.Tensor = model(input_ids=ids, attention_mask=real.long(), labels=labels, **options).loss
    return found


def learned(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Return loss, gradients, and the bytes kept in between."""
    size = kept(model, lambda: forward(model))
    model.zero_grad()
    loss = forward(model)
    loss.backward()
    slopes = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss.detach(), slopes, size


def twice(model: Any) -> None:
    assert choose(model, True, memory=0, needed=None)
    assert "as asked" in recomputation.describe(model)


def same(model: Any, expected: tuple[torch.Tensor, dict[str, torch.Tensor], int]) -> None:
    loss, slopes, size = learned(model)
    assert torch.equal(loss, expected[0]) and slopes.keys() == expected[1].keys()
    assert all(torch.equal(slope, expected[1][name]) for name, slope in slopes.items())
    assert size < 0.6 * expected[2], (size, expected[2])


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "GPT2", "T5", "Llama"])
def test_losses_and_gradients_are_the_same_bits(family: str) -> None:
    """fp32, dropout on; of encoders without padding, whose last layer computes what is read: in the second pass too."""
    model = build(family)
    expected = learned(model)
    twice(model)
    same(model, expected)
    if family == "Bert":
        assert last_layer.enabled(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = learned(model)[1]
            model._set_gradient_checkpointing(enable=False)
            assert all(torch.equal(slope, found[name]) for name, slope in learned(model)[1].items())


@pytest.mark.parametrize("family", ["Qwen3", "T5"])
def test_with_adapters(family: str) -> None:
    """Also where the first layer has none; beneath the first that has, the backward pass does not go on."""
    settings = {} if family == "T5" else {"target_modules": ["layers.1.mlp.up_proj", "layers.1.self_attn.q_proj"]}
    model = attach(build(family), AdapterConfig(rank=2, dropout=0.1, **settings), [], 63, 0, FROM)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = learned(model)
    twice(model)
    if family == "T5":
        same(model, expected)
        return
    needs: list[bool] = []
    layers = model.get_base_model().model.layers
    hooks = [layer.register_forward_hook(lambda *given: needs.append(given[2].requires_grad)) for layer in layers]
    loss, slopes, _ = learned(model)
    for hook in hooks:
        hook.remove()
    assert needs[:2] == [False, True]
    assert torch.equal(loss, expected[0]) and all(torch.equal(slopes[name], each) for name, each in expected[1].items())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_compiled(family: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same but for rounding, dropout on, and little is kept: the graph is computed twice. Last run: 2026-11-28."""
    monkeypatch.setattr(compilation, "BACKEND", backend)
    model = build(family)
    last_layer.disable(model)  # as on a CPU
    expected = learned(model)
    compilation.compile_layers(model)
    try:
        plain = learned(model)
        twice(model)
        loss, slopes, size = learned(model)
    finally:
        torch._dynamo.reset()
    assert torch.equal(loss, plain[0]) and slopes.keys() == plain[1].keys()
    assert all(torch.equal(slope, plain[1][name]) for name, slope in slopes.items())
    assert size < 0.6 * plain[2], (size, plain[2])
    assert loss == pytest.approx(expected[0].item(), rel=1e-6)
    assert all(torch.allclose(slope, expected[1][name], atol=1e-5) for name, slope in slopes.items())


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_what_is_kept_is_foretold(family: str) -> None:
    """From micro-batches of two rows and of four, for one four times as large: to 15 %; under autocast too."""
    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters())
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            fewer, more = (
                Kept(sum(lengths), kept(model, lambda lengths=lengths: forward(model, lengths)))  # type: ignore[misc]
                for lengths in ((40, 38), (40, 38, 36, 38))
            )
            real = kept(model, lambda: forward(model, (40, 38, 36, 38) * 4))
            assert kept(model.eval(), lambda: forward(model, (40, 38, 36, 38) * 4)) == real and not model.training
            model.train()  # models are read to be judged, and learn later
        found = estimate(model, optimizer, fewer, more, 4 * more.tokens)
        assert found.activations == pytest.approx(real, rel=0.15)
    weights = sum(each.numel() for each in model.parameters()) * 4
    buffers = sum(each.numel() * each.element_size() for each in model.buffers())
    assert found.weights == 4 * weights + buffers  # weights, gradients, two states
    model.requires_grad_(False)
    assert estimate(model, optimizer, fewer, more, 1, shares=2).weights == (weights + buffers) // 2
    assert estimate(model, torch.optim.SGD(model.parameters(), 1.0), fewer, fewer, 10).fixed == 0


def test_nothing_is_left_of_what_was_watched() -> None:
    """No graph that holds itself, for as long as the process lives: of a 1B model 60 GB on a GPU."""
    layer, seen = torch.nn.Linear(8, 8), list[Any]()

    def forward() -> torch.Tensor:
        hidden = layer(torch.ones(4, 8)).exp()  # keeps what it gives
        seen.append(weakref.ref(hidden))
        result: torch.Tensor = layer(hidden).exp().sum()
        return result

    for _ in range(3):
        assert kept(layer, forward) > 0
    gc.collect()
    assert [each() for each in seen] == [None] * 3


def test_when_it_is_done() -> None:
    needs = Estimate(weights=6 * 10**9, fixed=10**9, per_token=1e6, tokens=4000)

    def chosen(choice: Any, memory: float, needed: Any = lambda: needs) -> bool:
        return choose(build("Llama"), choice, memory=round(memory * 1e9), needed=needed)

    assert needs.total == 11 * 10**9
    assert [chosen("auto", memory) for memory in (10, 13.7, 13.8, 80)] == [True, True, False, False]
    assert chosen("auto", 80, lambda: Estimate(1, 0.0, float("inf"), 4000))
    assert chosen(True, 80) and not chosen(False, 10) and not chosen("auto", 0, None)
    model = build("Llama")
    assert recomputation.describe(model) == ""
    choose(model, "auto", memory=10**10, needed=lambda: needs)
    assert recomputation.describe(model) == (
        "about 11.0 GB of 10.0 GB with 4,000 tokens at once: layers are computed again in the backward pass"
    )
    config = transformers.AlbertConfig(
        vocab_size=63, hidden_size=16, num_attention_heads=2, intermediate_size=16, embedding_size=8
    )
    albert = transformers.AlbertModel(config)
    assert not choose(albert, "auto", memory=1, needed=lambda: needs)
    with pytest.raises(UserError, match="cannot compute the layers of a AlbertModel twice; leave it out"):
        choose(albert, True, memory=1, needed=None)


def test_a_run_is_the_same_run(
    make_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32, dropout on, no padding, memory as a GPU's that is too small: to the last bit as on a CPU."""
    outputs = []
    for how, memory in (("plain", 0), ("twice", 10**6)):
        monkeypatch.setattr(rehearsal, "_memory", lambda accelerator, memory=memory: memory)
        outputs.append(tmp_path / how)
        config = make_config(output=str(tmp_path / how), updates=4, precision="fp32", model__config={})
        assert carry_out(config) == 0
    _equal(*outputs)
    said = (outputs[1] / "logs" / "rank-0.log").read_text()
    assert "GB of 0.0 GB with 2,048 tokens at once: layers are computed again" in said
    assert "memory " not in (outputs[0] / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize("padding_free", [True, False])
def test_two_micro_batches_of_different_size_are_watched(
    padding_free: bool, make_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However different the lengths of rows are; and of no more rows than those of the run have."""
    watched, real = list[tuple[Kept, Kept, int]](), rehearsal.estimate

    def estimating(model: Any, optimizer: Any, fewer: Kept, more: Kept, tokens: int, shares: int) -> Estimate:
        watched.append((fewer, more, tokens))
        return real(model, optimizer, fewer, more, tokens, shares)

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": "a " * (number + 1), "label": number % 2}) for number in range(34)))
    monkeypatch.setattr(rehearsal, "estimate", estimating)
    monkeypatch.setattr(rehearsal, "_memory", lambda accelerator: 10**12)
    for at_most in (34, 1):
        config = make_config(
            output=str(tmp_path / f"{at_most}"), updates=1, batch_size=34, padding_free=padding_free,
            micro_batch_size=at_most, data__train=str(rows), data__validation=None,
        )  # fmt: skip
        assert carry_out(config) == 0
    (fewer, more, _), (one, other, tokens) = watched
    longest = 36  # 34 words between two marks; 34 rows, up to 8 at once, are four times 7 and 6, longest first
    assert (fewer.tokens, more.tokens) == ((71, 189) if padding_free else (2 * longest, 7 * (longest - 6)))
    assert 2 * fewer.size < more.size < 6 * fewer.size
    assert one.tokens == other.tokens == longest and one.size == other.size and tokens == 64, "data.max_length"


def _equal(one: Path, other: Path) -> None:
    said = [(output / "logs" / "rank-0.log").read_text() for output in (one, other)]
    assert "layers are computed again" in said[1] and "layers are computed again" not in said[0]
    for name in ("train/loss", "train/grad_norm", "validation/loss"):
        assert figures(one, name) == figures(other, name) != {}
    weights = [checkpoint(output, 4)[0] for output in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_on_two_processes(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """DDP and FSDP2, dropout on, fp32: as without, to the last bit. Last run on 2026-11-26."""
    jobs, pairs = [], []
    for how in ("ddp", "fsdp2"):
        for choice in (False, True):
            config = make_config(
                output=str(tmp_path / f"{how}-{choice}"), updates=4, precision="fp32", model__config={},
                activation_checkpointing=choice,
            )  # fmt: skip
            jobs.append({"config": config, "strategy": environment(how)})
        pairs.append((tmp_path / f"{how}-False", tmp_path / f"{how}-True"))
    launch(jobs, 2, tmp_path)
    for pair in pairs:
        _equal(*pair)


def test_what_fsdp2_makes_of_a_compiled_layer_is_computed_twice() -> None:
    """It gives a layer a class of its own after it is compiled, and the outermost class alone computes twice."""
    model, asked = build("Bert"), list[Any]()
    twice(model)
    compilation.compile_layers(model)
    layers = [module for module in model.modules() if is_compiled(module)]
    for layer in layers:
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
        real = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *given, real=real: asked.append(given) or real(*given)
    with compilation.eager():
        forward(model).sum().backward()
    assert len(asked) == len(layers) == 2
    assert compilation.describe(model) == "2 BertLayer"
