"""Tokenizers as the model gets them: special tokens, pairs, added tokens, and in a fresh process the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from data.source import Rows
from train.model_config import ModelConfig
from train.tokenizer import ids, load_tokenizer, special_ids

TEXTS = ["The old man  and the sea.", "A tale\nof two cities, and\tone more", "the theme of the thesis: THE end"]
ENCODERS = ("bert", "roberta", "deberta-v2", "modernbert")
DECODERS = ("gpt2", "llama", "qwen3", "mamba")
KINDS = ("bpe", "wordpiece", "unigram", "char")

Train = Callable[..., Any]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that gives the tokenizer of a model from scratch."""
    from datasets import Dataset

    rows, cache = [Rows(Dataset.from_dict({"text": TEXTS}), "rows.jsonl")], tmp_path_factory.mktemp("cache")

    def made(model_type: str, kind: str = "bpe", **options: Any) -> Any:
        settings = {"config": {"model_type": model_type}, "tokenizer": {"train": {"kind": kind}}, **options}
        return load_tokenizer(ModelConfig.model_validate(settings), rows, cache, None)[0]

    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_frame_a_text_and_a_pair(train: Train, model_type: str, kind: str) -> None:
    tokenizer = train(model_type, kind)
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert (begin, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    plain = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS[:2]]
    assert tokenizer(TEXTS[0]).input_ids == [begin, *plain[0], end]
    pair = tokenizer(TEXTS[0], TEXTS[1])
    assert pair.input_ids == [begin, *plain[0], end, *plain[1], end]
    types = [0] * (len(plain[0]) + 2) + [1] * (len(plain[1]) + 1)
    assert pair.get("token_type_ids") == (types if model_type in ("bert", "roberta") else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", DECODERS)
def test_decoders_get_the_beginning_that_they_learn_with(train: Train, model_type: str, kind: str) -> None:
    tokenizer = train(model_type, kind)
    encoded = tokenizer(TEXTS[0])
    assert list(encoded) == ["input_ids", "attention_mask"]
    plain = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert encoded.input_ids == [tokenizer.bos_token_id, *plain[0]]
    assert tokenizer(TEXTS[0], TEXTS[1]).input_ids == [tokenizer.bos_token_id, *plain[0], *plain[1]]
    assert not {*plain[0]} & {*special_ids(tokenizer).values()}
    if kind in ("bpe", "char"):
        assert [tokenizer.decode(ids) for ids in plain] == TEXTS


@pytest.mark.parametrize("kind", KINDS)
def test_every_special_token_has_a_place_and_is_left_out_of_decoded_text(train: Train, kind: str) -> None:
    tokenizer = train("roberta", kind)
    assert special_ids(tokenizer) == {
        "pad_token_id": 0, "unk_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
        "sep_token_id": 3, "mask_token_id": 4,
    }  # fmt: skip
    encoded = tokenizer(["a", "the sea and"], padding=True)
    assert encoded.input_ids[0][-1] == 0 and encoded.attention_mask[0][-1] == 0
    assert tokenizer.decode(encoded.input_ids[1], skip_special_tokens=True) == "the sea and"
    assert tokenizer("the <|mask|>").input_ids[-2:] == [4, 3]
    assert ids(tokenizer) == len(tokenizer)


def test_offsets_of_bytes_are_those_of_words(train: Train) -> None:
    encoded = train("roberta", "bpe")(TEXTS[0], return_offsets_mapping=True)
    spans = [TEXTS[0][start:end] for start, end in encoded["offset_mapping"]]
    assert all(span == span.strip() for span in spans if span.strip()) and "".join(spans) == TEXTS[0].replace(" ", "")


def encodings(folder: Path, tokenizer: Any = None) -> list[Any]:
    """Return what the tokenizer in a folder makes of texts it has and has not seen."""
    from transformers import AutoTokenizer

    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "  unseen\n\n wörds <|mask|> and ☃", ""]
    encoded = [dict(tokenizer(text, "and the end")) for text in texts]
    return [encoded, [tokenizer.decode(tokenizer(text).input_ids) for text in texts], special_ids(tokenizer)]


def test_a_fresh_process_gets_the_same_from_what_was_exported(train: Train, tmp_path: Path) -> None:
    from transformers import AutoConfig

    wanted = {}
    for kind, model_type in zip(KINDS * 2, (*ENCODERS, *DECODERS), strict=True):
        folder = tmp_path / model_type
        tokenizer = train(model_type, kind, add_tokens=["the"])
        tokenizer.save_pretrained(folder)
        AutoConfig.for_model(model_type).save_pretrained(folder)  # AutoTokenizer looks at the kind of the model too
        wanted[str(folder)] = encodings(folder, tokenizer)
    code = (
        "import json, sys; from tests.train.test_tokenizer import encodings; "
        "print(json.dumps({folder: encodings(folder) for folder in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *wanted],
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


def test_added_tokens_are_tokens_and_come_after_the_others(train: Train, tiny_model: str) -> None:
    plain = train("gpt2", "bpe")
    tokenizer = train("gpt2", "bpe", add_tokens=["theme", "<user>"])
    added = [tokenizer.convert_tokens_to_ids(token) for token in ("theme", "<user>")]
    assert added == [len(plain), len(plain) + 1] and ids(tokenizer) == len(plain) + 2
    assert tokenizer.decode(tokenizer("a theme<user>").input_ids, skip_special_tokens=True) == "a theme<user>"
    assert {*added} <= {*tokenizer("a theme<user>").input_ids}
    settings = ModelConfig(path=tiny_model, add_tokens=("w1", "new"))
    extended, known = load_tokenizer(settings, [], Path(), None)
    assert (known, ids(extended)) == (65, 66), "what is a token already stays the one that it is"


def test_a_tokenizer_that_cannot_pad_or_is_not_there_is_refused(tiny_model: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no-pad")
    for path, message in (
        (tmp_path / "no-pad", "neither a padding nor an end token"),
        ("no/such", "needs the network"),
    ):
        with pytest.raises(UserError, match=f"model.tokenizer: .*{message}"):
            load_tokenizer(ModelConfig(path=tiny_model, tokenizer=str(path)), [], Path(), None)


def test_less_text_than_size_is_told_once(train: Train, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    settings = {"tokenizer": {"train": {"kind": "wordpiece", "size": 5_000}}}
    train("bert", **settings)
    assert "the training rows give 48 tokens, not 5000" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    train("bert", **settings)
    assert not caplog.text
