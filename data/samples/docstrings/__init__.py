"""The docstrings of Python's standard library, read from its sources: real English that every machine has."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path

from data.errors import UserError

SPLITS = ("train", "validation")

VALIDATION = 10  # one module in so many is to judge on
WORDS = 4  # shorter ones are mostly a repetition of the name

NOT_OURS = {
    "site-packages", "dist-packages",  # installed by whoever owns the machine
    "test", "tests", "idle_test",  # files made to be malformed among them
    "lib2to3", "distutils", "ensurepip", "idlelib", "turtledemo",  # not there in all versions and distributions
    "encodings", "pydoc_data",  # written by programs: a hundred times the same sentence
}  # fmt: skip

Defined = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def identity() -> str:
    """Return the version and the place of this Python: other ones have other docstrings."""
    return f"{sys.version} {sysconfig.get_path('stdlib')}"


def rows(split: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the docstrings of a split in the order of modules and lines, no text twice over both splits.

    `text` is the docstring without its indentation, `module` the first part of its module's name ("email").
    """
    for module, name, text in _all(sysconfig.get_path("stdlib")):
        if _split(module) == split:
            yield ".".join(filter(None, (module, name))), {"text": text, "module": module.partition(".")[0]}


def _split(module: str) -> str:
    """Return the side of a module: that of its name, so that it has the same one in every version of Python."""
    number = int.from_bytes(hashlib.blake2b(module.encode(), digest_size=8).digest(), "big")
    return "train" if number % VALIDATION else "validation"


@cache
def _all(library: str) -> list[tuple[str, str, str]]:
    """Return (module, name inside it, text) of every docstring to be used: 2 s, once for both splits; 2 MB."""
    found, seen = [], set()
    for module, file in sorted(_modules(Path(library))):
        for name, text in _documented(_tree(file), ""):
            words = tuple(re.findall(r"\w+", text.lower()))
            if len(text.split()) >= WORDS and words not in seen:
                seen.add(words)
                found.append((module, name, text))
    if not found:
        raise UserError(
            f"samples:docstrings: {library} holds no sources of the standard library, as where Python was installed "
            "without them (zipped or compiled); use another Python, or other data"
        )
    return found


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_OURS]  # installed packages may be 100,000 files
        for file in (Path(here, name) for name in names if name.endswith(".py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def _tree(file: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that later versions will refuse: not for us to mend
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"samples:docstrings: {file} cannot be read ({error}): is this Python damaged?") from error


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) of what is defined in `node`, in order. Expressions hold none and are passed over."""
    if isinstance(node, ast.Module | Defined):
        text = ast.get_docstring(node, clean=False) or ""
        yield name, "\n".join(line.rstrip() for line in cleandoc(text).splitlines()).strip()
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            inside = [child.name] if isinstance(child, Defined) else []
            yield from _documented(child, ".".join(filter(None, (name, *inside))))
