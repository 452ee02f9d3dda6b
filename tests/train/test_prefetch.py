"""Batches that are made ahead, with a stand-in for a GPU's streams: the same batches, whatever happens meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.batches import Batch, Part
from train import prefetch

chosen = list[tuple[Any, int]]()
"""The devices that were chosen, and by which thread."""


@pytest.fixture(autouse=True)
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen.clear()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((device, threading.get_ident())))
    stream = SimpleNamespace(record_event=lambda: "there", device=torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(prefetch, "_take_over", lambda batch, copied, device: None)
    monkeypatch.setattr(prefetch, "sent", lambda tensors, device: {name: each + 1 for name, each in tensors.items()})


def batch(number: int) -> Batch:
    """One that says of itself whether it was cut again, and knows where it comes from."""
    one = np.ones(1, dtype=np.int64)
    parts = [Part({"x": torch.tensor([number])}, one, False, one)]
    made = Batch(parts, one * number, 1, 1, 1, one, lambda: again, lambda: {"rows": [number]})
    again = replace(made, computed=99)
    return made


def ahead(numbered: Iterator[tuple[int, Batch]], smaller: list[Any]) -> Iterator[tuple[int, Batch]]:
    return prefetch._ahead(SimpleNamespace(smaller=smaller), numbered, "gpu")  # type: ignore[arg-type]


def test_in_order_and_sent() -> None:
    found = list(ahead(((number, batch(number)) for number in range(1, 9)), []))
    assert [number for number, _ in found] == [*range(1, 9)]
    assert [int(each.parts[0].tensors["x"]) for _, each in found] == [*range(2, 10)]
    [(device, thread)] = chosen
    assert torch.cuda._utils._get_device_index(device) == 1, "with a number: alone in a run the device has none"
    assert thread != threading.get_ident(), "a thread begins with the first GPU"


def test_a_halving_while_a_batch_is_made() -> None:
    """It is cut again, also if it was planned before and handed over after; and it still knows where it comes from."""
    smaller, planned, halved = list[Any](), threading.Event(), threading.Event()

    def numbered() -> Iterator[tuple[int, Batch]]:
        yield 1, batch(1)
        made = batch(2)
        planned.set()
        halved.wait()
        yield 2, made

    running = ahead(numbered(), smaller)
    assert next(running)[1].computed == 1
    planned.wait()
    smaller.append((1, "half"))
    halved.set()
    number, second = next(running)
    assert (number, second.computed, second.places()) == (2, 99, {"rows": [2]})


def test_no_memory_for_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is given the batch as it is: it knows what to do where memory lacks."""

    def lacking(tensors: Any, device: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory (as if)")

    monkeypatch.setattr(prefetch, "sent", lacking)
    [(_, found)] = ahead(iter([(1, batch(1))]), [])
    assert int(found.parts[0].tensors["x"]) == 1


def test_of_a_stream_each_is_sent_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thread that asks, since a stream's processes talk to each other; and not for a CPU."""
    asked, here = list[tuple[int, int]](), threading.get_ident()

    def numbered() -> Iterator[tuple[int, Batch]]:
        for number in range(1, 4):
            asked.append((number, threading.get_ident()))
            yield number, batch(number)

    stream: Any = SimpleNamespace()  # no `Batches`
    coming = prefetch.prefetch(stream, numbered(), torch.device("cuda"))
    for number in range(1, 4):
        found, made = next(coming)
        assert (found, int(made.parts[0].tensors["x"]), made.places()) == (number, number + 1, {"rows": [number]})
        assert asked[-1] == (number, here)
    assert next(coming, None) is None
    _, made = next(prefetch.prefetch(stream, numbered(), torch.device("cpu")))
    assert int(made.parts[0].tensors["x"]) == 1

    def lacking(tensors: Any, device: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory (as if)")

    monkeypatch.setattr(prefetch, "sent", lacking)
    _, made = next(prefetch.prefetch(stream, numbered(), torch.device("cuda")))
    assert int(made.parts[0].tensors["x"]) == 1


def test_what_goes_wrong_and_who_leaves() -> None:
    def numbered() -> Iterator[tuple[int, Batch]]:
        yield 1, batch(1)
        raise ValueError("a row")

    running = ahead(numbered(), [])
    next(running)
    with pytest.raises(ValueError, match="a row"):
        next(running)
    before = threading.active_count()
    running = ahead(((number, batch(number)) for number in range(1_000_000)), [])
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
