"""Bits per byte: what a code that the model makes would need."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.errors import UserError
from train import metrics
from train.metrics import Choice


def test_against_probabilities_multiplied_out() -> None:
    """1,000 random sets of texts: the bits of a text are log2 of 1 / the product of its tokens' probabilities."""
    generator = np.random.default_rng(0)
    metric = metrics.load(Choice("bits_per_byte"))
    for _ in range(1_000):
        chances = [generator.uniform(0.1, 1, generator.integers(1, 20)) for _ in range(generator.integers(1, 9))]
        sizes = generator.integers(1, 50, len(chances))
        losses = np.array([-np.log(each).sum() for each in chances])
        bits = math.log2(1 / math.prod(math.prod(each) for each in chances))
        outputs = {"losses": losses, "targets": np.array([len(each) for each in chances]), "bytes": sizes}
        figures = metrics.compute([metric], outputs, "next_tokens")
        assert figures == {"bits_per_byte": pytest.approx(bits / sizes.sum(), rel=1e-9)}


def test_a_uniform_model_of_bytes_needs_eight_bits() -> None:
    outputs = {"losses": np.array([3 * math.log(256), 5 * math.log(256)]), "bytes": np.array([3, 5])}
    assert metrics.compute([metrics.load(Choice("bits_per_byte"))], outputs, "next_tokens")["bits_per_byte"] == 8


def test_no_bytes_and_direction() -> None:
    with pytest.raises(UserError, match="the texts hold no bytes"):
        outputs = {"losses": np.ones(1), "bytes": np.zeros(1)}
        metrics.compute([metrics.load(Choice("bits_per_byte"))], outputs, "next_tokens")
    assert not metrics.higher_is_better("validation/bits_per_byte")
