"""The docstrings of the standard library, as data: built once, the same each time, no module in both splits."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import samples
from data.errors import UserError
from data.samples import docstrings
from data.source import Rows
from data.text_files import LINE

Read = Callable[..., list[Rows]]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that writes a file of a standard library made here, which is read in place of the real one."""
    folder = tmp_path / "lib"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))

    def write(name: str, content: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(content), encoding="utf-8")

    return write


def places(split: str = "train") -> list[str]:
    return [place for place, _ in docstrings.rows(split)]


def module_of(place: str) -> str:
    """The longest beginning of a place that is a module's file."""
    parts = place.split(".")
    folder = Path(sysconfig.get_path("stdlib"))
    for end in range(len(parts), 0, -1):
        path = folder.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:end])
    raise AssertionError(place)


@pytest.mark.whole_run
def test_every_machine_has_them(read: Read) -> None:
    found = {role: read("samples:docstrings", role=role)[0] for role in ("train", "validation")}
    assert found["train"].name == "samples:docstrings"
    sizes = {role: len(rows.dataset) for role, rows in found.items()}
    assert sizes["train"] > 4000 and 0.05 < sizes["validation"] / sizes["train"] < 0.25
    for rows in found.values():
        assert rows.dataset.column_names == ["text", "module", LINE]
        for row in rows.dataset:
            assert len(row["text"].split()) >= 4
            assert row["text"] == "\n".join(line.rstrip() for line in row["text"].strip().split("\n"))
            assert row["module"] == row[LINE].partition(".")[0]
    assert sum(len(text) for text in found["train"].dataset["text"]) > 1_000_000


def test_they_are_what_python_calls_docstrings() -> None:
    found = {place: row["text"] for split in docstrings.SPLITS for place, row in docstrings.rows(split)}
    for name in ("json.JSONDecoder", "textwrap.dedent", "heapq", "argparse.ArgumentParser.parse_known_args", "random"):
        value: Any = json if name.startswith("json.") else __import__(name.partition(".")[0])
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        place = "json.decoder.JSONDecoder" if name == "json.JSONDecoder" else name
        expected = inspect.getdoc(value)
        assert expected is None or len(expected.split()) < 4 or found[place].split() == expected.split()
    assert "heapq" in found and "textwrap.dedent" in found


def test_no_module_and_no_text_is_in_both() -> None:
    rows = {split: list(docstrings.rows(split)) for split in docstrings.SPLITS}
    modules = {split: {module_of(place) for place, _ in found} for split, found in rows.items()}
    assert len(modules["validation"]) >= 20
    assert not modules["train"] & modules["validation"]
    texts = [" ".join(re.findall(r"\w+", row["text"].lower())) for found in rows.values() for _, row in found]
    assert len(texts) == len(set(texts))
    tops = [{row["module"] for _, row in found} for found in rows.values()]
    assert len(tops[0] & tops[1]) >= 8, "too few modules to be told apart in both"


@pytest.mark.whole_run
def test_the_same_in_any_process_and_built_once(read: Read, tmp_path: Path) -> None:
    first = read("samples:docstrings")[0].dataset
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert len(files) == 1 and next(iter(files)).name.startswith("docstrings-train-")
    program = (
        "import hashlib, sys; from data.samples import docstrings\n"
        "print(hashlib.sha256(repr(list(docstrings.rows('train'))).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True,
            check=True, cwd=Path(__file__).parents[2],
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1
    again = read("samples:docstrings")[0].dataset
    assert again._fingerprint == first._fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == files


def test_a_module_keeps_its_side_in_every_version() -> None:
    """Pinned: to change the rule is to change the data of everybody's runs."""
    sides = {module: docstrings._split(module) for module in ("ast", "turtle", "email.message", "re")}
    assert sides == {"ast": "validation", "turtle": "validation", "email.message": "train", "re": "train"}


def test_another_python_is_another_data_set(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read("samples:docstrings", role="validation")
    monkeypatch.setattr(sys, "version", "3.99.0")
    read("samples:docstrings", role="validation")
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2


def test_names_places_and_order(library: Callable[[str, str], None]) -> None:
    library(
        "b/__init__.py",
        '''
        """A package with a docstring."""
        if True:
            class Outer:
                """
                A class, in a branch.

                    Indented more.   \n
                """
                def method(self):
                    """Three words only."""
                    def inner():
                        """This is defined inside of a function."""
                async def waits(self):
                    r"""Waits for some thing \\d."""
        x = lambda: """Not a docstring at all."""
        ''',
    )
    library("b/c.py", '"""a PACKAGE, with: a docstring!"""\ndef f():\n    """Only here, but four words."""\n')
    library("a.py", 'def f():\n    """First in the order."""\n')
    found = [*docstrings.rows("train"), *docstrings.rows("validation")]
    inside = ["b", "b.Outer", "b.Outer.method.inner", "b.Outer.waits"]
    assert sorted(place for place, _ in found) == ["a.f", *inside, "b.c.f"]
    texts = {place: row["text"] for place, row in found}
    assert texts["b.Outer"] == "A class, in a branch.\n\n    Indented more."
    assert texts["b.Outer.waits"] == r"Waits for some thing \d."
    assert {row["module"] for _, row in found} == {"a", "b"}


@pytest.mark.parametrize("folder", ["site-packages/x", "test", "unittest/test", "lib2to3/tests/data", "encodings"])
def test_what_is_not_ours_is_not_even_read(folder: str, library: Callable[[str, str], None]) -> None:
    library(f"{folder}/broken.py", "def (:")
    library("a.py", '"""The only one of them."""')
    assert [*places("train"), *places("validation")] == ["a"]


def test_a_damaged_library_is_named(library: Callable[[str, str], None], read: Read, tmp_path: Path) -> None:
    library("good.py", '"""The only one of them."""')
    library("bad.py", "def (:")
    with pytest.raises(UserError, match=r"bad\.py cannot be read \(invalid syntax.*is this Python damaged"):
        read("samples:docstrings")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_python_without_sources_is_told(library: Callable[[str, str], None], read: Read) -> None:
    with pytest.raises(UserError, match="holds no sources of the standard library"):
        read("samples:docstrings")


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("samples:docstring", {}, "there is no 'samples:docstring'; there is samples:docstrings; did you mean"),
        ("samples:", {}, "there is no 'samples:'"),
        ("samples:docstrings/train.jsonl", {}, "there is no 'samples:docstrings/train.jsonl'"),
        ("samples:docstrings", {"role": "test"}, "no split 'test'; it has train, validation. Choose one with"),
        ("samples:docstrings", {"split": "dev"}, r"no split 'dev'; .*data\.train\.split"),
        ("samples:docstrings", {"name": "x"}, "data.train: name cannot take effect"),
        ("samples:docstrings", {"revision": "x"}, "data.train: revision cannot take effect"),
    ],
)
def test_what_cannot_be(path: str, settings: dict[str, Any], message: str, read: Read) -> None:
    with pytest.raises(UserError, match=message):
        read(path, **settings)


def test_a_split_may_be_chosen(read: Read) -> None:
    assert len(read("samples:docstrings", role="test", split="validation")[0].dataset) == len(places("validation"))


def test_every_builder_keeps_the_contract() -> None:
    assert samples.names() == ["docstrings"]
    for name in samples.names():
        source = Path(samples.__path__[0], name, "__init__.py").read_text(encoding="utf-8")
        defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert {"identity", "rows"} <= defined
        assert Path(samples.__path__[0], name, "README.md").is_file()
