"""Sequence to sequence: what is learned, how long targets end, what is written, in any family; the exported model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Features, Translation

from data.encode import encode_sources
from data.errors import UserError
from data.source import Rows
from tests.conftest import WORDS
from tests.every_task.seq2seq import rows as pairs
from tests.worker import carry_out
from train import predict
from train.tasks.seq2seq import Config, Seq2Seq

MakeConfig = Callable[..., dict[str, Any]]
SIZES: dict[str, Any] = {"vocab_size": len(WORDS) + 3, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 512,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "bart": BART,
    "t5gemma": {"encoder": GEMMA, "decoder": GEMMA},
}


def prepare(tokenizer: Any, examples: list[dict[str, Any]], **config: Any) -> Seq2Seq:
    return Seq2Seq.prepare(Config(**config), [Rows(Dataset.from_list(examples), "rows.jsonl")], tokenizer)


@pytest.fixture
def tokenizer(tiny_encoder_decoder: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_encoder_decoder)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_loss_is_the_models_own_and_neither_padding_nor_company_matters(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    own = {"decoder_start_token_id": 0 if family == "t5" else 2}
    settings = transformers.AutoConfig.for_model(family, **SIZES, **own, **FAMILIES[family])
    model = transformers.AutoModelForSeq2SeqLM.from_config(settings).double().eval()
    examples = pairs(12, 0)
    task = prepare(tokenizer, examples, generation=None)
    encoded = encode_sources(
        [[Rows(Dataset.from_list(examples), "r")]], task, tokenizer, 32, skip_bad=False, cache=tmp_path
    )
    whole = task.collate(encoded.features(np.arange(12)))
    assert (whole["labels"] == -100).any() and (whole["attention_mask"] == 0).any()
    with torch.no_grad():
        total = task.loss(model, whole).item()
        losses = task.predict(model, whole)["loss"].tolist()
        for place, loss in enumerate(losses):
            alone = task.collate(encoded.features(np.array([place])))
            labels = alone["labels"]
            theirs = model(input_ids=alone["input_ids"], labels=labels).loss.item() * labels.shape[1]
            assert loss == pytest.approx(theirs, rel=1e-7) == pytest.approx(task.loss(model, alone).item(), rel=1e-7)
    assert total == pytest.approx(sum(losses), rel=1e-12)


def test_a_target_ends_with_eos_but_one_that_is_cut_does_not(tokenizer: Any) -> None:
    examples = [{"source": "w1 w2 w3", "target": "w4 w5"}, {"source": "w1", "target": "w1 w2 w3 w4 w5"}]
    task = prepare(tokenizer, examples, prefix="w9 ", max_target_length=4)
    columns = {name: [example[name] for example in examples] for name in ("source", "target")}
    features = task.encode(columns, tokenizer, 3)
    known = tokenizer.get_vocab()
    assert features["input_ids"] == [[known[word] for word in ("w9", "w1", "w2")], [known["w9"], known["w1"]]]
    assert features["labels"][0] == [known["w4"], known["w5"], tokenizer.eos_token_id]
    assert features["labels"][1] == [known[f"w{number}"] for number in (1, 2, 3, 4)]
    assert features["length"] == [6, 6] and features["targets"] == [3, 4] and features["longest"] == [3, 2]


def test_columns_and_fields_are_found_or_named(tokenizer: Any) -> None:
    assert str(prepare(tokenizer, [{"document": "w1", "summary": "w2"}])).startswith(
        "sequence to sequence: document → summary, written with the likeliest token each"
    )
    sentences = [{"translation": {"en": "w1", "de": "w2"}}]
    task = prepare(tokenizer, sentences, source="translation.en", target="translation.de")
    assert task.columns == ("translation",) and task.problem(sentences[0]) is None
    assert task.problem({"translation": None}) == "'translation.en' must be text, not None"
    assert task.problem({"translation": {"en": " ", "de": "w2"}}) == "'translation.en' is empty"
    declared = Dataset.from_list(sentences, features=Features({"translation": Translation(languages=["de", "en"])}))
    config = Config(source="translation.en", target="translation.de")
    stored = Seq2Seq.prepare(config, [Rows(declared, "rows")], tokenizer)
    assert stored.encode({"translation": [sentences[0]["translation"]]}, tokenizer, 8)["text"] == ["w2"]
    with pytest.raises(UserError, match=r"no column 'translation.fr'; it has translation, translation.en"):
        prepare(tokenizer, sentences, source="translation.fr", target="translation.de")
    with pytest.raises(UserError, match=r"no column 'source'; it has sources, target; did you mean 'sources'"):
        prepare(tokenizer, [{"sources": "w1", "target": "w2"}])


def test_an_end_is_needed(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no end token"):
        prepare(tokenizer, [{"source": "w1", "target": "w2"}])


@pytest.mark.parametrize("family", FAMILIES)
def test_families_from_scratch_train_resume_and_write_when_loaded_again(
    family: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    task = {"name": "seq2seq", "generation": {"max_new_tokens": 4}}
    run = make_config(updates=6, precision="fp32", task=task, data__max_length=24, micro_batch_size=8)
    run["model"] = {"config": {"model_type": family, **FAMILIES[family]}, "tokenizer": {"train": {"kind": "wordpiece"}}}
    run["metrics"] = ["bleu", "chrf", "rouge", "exact_match"]
    given = {role: pairs(count, count) for role, count in (("train", 150), ("validation", 12))}
    for role, examples in given.items():
        Path(run["data"][role]).write_text("".join(json.dumps(example) + "\n" for example in examples))
    for name in ("whole", "stopped"):
        assert name == "whole" or carry_out({**run, "output": str(tmp_path / name)}, stop_after=3) == 0
        assert carry_out({**run, "output": str(tmp_path / name)}) == 0
    whole, stopped = (tmp_path / name / "model" for name in ("whole", "stopped"))
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(whole)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    lines = [json.loads(line) for line in (whole.parent / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in lines] == [example["target"] for example in given["validation"]]
    for line, example in zip(lines, given["validation"], strict=True):
        ids = tokenizer(example["source"], truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        assert line["prediction"] == tokenizer.decode(model.generate(ids)[0], skip_special_tokens=True).strip()


def test_the_same_texts_are_drawn_in_evaluation_and_for_those_who_ask(
    make_config: MakeConfig, tiny_encoder_decoder: str, tmp_path: Path
) -> None:
    """Also where a row is skipped that is none of theirs."""
    task = {"name": "seq2seq", "generation": {"max_new_tokens": 6, "temperature": 1.0}}
    run = make_config(updates=1, task=task, data__max_length=24, data__on_bad_row="skip", metrics=["bleu"])
    run["model"] = {"path": tiny_encoder_decoder}
    examples = pairs(12, 12)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    examples[3] = {"source": " ", "target": "w1"}
    for role in ("train", "validation"):
        Path(run["data"][role]).write_text("".join(json.dumps(example) + "\n" for example in examples))
    assert carry_out(run) == 0
    options = ["--input", str(tmp_path / "all.jsonl"), "--output", str(tmp_path / "asked.jsonl")]
    options += ["--cache", str(tmp_path / "cache"), "--precision", "fp64"]
    assert predict.main([run["output"], *options]) == 0
    files = (Path(run["output"]) / "predictions" / "validation.jsonl", tmp_path / "asked.jsonl")
    judged, asked = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [line["row"] for line in judged] == [row for row in range(12) if row != 3]
    assert len({line["prediction"] for line in judged}) > 8, "little is drawn"
    assert len(asked) == 12
    for line in judged:
        assert line["prediction"] == asked[line["row"]]["prediction"]


def test_no_text_is_written_past_the_decoders_end(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each position writes a token: by default as many as there are, and more are refused before training."""
    run = make_config(updates=1, precision="fp32", task={"name": "seq2seq"}, data__max_length=16, metrics=["bleu"])
    run["model"] = {
        "config": {"model_type": "bart", **BART, "max_position_embeddings": 16},
        "tokenizer": {"train": {"kind": "wordpiece"}},
    }
    for role in ("train", "validation"):
        example = {"source": "w1 w2", "target": " ".join(WORDS[:14])}
        Path(run["data"][role]).write_text((json.dumps(example) + "\n") * 9)
    for task, said in (
        (
            {"generation": {"max_new_tokens": 17}},
            "task.generation.max_new_tokens: 17 tokens are more than .* 16. Lower",
        ),
        ({"max_target_length": 17}, "task.max_target_length: 17 is more than the 16 tokens that the decoder can write"),
    ):
        with pytest.raises(UserError, match=said):
            carry_out({**run, "task": {"name": "seq2seq", **task}})
    assert not Path(run["output"]).exists()
    run["task"]["generation"] = {"min_new_tokens": 16}
    assert carry_out(run) == 0
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(Path(run["output"]) / "model")
    assert model.generation_config.max_new_tokens == 16
    options = ["--input", run["data"]["validation"], "--output", str(tmp_path / "asked.jsonl"), "--precision", "fp32"]
    options += ["--cache", str(tmp_path / "cache")]
    assert predict.main([run["output"], *options, "task.generation.max_new_tokens=17"]) == 2
    assert "17 tokens are more than there is room for" in capsys.readouterr().err
