"""Encoding by several processes at once: one works, the others wait for it, and one may die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.data.conftest import FakeEncoder, build_tokenizer
from data.encode import encode_sources
from data.source import Source, open_rows

class Slow(FakeEncoder):
    def encode(self, rows, tokenizer, max_length):
        time.sleep(float(sys.argv[2]))
        return super().encode(rows, tokenizer, max_length)

folder = Path(sys.argv[1])
encoder = Slow()
rows = open_rows(Source(path=str(folder / "x.jsonl")), "train", skip_bad=False, cache=folder / "cache", token=None)
encoded = encode_sources([rows], encoder, build_tokenizer(), 16, skip_bad=False, cache=folder / "cache")
print(len(encoder.calls), encoded.fingerprint)
"""


def write(folder: Path) -> None:
    (folder / "x.jsonl").write_text((json.dumps({"text": "ab", "label": 1}) + "\n") * 3000)


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(PROGRAM)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(folder / "program.py"), str(folder), str(seconds), str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.whole_run
def test_a_killed_writer_frees_those_who_wait_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Of two processes the one that encodes is killed: the other encodes, and the file is whole."""
    write(tmp_path)
    first = start(tmp_path, 30)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("encoded/*.writing")) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = start(tmp_path, 0)
    time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert first.stdout is not None
    first.stdout.close()
    answer = second.communicate(timeout=60)[0]
    assert answer.split()[0] == "3"
    files = [file.suffix for file in (tmp_path / "cache" / "encoded").glob("*") if file.suffix != ".lock"]
    assert sorted(files) == [".arrow", ".json"]


@pytest.mark.whole_run
def test_processes_that_encode_at_once_share_one_file(tmp_path: Path) -> None:
    write(tmp_path)
    answers = [process.communicate(timeout=60)[0].split() for process in [start(tmp_path, 0.1) for _ in range(2)]]
    assert sorted(calls for calls, _ in answers) == ["0", "3"]
    assert len({fingerprint for _, fingerprint in answers}) == 1
