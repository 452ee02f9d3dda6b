"""The same losses and the same figures, however a batch is cut and however many processes share it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHAPES, figures
from tests.distributed import launch
from tests.worker import carry_out

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
"""The losses of 20 updates for each shape of the task: one list for all cuts. A change of it needs a reason."""

FIGURES = GOLDEN.with_name("figures.json")

CUTS: tuple[dict[str, Any], ...] = ({"micro_batch_size": 32}, {"micro_batch_size": 8}, {"micro_batch_size": 5})
METRICS: dict[str, list[Any]] = {
    "single_label": ["accuracy", "f1", "matthews_correlation", "roc_auc"],
    "multi_label": [{"name": "f1", "average": "micro"}, "accuracy"],
    "pair": ["accuracy", {"name": "f1", "average": "macro"}],
    "regression": ["pearson", "spearman", "mse"],
}


@pytest.fixture
def golden(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, list[float]]:
    """The list; GOLDEN=write makes it anew from one process and one cut, for a commit that says why."""
    if os.environ.get("GOLDEN") == "write":
        configs = jobs(make_config, tmp_path, CUTS[:1])
        losses, final = {}, {}
        for name, config in configs.items():
            assert carry_out(config) == 0
            losses[name.split("-")[0]] = list(figures(Path(config["output"]), "train/loss").values())
            final[name.split("-")[0]] = json.loads((Path(config["output"]) / "result.json").read_text())["metrics"]
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
        FIGURES.write_text(json.dumps(final, indent=1) + "\n")
        pytest.skip("wrote the golden files")
    loaded: dict[str, list[float]] = json.loads(GOLDEN.read_text())
    assert set(loaded) == set(SHAPES)
    return loaded


def jobs(
    make_config: Callable[..., dict[str, Any]], tmp_path: Path, cuts: tuple[dict[str, Any], ...]
) -> dict[str, Any]:
    return {
        f"{shape}-{place}": make_config(
            shape, **cut, output=str(tmp_path / f"{shape}-{place}"), metrics=METRICS[shape], evaluate__every=10
        )
        for shape in SHAPES
        for place, cut in enumerate(cuts)
    }


def check(configs: dict[str, dict[str, Any]], golden: dict[str, list[float]]) -> None:
    """All losses as in the golden list; evaluations equal over all cuts of a shape."""
    reference: dict[str, dict[str, float]] = {}
    for name, config in configs.items():
        shape, output = name.split("-")[0], Path(config["output"])
        losses = figures(output, "train/loss")
        assert list(losses) == list(range(1, 21))
        assert list(losses.values()) == pytest.approx(golden[shape], rel=1e-9)
        found = json.loads((output / "result.json").read_text())["metrics"]
        loss = found.pop("validation/loss")
        assert len(found) == len(METRICS[shape])
        expected = json.loads(FIGURES.read_text())[shape]
        assert loss == pytest.approx(expected["validation/loss"], rel=1e-9)
        for figure, value in found.items():
            assert value == pytest.approx(expected[figure], rel=1e-9), figure
        assert reference.setdefault(shape, found).keys() == found.keys()


def test_one_process_three_cuts(
    make_config: Callable[..., dict[str, Any]], tmp_path: Path, golden: dict[str, list[float]]
) -> None:
    configs = jobs(make_config, tmp_path, CUTS)
    for config in configs.values():
        assert carry_out(config) == 0
    assert len(configs) == len(SHAPES) * len(CUTS)
    check(configs, golden)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes(
    world: int, make_config: Callable[..., dict[str, Any]], tmp_path: Path, golden: dict[str, list[float]]
) -> None:
    configs = jobs(make_config, tmp_path, ({}, {"micro_batch_size": 5}))
    launch([{"config": config} for config in configs.values()], world, tmp_path)
    for config in configs.values():
        assert json.loads((Path(config["output"]) / "result.json").read_text())["world_size"] == world
    check(configs, golden)
