"""Addresses of files that installed packages carry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data import package
from data.errors import UserError


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that must never be imported, and carries data."""
    folder = tmp_path / "site" / "carrier_of_rows"
    (folder / "rows" / "a").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "rows" / "a" / "train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_other_addresses_come_back_unchanged() -> None:
    for address in ("imdb", "org/name", "/tmp/x.csv", "rows/*.csv", ""):
        assert package.resolve(address) == address


def test_a_file_is_located_without_importing_its_package(carrier: Path) -> None:
    assert package.resolve("package:carrier_of_rows/rows/a/train.jsonl") == str(carrier / "rows/a/train.jsonl")
    assert package.resolve("package:carrier_of_rows/rows") == str(carrier / "rows")
    assert "carrier_of_rows" not in sys.modules


@pytest.mark.parametrize("pattern", ["rows/a/*.jsonl", "rows/*/train.jsonl", "**/*.jsonl"])
def test_patterns_stay_patterns(carrier: Path, pattern: str) -> None:
    assert package.resolve(f"package:carrier_of_rows/{pattern}") == str(carrier / pattern)


@pytest.mark.parametrize("address", ["package:no_such_package_here/x", "package:no-name/x", "package:/x", "package:"])
def test_a_missing_package_is_named(address: str) -> None:
    with pytest.raises(UserError, match=r"is installed here; install it with pip"):
        package.resolve(address)


def test_a_module_that_is_no_package_carries_nothing() -> None:
    with pytest.raises(UserError, match=r"no package 'this'"):
        package.resolve("package:this/x")


@pytest.mark.parametrize("inside", ["rows/valid.jsonl", "rows/*/*.csv"])
def test_a_missing_file_in_a_package_is_named(carrier: Path, inside: str) -> None:
    with pytest.raises(UserError, match=r"is installed, but .* does not exist"):
        package.resolve(f"package:carrier_of_rows/{inside}")
