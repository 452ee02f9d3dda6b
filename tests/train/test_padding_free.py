"""Encoders without padding compute what they compute with it; what cannot be so is left as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.train.test_documents import kernel
from train import padding_free, varlen
from train.adapter import ROWS, attach
from train.adapter_config import AdapterConfig

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "pad_token_id": 1},
    "Electra": {**SIZES, "embedding_size": 16},
    "Albert": {**SIZES, "embedding_size": 8},
    "DistilBert": {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "ModernBert": {**SIZES, "num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 4,
                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
}  # fmt: skip
LENGTHS = (7, 2, 11, 5)


def make(kind: str, head: str = "ForTokenClassification", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**KINDS[kind], **settings})
    return getattr(transformers, kind + head)(config).double().eval()


def batch(side: str = "right") -> dict[str, Tensor]:
    width, lengths = max(LENGTHS), torch.tensor(LENGTHS)[:, None]
    mask = (torch.arange(width)[None] < lengths).long()
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask if side == "right" else mask.flip(1)}


def learned(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of real tokens, and the gradients of all parameters."""
    model.zero_grad()
    logits = model(**given).logits[given["attention_mask"].bool()]
    (logits**2).sum().backward()
    return logits.detach(), [each.grad.clone() for each in model.parameters() if each.grad is not None]


def counting(base: Any) -> list[tuple[int, ...]]:
    """Note the shape of what the last linear layer is given in each pass."""
    seen = list[tuple[int, ...]]()
    last = [module for module in base.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    return seen


def looked_up(model: nn.Module) -> list[tuple[int, ...]]:
    """Note the shape of all ids that are looked up."""
    seen = list[tuple[int, ...]]()
    for table in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        table.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    return seen


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["on rows", "without rows", "and some zeros"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same(kind: str, attention: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and every gradient, float64 to 1e-9; the layers see 25 tokens, not 44.

    Also by another kernel in the place of the one that GPUs have for sequences of any lengths; and with zeros, as in
    bf16 on a CPU.
    """
    seen_by_layers = sum(LENGTHS)
    if attention == "and some zeros":
        monkeypatch.setattr(padding_free, "_size", lambda count, device: -(-count // 16) * 16)
        seen_by_layers = 32
    if attention == "without rows":
        monkeypatch.setattr(varlen, "available", lambda model: True)
        monkeypatch.setattr(varlen, "_kernel", kernel)
    model, given = make(kind), batch(side)
    logits, gradients = learned(model, given)
    assert padding_free.enable(model)
    seen = counting(model.base_model)
    found, others = learned(model, given)
    assert (1, seen_by_layers) in {shape[:2] for shape in seen}
    assert torch.allclose(found, logits, rtol=1e-9, atol=1e-12)
    assert len(others) == len(gradients) >= 20
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(others, gradients, strict=True))


DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, "num_key_value_heads": 2},
    "Qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "Mistral": {**SIZES, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4},
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["on rows", "without rows"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_that_classify(kind: str, attention: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They look back only, with a kernel for any lengths too; reward models are such."""
    monkeypatch.setitem(KINDS, kind, DECODERS[kind])
    test_it_is_the_same(kind, attention, side, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_of_real_tokens(kind: str) -> None:
    """Where it gives the same: DistilBERT takes from the shape of what it looks up where tokens stand."""
    model, given = make(kind), batch()
    assert padding_free.enable(model)
    seen = looked_up(model)
    model(**given)
    assert set(seen) == ({(4, 11), (1, 11)} if kind == "DistilBert" else {(1, 25)})


ROWS_OF_NUMBERS = [(kind, shape) for kind in ("Bert", "Roberta", "LayoutLM") for shape in ((4, 11), (1, 11))]


@pytest.mark.parametrize("kind, shape", [*ROWS_OF_NUMBERS, ("LayoutLM", (11,))])
def test_positions_and_types_of_ones_own(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "LayoutLM", SIZES)
    model = make(kind)
    numbers = torch.randint(2, 40, shape, generator=torch.Generator().manual_seed(2))
    given = {**batch(), "position_ids": numbers}
    if kind != "Roberta":
        given["token_type_ids"] = torch.arange(44).view(4, 11) % 2
    logits, gradients = learned(model, given)
    assert padding_free.enable(model)
    seen = looked_up(model)
    found, others = learned(model, given)
    assert set(seen) == {(1, 25)}
    assert torch.allclose(found, logits, rtol=1e-9, atol=1e-12)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(others, gradients, strict=True))


def test_of_vectors_instead_of_ids_positions_are_rows() -> None:
    """Nobody has ids that could be made real ones only: positions and types are looked up as they would be."""
    model, given = make("Bert"), batch()
    given["token_type_ids"] = torch.arange(44).view(4, 11) % 2
    vectors = model.get_input_embeddings()(given.pop("input_ids")).detach()
    logits, gradients = learned(model, {**given, "inputs_embeds": vectors})
    assert padding_free.enable(model)
    seen = looked_up(model)
    found, others = learned(model, {**given, "inputs_embeds": vectors})
    assert seen == [(4, 11), (1, 11)]
    assert torch.allclose(found, logits, rtol=1e-9, atol=1e-12)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(others, gradients, strict=True))


def test_under_autocast_there_are_sizes_that_come_again() -> None:
    model, given = make("Bert").float(), batch()
    assert padding_free.enable(model)
    for half, tokens in ((False, 25), (True, 32)):
        seen = counting(model.base_model)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(**given)
        assert (1, tokens) in {shape[:2] for shape in seen}


def test_without_padding_nothing_is_taken_apart() -> None:
    model, ids = make("Bert"), batch()["input_ids"]
    expected = model(input_ids=ids).logits
    assert padding_free.enable(model)
    seen = counting(model.base_model)
    for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
        assert torch.equal(model(input_ids=ids, **mask).logits, expected)
    assert {shape[:2] for shape in seen} == {ids.shape}


@pytest.mark.parametrize("lengths", [(4, 4), (1, 7), (8, 0), (1, 1)])
def test_as_many_tokens_as_a_row_is_wide(lengths: tuple[int, int]) -> None:
    """Padded to 8, by a task of the user's own."""
    model = make("Bert")
    mask = (torch.arange(8)[None] < torch.tensor(lengths)[:, None]).long()
    given = {"input_ids": torch.arange(16).view(2, 8) + 5, "attention_mask": mask}
    logits, _ = learned(model, given)
    assert padding_free.enable(model)
    assert torch.allclose(learned(model, given)[0], logits, rtol=1e-9, atol=1e-12)


def test_layers_between_come_out_as_rows() -> None:
    model, given = make("Bert"), batch()
    expected = model(**given, output_hidden_states=True).hidden_states
    assert padding_free.enable(model)
    found = model(**given, output_hidden_states=True).hidden_states
    assert len(found) == 3 and all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_it_leaves_no_trace(tmp_path: Any) -> None:
    """Not in the config that is exported, not after a pass that failed, not in the generator of random numbers."""
    model, given = make("Bert"), batch()
    expected = model.config.to_dict()
    state = torch.random.get_rng_state()
    assert padding_free.enable(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    model(**given)
    model.classifier.forward = None
    with pytest.raises(TypeError):
        model(**given)
    with pytest.raises(IndexError):
        model.base_model(input_ids=given["input_ids"] + 1000, attention_mask=given["attention_mask"])
    assert model.config.to_dict() == expected and model.config._attn_implementation == "sdpa"


def test_dropout_falls_on_real_tokens_alone() -> None:
    model = make("Bert", hidden_dropout_prob=0.5).train()
    assert padding_free.enable(model) and model.training
    torch.manual_seed(3)
    one = model(**batch()).logits
    torch.manual_seed(3)
    assert torch.equal(model(**batch()).logits, one)


def test_a_view_of_a_whole_mask_has_as_many_ones() -> None:
    """Of a part, or of one that is repeated, nobody knows; nor where it was never said."""
    mask = torch.ones(2, 3, 4, dtype=torch.long)
    assert padding_free._known(mask) is padding_free._known(mask.view(-1, 4)) is None
    setattr(mask, padding_free.COUNT, 24)
    whole = (mask, mask.view(-1, 4), mask.flatten(0, 1), mask[None].view(-1, 4))
    assert [padding_free._known(each) for each in whole] == [24] * 4
    other = (mask[0], mask[:1].expand(2, 3, 4), mask.clone().view(-1, 4), mask.transpose(0, 1))
    assert [padding_free._known(each) for each in other] == [None] * 4


CANNOT: dict[str, Callable[[], Any]] = {
    "attention of this DebertaV2ForTokenClassification is eager": lambda: transformers.DebertaV2ForTokenClassification(
        transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c"])
    ),
    "attention of this BertForTokenClassification is eager": lambda: make("Bert", attn_implementation="eager"),
    "a GPT2LMHeadModel writes text, and its task alone decides what is padded$": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    ),
    "a BertForTokenClassification writes text": lambda: make("Bert", is_decoder=True),
    "set activation_checkpointing: true instead": lambda: checkpointing(make("Bert")),
    "has 0 stacks of layers, not one": lambda: make("Bert", num_hidden_layers=0),
    "does not give the same without padding, so padding is computed$": lambda: mixing(make("Bert")),
    "on a GPU it takes .* bf16 or fp16, .* attention_probs_dropout_prob: 0": lambda: make("Bert").to("meta"),
}  # fmt: skip


def mixing(model: Any) -> Any:
    """Each token sees the row that it lies in, padding as well."""
    middle = model.base_model.encoder.layer[1]
    middle.register_forward_pre_hook(lambda _, given: (given[0] - given[0].mean(1, keepdim=True), *given[1:]))
    return model


def checkpointing(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("why", CANNOT)
def test_what_cannot_be_is_left_as_it_is(why: str) -> None:
    model = CANNOT[why]()
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert not padding_free.enable(model)
    assert re.search(why, padding_free.obstacle(model))
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("new", [[], [f"2{ROWS}"]], ids=["no new tokens", "new tokens"])
def test_beside_an_adapter(new: list[str]) -> None:
    """PEFT puts in the place of a table of which rows are new what looks up the ids itself."""
    results = []
    for enabled in (False, True):
        model, given = make("Bert"), batch()
        assert not enabled or padding_free.enable(model)
        adapted = attach(model, AdapterConfig(dropout=0.0), new, 60, 0, SimpleNamespace(path="nowhere", revision=None))
        seen = looked_up(adapted)
        results.append(learned(adapted.double().eval(), given))
        assert ((1, 25) in seen) == (enabled and not new)
    (logits, gradients), (found, others) = results
    assert torch.allclose(found, logits, rtol=1e-9, atol=1e-12)
    assert len(others) == len(gradients) > 0
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(others, gradients, strict=True))
