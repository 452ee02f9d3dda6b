"""The simple baseline: TF-IDF and logistic regression. `python -m benchmarks.tfidf TRAIN VALIDATION [TEXT LABEL]`.

TRAIN and VALIDATION are sources as in a config. Prints the accuracy of four settings; the best of them, chosen on the
validation rows themselves, is the line that a fine-tuned model is held against.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from data.source import Source, named, open_rows


def columns(path: str, text: str, label: str, cache: Path) -> tuple[list[str], list[str]]:
    """Return the texts and labels of a source."""
    rows = open_rows(Source(path=path), "train", skip_bad=False, cache=cache, token=None)
    parts = [named(part.dataset.select_columns([text, label])[:], part.dataset.features) for part in rows]
    return [value for part in parts for value in part[text]], [str(value) for part in parts for value in part[label]]


def main(train: str, validation: str, text: str = "text", label: str = "label") -> float:
    """Print each setting's accuracy; return the best."""
    with tempfile.TemporaryDirectory() as cache:
        texts, labels = columns(train, text, label, Path(cache))
        unseen, expected = columns(validation, text, label, Path(cache))
    best = 0.0
    for longest in (1, 2):
        for strength in (1.0, 10.0):
            model = make_pipeline(
                TfidfVectorizer(ngram_range=(1, longest), sublinear_tf=True),
                LogisticRegression(C=strength, max_iter=2000),
            )
            accuracy = float(model.fit(texts, labels).score(unseen, expected))
            print(f"n-grams up to {longest}, C {strength:g}: accuracy {accuracy:.4f}")
            best = max(best, accuracy)
    print(f"best {best:.4f}")
    return best


if __name__ == "__main__":
    main(*sys.argv[1:])
