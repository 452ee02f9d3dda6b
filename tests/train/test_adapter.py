"""Adapters: what learns, what is kept, and that all ways to load them predict the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.errors import UserError
from tests.conftest import SHARD, figures
from tests.worker import carry_out
from train.adapter import attach, quiet
from train.adapter_config import AdapterConfig
from train.config import validate
from train.weights import fingerprint

MakeConfig = Callable[..., dict[str, Any]]


def records(output: Path) -> list[Any]:
    return [json.loads(line) for line in (output / "predictions" / "validation.jsonl").read_text().splitlines()]


def learned(make_config: MakeConfig, output: Path, kind: str = "lora", **changes: Any) -> dict[str, Any]:
    """Return the config of a run with an adapter that learns something."""
    adapter = {"kind": kind, "rank": 4, **changes.pop("adapter", {})}
    length = 24 if kind == "dora" else 14  # its directions move more slowly
    defaults = {"optim__lr": 1e-2, "optim__schedule": "constant", "updates": length}
    return make_config(**{"adapter": adapter, "output": str(output), **defaults, **changes})


def on_its_base(folder: Path, auto: str = "AutoModelForSequenceClassification") -> tuple[Any, Any]:
    """Put an exported adapter on its base, as the lines of its card do: they are run."""
    card = (folder / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("```")[0]
    assert auto in lines
    names: dict[str, Any] = {}
    with quiet():
        exec(lines.replace("path/to/this/folder", str(folder)), names)
    return names["model"], names["tokenizer"]


def scores(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    import torch

    found = []
    for row in rows:
        with torch.no_grad():
            chances = model.double()(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(0).tolist()
        found.append({model.config.id2label[place]: chance for place, chance in enumerate(chances)})
    return found


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_merged_or_not_it_predicts_the_same(kind: str, make_config: MakeConfig, tmp_path: Path) -> None:
    """The run's own records, the adapter on its base through peft, the merged model: in float64, with a new token."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    alone, merged = tmp_path / "alone", tmp_path / "merged"
    tokens = ["w1 w2"]
    assert carry_out(learned(make_config, alone, kind, model__add_tokens=tokens)) == 0
    assert carry_out(learned(make_config, merged, kind, model__add_tokens=tokens, adapter={"merge": True})) == 0
    losses = list(figures(alone, "train/loss").values())
    assert min(losses[-3:]) < losses[0] - 0.05
    assert records(alone) == records(merged)
    rows = [json.loads(line) for line in (tmp_path / "single_label-validation.jsonl").read_text().splitlines()]
    rows.append({"text": "w1 w2 w3"})
    whole = AutoModelForSequenceClassification.from_pretrained(merged / "model", dtype=torch.float64)
    expected = scores(whole, AutoTokenizer.from_pretrained(merged / "model"), rows)
    model, tokenizer = on_its_base(alone / "model")
    assert len(tokenizer) == len(model.get_input_embeddings().weight)
    found = scores(model, tokenizer, rows)
    for own, one, other in zip([*records(alone), None], found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6)  # the card's lines load float32
        assert own is None or own["scores"] == pytest.approx(other, abs=2e-6)  # records are rounded to six digits
    files = {path.name for path in (alone / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "lockstep.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files and not (merged / "model" / "adapter_config.json").exists()


def test_an_adapter_is_a_starting_model(make_config: MakeConfig, tmp_path: Path) -> None:
    """A run goes on from where the adapter's left off, its head and new token included; its base is checked."""
    first, second = tmp_path / "first", tmp_path / "second"
    base = tmp_path / "base"
    config = learned(make_config, first, model__add_tokens=["w1 w2"])
    shutil.copytree(config["model"]["path"], base)
    config["model"]["path"] = str(base)
    assert carry_out(config) == 0
    found = make_config(
        model__path=str(first / "model"), output=str(second), updates=1, optim__lr=1e-12, optim__weight_decay=0.0
    )
    assert carry_out(found) == 0
    for one, other in zip(records(first), records(second), strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=2e-6)
    started = json.loads((second / "result.json").read_text())["started_from"]["sha256"]
    assert started == fingerprint(str(first / "model")) != fingerprint(str(base))
    with pytest.raises(UserError, match=r"adapter\.merge: must be true: model\.path .* is an adapter itself"):
        carry_out({**found, "adapter": {"rank": 2}, "output": str(tmp_path / "third")})
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    for damage, message in ((lambda: None, "have changed"), (lambda: shutil.rmtree(base), "is not there")):
        damage()
        with pytest.raises(UserError, match=message):
            carry_out({**found, "output": str(tmp_path / "third")})


def test_a_checkpoint_holds_only_what_learns(make_config: MakeConfig, tmp_path: Path) -> None:
    """Also with a head that is trained whole, rates by layer, and the best checkpoint brought back for the export."""
    from safetensors import safe_open

    out = tmp_path / "out"
    config = learned(
        make_config, out, adapter={"also_train": ["pooler"]}, optim__layer_decay=0.9, checkpoint__best="loss",
        evaluate__every=5, checkpoint__every=5, optim__lr=5e-2,
    )  # fmt: skip
    assert carry_out(config) == 0
    newest = sorted((out / "checkpoints").iterdir())[-1]
    with safe_open(newest / "model" / SHARD, "pt") as file:
        kept = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    marks = ("lora_", "classifier.", "pooler.modules_to_save.")
    assert kept and all(any(mark in name for mark in marks) for name in kept), kept
    result = json.loads((out / "result.json").read_text())
    assert result["best_update"] < result["updates"], "the best is not the last, or nothing is shown"
    rows = [json.loads(line) for line in (tmp_path / "single_label-validation.jsonl").read_text().splitlines()]
    for own, other in zip(records(out), scores(*on_its_base(out / "model"), rows), strict=True):
        assert own["scores"] == pytest.approx(other, abs=2e-6)


BART = {"encoder_layers": 2, "decoder_layers": 2}
QWEN = {"head_dim": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "T5": ("ForConditionalGeneration", {"d_kv": 8, "d_ff": 64}, "k o q v wi wo"),
    "Bart": ("ForConditionalGeneration", BART, "fc1 fc2 k_proj out_proj q_proj v_proj"),
    "Llama": ("ForCausalLM", {"tie_word_embeddings": False}, "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
    "Qwen3": ("ForCausalLM", QWEN, "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
    "GPT2": ("LMHeadModel", {}, "c_attn c_fc c_proj"),
}  # fmt: skip


def tiny(family: str) -> Any:
    import torch
    import transformers

    head, settings, _ = FAMILIES[family]
    sizes = {"vocab_size": 63, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **settings}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **FIXED)
    return getattr(transformers, f"{family}{head}")(config)


FIXED = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2, "decoder_start_token_id": 2}
FROM = SimpleNamespace(path="nowhere", revision=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_finds_the_linear_layers_and_new_rows_learn(family: str) -> None:
    """Every linear layer but the output layer; new rows of the embedding, and of an output layer of its own."""
    import torch

    model = tiny(family)
    settings = AdapterConfig(rank=2)
    adapted = attach(model, settings, ["2 rows of the embedding"], 63, 0, FROM)
    targets = {name.rpartition(".")[2] for name in adapted.peft_config["default"].target_modules}
    assert targets == set(FAMILIES[family][2].split())
    learning = {name for name, each in adapted.named_parameters() if each.requires_grad}
    rows = {name for name in learning if "trainable_tokens" in name}
    assert len(rows) == (2 if family == "Llama" else 1)
    assert all("lora_" in name or name in rows for name in learning)
    ids = torch.tensor([[5, 61, 7, 62]])
    adapted.eval()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(each.grad is not None for name, each in adapted.named_parameters() if name in learning)
    with torch.no_grad():
        for each in adapted.parameters():
            if each.requires_grad:
                each.add_(0.1 * torch.randn_like(each))
        before = adapted(input_ids=ids, labels=ids).logits
        assert torch.allclose(adapted.merge_and_unload()(input_ids=ids, labels=ids).logits, before, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_modules": ("q_prj",)}, "has no layer 'q_prj'; did you mean 'q_proj'"),
        ({"target_modules": ("input_layernorm",)}, "'input_layernorm' is no linear layer"),
        ({"also_train": ("nrom",)}, "adapter.also_train: the model has no module 'nrom'; did you mean 'norm'"),
        ({"also_train": ("layers",)}, "is a list of modules"),
    ],
)
def test_names_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(tiny("Llama"), AdapterConfig(**changes), [], 63, 0, FROM)


def test_what_cannot_be_right_is_refused() -> None:
    import transformers

    with pytest.raises(UserError, match="lm_head shares weights with the rest"):
        attach(tiny("Qwen3"), AdapterConfig(also_train=("lm_head",)), [], 63, 0, FROM)
    sizes = {"vocab_size": 63, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=32))
    with pytest.raises(UserError, match="output layer has a bias, which peft leaves out"):
        attach(model, AdapterConfig(), ["2 rows of the embedding"], 63, 0, FROM)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"adapter": {"rank": 0}}, "adapter.rank: must be at least 1"),
        ({"adapter": {"alpah": 3}}, "adapter.alpah: no such key; did you mean adapter.alpha"),
        ({"adapter": {"target_modules": "all"}}, "adapter.target_modules: must be 'auto' or a list"),
        ({"adapter": {"quantize": "4bit", "merge": True}, "precision": "fp32"}, "adapter.merge: cannot go with"),
        ({"adapter": {"quantize": "4bit"}}, "no kernels for it in precision fp64"),
        ({"adapter": {"quantize": "4bit"}, "precision": "fp32", "compile": True}, "has not been tried with compile"),
        (
            {"adapter": {}, "task": "sentence_embedding"},
            r"adapter\.merge: must be true with the task sentence_embedding",
        ),
        (
            {"adapter": {"quantize": "8bit"}, "task": {"name": "sentence_embedding"}, "precision": "fp32"},
            r"adapter\.quantize: cannot go with the task sentence_embedding.*adapter\.merge=true",
        ),
        (
            {"adapter": {}, "model": {"config": {"model_type": "bert"}, "tokenizer": "x"}},
            "adapter: there is nothing to adapt in a model from scratch",
        ),
    ],
)
def test_keys_that_do_not_fit_are_said(changes: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=message):
        validate({**make_config(), **changes}, "test")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized(bits: str, make_config: MakeConfig, tmp_path: Path) -> None:
    """Trained, stopped and resumed to the last bit, exported, and taken up again on weights as they were."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'lockstep[quantization]'")
    outs = [tmp_path / name for name in ("steady", "stopped")]
    for out, stops in zip(outs, ((None,), (8, None)), strict=True):
        config = learned(make_config, out, adapter={"quantize": bits}, precision="fp32")
        assert [carry_out(config, stop_after=stop) for stop in stops] == [0] * len(stops)
    losses = list(figures(outs[0], "train/loss").values())
    assert min(losses[-3:]) < losses[0] - 0.05
    weights = [(out / "model" / "adapter_model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]
    rows = [json.loads(line) for line in (tmp_path / "single_label-validation.jsonl").read_text().splitlines()]
    for own, other in zip(records(outs[0]), scores(*on_its_base(outs[0] / "model"), rows), strict=True):
        assert own["scores"] == pytest.approx(other, abs=0.05)  # the base is not rounded there
    assert json.loads((outs[0] / "model" / "lockstep.json").read_text())["base"]["quantized"] == bits


def test_without_bitsandbytes_it_is_said(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes, which cannot be imported .*pip install"):
        carry_out(make_config(adapter={"quantize": "4bit"}, precision="fp32"))
