"""The proof at the start refuses every model that leaks, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from data.errors import UserError
from tests.train.tasks.test_causal_lm import FAMILIES, SMALL, build
from train.tasks._proof import prove_causal, prove_isolated


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_that_keep_documents_apart_pass(family: str, dtype: torch.dtype) -> None:
    model = build(family, **FAMILIES[family]).to(dtype)
    prove_causal(model)
    prove_isolated(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_keep_documents_apart_pass_in_bf16_too(family: str) -> None:
    """No false refusal where kernels differ by the rounding of bf16, packed or alone."""
    with torch.autocast("cpu", torch.bfloat16):
        model = build(family, **FAMILIES[family]).float()
        prove_causal(model)
        prove_isolated(model)


def test_a_leak_within_the_rounding_of_bf16_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model from scratch hardly attends to anything: what leaks is less than what bf16 rounds."""
    model = build("llama", **FAMILIES["llama"]).float()
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(0.01)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UserError, match=r"it cannot be proved .* another document by"):
            prove_isolated(model)
        model = build("bert", **SMALL).float()
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.data.mul_(0.2)
        with pytest.raises(UserError, match="is not causal"):
            prove_causal(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_made_to_leak_is_refused(attention: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a mask or a cache: transformers then leaves the packing out, in silence."""
    model = build("llama", attention, **FAMILIES["llama"]).to(dtype)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    prove_causal(model)
    with pytest.raises(UserError, match=rf"attention {attention} does not keep .* Set task.packing=none"):
        prove_isolated(model)


def test_a_leak_in_batches_of_several_rows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention takes its lengths from the positions in a batch of one row only."""
    real, model = masking_utils.find_packed_sequence_indices, build("llama", **FAMILIES["llama"])
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda given: real(given) if len(given) == 1 else None
    )
    with pytest.raises(UserError, match="does not keep the documents of a row apart"):
        prove_isolated(model)


def test_a_model_that_takes_positions_and_ignores_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents are apart, but the second is computed as if it stood further on."""
    model = build("gpt2", **FAMILIES["gpt2"])
    table, real = model.transformer.wpe, model.transformer.wpe.forward
    monkeypatch.setattr(table, "forward", lambda positions: real(torch.arange(positions.shape[1]).expand_as(positions)))
    prove_causal(model)
    with pytest.raises(UserError, match="does not keep the documents of a row apart"):
        prove_isolated(model)


@pytest.mark.parametrize("family", ["mamba", "xlstm", "recurrent_gemma", "bloom", "opt"])
def test_families_that_carry_a_state_or_count_positions_themselves_are_refused(family: str) -> None:
    config: dict[str, dict[str, Any]] = {
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "xlstm": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4},
        "recurrent_gemma": {**SMALL, "head_dim": 8, "lru_width": 32},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    }
    model = build(family, **config[family]).float()
    prove_causal(model)
    with pytest.raises(UserError, match=r"task.packing=documents: .* Set task.packing=none"):
        prove_isolated(model)


def test_a_model_that_sees_what_comes_is_refused() -> None:
    with pytest.raises(UserError, match=r"BertLMHeadModel .* is not causal: .*is_decoder: true"):
        prove_causal(build("bert", **SMALL))
    prove_causal(build("bert", **SMALL, is_decoder=True))


def test_no_proof_is_no_pass() -> None:
    """Where no token matters to another, as before training with weights of 0, a leak could not be seen."""
    model = build("gpt2", **FAMILIES["gpt2"])
    for block in model.transformer.h:
        torch.nn.init.zeros_(block.attn.c_proj.weight)
    with pytest.raises(UserError, match="it cannot be proved"):
        prove_isolated(model)
    broken = build("gpt2", **FAMILIES["gpt2"])
    torch.nn.init.constant_(broken.transformer.wte.weight, float("nan"))
    with pytest.raises(UserError, match="by nan"):
        prove_causal(broken)


def test_a_model_that_cannot_be_called_so_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2", **FAMILIES["gpt2"])
    real = model.transformer.forward

    def forward(input_ids: Any, use_cache: bool = False, **others: Any) -> Any:
        if others.get("position_ids") is not None:
            raise TypeError("no position_ids here")
        return real(input_ids, use_cache=use_cache)

    monkeypatch.setattr(model.transformer, "forward", forward)
    prove_causal(model)
    with pytest.raises(UserError, match=r"could not be tried: no position_ids here. Set task.packing=none"):
        prove_isolated(model)


@pytest.mark.parametrize("training", [True, False])
def test_a_proof_leaves_no_trace(training: bool) -> None:
    model = build("gpt2", **FAMILIES["gpt2"])
    model.train(training)
    before, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    prove_causal(model)
    prove_isolated(model)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert isinstance(model, transformers.GPT2LMHeadModel)
