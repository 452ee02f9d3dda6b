"""A small tokenizer and an encoder over it, as `data` sees a task; no model, no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data.encode import encode_sources
from data.encoded import Encoded
from data.source import Rows, Source, open_rows

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass
class FakeEncoder:
    """Texts → tokens, labels → numbers; counts its calls. A text "bad" cannot be used; "boom" breaks the program."""

    columns: tuple[str, ...] = ("text", "label")
    identity: str = "fake"
    calls: list[int] = field(default_factory=list)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        return "'text' is bad" if row["text"] in ("bad", None) else None

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        self.calls.append(len(rows["text"]))
        if "boom" in rows["text"]:
            raise RuntimeError("boom")
        tokens = tokenizer(rows["text"], truncation=True, max_length=max_length)["input_ids"]
        labels = [int(label) for label in rows["label"]]
        return {
            "input_ids": tokens,
            "label": labels,
            "length": [len(ids) for ids in tokens],
            "targets": [1] * len(labels),
        }


def build_tokenizer(letters: str = LETTERS, **settings: Any) -> Any:
    """Return a WordPiece tokenizer that knows letters, at the beginning and inside of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIALS, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **settings)


@pytest.fixture
def new_tokenizer() -> Callable[..., Any]:
    """The function that builds a tokenizer."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One tokenizer for all tests that do not change it."""
    return build_tokenizer()


@pytest.fixture
def encoder() -> FakeEncoder:
    """An encoder that nobody has called."""
    return FakeEncoder()


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Rows]]:
    """Open a source given by its path."""

    def read(path: Path | str, *, role: str = "train", skip_bad: bool = False, **settings: Any) -> list[Rows]:
        source = Source(path=str(path), **settings)
        return open_rows(source, role, skip_bad=skip_bad, cache=tmp_path / "cache", token=None)

    return read


@pytest.fixture
def encode(tmp_path: Path, encoder: FakeEncoder, tokenizer: Any) -> Callable[..., Encoded]:
    """Encode sources, given as lists of `Rows`."""

    def encode(*sources: list[Rows], skip_bad: bool = False, max_length: int = 16, **changes: Any) -> Encoded:
        chosen, cache = changes.get("encoder", encoder), changes.get("cache", tmp_path / "cache")
        words = changes.get("tokenizer", tokenizer)
        return encode_sources(sources, chosen, words, max_length, skip_bad=skip_bad, cache=cache)

    return encode
