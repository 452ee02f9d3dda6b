"""How far below the head each parameter is, in families that name and order their parts in very different ways."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from data.errors import UserError
from train.layers import depths

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 40, "pad_token_id": 0}
DEBERTA = {
    **SMALL,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 3,
    "position_buckets": 8,
}
T5 = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 20,
    "num_layers": 3,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 40,
}
STATE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3}

# class, config, the lists of blocks, what is of the head, what is below the lowest block (by how their names begin)
FAMILIES: list[tuple[str, dict[str, Any], list[str], list[str], list[str]]] = [
    (
        "BertForSequenceClassification",
        SMALL,
        ["bert.encoder.layer"],
        ["bert.pooler", "classifier"],
        ["bert.embeddings"],
    ),
    (
        "BertForMaskedLM",
        SMALL,
        ["bert.encoder.layer"],
        ["bert.embeddings.word_embeddings", "cls"],  # tied
        ["bert.embeddings.position", "bert.embeddings.token_type", "bert.embeddings.LayerNorm"],
    ),
    (
        "BertForMaskedLM",
        {**SMALL, "tie_word_embeddings": False},
        ["bert.encoder.layer"],
        ["cls"],
        ["bert.embeddings"],
    ),
    (
        "XLMRobertaForSequenceClassification",  # registers the head first
        SMALL,
        ["roberta.encoder.layer"],
        ["classifier"],
        ["roberta.embeddings"],
    ),
    (
        "DebertaV2ForSequenceClassification",  # registers relative embeddings and their norm after the blocks
        {**DEBERTA, "conv_kernel_size": 0},
        ["deberta.encoder.layer"],
        ["pooler", "classifier"],
        ["deberta.embeddings", "deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"],
    ),
    (
        "ModernBertForSequenceClassification",
        SMALL,
        ["model.layers"],
        ["model.final_norm", "head", "classifier"],
        ["model.embeddings"],
    ),
    (
        "DistilBertForSequenceClassification",
        {"vocab_size": 50, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 20},
        ["distilbert.transformer.layer"],
        ["pre_classifier", "classifier"],
        ["distilbert.embeddings"],
    ),
    (
        "AlbertForSequenceClassification",  # one block for all layers
        {**SMALL, "embedding_size": 8},
        ["albert.encoder.albert_layer_groups"],
        ["albert.pooler", "classifier"],
        ["albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"],
    ),
    (
        "XLMForSequenceClassification",  # a block is an item of four lists
        {"vocab_size": 50, "emb_dim": 16, "n_layers": 3, "n_heads": 2},
        [f"transformer.{part}" for part in ("attentions", "layer_norm1", "ffns", "layer_norm2")],
        ["sequence_summary"],
        ["transformer.position_embeddings", "transformer.embeddings", "transformer.layer_norm_emb"],
    ),
    (
        "GPT2ForSequenceClassification",
        GPT2,
        ["transformer.h"],
        ["transformer.ln_f", "score"],
        ["transformer.wte", "transformer.wpe"],
    ),
    ("GPT2LMHeadModel", GPT2, ["transformer.h"], ["transformer.wte", "transformer.ln_f"], ["transformer.wpe"]),
    (
        "OPTForSequenceClassification",  # registers its last norm before the blocks
        {**STATE, "num_attention_heads": 2, "ffn_dim": 20, "word_embed_proj_dim": 16, "pad_token_id": 0},
        ["model.decoder.layers"],
        ["model.decoder.final_layer_norm", "score"],
        ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
    ),
    ("LlamaForCausalLM", GROUPED, ["model.layers"], ["model.norm", "lm_head"], ["model.embed_tokens"]),
    ("Qwen3ForSequenceClassification", GROUPED, ["model.layers"], ["model.norm", "score"], ["model.embed_tokens"]),
    (
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 8},
        ["model.layers"],
        ["model.norm", "lm_head"],
        ["model.embed_tokens"],
    ),
    (
        "Lfm2ForCausalLM",  # calls its last norm "embedding_norm", and blocks of two kinds lie in one list
        {**GROUPED, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": False},
        ["model.layers"],
        ["model.embedding_norm", "lm_head"],
        ["model.embed_tokens"],
    ),
    ("MambaForCausalLM", STATE, ["backbone.layers"], ["backbone.norm_f", "backbone.embeddings"], []),
    ("RwkvForCausalLM", STATE, ["rwkv.blocks"], ["rwkv.ln_out", "head"], ["rwkv.embeddings"]),
    (
        "T5ForConditionalGeneration",
        T5,
        ["encoder.block", "decoder.block"],
        ["shared", "encoder.final_layer_norm", "decoder.final_layer_norm"],
        [],
    ),
    (
        "BartForSequenceClassification",  # registers the norm of its embeddings after the blocks; stacks of 3 and 2
        {**BART, "num_labels": 2},
        ["model.encoder.layers", "model.decoder.layers"],
        ["classification_head"],
        [
            "model.shared",
            *(f"model.{stack}.{part}" for stack in ("encoder", "decoder") for part in ("embed_", "layernorm_")),
        ],
    ),
]


def build(name: str, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Return a tiny model and a forward pass over one row that ends in BART's end token."""
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**config))
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 2]])
    labels = torch.tensor([1]) if name.endswith("SequenceClassification") else ids
    return model, lambda: model(input_ids=ids, labels=labels).loss


def starts(name: str, beginnings: list[str]) -> bool:
    return any(name.startswith(beginning) for beginning in beginnings)


@pytest.mark.parametrize(
    ("name", "config", "lists", "head", "embeddings"),
    FAMILIES,
    ids=[f"{family[0]}{place}" for place, family in enumerate(FAMILIES)],
)
def test_depth_of_every_parameter(
    name: str, config: dict[str, Any], lists: list[str], head: list[str], embeddings: list[str]
) -> None:
    model, forward = build(name, config)
    found = depths(model, forward)
    assert list(found) == [parameter for parameter, _ in model.named_parameters()]
    lengths = {path: len(model.get_submodule(path)) for path in lists}  # type: ignore[arg-type]
    expected = {}
    for parameter in found:
        block = next(
            (match for path in lists if (match := re.match(rf"({re.escape(path)})\.(\d+)\.", parameter))), None
        )
        if block:
            expected[parameter] = lengths[block[1]] - int(block[2])
        else:
            assert starts(parameter, head) != starts(parameter, embeddings), f"{parameter}: not in this test's table"
            expected[parameter] = 0 if starts(parameter, head) else max(lengths.values()) + 1
    assert found == expected
    assert {found[parameter] for parameter in found if starts(parameter, head)} == {0}


def test_many_families_are_here() -> None:
    assert len({family[0] for family in FAMILIES}) >= 18


def test_a_part_between_blocks_is_of_the_block_before_it() -> None:
    model, forward = build("DebertaV2ForSequenceClassification", DEBERTA)
    found = depths(model, forward)
    between = {depth for name, depth in found.items() if name.startswith("deberta.encoder.conv.")}
    assert between == {found["deberta.encoder.layer.0.attention.self.query_proj.weight"]} == {3}


def test_what_is_new_is_of_the_head() -> None:
    model, forward = build("BertForMaskedLM", SMALL)
    usual = depths(model, forward)
    new = ["bert.embeddings.token_type_embeddings.weight", "bert.encoder.layer.0.output.dense.bias"]
    found = depths(model, forward, new)
    assert {name for name in found if found[name] != usual[name]} == set(new)
    assert {found[name] for name in new} == {0}
    tied = depths(model, forward, ["cls.predictions.decoder.weight"])  # the other name of the word embeddings
    assert tied["bert.embeddings.word_embeddings.weight"] == 0


def test_only_looking_changes_nothing() -> None:
    model, forward = build("RwkvForCausalLM", {**STATE, "num_hidden_layers": 8})  # would rescale blocks in evaluation
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    depths(model, forward)
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Untold(nn.Module):
    """No list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.heads = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return sum((head(self.layers(x)) for head in self.heads), start=torch.zeros(1))


def test_a_model_without_blocks_is_refused() -> None:
    model = Untold()
    with pytest.raises(UserError, match=r"optim.layer_decay, optim.unfreeze: Untold has no layers"):
        depths(model, lambda: model(torch.ones(2)))
