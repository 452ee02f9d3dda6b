from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest

from data.errors import UserError
from train import weights


def test_weights_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of the standard, FIPS 180
    assert weights.fingerprint(str(tmp_path)) == expected
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    assert weights.fingerprint(str(tmp_path)) == expected, "transformers takes the one file, too"
    (tmp_path / "model.safetensors").write_bytes(b"abcd")
    assert weights.fingerprint(str(tmp_path)) != expected


def test_a_model_is_known_by_all_its_numbers() -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    found = weights.fingerprint_of(model)
    assert weights.fingerprint_of(model.eval()) == found
    seen = {found}
    for name, tensor in model.state_dict().items():
        before = tensor.clone()
        tensor.add_(1)
        seen.add(weights.fingerprint_of(model))
        tensor.copy_(before)
        assert weights.fingerprint_of(model) == found, name
    assert len(seen) == 1 + len(model.state_dict()) == 8
    assert weights.fingerprint_of(model.bfloat16()) not in seen


def test_weights_in_parts(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        (tmp_path / f"model-0000{number}-of-00003.safetensors").write_bytes(b"part" * number)
    found = weights.fingerprint(str(tmp_path))
    command = "sha256sum model-*-of-*.safetensors | sha256sum"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == found
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"other")
    assert weights.fingerprint(str(tmp_path)) != found


def test_of_a_package() -> None:
    path = Path(__file__).parent.parent / "data" / "__init__.py"
    assert path.exists()
    assert weights.fingerprint("package:tests/data") is None, "no weights there"
    assert weights.fingerprint("package:no_such_package/model") is None


def test_of_the_hub_those_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    for commit, content in (("a" * 40, b"one"), ("b" * 40, b"two")):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "model.safetensors").write_bytes(content)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    found = {
        revision: weights.fingerprint("some/model", revision) for revision in (None, "main", "a" * 40, "b" * 40, "c")
    }
    assert (
        found[None]
        == found["main"]
        == found["a" * 40]
        == weights.digest(repository / "snapshots" / ("a" * 40) / "model.safetensors")
    )
    assert found["b" * 40] not in (None, found[None]) and found["c"] is None
    (repository / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    (repository / "snapshots" / ("a" * 40) / "model.safetensors.index.json").write_text("{}")
    (repository / "snapshots" / ("a" * 40) / "model-00001-of-00001.safetensors").write_bytes(b"one")
    assert weights.fingerprint("some/model") not in (None, found[None])


@pytest.mark.parametrize("path", [None, "", "some/model", "a/folder/that/is/gone", "/", "no name: of the Hub?"])
def test_none_here(path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert weights.fingerprint(path) is None


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = weights.sha256

    def counted(file: Path) -> str:
        read.append(file)
        return real(file)

    monkeypatch.setattr(weights, "sha256", counted)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"abc")
    assert weights.digest(file) == weights.fingerprint(str(tmp_path))
    assert len(read) == 1
    file.write_bytes(b"abcd")
    assert weights.digest(file) == weights.fingerprint(str(tmp_path))
    assert len(read) == 2


@pytest.mark.parametrize("then, now", [("one", "one"), ("one", None), ("", "one"), (None, "one"), (None, None)])
def test_what_has_not_changed(then: str | None, now: str | None, caplog: pytest.LogCaptureFixture) -> None:
    weights.check_same("path", then, now, Path("out"), anyway=False, speaks=True)
    assert caplog.messages == []


def test_what_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError) as caught:
        weights.check_same("base", "one", "two", Path("out"), anyway=False, speaks=True)
    assert "the weights of base are not those that the run in out started from" in str(caught.value)
    assert "their sha256 is two, then it was one" in str(caught.value) and "--resume-anyway" in str(caught.value)
    with caplog.at_level(logging.WARNING, "train"):
        weights.check_same("base", "one", "two", Path("out"), anyway=True, speaks=False)
        assert caplog.messages == []
        weights.check_same("base", "one", "two", Path("out"), anyway=True, speaks=True)
    assert len(caplog.messages) == 1 and "their sha256 is two, then it was one" in caplog.text
