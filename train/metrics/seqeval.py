"""Precision, recall and F1 of entities, and accuracy over words, as conlleval and the package seqeval compute them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from pydantic import Field, model_validator

from data.errors import UserError
from data.section import Section
from train.schemes import ALL_LETTERS, LETTERS, Scheme, detect, entities, fits

KINDS: Final = ("entities",)
TAKES: Final = "tag_predictions"
AGAINST: Final = "tag_references"
HIGHER_IS_BETTER: Final = True
FIGURES: Final = ("precision", "recall", "f1", "accuracy")
FIGURES_WITH: Final = {"per_type": ("f1_*",)}

Tags = Sequence[Sequence[str | None]]


class Options(Section):
    """How tags become entities, and what is reported of them."""

    strict: bool = Field(
        False, description="Only what is spelt by the scheme's rules is an entity: seqeval's strict mode."
    )
    scheme: Scheme | None = Field(None, description="For strict. Left out, the task tells it, or else the references.")
    per_type: bool = Field(False, description="Also f1_TYPE for every type of entity.")

    @model_validator(mode="after")
    def _has_effect(self) -> Options:
        if self.scheme and not self.strict:
            raise ValueError("scheme has no effect without strict: any scheme is read then")
        return self


def columns() -> Any:
    """Tags of the words of a row, on both sides."""
    from datasets import List, Value

    return List(Value("string")), List(Value("string"))


def compute(predictions: Tags, references: Tags, options: Options) -> dict[str, float]:
    """Return {"precision", "recall", "f1", "accuracy": 0.0 to 1.0} of the tags of each row's words.

    An entity is right if its type, first and last word are. A word that got no tag (None) is in no entity and wrong.
    A ratio of nothing is 0.
    """
    pairs = list(zip(predictions, references, strict=True))
    if uneven := [row for row, (given, truth) in enumerate(pairs) if len(given) != len(truth)]:
        raise UserError(f"metric 'seqeval': row {uneven[0]} has not as many predicted tags as words")
    names = {tag for tag in chain.from_iterable([*predictions, *references]) if tag is not None and tag != "O"}
    if names and not fits(names, ALL_LETTERS):
        raise UserError(f"metric 'seqeval' takes tags such as O, B-PER and I-PER; got {', '.join(sorted(names)[:20])}")
    scheme = None
    if options.strict and names:
        scheme = options.scheme or detect(names, references)
        if scheme is None or not fits(names, LETTERS[scheme]):
            raise UserError(
                f"metric 'seqeval': strict needs tags of one scheme ({scheme or ', '.join(LETTERS)}); "
                f"got {', '.join(sorted(names)[:20])}"
            )
    hits, predicted, actual = Counter[str](), Counter[str](), Counter[str]()
    for given, truth in pairs:
        found, there = set(entities(given, scheme)), set(entities(truth, scheme))
        hits.update(entity[0] for entity in found & there)
        predicted.update(entity[0] for entity in found)
        actual.update(entity[0] for entity in there)
    words = sum(len(truth) for truth in references)
    right = sum(one == other for given, truth in pairs for one, other in zip(given, truth, strict=True))
    figures = {
        "precision": _divide(hits.total(), predicted.total()),
        "recall": _divide(hits.total(), actual.total()),
        "f1": _divide(2 * hits.total(), predicted.total() + actual.total()),
        "accuracy": _divide(right, words),
    }
    for kind in sorted({*predicted, *actual}) if options.per_type else ():
        figures[f"f1_{kind}"] = _divide(2 * hits[kind], predicted[kind] + actual[kind])
    return figures


def _divide(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
