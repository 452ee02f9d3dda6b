"""Tokenizers from rows: lossless where promised, the same bytes for the same rows, and what cannot be is told."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from pydantic import ValidationError

from data.errors import UserError
from data.source import Rows
from data.tokenizer_training import SPECIALS, TokenizerTraining, train_tokenizer

KINDS = ("bpe", "wordpiece", "unigram", "char")
ROOT = Path(__file__).parents[2]
REVIEWS = ROOT / "data" / "samples" / "reviews" / "train.jsonl"
UNKNOWN = SPECIALS.index("<|unk|>")
ALPHABET = "abcÄß 漢字\n\t.,'0"
texts = some.text(ALPHABET, max_size=40).filter(lambda text: "<|" not in text)


def rows(**columns: list[Any]) -> list[Rows]:
    from datasets import Dataset

    return [Rows(Dataset.from_dict(columns), "rows.jsonl")]


def reviews() -> list[Rows]:
    return rows(text=[json.loads(line)["text"] for line in REVIEWS.read_text(encoding="utf-8").splitlines()])


def made(kind: str, given_rows: list[Rows], cache: Path, size: int | None = None, **options: Any) -> Any:
    return train_tokenizer(TokenizerTraining(kind=kind, size=size, **options), given_rows, cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def small(cache: Path) -> dict[str, Any]:
    """A tokenizer of each kind that has seen every character of ALPHABET."""
    given_rows = rows(text=[ALPHABET, "abc abc bca\n", "Äßa0 Äßcab 漢字 漢字."])
    return {kind: made(kind, given_rows, cache) for kind in KINDS}


@given(some.text(max_size=60).filter(lambda text: "<|" not in text))
def test_bytes_come_back_whatever_the_text(small: dict[str, Any], text: str) -> None:
    assert small["bpe"].decode(small["bpe"].encode(text).ids) == text
    assert UNKNOWN not in small["bpe"].encode(text).ids


@given(texts)
def test_characters_come_back_one_for_one(small: dict[str, Any], text: str) -> None:
    encoded = small["char"].encode(text)
    assert encoded.tokens == list(text) and small["char"].decode(encoded.ids) == text


@given(some.text("abc漢字 \n.,'", max_size=40))
def test_wordpiece_and_unigram_lose_spaces_at_most(small: dict[str, Any], text: str) -> None:
    for kind in ("wordpiece", "unigram"):
        ids = small[kind].encode(text).ids
        assert UNKNOWN not in ids
        assert "".join(small[kind].decode(ids).split()) == "".join(text.split())


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "char"])
def test_a_character_never_seen_is_unknown(small: dict[str, Any], kind: str) -> None:
    assert UNKNOWN in small[kind].encode("ab☃ab").ids


def test_the_special_tokens_come_first_and_are_found_in_text(small: dict[str, Any]) -> None:
    for tokenizer in small.values():
        assert [tokenizer.token_to_id(token) for token in SPECIALS] == [0, 1, 2, 3, 4]
        assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    for kind in ("bpe", "unigram"):  # the space before the mask is part of it: none stands before it in training
        assert small[kind].encode("漢 <|mask|>").tokens[-1] == " <|mask|>"


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_reached(kind: str, cache: Path) -> None:
    tokenizer = made(kind, reviews(), cache, None if kind == "char" else 700)
    assert tokenizer.get_vocab_size() == (79 if kind == "char" else 700)


@pytest.mark.parametrize("kind", KINDS)
def test_lower_case_is_all_there_is(kind: str, cache: Path) -> None:
    tokenizer = made(kind, rows(text=["ABC abc Äß"]), cache, lowercase=True)
    words = [token for token in tokenizer.get_vocab() if token not in SPECIALS]
    assert kind == "bpe" or [token for token in words if token != token.lower()] == []
    assert tokenizer.encode("ABC Ä").ids == tokenizer.encode("abc ä").ids
    assert UNKNOWN not in tokenizer.encode("ABC Ä").ids


def digests(cache: Path) -> list[str]:
    """Return a digest of the tokenizer of each kind."""
    made_all = [made(kind, reviews(), cache, None if kind == "char" else 500) for kind in KINDS]
    return [hashlib.sha256(tokenizer.to_str().encode()).hexdigest() for tokenizer in made_all]


def test_other_processes_and_numbers_of_threads_make_the_same_bytes(tmp_path: Path) -> None:
    """The hash tables of `tokenizers` are seeded anew in each process; so are Python's."""
    code = "import pathlib, sys; from tests.data import test_tokenizer_training as t; print(*t.digests(pathlib.Path()))"
    here = digests(tmp_path / "here")
    for threads in ("1",):
        folder = tmp_path / threads
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code], text=True, capture_output=True, cwd=folder, timeout=120,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.stdout.split() == here, done.stderr


def test_the_cut_into_files_does_not_matter_and_rows_are_learned_from_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["abc abd", "abd xyz", "", "abc"]
    together, apart = rows(text=lines), [*rows(text=lines[:1]), *rows(text=lines[1:])]
    for kind in KINDS:
        assert made(kind, together, cache).to_str() == made(kind, apart, cache).to_str()
    monkeypatch.setattr("data.tokenizer_training._train", lambda *_: pytest.fail("made again"))
    assert made("bpe", together, cache).get_vocab_size() > 256


def test_text_is_the_column_and_else_all_texts_and_lists_of_texts(cache: Path) -> None:
    def letters(**options: Any) -> set[str]:
        return set(made("char", given_rows, cache, **options).get_vocab()) - set(SPECIALS)

    given_rows = rows(text=["ab"], other=["cd"], words=[["e", None, "fg"]], number=[7], __line=["zz"])
    assert letters() == set("ab")
    assert letters(column="other") == set("cd") and letters(column="words") == set("efg")
    named = train_tokenizer(TokenizerTraining(kind="char"), given_rows, cache, ["words", "number", "missing"])
    assert set(named.get_vocab()) - set(SPECIALS) == set("efg")
    given_rows = rows(first=["ab", None], words=[["e"], None], number=[7, 8], __line=["zz", "zz"])
    assert letters() == set("abe")


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({"kind": "bpe", "column": "txt"}, {"text": ["a"]}, "no column 'txt' of texts; .* did you mean 'text'"),
        ({"kind": "bpe"}, {"number": [1]}, "rows.jsonl has no column of texts"),
        ({"kind": "char"}, {"text": [""]}, "hold no text"),
        ({"kind": "wordpiece"}, {"text": [" "]}, "hold no text"),
        ({"kind": "unigram"}, {"text": [""]}, "hold no text"),
        ({"kind": "wordpiece", "size": 11}, {"text": ["abcd"]}, "size 11 is less than the 12 .*raise size"),
        ({"kind": "unigram", "size": 8}, {"text": ["abcd"]}, "5 different characters.*raise size"),
        ({"kind": "unigram", "size": 5}, {"text": ["abcd"]}, "size 5 leaves no place"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_is_kept(
    options: dict[str, Any], columns: dict[str, list[Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train_tokenizer(TokenizerTraining(**options), rows(**columns), tmp_path)
    assert "model.tokenizer.train" in str(caught.value)
    assert not list(tmp_path.rglob("*.tokenizer"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "char", "size": 100}, "size cannot take effect"),
        ({"kind": "bpe", "size": 260}, "at least 261"),
        ({"kind": "bpe", "size": 0}, "greater than or equal to 1"),
    ],
)
def test_sizes_that_cannot_be_are_found_before_any_row_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerTraining(**options)
