"""Made-up words that are one token each, their tokenizer, and rows of them of given lengths."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LABELS = ("good", "bad")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 5, "cls_token_id": 2, "sep_token_id": 3}
WORDS = tuple(
    "".join(letters) for letters in itertools.islice(itertools.product(string.ascii_lowercase, repeat=4), 20_000)
)
FRAME = 6
"""Tokens of a conversation of two turns that nobody says: what begins each, who speaks, what ends it."""


def known(size: int) -> tuple[str, ...]:
    """Return the words of a vocabulary of `size` tokens, most of them or 20,000."""
    return WORDS[: size - len(SPECIAL) - len(ROLES)]


def tokenizer(size: int, *, encoder: bool) -> Any:
    """Return a tokenizer of at most `size` tokens: with the template ChatML, or with [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from train.tasks._chatml import CHATML

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *ROLES, *known(size)))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    named: dict[str, Any] = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    if encoder:
        ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)  # type: ignore[assignment]
        named = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    found: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"], **named,
    )  # fmt: skip
    if not encoder:
        found.chat_template = CHATML
    return found


def plain(vocabulary: Iterable[str]) -> list[str]:
    """Return the whole words of MiniLM's vocabulary, the most frequent first."""
    return [word for word in itertools.islice(vocabulary, 1996, None) if word.isascii() and word.isalpha()]


def write(file: Path, task: str, lengths: NDArray[np.int64], words: Sequence[str]) -> None:
    """Write a row of each of these lengths, in tokens with all that a tokenizer or template adds."""
    generator = np.random.default_rng(1)
    row: Callable[[int], dict[str, Any]] = {
        "text_classification": lambda length: _text(length, words, generator),
        "causal_lm": lambda length: {"text": _say(length - 1, words, generator)},  # and what ends it
        "chat": lambda length: _conversation(length, words, generator),
    }[task]
    file.write_text("".join(json.dumps(row(int(length))) + "\n" for length in lengths), encoding="utf-8")


def _say(count: int, words: Sequence[str], generator: np.random.Generator) -> str:
    return " ".join(words[place] for place in generator.integers(len(words), size=max(1, count)))


def _text(length: int, words: Sequence[str], generator: np.random.Generator) -> dict[str, Any]:
    """A text whose words tell its label, in seven of ten."""
    label, half = int(generator.integers(2)), len(words) // 2
    count = max(1, length - 2)  # [CLS] and [SEP]
    favoured = generator.random(count) < 0.7
    places = generator.integers(half, size=count) + np.where(favoured == bool(label), 0, half)
    return {"text": " ".join(words[place] for place in places), "label": LABELS[label]}


def _conversation(length: int, words: Sequence[str], generator: np.random.Generator) -> dict[str, Any]:
    """A question and an answer: a tenth to half of what is said is the question."""
    said = max(2, length - FRAME)
    asked = min(said - 1, max(1, round(said * generator.uniform(0.1, 0.5))))
    turns = ("user", asked), ("assistant", said - asked)
    return {"messages": [{"role": role, "content": _say(count, words, generator)} for role, count in turns]}
