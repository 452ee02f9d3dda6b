"""Attention by documents, with another kernel in the place of the GPU's: what it is given, and who may use it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from data.errors import UserError
from tests.train.test_output_layer import SIZES
from train import documents, prefetch, varlen
from train.tasks import _packed, _proof

PIECES = torch.tensor([[5, 3, 2], [12, 0, 0], [1, 9, 0]])
WIDTH = 12


def kernel(query: Any, key: Any, value: Any, starts: Any, others: Any, most: int, mosts: int, **options: Any) -> Any:
    """What `varlen_attn` promises, document by document. (tokens, heads, d) → the same."""
    assert torch.equal(starts, others) and starts.dtype == torch.int32 and int(starts[-1]) == len(query)
    sizes, (back, ahead) = starts.diff().tolist(), options["window_size"]
    assert max(sizes) <= most == mosts
    found, inf = [], float("inf")
    for one in zip(*(each.split(sizes) for each in (query, key, value)), strict=True):
        places = torch.arange(len(one[0]))
        apart = places[:, None] - places[None]
        mask = (apart <= (back if back >= 0 else inf)) & (apart >= (-ahead if ahead >= 0 else -inf))
        several = [each.transpose(0, 1)[None] for each in one]
        result = torch.nn.functional.scaled_dot_product_attention(
            *several, attn_mask=mask, scale=options["scale"], enable_gqa=True
        )
        found.append(result[0].transpose(0, 1))
    return torch.cat(found)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU pass for a GPU."""
    monkeypatch.setattr(varlen, "available", lambda model: True)
    monkeypatch.setattr(varlen, "_kernel", kernel)


def build(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"pad_token_id": 0, **({} if kind == "gpt2" else SIZES)}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def rows() -> dict[str, torch.Tensor]:
    positions = torch.zeros(3, WIDTH, dtype=torch.long)
    for row, sizes in enumerate(PIECES.tolist()):
        counted = [torch.arange(size) for size in [*sizes, WIDTH - sum(sizes)]]
        positions[row] = torch.cat(counted)
    ids = torch.randint(1, 50, (3, WIDTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": positions}


def test_offsets() -> None:
    assert documents.offsets(torch.tensor([[2, 1], [4, 0]]), 5).tolist() == [0, 2, 3, 5, 9, 9, 10]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {}), ("qwen3", {"head_dim": 8}), ("mistral", {"sliding_window": 3, "head_dim": 4}), ("olmo2", {})],
)
def test_as_with_masks(kind: str, settings: dict[str, Any]) -> None:
    """Logits of tokens, and gradients, are those with masks; and the kernel was there in every layer."""
    model, given = build(kind, **settings), rows()
    real = given["position_ids"].new_ones(3, WIDTH).bool()
    for row, sizes in enumerate(PIECES.tolist()):
        real[row, sum(sizes) :] = False
    expected = model(**given, use_cache=False).logits[real]
    expected.square().sum().backward()
    slopes = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert documents.enable(model)
    with documents.known(PIECES):
        found = model(**given, use_cache=False).logits[real]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, slopes[name], rtol=1e-9, atol=1e-9)
    _proof.prove_isolated(model)


def test_the_kernel_is_told_how_long_the_longest_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document, or the padding behind the last: by who sends the batch, or who computes it; else as long as a row."""
    told = list[int]()

    def noting(*given: Any, **options: Any) -> torch.Tensor:
        told.append(given[5])
        return kernel(*given, **options)

    model, ids = build("llama"), rows()["input_ids"]
    assert documents.enable(model)
    monkeypatch.setattr(varlen, "_kernel", noting)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    for sizes, most in (([[5, 3, 2], [2, 7, 1], [6, 6, 0]], 7), ([[5, 3, 2], [2, 2, 0], [6, 6, 0]], 8)):
        plain = torch.tensor(sizes)
        sent = prefetch.sent({"input_ids": ids, "pieces": plain}, torch.device("cpu"))["pieces"]
        for known in (documents.known(sent), documents.known(plain, most), documents.known(plain)):
            with known:
                model(input_ids=ids, use_cache=False)
        layers = model.config.num_hidden_layers
        assert told == [most] * 2 * layers + [WIDTH] * layers
        told.clear()


def test_who_knows_of_no_documents_is_served_as_before() -> None:
    """Texts are written, and rows without documents read, with the masks that they had."""
    model = build("llama")
    given = {"input_ids": torch.tensor([[0, 0, 7, 8], [3, 4, 5, 6]])}
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    before = model(**given, attention_mask=mask).logits, model.generate(**given, attention_mask=mask, max_new_tokens=4)
    assert documents.enable(model)
    assert torch.equal(model(**given, attention_mask=mask).logits, before[0])
    assert torch.equal(model.generate(**given, attention_mask=mask, max_new_tokens=4), before[1])


def test_models_that_do_not_pass_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole, or in one of their layers: they stay as they were."""
    model = build("llama")
    real = model.model.layers[1].self_attn.forward
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda cu_seq_lens_q=None, **named: real(**named))
    assert not documents.enable(model)
    assert model.config._attn_implementation == "sdpa" and not model.model._forward_pre_hooks


def test_a_kernel_that_leaks_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
        starts = torch.tensor([0, len(query)], dtype=torch.int32)
        return kernel(query, key, value, starts, starts, len(query), len(query), **options)

    monkeypatch.setattr(varlen, "_kernel", leaking)
    model = build("llama")
    _packed.check(model, isolated=True)
    assert model.config._attn_implementation == "sdpa"


def test_what_the_kernel_does_not_know() -> None:
    module, some = torch.nn.Module(), torch.zeros(1, 2, 3, 4)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    for options in ({"dropout": 0.1}, {"softcap": 3.0}, {"is_causal": False}, {"position_bias": some}):
        with pytest.raises(ValueError, match="attention by this kernel knows no"):
            documents.attention(module, some, some, some, None, starts, **options)


def test_packing_that_cannot_be_is_refused_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "available", lambda model: False)
    model = build("gpt2", vocab_size=50, n_embd=16, n_layer=2, n_head=2)
    model.transformer.wpe.weight.data.zero_()
    for block in model.transformer.h:
        block.attn.forward = lambda hidden_states, *_, **__: (hidden_states.cumsum(1), None)
    with pytest.raises(UserError, match="does not keep the documents of a row apart"):
        _packed.check(model, isolated=True)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "llama4_text",
            {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 4},
        ),
        ("phimoe", {"sliding_window": 4, "num_local_experts": 2}),
    ],
)
def test_windows_that_stand_in_the_mask_alone(kind: str, settings: dict[str, Any]) -> None:
    """Of them the kernel would know nothing, and rows shorter than the window would not tell."""
    model = build(kind, **settings)
    assert not documents.enable(model) and model.config._attn_implementation == "sdpa"
