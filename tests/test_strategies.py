"""The promise over strategies: however model and gradients are spread, the same run; and any goes on from any other's.

On CPUs with gloo, as FSDP2, HSDP and ZeRO are on GPUs but for speed (see `strategies`). In float64, to 1e-9; ZeRO keeps
its weights in fp32: to 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import figures
from tests.distributed import launch
from tests.every_task._runs import Build, builder, runner, same
from tests.strategies import environment
from tests.worker import carry_out
from train import zero

pytestmark = pytest.mark.whole_run

SAMPLES = ("text_classification", "causal_lm")
KINDS: dict[str, dict[str, Any]] = {"whole": {}, "lora": {"adapter": {"rank": 4}}}
STRATEGIES = [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("hsdp", 4), ("deepspeed_zero2", 2), ("deepspeed_zero3", 2)]
CASES = [(name, kind, how, world) for name in SAMPLES for kind in KINDS for how, world in STRATEGIES]
CHANGES = [("fsdp2", 2, "ddp", 2), ("ddp", 2, "fsdp2", 2), ("fsdp2", 2, "alone", 1), ("alone", 1, "fsdp2", 2),
           ("fsdp2", 2, "hsdp", 4), ("ddp", 4, "fsdp2", 2), ("deepspeed_zero2", 2, "ddp", 4),
           ("ddp", 4, "deepspeed_zero2", 2), ("deepspeed_zero3", 2, "fsdp2", 2), ("alone", 1, "deepspeed_zero3", 2),
           ("deepspeed_zero2", 2, "deepspeed_zero3", 2), ("deepspeed_zero3", 2, "deepspeed_zero3", 2)]  # fmt: skip
"""Stopped under the first, gone on under the second."""
DEEPSPEED = zero.installed()
POISONED = ("fsdp2", "deepspeed_zero2", "deepspeed_zero3")
ZERO = [("text_classification", "whole", "deepspeed_zero2", 2), ("causal_lm", "lora", "deepspeed_zero3", 2),
        ("preference", "whole", "deepspeed_zero3", 2)]  # fmt: skip
QUICK = [case for case in CASES if case[2:] == ("fsdp2", 2)] + ZERO + [("preference", "whole", "fsdp2", 2)]
"""preference: its backward pass takes the output layer's weights once more."""
QUICK_CHANGES = [("causal_lm", *CHANGES[0]), ("causal_lm", *CHANGES[2]), ("text_classification", *CHANGES[1]),
                 ("causal_lm", *CHANGES[10])]  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str]) -> Build:
    return builder(tmp_path_factory.mktemp("strategies"), tiny_models)


def here(*case: Any) -> Any:
    """Mark a case to be skipped where it needs DeepSpeed, which `make test-deepspeed` installs."""
    missing = any("zero" in str(each) for each in case) and not DEEPSPEED
    return pytest.param(*case, marks=pytest.mark.skipif(missing, reason="DeepSpeed is not installed"))


def possible(cases: Iterable[Any]) -> list[Any]:
    """Leave out the cases that are skipped."""
    return [case for case in cases if DEEPSPEED or not any("zero" in str(each) for each in case)]


def settings(kind: str, *strategies: str) -> dict[str, Any]:
    """What distinguishes the config of a run.

    In fp32 with a large epsilon: without it Adam makes a step of the full rate of a gradient that is only rounding.
    """
    fp32 = {"precision": "fp32", "optim": {"lr": 5e-3, "warmup": "10%", "eps": 1e-4}}
    return {**KINDS[kind], **(fp32 if any("zero" in each for each in strategies) else {})}


@pytest.fixture(scope="module")
def alone(build: Build) -> Callable[..., Path]:
    """The run in one process, made once for each kind."""

    @cache
    def output(name: str, kind: str, *strategies: str) -> Path:
        chosen = settings(kind, *strategies)
        return runner(build, f"alone-{kind}-{chosen.get('precision', 'fp64')}", **chosen)(name)

    return output


def job(config: dict[str, Any], how: str, stop_after: int | None = None) -> dict[str, Any]:
    given: dict[str, Any] = {"config": config, "stop_after": stop_after}
    return given if how == "alone" else {**given, "strategy": environment(how)}


def carry_out_all(build: Build, cases: list[Any], changes: list[Any], folder: Path) -> None:
    """Make all runs: those of a world in one start, and those that go on after those that they go on from."""
    begun: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    going_on: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    merged = build(SAMPLES[0], "merged", adapter={"rank": 4, "merge": True})
    begun[2].append({**job(merged, "fsdp2"), "refused": "adapter.merge: weights that are shared out cannot be merged"})
    for (how,) in possible((how,) for how in POISONED):
        config = build("causal_lm", f"{how}-poisoned", **settings("whole", how))
        begun[2].append({**job(config, how), "poison": [3]})
    for name, kind, how, world in cases:
        begun[world].append(job(build(name, f"{how}-{world}-{kind}", **settings(kind, how)), how))
    for name, before, first, after, second in changes:
        config = build(name, f"{before}-{first}-{after}-{second}", **settings("whole", before, after))
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


def check(output: Path, world: int, reference: Path, *strategies: str) -> tuple[float, float]:
    """Hold a run against the one in one process; return the largest relative difference of losses, and of weights."""
    tolerance = 1e-5 if settings("whole", *strategies) else 1e-9
    assert json.loads((output / "result.json").read_text())["world_size"] == world
    same(output, reference, tolerance)
    losses = [list(figures(each, "train/loss").values()) for each in (output, reference)]
    lost = max(abs(one - other) / abs(other) for one, other in zip(*losses, strict=True))
    found = difference(output, reference)
    assert found < tolerance
    return lost, found


@pytest.fixture(scope="module")
def runs(build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    carry_out_all(build, possible(QUICK), possible(QUICK_CHANGES), tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize(("name", "kind", "how", "world"), [here(*case) for case in QUICK])
def test_a_strategy_does_not_matter(
    name: str, kind: str, how: str, world: int, build: Build, alone: Callable[..., Path], runs: None
) -> None:
    check(Path(build(name, f"{how}-{world}-{kind}")["output"]), world, alone(name, kind, how), how)


@pytest.mark.parametrize(("name", "before", "first", "after", "second"), [here(*case) for case in QUICK_CHANGES])
def test_a_run_goes_on_under_another_strategy_and_world(
    name: str, before: str, first: int, after: str, second: int, build: Build, alone: Callable[..., Path], runs: None
) -> None:
    output = Path(build(name, f"{before}-{first}-{after}-{second}")["output"])
    check(output, second, alone(name, "whole", before, after), before, after)


@pytest.mark.parametrize("how", [here(how) for how in POISONED])
def test_an_update_that_is_not_finite_is_left_out(how: str, build: Build, runs: None) -> None:
    """By all processes alike, also if one alone has met it."""
    alone = build("causal_lm", f"alone-poisoned-{how}", micro_batch_size=32, **settings("whole", how))
    assert carry_out(alone, poison=(3,)) == 0
    output = Path(build("causal_lm", f"{how}-poisoned")["output"])
    losses = [figures(Path(each), "train/loss") for each in (output, alone["output"])]
    assert [[number for number, loss in each.items() if loss is None] for each in losses] == [[3], [3]]
    assert difference(output, Path(alone["output"])) < (1e-5 if settings("whole", how) else 1e-9)


@pytest.mark.slow
def test_the_whole_table(build: Build, alone: Callable[..., Path], tmp_path: Path) -> None:
    """Every task, strategy, world and change of them: the table of docs/strategies.md, with -s or -rP."""
    cases, changes = possible(CASES), possible((name, *change) for name in SAMPLES for change in CHANGES)
    carry_out_all(build, cases, changes, tmp_path)
    print("" if DEEPSPEED else "ZeRO is left out: DeepSpeed is not installed")
    print("| task | what learns | strategy, processes | losses | weights |\n|---|---|---|---|---|")
    for name, kind, how, world in cases:
        found = check(Path(build(name, f"{how}-{world}-{kind}")["output"]), world, alone(name, kind, how), how)
        print(f"| {name} | {kind} | {how}, {world} | {found[0]:.1e} | {found[1]:.1e} |")
    for name, before, first, after, second in changes:
        output = Path(build(name, f"{before}-{first}-{after}-{second}")["output"])
        found = check(output, second, alone(name, "whole", before, after), before, after)
        print(f"| {name} | whole | {before}, {first} → {after}, {second} | {found[0]:.1e} | {found[1]:.1e} |")
