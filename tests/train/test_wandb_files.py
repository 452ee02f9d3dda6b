"""What is read of W&B's files, written here as its format says; files by W&B itself: test_tracking_wandb.py."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from train import wandb_files
from train.wandb_files import BLOCK, last_step, steps


def write(file: Path, recorded: Sequence[int], sizes: Sequence[int]) -> None:
    """Write records of these steps, each behind another kind of record, in a LevelDB log."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = bytearray(b":W&B\xe1\xbe\x00")
    for step, size in zip(recorded, sizes, strict=True):
        history, other = Record(), Record()
        history.history.item.add(nested_key=["train/loss"], value_json="0." + "1" * size)
        history.history.item.add(nested_key=["_step"], value_json=json.dumps(step))
        other.run.run_id = "abc"
        for record in (other, history):
            left, first = record.SerializeToString(), True
            while left or first:
                if (room := BLOCK - len(content) % BLOCK) < 7:
                    content += bytes(room)
                    continue
                part, left = left[: room - 7], left[room - 7 :]
                kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not left]
                content += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
                first = False
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "wandb"


def test_records_over_many_blocks(folder: Path) -> None:
    sizes = random.Random(0).choices([10, 500, BLOCK - 60, 3 * BLOCK], k=60)
    file = folder / "offline-run-20260101_000000-abc/run-abc.wandb"
    write(file, range(60), sizes)
    assert list(steps(file)) == list(range(60))
    found = [list(steps(file, begin)) for begin in range(0, file.stat().st_size, BLOCK)]
    for some in found:
        assert some == list(range(60))[60 - len(some) :]
    assert [] not in found[:-3] and sorted(map(len, found), reverse=True) == list(map(len, found))


def test_a_file_that_a_kill_has_torn(folder: Path) -> None:
    file = folder / "offline-run-20260101_000000-abc/run-abc.wandb"
    write(file, range(5), [10, 10, BLOCK, 10, 10])
    whole, lengths = file.read_bytes(), set()
    for end in random.Random(1).sample(range(7, len(whole)), 300):
        file.write_bytes(whole[:end])
        found = list(steps(file))
        assert found == list(range(len(found)))
        lengths.add(len(found))
    assert lengths >= {2, 4}
    for begin in range(7, len(whole), 97):  # as long as it was, with nothing in it from some byte on
        file.write_bytes(whole[:begin] + bytes(len(whole) - begin))
        found = list(steps(file))
        assert found == list(range(len(found))) and len(found) < 5
    for zeros in (1, 7, 100, 2 * BLOCK):  # room on the disk whose content was never written
        file.write_bytes(whole + bytes(zeros))
        assert list(steps(file)) == list(range(5))


def test_the_last_step_of_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = folder / "offline-run-20260105_000000-abc"
    write(newest / "run-abc.wandb", [], [])
    assert last_step(folder, "abc", newest) is None  # nothing to ask
    write(folder / "offline-run-20260104_000000-abc/run-abc.wandb", [], [])
    assert last_step(folder, "abc", newest) == -1  # its service was ended before it wrote any
    (folder / "offline-run-20260104_000000-abc/run-abc.wandb").write_bytes(b":W&B\xe1\xbe\x01 of a later version")
    assert last_step(folder, "abc", newest) is None
    (folder / "offline-run-20260104_000000-abc/run-abc.wandb").write_bytes(b"")
    assert last_step(folder, "abc", newest) == -1
    write(folder / "run-20260103_000000-abc/run-abc.wandb", [6, 7], [10, 10])
    write(folder / "offline-run-20260102_000000-abc/run-abc.wandb", [4, 5], [10, 10])
    write(folder / "offline-run-20260106_000000-abcd/run-abcd.wandb", [70], [10])
    assert last_step(folder, "abc", newest) == 7
    monkeypatch.setattr(wandb_files, "TAIL", BLOCK)
    write(folder / "offline-run-20260104_000000-abc/run-abc.wandb", [8, 9], [10, 10 * BLOCK])  # no whole one at the end
    assert last_step(folder, "abc", newest) == 9
