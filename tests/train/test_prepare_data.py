"""`python -m train --prepare-data`: what the run needs is there before it begins; what it would refuse is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_config
from train.__main__ import main

MakeConfig = Callable[..., dict[str, Any]]


def test_the_run_finds_everything_encoded(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.signals.install", lambda: None)
    config = make_config(updates=2, train=40, validation=9, precision="fp32", tracking__log_every=1)
    file = str(write_config(config, tmp_path / "run.yaml"))
    follows = make_config(updates=2, train=40, validation=9, model__path="${previous}", output=str(tmp_path / "next"))
    second = str(write_config(follows, tmp_path / "second.yaml"))
    assert main([file, second, "--prepare-data"]) == 0
    told = capsys.readouterr().out
    assert "run.yaml: prepared: train 40, validation 9 examples, 2 updates of 32" in told
    assert f"second.yaml: reads from {tmp_path / 'out'}, which is yet to be made" in told
    assert not (tmp_path / "out").exists(), "it writes caches only"
    assert main([file, "--unfinished"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"

    def encoded(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("data.encode._write", encoded)
    assert main([file]) == 0
    capsys.readouterr()
    assert main([file, "--unfinished"]) == 0
    assert capsys.readouterr().out == ""
    assert main([file, "--prepare-data"]) == 0
    assert "finished; its results are in" in capsys.readouterr().out


def test_what_the_run_would_refuse(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_config(make_config(updates=3), tmp_path / "run.yaml"))
    for change, message in (
        ("task.text=txt", "no column 'txt'"),
        ("optim.warmup=20", "optim.warmup: 20 is 20 updates"),
    ):
        assert main([file, "--prepare-data", change]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
