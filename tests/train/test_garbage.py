"""Python looks for garbage between updates only, and by itself again when training is over."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from data.errors import UserError
from tests.worker import carry_out
from train import garbage, update

MakeConfig = Callable[..., dict[str, Any]]


class Circle:
    """Garbage that only a collection frees."""

    alive = 0

    def __init__(self) -> None:
        self.self = self
        Circle.alive += 1

    def __del__(self) -> None:
        Circle.alive -= 1


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """For each collection, the update within which it began; minus its number, if after it and before the next.

    Each update leaves a `Circle`, and Python is told to look all the time.
    """
    found: list[int] = []
    now, real = [0], update.Learner.update

    def updated(self: update.Learner, number: int, batch: Any) -> update.Report:
        now[0] = number
        Circle()
        try:
            return real(self, number, batch)
        finally:
            now[0] = -number

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(now[0])

    monkeypatch.setattr(update.Learner, "update", updated)
    monkeypatch.setattr(garbage, "EVERY", 4)
    before = gc.get_threshold()
    gc.set_threshold(100, 1000, 1000)  # among the newest objects: among all it takes a second each time
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.set_threshold(*before)


def test_it_looks_between_updates_only(collected: list[int], make_config: MakeConfig) -> None:
    config = make_config(updates=14, evaluate__every=6)
    assert carry_out(config) == 0
    assert not [update for update in collected if update > 0]
    assert {-update for update in collected if update < 0} == {4, 6, 8, 12, 14}  # 6, 12 and 14: evaluations
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert Circle.alive == 0


def test_a_run_that_fails_gives_it_back(collected: list[int], make_config: MakeConfig) -> None:
    config = make_config(updates=14, data__validation=None, optim__max_nonfinite=3, tracking__log_every=100)
    with pytest.raises(UserError, match="stopped at update 11"):
        carry_out(config, poison=(9, 10, 11))
    assert not [update for update in collected if update > 0]
    assert {-update for update in collected if update < 0} >= {4, 8}
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_nothing_is_collected_unless_told() -> None:
    gc.collect()
    with garbage.only_when_told():
        for _ in range(3):
            Circle()
        assert Circle.alive == 3 and not gc.isenabled()
        with garbage.by_itself():
            assert gc.isenabled()
        assert Circle.alive == 0 and not gc.isenabled()
    gc.disable()
    try:
        with garbage.only_when_told():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
