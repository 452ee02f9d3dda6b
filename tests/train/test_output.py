from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from train import files, output
from train.config import RunConfig, validate


def settings(folder: Path, **changes: Any) -> RunConfig:
    content = {
        "output": str(folder),
        "epochs": 1,
        "task": "text_classification",
        "data": {"train": "train.jsonl"},
        "model": {"path": "some/model"},
        "hub_token": "hf_CANARY",
    }
    return validate({**content, **changes}, "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def test_a_new_folder_is_claimed_without_being_made(folder: Path) -> None:
    assert output.claim(settings(folder), resume_anyway=False) is False
    assert not folder.parent.exists()


def test_a_run_goes_on_until_it_is_done(folder: Path) -> None:
    config = settings(folder)
    output.begin(config)
    assert output.claim(config, resume_anyway=False) is False
    files.write(folder / output.DONE, "")
    assert output.claim(config, resume_anyway=False) is True
    assert output.claim(settings(folder, micro_batch_size=3), resume_anyway=False) is True, "cannot change the run"


def test_another_run_is_refused_naming_the_keys(folder: Path) -> None:
    output.begin(settings(folder))
    files.write(folder / output.DONE, "")
    other = settings(folder, optim={"lr": 1e-3}, seed=7)
    with pytest.raises(UserError) as caught:
        output.claim(other, resume_anyway=False)
    for part in (str(folder), "optim.lr: 5e-05 → 0.001", "seed: 0 → 7", "--resume-anyway"):
        assert part in str(caught.value)
    assert output.claim(other, resume_anyway=True) is False, "what is done by another config is not done by this one"
    output.begin(other)
    assert not (folder / output.DONE).exists()
    assert output.claim(other, resume_anyway=False) is False


def test_a_folder_of_something_else_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / ".hidden").touch()
    assert output.claim(settings(folder), resume_anyway=False) is False
    (folder / "thesis.doc").touch()
    with pytest.raises(UserError, match="holds something that is not a run"):
        output.claim(settings(folder), resume_anyway=True)


def test_a_file_where_the_folder_should_be(folder: Path) -> None:
    folder.parent.mkdir()
    folder.touch()
    with pytest.raises(UserError, match="is a file"):
        output.claim(settings(folder), resume_anyway=False)
    with pytest.raises(UserError, match="cannot be written"):
        output.claim(settings(folder / "below"), resume_anyway=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        output.claim(settings(tmp_path / "out"), resume_anyway=False)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("text", ["", "- a\n", "seed: {\n", "sede: 3\n"])
def test_a_run_whose_config_is_damaged(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="what it was cannot be read"):
        output.claim(settings(folder), resume_anyway=False)


def test_the_token_is_not_written(folder: Path) -> None:
    output.begin(settings(folder))
    text = (folder / "config.yaml").read_text()
    assert "CANARY" not in text and "hub_token" not in text
    assert "text_classification" in text


def test_files_are_written_whole_or_not_at_all(folder: Path) -> None:
    file = folder / "deep" / "lines.jsonl"
    files.write_json_lines(file, [{"a": "ä"}, {"a": 2}])
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [{"a": "ä"}, {"a": 2}]
    with pytest.raises(ZeroDivisionError):
        files.write_json_lines(file, ({"a": 1 // number} for number in (1, 0)))
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2
    files.write_json(folder / "one.json", {"a": 1.5})
    assert json.loads((folder / "one.json").read_text()) == {"a": 1.5}
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["lines.jsonl", "one.json"]
