"""The promise over strategies: however model and gradients are spread, the same run; and any goes on from any other's.

On CPUs with gloo, as FSDP2 and HSDP are on GPUs but for speed (see `strategies`); float64, 1e-9.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import launch
from tests.every_task._runs import Build, builder, runner, same
from tests.strategies import environment
from tests.worker import carry_out

SAMPLES = ("text_classification", "causal_lm")
KINDS: dict[str, dict[str, Any]] = {"whole": {}, "lora": {"adapter": {"rank": 4}}}
STRATEGIES = [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("hsdp", 4)]
CASES = [(name, kind, how, world) for name in SAMPLES for kind in KINDS for how, world in STRATEGIES]
CHANGES = [("fsdp2", 2, "ddp", 2), ("ddp", 2, "fsdp2", 2), ("fsdp2", 2, "alone", 1), ("alone", 1, "fsdp2", 2),
           ("fsdp2", 2, "hsdp", 4), ("ddp", 4, "fsdp2", 2)]  # fmt: skip
"""Stopped under the first, gone on under the second."""
QUICK = [case for case in CASES if case[2:] == ("fsdp2", 2)]
QUICK_CHANGES = [("causal_lm", *CHANGES[0]), ("causal_lm", *CHANGES[2]), ("text_classification", *CHANGES[1])]


@pytest.fixture(scope="module")
def build(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: str, tiny_decoder: str, tiny_encoder_decoder: str
) -> Build:
    models = {"bert": tiny_model, "gpt2": tiny_decoder, "t5": tiny_encoder_decoder}
    return builder(tmp_path_factory.mktemp("strategies"), models)


@pytest.fixture(scope="module")
def alone(build: Build) -> Callable[[str, str], Path]:
    """The run in one process, made once for each kind."""
    runners = {kind: runner(build, f"alone-{kind}", **settings) for kind, settings in KINDS.items()}
    return lambda name, kind: runners[kind](name)


def job(config: dict[str, Any], how: str, stop_after: int | None = None) -> dict[str, Any]:
    given: dict[str, Any] = {"config": config, "stop_after": stop_after}
    return given if how == "alone" else {**given, "strategy": environment(how)}


def carry_out_all(build: Build, cases: list[Any], changes: list[Any], folder: Path) -> None:
    """Make all runs: those of a world in one start, and those that go on after those that they go on from."""
    begun: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    going_on: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    merged = build(SAMPLES[0], "merged", adapter={"rank": 4, "merge": True})
    begun[2].append({**job(merged, "fsdp2"), "refused": "adapter.merge: weights that are shared out cannot be merged"})
    for name, kind, how, world in cases:
        begun[world].append(job(build(name, f"{how}-{world}-{kind}", **KINDS[kind]), how))
    for name, before, first, after, second in changes:
        config = build(name, f"{before}-{first}-{after}-{second}")
        begun[first].append(job(config, before, stop_after=3))
        going_on[second].append(job(config, after))
    for place, jobs in enumerate((begun, going_on)):
        for world, listed in jobs.items():
            if world > 1 and listed:
                (folder / str(place)).mkdir(exist_ok=True)
                launch(listed, world, folder / str(place))
            for each in listed if world == 1 else ():
                assert carry_out(each["config"], each["stop_after"]) == 0


def final(output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = sorted((output / "model").glob("*.safetensors"))
    assert len(files) == 1
    return load_file(files[0])


def difference(output: Path, reference: Path) -> float:
    """Return the largest difference of final weights, relative to the largest weight.

    Not of each tensor: a bias of attention's keys has no effect, so that its gradient is rounding and nothing else.
    """
    found, expected = final(output), final(reference)
    assert found.keys() == expected.keys() and len(expected) >= 4
    largest = max(float(each.abs().max()) for each in expected.values())
    return max(float((found[name] - each).abs().max()) for name, each in expected.items()) / largest


def check(output: Path, world: int, reference: Path) -> float:
    """Hold a run against the one in one process; return the largest difference of their weights."""
    assert json.loads((output / "result.json").read_text())["world_size"] == world
    same(output, reference)
    found = difference(output, reference)
    assert found < 1e-9
    return found


@pytest.fixture(scope="module")
def runs(build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    carry_out_all(build, QUICK, QUICK_CHANGES, tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize(("name", "kind", "how", "world"), QUICK)
def test_a_strategy_does_not_matter(
    name: str, kind: str, how: str, world: int, build: Build, alone: Callable[[str, str], Path], runs: None
) -> None:
    check(Path(build(name, f"{how}-{world}-{kind}", **KINDS[kind])["output"]), world, alone(name, kind))


@pytest.mark.parametrize(("name", "before", "first", "after", "second"), QUICK_CHANGES)
def test_a_run_goes_on_under_another_strategy_and_world(
    name: str, before: str, first: int, after: str, second: int, build: Build, alone: Callable[[str, str], Path],
    runs: None,
) -> None:  # fmt: skip
    check(Path(build(name, f"{before}-{first}-{after}-{second}")["output"]), second, alone(name, "whole"))


@pytest.mark.slow
def test_the_whole_table(build: Build, alone: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Every task, strategy, world and change of them: the largest difference of weights of each is printed.

    Not run whole yet since weights are compared as they are now; losses were equal in all of it (2026-11-26).
    """
    changes = [(name, *change) for name in SAMPLES for change in CHANGES]
    carry_out_all(build, CASES, changes, tmp_path)
    for name, kind, how, world in CASES:
        found = check(Path(build(name, f"{how}-{world}-{kind}", **KINDS[kind])["output"]), world, alone(name, kind))
        print(f"{name:20} {kind:6} {how:6} {world}  {found:.1e}")
    for name, *change in changes:
        run = "-".join(map(str, change))
        found = check(Path(build(name, run)["output"]), int(change[-1]), alone(name, "whole"))
        print(f"{name:20} whole  {run:16}  {found:.1e}")
