"""Masked language modelling: how much is hidden, where and how; whole words of any tokenizer; the sparse head."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from data.encode import encode_sources
from data.errors import UserError
from data.order import example_keys
from data.source import Rows
from tests import every_task
from tests.conftest import WORDS, figures
from tests.distributed import launch
from tests.worker import carry_out
from train.tasks.masked_lm import IGNORED, Config, MaskedLM

TEXT = "The quick brown foxes jumped over lazy dogs; extraordinarily unbelievable happenings followed, naturally."


def prepare(tokenizer: Any, **config: Any) -> MaskedLM:
    return MaskedLM.prepare(Config(**config), [Rows(Dataset.from_dict({"text": [TEXT]}), "rows.jsonl")], tokenizer)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def batch(examples: int = 64, length: int = 128, *parts: Any) -> dict[str, Any]:
    """Examples of words only, between the two special tokens."""
    rng = np.random.default_rng(0)
    ids = [np.array([2, *rng.integers(5, 65, length - 2), 3], dtype=np.int32) for _ in range(examples)]
    return {"input_ids": ids, "key": example_keys(np.arange(examples), *(parts or ("evaluation",)))}


def hidden(task: MaskedLM, features: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(task.collate(features)["labels"] != IGNORED)


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_the_rate_and_the_positions(tokenizer: Any, rate: float) -> None:
    """Every position equally often, within 4.5 standard deviations; the ends, which are special, never."""
    task, examples, length = prepare(tokenizer, mask_rate=rate), 4_000, 40
    chosen = hidden(task, batch(examples, length))
    assert not chosen[:, [0, -1]].any()
    inside = chosen[:, 1:-1]
    spread = math.sqrt(rate * (1 - rate) / examples)
    assert abs(inside.mean() - rate) < 4.5 * spread / math.sqrt(inside.shape[1])
    assert np.abs(inside.mean(axis=0) - rate).max() < 4.5 * spread
    together = np.corrcoef(inside[:, :-1].ravel(), inside[:, 1:].ravel())[0, 1]
    assert abs(together) < 4.5 / math.sqrt(inside[:, 1:].size)


def test_four_fifths_are_masked_a_tenth_is_random_and_a_tenth_stays(tokenizer: Any) -> None:
    task, features = prepare(tokenizer), batch(2_000, 130)
    tensors = task.collate(features)
    given, labels = (tensors[name].numpy() for name in ("input_ids", "labels"))
    chosen = labels != IGNORED
    assert np.array_equal(given[~chosen], np.stack(features["input_ids"])[~chosen])
    assert np.array_equal(labels[chosen], np.stack(features["input_ids"])[chosen])
    masked = given[chosen] == tokenizer.mask_token_id
    changed = ~masked & (given[chosen] != labels[chosen])
    count, regular = int(chosen.sum()), len(WORDS)
    assert masked.mean() == pytest.approx(0.8, abs=4.5 * math.sqrt(0.16 / count))
    assert changed.mean() == pytest.approx(0.1 * (1 - 1 / regular), abs=4.5 * math.sqrt(0.09 / count))
    frequencies = np.bincount(given[chosen][changed], minlength=65)
    assert not frequencies[:5].any(), "a special token was drawn"
    assert frequencies[5:].min() > 0.6 * changed.sum() / regular


def test_shares_can_be_chosen(tokenizer: Any) -> None:
    all_masked = prepare(tokenizer, replace=[1.0, 0.0, 0.0]).collate(batch())
    assert (all_masked["input_ids"][all_masked["labels"] != IGNORED] == tokenizer.mask_token_id).all()
    untouched = prepare(tokenizer, replace=[0.0, 0.0, 1.0]).collate(batch())
    assert np.array_equal(untouched["input_ids"], np.stack(batch()["input_ids"]))
    with pytest.raises(ValueError, match="three shares that add up to 1"):
        Config(replace=(0.8, 0.1, 0.2))


def test_masks_follow_from_the_key_alone(tokenizer: Any) -> None:
    """Not from company, place in the batch or padding; another epoch or seed gives others, an evaluation the same."""
    task, features = prepare(tokenizer), batch(32, 60, 7, 0)
    features["input_ids"] = [ids[: 10 + place] for place, ids in enumerate(features["input_ids"])]
    whole = task.collate(features)
    order = np.random.default_rng(1).permutation(32)
    for part in np.split(order, [1, 12]):
        alone = task.collate({"input_ids": [features["input_ids"][row] for row in part], "key": features["key"][part]})
        width = alone["input_ids"].shape[1]
        for name in ("input_ids", "labels"):
            for row, values in zip(part, alone[name], strict=True):
                size = len(features["input_ids"][row])
                assert torch.equal(values[:size], whole[name][row, :size])
                assert width >= size and set(values[size:].tolist()) <= {0, IGNORED}
        assert torch.equal(alone["places"], (alone["labels"] != IGNORED).flatten().nonzero().flatten())
    for other in ((7, 1), (8, 0)):
        assert not np.array_equal(hidden(task, batch(32, 60, 7, 0)), hidden(task, batch(32, 60, *other)))
    assert np.array_equal(hidden(task, batch(32, 60)), hidden(task, batch(32, 60)))


@pytest.mark.parametrize("whole_words", [False, True])
def test_count_is_what_collate_hides(tokenizer: Any, whole_words: bool) -> None:
    task, features = prepare(tokenizer, whole_words=whole_words), batch(40, 30, 3, 2)
    features["input_ids"] = [ids[: 3 + place % 25] for place, ids in enumerate(features["input_ids"])]
    features["words"] = [np.where(np.isin(ids, (2, 3)), -1, np.arange(len(ids)) // 3) for ids in features["input_ids"]]
    chosen = hidden(task, features)
    assert task.count(features) == chosen.sum()
    assert chosen.any(axis=1).all(), "an example without a target"


def test_masking_costs_little(tokenizer: Any) -> None:
    task, features = prepare(tokenizer), batch(32, 128)
    elapsed = []
    for _ in range(20):
        start = time.process_time()
        task.count(features)
        task.collate(features)
        elapsed.append(time.process_time() - start)
    assert min(elapsed) < 3e-3


def trained(kind: str) -> Any:
    """A tokenizer of a kind, trained on a few words, so that most words have several pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<unk>", "<mask>", "<s>", "</s>"]
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        trainer: Any = trainers.WordPieceTrainer(vocab_size=60, special_tokens=specials)
    elif kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=280, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=kind == "sentencepiece")
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token="<unk>")
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", bos_token="<s>",
        eos_token="</s>", model_max_length=512,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "sentencepiece", "unsplit"])
def test_whole_words_of_any_tokenizer(kind: str) -> None:
    """All pieces of a word or none, also where the tokenizer itself does not split at blanks."""
    tokenizer = trained(kind)
    task = prepare(tokenizer, whole_words=True)
    encoded = task.encode({"text": [TEXT]}, tokenizer, 512)
    ids, words = (np.array(encoded[name][0]) for name in ("input_ids", "words"))
    assert words[0] == words[-1] == -1 and (np.diff(words[1:-1]) >= 0).all()
    spelled = [tokenizer.decode(ids[words == word]).strip() for word in range(words.max() + 1)]
    assert "".join(spelled) == TEXT.replace(" ", "")
    assert {"quick", "extraordinarily", "unbelievable"} <= set(spelled)
    assert len(ids) > 1.5 * len(spelled), "words have several pieces"
    keys = example_keys(np.arange(3_000), "evaluation")
    chosen = hidden(task, {"input_ids": [ids] * 3_000, "words": [words] * 3_000, "key": keys})
    rates = []
    for word in range(words.max() + 1):
        pieces = chosen[:, words == word]
        assert (pieces.all(axis=1) == pieces.any(axis=1)).all()
        rates.append(pieces[:, 0].mean())
    assert np.abs(np.array(rates) - 0.15).max() < 0.05  # at least one word is hidden, so the rate is a little higher


def test_a_word_with_a_piece_that_must_not_be_hidden_stays_whole() -> None:
    tokenizer = trained("wordpiece")
    task = prepare(tokenizer, whole_words=True)
    encoded = task.encode({"text": ["quick ☃ <mask> brown"]}, tokenizer, 64)
    special = np.isin(encoded["input_ids"][0], tokenizer.all_special_ids)
    assert special.sum() == 4
    assert ((np.array(encoded["words"][0]) == -1) == special).all()


@pytest.mark.parametrize("whole_words", [False, True])
def test_long_texts_are_cut_and_nothing_is_lost(whole_words: bool) -> None:
    tokenizer = trained("wordpiece")
    task = prepare(tokenizer, whole_words=whole_words)
    texts = [TEXT, "quick", " ".join([TEXT] * 3)]
    encoded = task.encode({"text": texts}, tokenizer, 16)
    assert max(encoded["length"]) == 16 and encoded["length"] == [len(ids) for ids in encoded["input_ids"]]
    for place, text in enumerate(texts):
        mine = [ids[1:-1] for row, ids in zip(encoded["row"], encoded["input_ids"], strict=True) if row == place]
        assert [*chain(*mine)] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded["row"].count(1) == 1 and encoded["unusable"] == []


def test_empty_documents_are_named_or_skipped(tokenizer: Any, tmp_path: Path) -> None:
    task = prepare(tokenizer)
    assert task.problem({"text": " \n"}) == "'text' is empty: there is nothing to hide"
    assert task.problem({"text": None}) == "'text' must be text, not None"
    texts = ["w1 w2", "nothing known here", "[MASK] [SEP]", "w3", ""]
    sources = [[Rows(Dataset.from_dict({"text": texts}), "rows.jsonl")]]
    with pytest.raises(UserError, match=r"rows.jsonl, row 4 \(from 0\): 'text' is empty"):
        encode_sources(sources, task, tokenizer, 64, skip_bad=False, cache=tmp_path)
    sources = [[Rows(Dataset.from_dict({"text": texts[:4]}), "rows.jsonl")]]
    with pytest.raises(UserError, match=r"row 1 \(from 0\): 'text' holds no token that could be hidden\n.*row 2"):
        encode_sources(sources, task, tokenizer, 64, skip_bad=False, cache=tmp_path)
    encoded = encode_sources(sources, task, tokenizer, 64, skip_bad=True, cache=tmp_path)
    assert encoded.column("row").tolist() == [0, 3] and len(encoded.skipped) == 2


def test_what_cannot_be_used_is_named(tokenizer: Any) -> None:
    class Maskless:
        mask_token_id = None

    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        prepare(Maskless())
    with pytest.raises(UserError, match="no column 'txt'; it has text; did you mean 'text'"):
        prepare(tokenizer, text="txt")


def families() -> dict[str, Any]:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 65, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    ends = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
    return {
        "bert": transformers.BertConfig(**sizes),
        "roberta": transformers.RobertaConfig(**sizes),
        "deberta": transformers.DebertaV2Config(**sizes, **relative),
        "deberta-new-head": transformers.DebertaV2Config(**sizes, **relative, legacy=False),
        "modernbert": transformers.ModernBertConfig(**sizes, **ends),
        "electra": transformers.ElectraConfig(**sizes, embedding_size=16),
    }


def model_of(family: str) -> torch.nn.Module:
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForMaskedLM.from_config(families()[family]).double().eval()
    return model


@pytest.mark.parametrize("family", list(families()))
def test_the_loss_is_that_of_all_logits_and_padding_does_not_matter(family: str, tokenizer: Any) -> None:
    """The head sees hidden tokens only; loss and gradients are those of a plain forward pass, and of each row alone."""
    task, model = prepare(tokenizer), model_of(family)
    features = batch(6, 40, 1, 0)
    features["input_ids"] = [ids[: 5 + 7 * place] for place, ids in enumerate(features["input_ids"])]
    tensors = task.collate(features)
    sizes: list[Any] = []
    model.get_output_embeddings().register_forward_hook(lambda *given: sizes.append(given[2].shape))  # type: ignore[operator]
    loss = task.loss(model, tensors)
    loss.backward()
    assert sizes == [(task.count(features), 65)] or family == "deberta-new-head"
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tensors["labels"].flatten(), reduction="sum")
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(gradients[name], value.grad, rtol=1e-9, atol=1e-12)
    rows = [{"input_ids": [ids], "key": key[None]} for ids, key in zip(*features.values(), strict=True)]
    found = task.predict(model, tensors)
    alone = [task.predict(model, task.collate(row)) for row in rows]
    assert found["loss"].tolist() == pytest.approx([one["loss"].item() for one in alone], rel=1e-9)
    assert found["loss"].sum().item() == pytest.approx(loss.item(), rel=1e-9)
    assert found["targets"].tolist() == [int(one["targets"]) for one in alone]
    for row, one in enumerate(alone):
        count = int(one["targets"])
        assert torch.equal(found["predictions"][row, :count], one["predictions"][0])
        assert set(found["predictions"][row, count:].tolist()) <= {IGNORED}
        assert found["scores"][row, count:].isnan().all()


def test_outputs_are_what_metrics_take(tokenizer: Any) -> None:
    task, model = prepare(tokenizer), model_of("bert")
    tensors = task.collate(batch(9, 30))
    with torch.no_grad():
        found = {name: tensor.numpy() for name, tensor in task.predict(model, tensors).items()}
        logits = model(input_ids=tensors["input_ids"]).logits
    outputs = task.outputs(found, None)  # type: ignore[arg-type]
    chosen = tensors["labels"] != IGNORED
    assert outputs["references"].tolist() == tensors["labels"][chosen].tolist()
    assert outputs["predictions"].tolist() == logits[chosen].argmax(1).tolist()
    assert outputs["targets"].sum() == len(outputs["references"])
    assert found["scores"][found["references"] != IGNORED] == pytest.approx(
        logits[chosen].softmax(1).max(1).values.numpy()
    )


def test_a_run_learns_and_ties_the_head_to_the_embeddings(make_config: Callable[..., Any], tmp_path: Path) -> None:
    """The head is new to a model without one; what is exported is one matrix, in and out."""
    rows = every_task.load("masked_lm").rows
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(200, 0)))
    from safetensors import safe_open
    from transformers import AutoModelForMaskedLM

    config = make_config(
        task={"name": "masked_lm", "whole_words": True}, data__train=str(tmp_path / "rows.jsonl"),
        data__validation=str(tmp_path / "rows.jsonl"), updates=40, metrics=["perplexity"],
    )  # fmt: skip
    assert carry_out(config) == 0
    perplexity = figures(tmp_path / "out", "validation/perplexity")
    loss = figures(tmp_path / "out", "validation/loss")
    assert perplexity[40] == pytest.approx(math.exp(loss[40]), rel=1e-12)
    assert perplexity[40] < 8.5, "which eight of 65 words are used is soon learned; their order is not"
    with safe_open(tmp_path / "out" / "model" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "bert.embeddings.word_embeddings.weight" in names and "cls.predictions.decoder.weight" not in names
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_inspect_shows_what_is_to_be_guessed(tokenizer: Any) -> None:
    task, features = prepare(tokenizer), batch(1, 12)
    tensors = task.collate(features)
    marks = task.marks(tensors, tokenizer)
    learned = [mark for _, mark in marks if mark]
    assert learned == [tokenizer.decode([label]) for label in tensors["labels"][0].tolist() if label != IGNORED]
    assert len(marks) == 12


def test_a_parameter_that_nothing_reads_does_not_hold_up_several_processes(
    make_config: Callable[..., Any], tmp_path: Path
) -> None:
    """An untied head of BERT has a second bias for which no gradient comes: DDP must not wait for it."""
    rows = every_task.load("masked_lm").rows
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(100, 0)))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": False}
    configs = [
        make_config(
            task={"name": "masked_lm"}, data__train=str(tmp_path / "rows.jsonl"), output=str(tmp_path / f"out-{world}"),
            data__validation=str(tmp_path / "rows.jsonl"), updates=4, metrics=["perplexity"],
            model={"config": {"model_type": "bert", **sizes, **quiet}, "tokenizer": {"train": {"kind": "char"}}},
        )
        for world in (1, 2, "launched-1")
    ]  # fmt: skip
    assert carry_out(configs[0]) == 0
    launch([{"config": configs[1]}], 2, tmp_path)
    launch(
        [{"config": configs[2]}], 1, tmp_path
    )  # Accelerate takes DDP for one process too where a launcher started it
    assert figures(tmp_path / "out-launched-1", "train/loss") == figures(tmp_path / "out-1", "train/loss")
    losses = [list(figures(tmp_path / f"out-{world}", "train/loss").values()) for world in (1, 2)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_no_room_beside_the_models_own_tokens_is_said() -> None:
    tokenizer = trained("wordpiece")
    with pytest.raises(UserError, match=r"data.max_length: 2 leaves no room"):
        prepare(tokenizer).encode({"text": ["quick"]}, tokenizer, 2)
    assert prepare(tokenizer).encode({"text": ["quick brown"]}, tokenizer, 3)["length"] == [3] * len(
        tokenizer("quick brown", add_special_tokens=False)["input_ids"]
    )
