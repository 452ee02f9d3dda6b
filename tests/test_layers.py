"""The shape of the source: its sizes, and that imports point down. Read with `ast`; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import those of lower layers. Plugins (modules of tasks/ and metrics/ without a line here) have that of
# their package. Add new modules where they belong.
LAYERS: dict[str, float] = {
    "data.errors": -6,
    "data.section": -6,
    "data.order": -5,
    "data.windows": -4.5,
    "data.plan": -5,
    "data.collate": -5,
    "data.packing": -5,
    "data.cache": -5,
    "data.package": -5,
    "data.conll": -5,
    "data.squad": -5,
    "data.text_files": -4,
    "data.samples": -3.5,
    "data.source": -3,
    "data.unigram": -5,
    "data.tokenizer_training": -2,
    "data.tables": -5,
    "data.advice": -6,
    "data.mapped": -5,
    "data.encoded": -4,
    "data.encode": -2,
    "data.shard_files": -2,
    "data.shards": -1.9,
    "data.find_shards": -1.5,
    "data.stream": -1.5,
    "data.first_rows": -1.25,
    "data.reader": -3,
    "data.batches": -1,
    "data.pulse": -6,
    "data.stream_batches": -0.5,
    "train.signals": -0.5,
    "train.watch": -0.5,
    "train.logs": 0.25,
    "train.together": -0.25,
    "train.plugins": 0,
    "train.manifest": 0,
    "train.durations": 0,
    "train.garbage": 0,
    "train.compilation": 0.25,
    "train.hardware": 0,
    "train.layers": 0,
    "train.frozen": 0.25,
    "train.recomputation": 0.5,
    "train.dropout": 0,
    "train.dropping_attention": 0.1,
    "train.row_attention": 0.2,
    "train.layout": 0.22,
    "train.padding_free": 0.25,
    "train.documents": 0,
    "train.prefetch": 2,
    "train.varlen": -0.1,
    "train.chunked_loss": 0,
    "train.output_layer": 0.1,
    "train.tasks._losses": 0.5,
    "train.tasks._proof": 0.75,
    "train.tasks._packed": 0.9,
    "train.last_layer": 0.4,
    "train.tracking_feed": 0,
    "train.gradients": 0,
    "train.trial": 0,
    "train.wandb_files": 0,
    "train.overrides": 0,
    "train.concat_pooling": 0,
    "train.files": -0.1,
    "train.schemes": 0,
    "train.weights": 0,
    "train.limits": 0,
    "train.launches": 0,
    "train.network": -0.5,
    "train.prepare_data": 6.5,
    "train.file_systems": 5.5,
    "train.accelerate_file": 0,
    "train.submit": 8,
    "train.grid": 8,
    "train.scratch": 0,
    "train.heads": 0,
    "train.notes": 0.25,
    "train.adapter_config": 0.25,
    "train.adapter": 0.5,
    "train.adapter_files": 0.75,
    "train.quantization": 0.75,
    "train.model_config": 0.25,
    "train.tokenizer": 0.5,
    "train.answers": 0,
    "train.tasks": 1,
    "train.metrics": 1,
    "train.model": 1,
    "train.few_bytes": 0.5,
    "train.halves": 0.05,
    "train.adamw": 0.5,
    "train.optim": 1,
    "train.shard_writer": 0.5,
    "train.background": 0.5,
    "train.snapshot": 0.5,
    "train.shards": 0.9,
    "train.zero": 0.92,
    "train.strategy": 0.94,
    "train.learned": 0.95,
    "train.checkpoint": 1,
    "train.tracking": 1,
    "train.problems": 1,
    "train.coupling": 1.5,
    "train.memory": 1.5,
    "train.update": 2,
    "train.evaluation": 3,
    "train.reference": 3,
    "train.journal": 3,
    "train.loop": 4,
    "train.config": 5,
    "train.idle": 5.5,
    "train.exchange": 0,
    "train.streaming_rules": 0,
    "train.streams": 5.25,
    "train.ingredients": 5.5,
    "train.output": 5.5,
    "train.report": 5.5,
    "train.announcement": 5.75,
    "train.stages": 5.75,
    "train.finish": 5.75,
    "train.preparation": 5.75,
    "train.rehearsal": 5.75,
    "train.run": 6,
    "train.imports": 6.25,
    "train.__main__": 7,
    "train.inspect": 7,
    "train.parts": 5.75,
    "train.prediction": 6,
    "train.predict": 7,
}
PACKAGES = ("train.tasks", "train.metrics", "data.samples")  # their files may import each other
HEAVY = {"torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "wandb", "pyarrow", "sklearn", "scipy"}
NOT_FOR_DATA = {"train", "accelerate", "transformers"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the two packages by dotted name; a package has that of its folder."""
    found = {}
    for package in ("data", "train"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def unit(module: str) -> str:
    """The module's line in LAYERS: its own, or its package's."""
    return next((package for package in PACKAGES if module.startswith(f"{package}.")), module)


def imports(module: str, *, at_start_only: bool = False) -> Iterator[str]:
    """Yield the dotted names that a module imports, those for type checkers left out; our own modules as such."""
    for node in _nodes(tree(module), at_start_only):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else str(node.module) for name in inside]
        else:
            continue
        yield from (name for name in names if name not in ("train", "data"))


def _nodes(node: ast.AST, at_start_only: bool) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if at_start_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _nodes(child, at_start_only)


def ours(module: str, *, at_start_only: bool = False) -> set[str]:
    return {name for name in imports(module, at_start_only=at_start_only) if name in modules()}


def test_the_source_is_seen() -> None:
    assert len(modules()) >= 40
    assert {"data.order", "train.loop", "train.metrics.f1", "train.tasks.text_classification"} <= set(modules())
    assert "train.config" in ours("train.output") and "train.run" in ours("train.__main__")
    assert "train.run" not in ours("train.__main__", at_start_only=True)


def test_every_module_has_a_layer() -> None:
    known = {*LAYERS, "data", "train"}
    assert {unit(module) for module in modules()} - known == set()
    assert set(LAYERS) - set(modules()) == set(), "a layer for a module that is gone"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    for name in ours(module) - {"data", "train"}:
        own, other = unit(module), unit(name)
        assert own == other or LAYERS[other] < LAYERS[own], f"{module} imports {name}"


def test_files_of_plugins_share_only_what_is_theirs() -> None:
    """A task or metric imports base, contract and files that begin with "_", never another task or metric."""
    for module in modules():
        for package in PACKAGES:
            if module.startswith(f"{package}."):
                siblings = {name.removeprefix(f"{package}.") for name in ours(module) if name.startswith(f"{package}.")}
                assert all(name == "base" or name.startswith("_") for name in siblings), f"{module}: {siblings}"


def test_there_is_no_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way, module))
        if module not in done:
            for name in ours(module):
                visit(name, (*way, module))
            done.add(module)

    for module in modules():
        visit(module, ())
    assert len(done) == len(modules())


def test_data_knows_neither_training_nor_models() -> None:
    found = {(module, name) for module in modules() if module.startswith("data") for name in imports(module)}
    assert len(found) > 30
    assert [entry for entry in sorted(found) if entry[1].split(".")[0] in NOT_FOR_DATA] == []


def test_what_the_command_line_imports_first_is_light() -> None:
    """All that is imported before `train.run`, also inside functions of __main__, and every task and metric."""
    ahead = {name for name in ours("train.__main__") if name not in ("train.run", "train.prepare_data")}
    ahead |= {name for name in modules() if unit(name) in PACKAGES and name != "train.metrics._offline"}
    light: set[str] = set()
    while ahead:
        module = ahead.pop()
        light.add(module)
        ahead |= ours(module, at_start_only=True) - light
        heavy = {name for name in imports(module, at_start_only=True) if name.split(".")[0] in HEAVY}
        assert not heavy, f"{module} imports {heavy}"
    assert {"train.config", "train.output", "train.tracking", "data.source", "train.optim"} <= light
    assert "train.checkpoint" not in light


@pytest.mark.parametrize("module", sorted(modules()))
def test_sizes(module: str) -> None:
    lines = len(modules()[module].read_text(encoding="utf-8").splitlines())
    assert lines <= (100 if module == "train.loop" else 300), f"{module} has {lines} lines"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{module}.{node.name} has {length} lines"
            arguments = node.args
            names = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            names += [arg.arg for arg in (arguments.vararg, arguments.kwarg) if arg]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            assert count <= 8, f"{module}.{node.name} has {count} parameters"


def test_no_machine_is_named() -> None:
    """Paths of the machine it was written on do not work on any other."""
    signs = ("/" + "work/", "/" + "tmp/", "/" + "home/", "/" + "root/")
    for path in [*modules().values(), *(ROOT / "configs").rglob("*.*"), *(ROOT / "accelerate_configs").glob("*")]:
        assert not [sign for sign in signs if sign in path.read_text(encoding="utf-8")], path
