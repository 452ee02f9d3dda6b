"""Causal language modelling: each token predicted once, packed as if alone, in any family; the exported model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as some

from data.encode import encode_sources
from data.errors import UserError
from data.source import Rows
from tests.conftest import WORDS, figures
from tests.every_task.causal_lm import rows as sentences
from tests.worker import carry_out
from train.model import load_model
from train.model_config import ModelConfig
from train.tasks._losses import token_losses
from train.tasks.causal_lm import CausalLanguageModelling, Config

MakeConfig = Callable[..., dict[str, Any]]
PACKINGS = ("documents", "concatenate", "none")
BOS, EOS = 1, 2


class NumberedTexts(dict[str, Any]):
    """What `Numbered` makes; the first token of a text is its first character."""

    is_fast = True

    def token_to_chars(self, text: int, token: int) -> transformers.CharSpan:
        assert self["input_ids"][text][token] % 100 == 0, "asked about another token than the first"
        return transformers.CharSpan(0, 1)


class Numbered:
    """Makes of "7:3" the tokens 700, 701, 702, between its own BOS or not: no two documents share a token."""

    pad_token_id = 0
    bos_token = "<start>"

    def __init__(self, bos: int | None, eos: int | None, *, adds_bos: bool = False) -> None:
        self.bos_token_id, self.eos_token_id, self.adds_bos = bos, eos, adds_bos

    def __call__(self, texts: list[str], **_: Any) -> NumberedTexts:
        ids = []
        for text in texts:
            document, length = map(int, (text or "0:0").split(":"))
            start = [self.bos_token_id or 0] * self.adds_bos
            ids.append([*start, *(100 * document + place for place in range(length))])
        return NumberedTexts(input_ids=ids)


def prepare(tokenizer: Any, **config: Any) -> CausalLanguageModelling:
    rows = Rows(Dataset.from_dict({"text": ["a"], "label": [0]}), "rows.jsonl")
    return CausalLanguageModelling.prepare(Config(**config), [rows], tokenizer)


def features(encoded: dict[str, list[Any]]) -> dict[str, Any]:
    """The encoded columns as `collate` gets them."""
    return {
        name: [np.array(value) for value in values] if isinstance(values[0], list) else np.array(values)
        for name, values in encoded.items()
        if name != "unusable"
    }


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=150, deadline=None)
@given(
    lengths=some.lists(some.integers(1, 40), min_size=1, max_size=20),
    size=some.integers(1, 12),
    ends=some.sampled_from([(None, None), (None, EOS), (BOS, EOS), (EOS, EOS), (BOS, None)]),
    adds_bos=some.booleans(),
)
def test_every_token_but_the_first_is_a_target_once(
    packing: str, lengths: list[int], size: int, ends: tuple[int | None, int | None], adds_bos: bool
) -> None:
    bos, eos = ends
    tokenizer = Numbered(bos, eos, adds_bos=adds_bos and bos is not None)
    task = prepare(tokenizer, packing=packing)
    texts = [f"{document}:{length}" for document, length in enumerate(lengths, 1)]
    encoded = task.encode({"text": texts}, tokenizer, size)
    begin = [bos] if bos is not None and not (packing == "concatenate" and bos == eos) else []
    documents = [
        [*begin, *(100 * document + place for place in range(length)), *([eos] if eos is not None else [])]
        for document, length in enumerate(lengths, 1)
    ]
    streams = documents if packing != "concatenate" else [[token for document in documents for token in document]]
    expected = [pair for stream in streams for pair in pairwise(stream)]
    if not expected:
        assert encoded["input_ids"] == []
        return
    alone = [place for place, document in enumerate(documents) if len(document) == 1]
    assert [place for place, _ in encoded["unusable"]] == [
        place for place in alone if packing != "concatenate" or not place
    ]
    tensors = task.collate(features(encoded))
    learned = tensors["labels"] != -100
    pairs = list(zip(tensors["input_ids"][learned].tolist(), tensors["labels"][learned].tolist(), strict=True))
    assert Counter(pairs) == Counter(expected)
    assert learned.sum(1).tolist() == encoded["targets"] == encoded["length"]
    assert tensors["input_ids"].shape[1] == max(encoded["length"]) <= size
    begun = {piece for row in encoded["rows"] for piece in row}
    unpredicted = 0 if begin else sum(packing != "concatenate" or document == 0 for document in begun)
    assert sum(encoded["bytes"]) == sum(len(texts[document]) for document in begun) - unpredicted
    check_boundaries(tensors, documents, packing)


@pytest.mark.parametrize("packing", PACKINGS)
def test_bytes_that_nothing_predicts_are_not_counted(packing: str, tmp_path: Path) -> None:
    """Without BOS, or bits per byte would flatter a tokenizer of long tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"été": 0, "Été": 1, "rouge": 2, "[END]": 3}))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="[END]", pad_token="[END]")
    task = prepare(tokenizer, packing=packing)
    encoded = task.encode({"text": ["  Été rouge", "été rouge"]}, tokenizer, 16)
    assert sum(encoded["bytes"]) == len(" rouge") + (len("été rouge".encode()) if packing == "concatenate" else 6)


def check_boundaries(tensors: dict[str, torch.Tensor], documents: list[list[Any]], packing: str) -> None:
    """Positions begin anew exactly where the row goes on with another document, or with padding."""
    if packing != "documents":
        assert "position_ids" not in tensors
        return
    follows = {pair for document in documents for pair in pairwise(document[:-1])}
    for ids, labels, positions in zip(
        *(tensors[name] for name in ("input_ids", "labels", "position_ids")), strict=True
    ):
        for place in range(1, len(ids)):
            inside = labels[place] != -100 and (ids[place - 1].item(), ids[place].item()) in follows
            padding = labels[place] == labels[place - 1] == -100
            if inside or padding:
                assert positions[place] == positions[place - 1] + 1
            else:
                assert positions[place] == 0


def test_begin_and_end_are_not_doubled(tiny_decoder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_decoder)
    written = {"text": ["w1 w2", "w3 <end>", "<end> w4 w5 <end> <end>"]}
    plain = prepare(tokenizer).encode(written, tokenizer, 9)
    assert plain["input_ids"] == [[4, 5, 6, 2, 7, 8]]
    assert plain["following"] == [[2, 2, 2]]
    tokenizer.bos_token = "<end>"  # as in GPT-2
    same = prepare(tokenizer).encode(written, tokenizer, 9)
    assert same["input_ids"] == [[2, 4, 5, 2, 6, 2, 7, 8]]
    stream = prepare(tokenizer, packing="concatenate").encode(written, tokenizer, 9)
    assert stream["input_ids"] == [[4, 5, 2, 6, 2, 7, 8]]
    assert stream["following"] == [[2, 2, 2]]


def test_the_column_is_found_or_named() -> None:
    def column(columns: dict[str, Any], **config: Any) -> str:
        rows = [Rows(Dataset.from_dict(columns), "rows.jsonl")]
        return CausalLanguageModelling.prepare(Config(**config), rows, Numbered(None, EOS)).text

    assert column({"id": ["x"], "document": ["y"]}) == "document"
    assert column({"number": [1], "review": ["y"]}) == "review"
    assert column({"text": ["x"], "review": ["y"]}, text="review") == "review"
    with pytest.raises(UserError, match=r"no column 'text'; it has title, body"):
        column({"title": ["x"], "body": ["y"]})
    with pytest.raises(UserError, match=r"no column 'txt'; it has text; did you mean 'text'"):
        column({"text": ["x"]}, text="txt")


def test_problems_of_rows_are_named_and_skipped_rows_leave_the_places_right(tiny_decoder: str, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_decoder)
    task = prepare(tokenizer)
    assert task.problem({"text": "\n "}) == "'text' is empty"
    assert task.problem({"text": None}) == "'text' must be text, not None"
    assert task.problem({"text": 3}) == "'text' must be text, not 3"
    texts = ["w1 w2", "", "w3", " ", "w4 w5 w6"]
    rows = Rows(Dataset.from_dict({"text": texts}), "rows.jsonl")
    with pytest.raises(UserError, match=r"rows.jsonl, row 1 \(from 0\): 'text' is empty"):
        encode_sources([[rows]], task, tokenizer, 8, skip_bad=False, cache=tmp_path)
    encoded = encode_sources([[rows, rows], [rows]], task, tokenizer, 8, skip_bad=True, cache=tmp_path)
    assert len(encoded.skipped) == 6
    found = {"losses": np.arange(3 * 3, dtype=float).reshape(3, 3)}
    lines = list(task.records(found, encoded))
    assert [(line["source"], line["row"]) for line in lines] == [
        (source, row + 5 * file) for source, files in ((0, 2), (1, 1)) for file in range(files) for row in (0, 2, 4)
    ]
    assert [line["tokens"] for line in lines] == [2, 1, 3] * 3
    assert lines[4] == {"source": 0, "row": 7, "loss": 4.0, "tokens": 1}


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROTARY = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": ROTARY,
    "qwen3": ROTARY,
    "mistral": {**ROTARY, "sliding_window": 5},
    "gpt_neox": {**SMALL, "max_position_embeddings": 64},
}


def build(family: str, attention: str | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    settings = transformers.AutoConfig.for_model(family, vocab_size=len(WORDS) + 3, **special, **config)
    return transformers.AutoModelForCausalLM.from_config(settings, attn_implementation=attention).double().eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_has_the_same_loss_packed_padded_and_alone(
    family: str, attention: str, tiny_decoder: str, tmp_path: Path
) -> None:
    """And the same gradient. The eager attention of most families is fp32 in any dtype, so it rounds to 1e-7."""
    exact = 1e-9 if attention == "sdpa" else 1e-7
    model = build(family, attention, **FAMILIES[family])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_decoder)
    texts = [row["text"] for row in sentences(40, 0)]
    assert max(len(text.split()) for text in texts) == 40
    losses, gradients = {}, {}
    for packing in ("documents", "none"):
        task = prepare(tokenizer, packing=packing)
        task.check_model(model)
        rows = [Rows(Dataset.from_dict({"text": texts}), "rows.jsonl")]
        encoded = encode_sources([rows], task, tokenizer, 24, skip_bad=False, cache=tmp_path)
        tensors = task.collate(encoded.features(np.arange(len(encoded.dataset))))
        with torch.no_grad():
            found = {name: value.numpy() for name, value in task.predict(model, tensors).items()}
        losses[packing] = [record["loss"] for record in task.records(found, encoded)]
        loss = task.loss(model, tensors)
        gradients[packing] = torch.autograd.grad(loss, list(model.parameters()))
        assert found["loss"].sum() == pytest.approx(loss.item(), rel=1e-12)
        assert task.outputs(found, encoded)["targets"].sum() == sum(len(text.split()) for text in texts)
    alone = []
    for text in texts:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        total = 0.0
        for start in range(0, len(ids) - 1, 24):
            piece = ids[start : start + 25]
            with torch.no_grad():
                chances = model(piece[None, :-1], use_cache=False).logits[0].log_softmax(1)
            total -= chances[range(len(piece) - 1), piece[1:]].sum().item()
        alone.append(total)
    assert losses["documents"] == pytest.approx(alone, rel=exact)
    assert losses["none"] == pytest.approx(alone, rel=exact)
    for one, other in zip(gradients["documents"], gradients["none"], strict=True):
        assert torch.allclose(one, other, rtol=exact, atol=10 * exact)


def test_a_stream_is_learned_across_documents_and_each_has_its_own_losses(tiny_decoder: str, tmp_path: Path) -> None:
    model = build("gpt2", **FAMILIES["gpt2"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_decoder)
    task = prepare(tokenizer, packing="concatenate")
    texts = [row["text"] for row in sentences(30, 0)]
    rows = [Rows(Dataset.from_dict({"text": texts}), "rows.jsonl")]
    encoded = encode_sources([rows], task, tokenizer, 24, skip_bad=False, cache=tmp_path)
    tensors = task.collate(encoded.features(np.arange(len(encoded.dataset))))
    with torch.no_grad():
        found = {name: value.numpy() for name, value in task.predict(model, tensors).items()}
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    ids = torch.tensor([token for document in documents for token in document])
    owners = [place for place, document in enumerate(documents) for _ in document]
    expected = [0.0] * len(texts)
    for start in range(0, len(ids) - 1, 24):
        piece = ids[start : start + 25]
        with torch.no_grad():
            chances = model(piece[None, :-1]).logits[0].log_softmax(1)
        for place in range(len(piece) - 1):
            expected[owners[start + place + 1]] -= chances[place, piece[place + 1]].item()
    records = list(task.records(found, encoded))
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=1e-9)
    assert [record["tokens"] for record in records] == [len(documents[0]) - 1, *map(len, documents[1:])]
    outputs = task.outputs(found, encoded)
    unpredicted = len(texts[0].split()[0])
    assert outputs["bytes"].sum() == sum(map(len, texts)) - unpredicted and outputs["targets"].sum() == len(ids) - 1


def test_a_tokenizer_from_scratch_serves_documents_as_they_were_learned(configure: MakeConfig, tmp_path: Path) -> None:
    """The exported tokenizer puts the BOS before a text that every document was learned with."""
    config = configure(precision="fp64")
    config["model"] = {
        "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256},
        "tokenizer": {"train": {"kind": "char"}},
    }
    config["data"]["max_length"] = 256
    assert carry_out(config) == 0
    folder = tmp_path / "out" / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions/validation.jsonl").read_text().splitlines()]
    for line, row in zip(lines, sentences(20, len("validation")), strict=True):
        ids = torch.tensor(tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id])
        with torch.no_grad():
            chances = model(ids[None, :-1]).logits[0].log_softmax(1)
        assert line["tokens"] == len(ids) - 1 == len(row["text"]) + 1
        assert line["loss"] == pytest.approx(-chances[range(len(ids) - 1), ids[1:]].sum().item(), rel=1e-6)


def test_the_loss_in_chunks_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (3, 7), generator=generator)
    labels[1, 4:] = -100
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    gradient = torch.autograd.grad(expected.sum(), logits)[0]
    for chunk in (1, 11 * 4, 10**6):
        monkeypatch.setattr("train.tasks._losses.CHUNK", chunk)
        found = token_losses(logits, labels)
        assert torch.allclose(found, expected, rtol=1e-14)
        assert torch.allclose(torch.autograd.grad(found.sum(), logits)[0], gradient, rtol=1e-12)
    half = token_losses(logits.bfloat16(), labels)
    assert half.dtype == torch.float32 and torch.allclose(half.double(), expected, atol=0.1)


@pytest.fixture
def configure(make_config: MakeConfig, tiny_decoder: str, tmp_path: Path) -> MakeConfig:
    """Return a function that gives the config of a run on sentences."""

    def make(**changes: Any) -> dict[str, Any]:
        config = make_config(updates=6, **{"task": {"name": "causal_lm"}, "data__max_length": 12, **changes})
        config["model"] = {"path": tiny_decoder, **changes.get("model", {})}
        for role, count in (("train", 60), ("validation", 20)):
            lines = [json.dumps(row) + "\n" for row in sentences(count, len(role))]
            Path(config["data"][role]).write_text("".join(lines))
        return {**config, "batch_size": 8, "evaluate": {"every": 3}}

    return make


@pytest.mark.parametrize("packing", ["none", "concatenate"])
def test_a_recurrent_model_trains_resumes_and_is_exported(
    packing: str, configure: MakeConfig, tiny_decoder: str, tmp_path: Path
) -> None:
    folder = recurrent(tiny_decoder, tmp_path)
    with pytest.raises(UserError, match=r"task.packing=documents: MambaForCausalLM .* Set task.packing=none"):
        carry_out(configure(model={"path": folder}))
    assert not (tmp_path / "out").exists()
    weights, losses = [], []
    for place, stop in enumerate((None, 4)):
        output = tmp_path / str(place)
        run = configure(
            model={"path": folder}, task={"name": "causal_lm", "packing": packing}, output=str(output), precision="fp32"
        )
        if stop:
            assert carry_out(run, stop_after=stop) == 0
        assert carry_out(run) == 0
        weights.append((output / "model" / "model.safetensors").read_bytes())
        losses.append(list(figures(output, "train/loss").values()))
    assert weights[0] == weights[1] and losses[0][-1] < losses[0][0]
    model = transformers.AutoModelForCausalLM.from_pretrained(output / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "model")
    lines = [json.loads(line) for line in (output / "predictions" / "validation.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in sentences(20, len("validation"))]
    assert [line["row"] for line in lines] == list(range(20))
    if packing == "none":
        for line, text in zip(lines, texts, strict=True):
            ids = torch.tensor(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])
            if len(ids) <= 13:
                with torch.no_grad():
                    chances = model(ids[None, :-1]).logits[0].log_softmax(1)
                loss = -chances[range(len(ids) - 1), ids[1:]].sum().item()
                assert line == {"row": line["row"], "loss": pytest.approx(loss, rel=1e-4), "tokens": len(ids) - 1}


@pytest.mark.parametrize("scratch", [True, False])
def test_a_token_that_begins_ends_and_pads_learns(scratch: bool, tiny_decoder: str, tmp_path: Path) -> None:
    """As in GPT-2's tokenizer; a Llama would keep the embedding of its padding token from learning."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_decoder)
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.eos_token
    build("llama", **FAMILIES["llama"]).save_pretrained(tmp_path)
    kind = {"config": {"model_type": "llama", **FAMILIES["llama"]}, "tokenizer": tiny_decoder}
    settings = ModelConfig(**(kind if scratch else {"path": str(tmp_path)}))
    task = prepare(tokenizer)
    model, _ = load_model(
        settings, task.model_class, task.model_config, tokenizer,
        known=len(tokenizer), dtype=torch.float64, seed=0, token=None,
    )  # fmt: skip
    task.check_model(model)
    assert model.config.pad_token_id == model.config.eos_token_id == model.config.bos_token_id == 2
    tensors = task.collate(features(task.encode({"text": ["w1 w2 w3", "w4"]}, tokenizer, 4)))
    assert tensors["labels"].tolist() == [[4, 5, 6, 2], [7, 2, -100, -100]]
    task.loss(model, tensors).backward()
    changed = model.get_input_embeddings().weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert changed == [2, 4, 5, 6, 7]


def recurrent(tokenizer: str, tmp_path: Path) -> str:
    """A tiny Mamba as a folder of safetensors."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=len(WORDS) + 3, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0, eos_token_id=2
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "mamba")
    return str(tmp_path / "mamba")


def test_what_is_shown_of_a_row(tiny_decoder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_decoder)
    task = prepare(tokenizer)
    tensors = task.collate(features(task.encode({"text": ["w1 w2", "w3"]}, tokenizer, 8)))
    marks = task.marks(tensors, tokenizer)
    assert [learned for _, learned in marks] == [None, "w2", "<end>", None, None, "<end>", None]
    assert "".join(piece for piece, _ in marks) == "w1 w2 <end>\nw3 <end>\n"
    assert str(task) == "causal language modelling: text, documents with EOS 2, packing documents"


def test_a_bos_that_the_tokenizer_does_not_put_is_told_to_who_uses_the_model() -> None:
    rows = [Rows(Dataset.from_dict({"text": ["1:3"]}), "rows")]
    hints = []
    for tokenizer in (Numbered(BOS, EOS), Numbered(BOS, EOS, adds_bos=True), Numbered(None, EOS)):
        hints.append(CausalLanguageModelling.prepare(Config(), rows, tokenizer).hint)
    assert "began with the token `<start>`" in hints[0] and hints[1:] == ["", ""]
