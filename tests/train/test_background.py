"""Checkpoints that are written while training goes on: of the update that they name, and of no later one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import SHARD
from tests.worker import carry_out
from train import hardware, manifest, shards
from train.background import Background
from train.snapshot import Snapshot
from train.update import Learner

MakeConfig = Callable[..., dict[str, Any]]
PARTS = (f"model/{SHARD}", f"optimizer/{SHARD}")


def tensors_of(file: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """All that a file holds, to the last bit. (The order of its header's entries means nothing.)"""
    return {
        name: (each.dtype, each.shape, each.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, each in load_file(file).items()
    }


def written(output: Path, update: int) -> list[Any]:
    """What the checkpoint after `update` holds of model and optimizer."""
    return [tensors_of(output / "checkpoints" / f"update-{update:08d}" / part) for part in PARTS]


@pytest.fixture
def waiting(make_config: MakeConfig, tmp_path: Path) -> Path:
    """The output of a run that waited while its checkpoints were written."""
    config = make_config(
        updates=10, checkpoint__every=3, checkpoint__keep=9, data__validation=None, output=str(tmp_path / "waiting"),
        checkpoint__background=False,
    )  # fmt: skip
    assert carry_out(config) == 0
    return tmp_path / "waiting"


def test_training_goes_on_and_changes_nothing_of_it(
    waiting: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpoint is held up until two more updates are done, or the run is over, before its files are written."""
    reached, more = [0], threading.Condition()
    update, save = Learner.update, shards.save

    def counted(self: Learner, number: int, batch: Any) -> Any:
        report = update(self, number, batch)
        with more:
            reached[0] = number
            more.notify_all()
        return report

    def held_up(tensors: Any, folder: Path, **settings: Any) -> None:
        at = int(folder.parent.name.removeprefix(".update-").removesuffix(".writing"))
        with more:
            assert more.wait_for(lambda: reached[0] >= min(at + 2, 10), timeout=60), "training waits"
        save(tensors, folder, **settings)

    monkeypatch.setattr(Learner, "update", counted)
    monkeypatch.setattr(shards, "save", held_up)
    config = make_config(updates=10, checkpoint__every=3, checkpoint__keep=9, data__validation=None)
    assert carry_out(config) == 0
    for number in (3, 6, 9, 10):
        assert written(tmp_path / "out", number) == written(waiting, number)


def test_without_the_memory_for_a_copy_training_waits(
    waiting: Path,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: 1000)
    config = make_config(updates=10, checkpoint__every=3, checkpoint__keep=9, data__validation=None)
    with caplog.at_level(logging.WARNING, "train"):
        assert carry_out(config) == 0
    assert caplog.text.count("from here on training waits while a checkpoint is written") == 1
    assert written(tmp_path / "out", 9) == written(waiting, 9)


def test_a_copy_that_cannot_be_made_stops_nothing(
    waiting: Path,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As if memory ran out, or could not be pinned, in the second one."""
    stage, calls = Snapshot._stage, [0]

    def lacking(self: Snapshot, tensors: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.\nMore of it")
        return stage(self, tensors)

    monkeypatch.setattr(Snapshot, "_stage", lacking)
    config = make_config(updates=10, checkpoint__every=3, checkpoint__keep=9, data__validation=None)
    with caplog.at_level(logging.WARNING, "train"):
        assert carry_out(config) == 0
    assert caplog.text.count("training waits while a checkpoint is written: a copy of 0.0 GB could not be made") == 1
    assert calls == [2] and "checkpoint.background=false" in caplog.text
    assert [written(tmp_path / "out", number) == written(waiting, number) for number in (3, 6, 9, 10)] == [True] * 4


def test_copies_are_not_what_they_were_copied_from() -> None:
    """Nor do they take new memory each time."""
    snapshot, tensors = (
        Snapshot(torch.device("cpu")),
        {"model": {"weight": torch.ones(300), "part": torch.ones(9)[3:5]}},
    )
    first = snapshot.take(tensors)
    assert [first["model"][name].tolist() for name in ("weight", "part")] == [[1.0] * 300, [1.0, 1.0]]
    place = first["model"]["weight"].data_ptr()
    tensors["model"]["weight"].zero_()
    assert first["model"]["weight"].sum() == 300
    again = snapshot.take(tensors)
    assert again["model"]["weight"].sum() == 0 and again["model"]["weight"].data_ptr() == place


def test_steps_are_done_in_order_until_one_fails() -> None:
    background, done = Background(Accelerator(cpu=True)), []

    def fails() -> None:
        raise OSError(28, "No space left on device")

    assert not background.busy
    told: list[str] = []
    background.begin([lambda: (time.sleep(0.1), done.append(1))[0], lambda: done.append(2)], told.append)
    assert background.busy and background.end() == "" and not background.busy
    background.begin([lambda: done.append(3), fails, lambda: done.append(4)], told.append)
    background.leave()
    assert told == ["OSError: [Errno 28] No space left on device"], "told by the thread, before anybody waits for it"
    assert background.end() == told[0]
    assert done == [1, 2, 3]


def test_a_save_that_fails_makes_room_at_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not when the next one begins, or the run ends: the disk may be full, and others need it meanwhile."""
    update, seen = Learner.update, []
    writing = tmp_path / "out" / "checkpoints" / ".update-00000002.writing"

    def full(written: Path, final: Path) -> None:
        if final.name == "update-00000002":
            raise OSError(28, "No space left on device")
        publish(written, final)

    def looks(self: Learner, number: int, batch: Any) -> Any:
        if number == 4:  # the checkpoint of update 2 is at hand
            deadline = time.monotonic() + 30
            while "after update 2 could not be written" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(writing.exists())
        return update(self, number, batch)

    publish = manifest.publish
    monkeypatch.setattr(manifest, "publish", full)
    monkeypatch.setattr(Learner, "update", looks)
    with caplog.at_level(logging.WARNING, "train"):
        assert carry_out(make_config(updates=8, checkpoint__every=2, checkpoint__keep=9, data__validation=None)) == 0
    assert seen == [False] and caplog.text.count("could not be written") == 1
    assert sorted(path.name for path in writing.parent.iterdir()) == [f"update-0000000{each}" for each in (4, 6, 8)]


def test_processes_that_cannot_agree_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks off the thread, such as another process that has died, is raised where it is waited for."""
    background = Background(Accelerator(cpu=True))

    def dead() -> None:
        raise TimeoutError("another process has given no sign of life")

    monkeypatch.setattr(background._line, "wait", dead)
    background.begin([lambda: None], print)
    with pytest.raises(TimeoutError, match="no sign of life"):
        background.end()


def test_each_process_writes_a_part_of_what_all_hold() -> None:
    tensors = {f"weight{size}": torch.zeros(size) for size in (50, 1000, 3, 400, 600, 3, 7, 90)}
    parts = [shards.dealt(tensors, 3, process) for process in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(tensors)
    sizes = [sum(each.numel() for each in part.values()) for part in parts]
    assert max(sizes) == 1000, "the largest is a part by itself"


def test_files_are_those_that_torch_writes(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = {"weight": torch.randn(7, 3), "step": torch.tensor(3.0), "half": torch.ones(4, dtype=torch.bfloat16)}
    shards.save(tensors, tmp_path / "ours")
    save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(tmp_path / "torch"), save_distributed=True))
    files = [tmp_path / who / SHARD for who in ("ours", "torch")]
    assert tensors_of(files[0]) == tensors_of(files[1])
    about = []
    for file in files:
        with safe_open(file, "pt") as opened:
            about.append(opened.metadata())
    assert about[0] == about[1] and len(about[0]) == 3


@pytest.mark.parametrize(("limit", "left"), [("max", None), ("1000", 1000 - 700 + 200)])
def test_a_control_group_limits_what_is_free(limit: str, left: int | None, tmp_path: Path) -> None:
    assert hardware._left(tmp_path) is None
    for name, text in (
        ("memory.max", limit),
        ("memory.current", "700"),
        ("memory.stat", "anon 500\ninactive_file 200"),
    ):
        (tmp_path / name).write_text(f"{text}\n")
    assert hardware._left(tmp_path) == left
    older = tmp_path / "older"
    older.mkdir()
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "700"), ("stat", "rss 5\ntotal_inactive_file 50")):
        (older / f"memory.{name}").write_text(f"{text}\n")
    assert hardware._left(older) == 250
    assert 2**20 < hardware.free_memory() < 2**50


def test_nothing_is_left_over_when_a_run_fails(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint at hand becomes whole before the folder is given to others."""
    publish, update = manifest.publish, Learner.update

    def slow(writing: Path, final: Path) -> None:
        time.sleep(0.5)
        publish(writing, final)

    def fails(self: Learner, number: int, batch: Any) -> Any:
        if number == 3:
            raise RuntimeError("something else")
        return update(self, number, batch)

    monkeypatch.setattr(manifest, "publish", slow)
    monkeypatch.setattr(Learner, "update", fails)
    with pytest.raises(RuntimeError, match="something else"):
        carry_out(make_config(updates=4, checkpoint__every=2, data__validation=None))
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["update-00000002"]
