"""Layer-wise rates and gradual unfreezing: by the paper's formulas, on any cut, over any stop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.batches import Batch, Part
from data.errors import UserError
from tests.conftest import checkpoint, figures
from tests.distributed import launch
from tests.worker import carry_out
from train import update
from train.optim import OptimConfig, build_optimizer, scales
from train.strategy import Prepared
from train.update import Learner

MakeConfig = Callable[..., dict[str, Any]]

EVERY, UPDATES = 3, 13
"""The tiny model has the head, two blocks and the embeddings: these learn from update 10 on."""

ULMFIT = {
    "lr": 5e-3,
    "schedule": "slanted_triangular",
    "warmup": 0,
    "weight_decay": 0.1,
    "layer_decay": 1 / 2.6,
    "unfreeze": EVERY,
}


def ulmfit(make_config: MakeConfig, output: Path, **changes: Any) -> dict[str, Any]:
    return make_config(**{"updates": UPDATES, "optim": ULMFIT, "output": str(output), **changes})


def with_dropout(make_config: MakeConfig, output: Path, **changes: Any) -> dict[str, Any]:
    return ulmfit(make_config, output, **{"precision": "fp32", "model__config": {}, "micro_batch_size": 11, **changes})


def depth(name: str) -> int:
    """Of a parameter of the tiny model."""
    places = {"embeddings": 3, "layer.0": 2, "layer.1": 1}
    return next((place for part, place in places.items() if part in name), 0)


def weights(output: Path) -> str:
    return hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_each_layer_learns_in_its_time_at_its_rate(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sections 3.2 and 3.3 of https://arxiv.org/abs/1801.06146; equation 3 with cut_frac 0.1, ratio 32."""
    output, rates, real = tmp_path / "out", dict[int, dict[int, float]](), Learner.update

    def watched(self: Learner, number: int, batch: Batch) -> update.Report:
        report = real(self, number, batch)
        rates[number] = {group["depth"]: group["lr"] for group in self.strategy.optimizer.param_groups}
        return report

    monkeypatch.setattr(Learner, "update", watched)
    assert carry_out(ulmfit(make_config, output, checkpoint__every=1, checkpoint__keep=99)) == 0
    shown = figures(output, "train/lr")
    before, _ = checkpoint(output, 1)
    for number in range(1, UPDATES + 1):
        after, optimizer = checkpoint(output, number)
        time, cut = number - 1, UPDATES // 10
        # the paper's cut x (1 / cut_frac - 1) is UPDATES - cut where nothing is rounded; here it would end below zero
        height = time / cut if time < cut else 1 - (time - cut) / (UPDATES - cut)
        rate = 5e-3 * (1 + height * 31) / 32
        learns = (number - 1) // EVERY
        expected = {place: rate / 2.6**place if place <= learns else 0 for place in range(4)}
        assert rates[number] == pytest.approx(expected, rel=1e-12), number
        assert shown[number] == pytest.approx(rate, rel=1e-12), "the rate of the head is reported"
        steps = {(depth(name), value.item()) for name, value in optimizer.items() if name.endswith(".step")}
        assert steps == {(place, number - place * EVERY) for place in range(4) if place <= learns}
        if number > 1:
            changed = {depth(name) for name in after if not torch.equal(before[name], after[name])}
            assert changed == {place for place in range(4) if place <= learns}
        before = after


@pytest.mark.slow
def test_stopped_after_every_update(make_config: MakeConfig, tmp_path: Path) -> None:
    """Last run: 2026-11-26, all bit-equal."""
    assert carry_out(with_dropout(make_config, tmp_path / "whole")) == 0
    expected, losses = weights(tmp_path / "whole"), figures(tmp_path / "whole", "train/loss")
    assert len(losses) == UPDATES
    for stop in range(1, UPDATES):
        output = tmp_path / f"stopped-{stop}"
        config = with_dropout(make_config, output)
        assert carry_out(config, stop_after=stop) == 0
        assert max(figures(output, "train/loss")) == stop
        assert carry_out(config) == 0
        assert weights(output) == expected, stop
        assert figures(output, "train/loss") == losses, stop


class Killed(BaseException):
    """Nothing is saved on the way out."""


@pytest.mark.whole_run
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_killed_in_every_update(
    optimizer: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint may be of a time when fewer layers learned."""
    changes = {"checkpoint__every": 2, "optim": {**ULMFIT, "name": optimizer}}
    assert carry_out(with_dropout(make_config, tmp_path / "whole", **changes)) == 0
    config = with_dropout(make_config, tmp_path / "killed", **changes)
    real = Learner.update
    for deadly in range(1, UPDATES + 1):

        def killed(self: Learner, number: int, batch: Batch, deadly: int = deadly) -> update.Report:
            report = real(self, number, batch)
            if number == deadly:
                raise Killed
            return report

        monkeypatch.setattr(Learner, "update", killed)
        with pytest.raises(Killed):
            carry_out(config)
    monkeypatch.undo()
    assert carry_out(config) == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_left_out_updates_do_not_count_for_a_layer(make_config: MakeConfig, tmp_path: Path) -> None:
    """Not finite in the update in which a layer joins: it joins in the next; a resumed run does the same."""
    poison = (1, EVERY + 1, 2 * EVERY + 1)
    changes = {"checkpoint__every": 1, "checkpoint__keep": 99}
    assert carry_out(with_dropout(make_config, tmp_path / "whole", **changes), poison=poison) == 0
    for number in poison[1:]:
        (before, _), (after, optimizer) = (
            checkpoint(tmp_path / "whole", number - 1),
            checkpoint(tmp_path / "whole", number),
        )
        assert all(torch.equal(before[name], after[name]) for name in before)
        joined = [value for name, value in optimizer.items() if depth(name) == (number - 1) // EVERY]
        assert joined and not any(value.any() for value in joined)
    for stop in poison:
        config = with_dropout(make_config, tmp_path / f"stopped-{stop}")
        assert carry_out(config, stop_after=stop, poison=poison) == 0
        assert carry_out(config, poison=poison) == 0
        assert weights(tmp_path / f"stopped-{stop}") == weights(tmp_path / "whole"), stop


@pytest.mark.whole_run
@pytest.mark.parametrize("stops", [[5], pytest.param(range(1, UPDATES), marks=pytest.mark.slow)], ids=["one", "all"])
def test_invariance_and_resume_on_one_and_two_processes(
    stops: Sequence[int], make_config: MakeConfig, tmp_path: Path
) -> None:
    """Float64 without dropout: the same losses on every cut; fp32 with dropout: bit-equal over a stop at any update."""
    alone = [{"micro_batch_size": size} for size in (32, 8, 5)]
    for place, cut in enumerate(alone):
        assert carry_out(ulmfit(make_config, tmp_path / f"alone-{place}", **cut)) == 0
    jobs: list[dict[str, Any]] = [
        {"config": ulmfit(make_config, tmp_path / f"two-{place}", **cut)} for place, cut in enumerate(alone)
    ]
    jobs.append({"config": with_dropout(make_config, tmp_path / "whole")})
    for stop in stops:
        config = with_dropout(make_config, tmp_path / f"stopped-{stop}")
        jobs += [{"config": config, "stop_after": stop}, {"config": config}]
    launch(jobs, 2, tmp_path)
    names = [f"{kind}-{place}" for kind in ("alone", "two") for place in range(len(alone))]
    for figure in ("train/loss", "train/grad_norm"):
        reference = list(figures(tmp_path / "alone-0", figure).values())
        assert len(reference) == UPDATES
        for name in names:
            assert list(figures(tmp_path / name, figure).values()) == pytest.approx(reference, rel=1e-9), (name, figure)
    assert json.loads((tmp_path / "two-0" / "result.json").read_text())["world_size"] == 2
    expected = weights(tmp_path / "whole")
    assert [weights(tmp_path / f"stopped-{stop}") for stop in stops] == [expected] * len(stops)


def test_two_processes_go_on_with_what_one_began(make_config: MakeConfig, tmp_path: Path) -> None:
    config = ulmfit(make_config, tmp_path / "moved")
    assert carry_out(config, stop_after=5) == 0
    launch([{"config": config}], 2, tmp_path)
    assert carry_out(ulmfit(make_config, tmp_path / "still")) == 0
    moved, still = (figures(tmp_path / name, "train/loss") for name in ("moved", "still"))
    assert list(moved.values()) == pytest.approx(list(still.values()), rel=1e-9)


class Tower(nn.Module):
    """A head over two layers, made so that a gradient can be followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: Tensor = self.head(x)
        return out


DEPTHS = {f"{module}.{kind}": depth for depth, module in enumerate(("head", "layers.1", "layers.0"))
          for kind in ("weight", "bias")}  # fmt: skip


def squares(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    return (model(tensors["x"]).squeeze(-1) - tensors["y"]).square().sum()


def learner(model: nn.Module, accelerator: Accelerator, settings: OptimConfig, updates: int, every: int) -> Learner:
    built = build_optimizer(model, settings, DEPTHS)
    scale = scales(settings, built, every, updates)
    model, optimizer = accelerator.prepare(model, built)
    return Learner(
        Prepared(accelerator, model, optimizer), squares, lambda number: settings.lr / number, scale, seed=0,
        max_grad_norm=settings.max_grad_norm, max_nonfinite=99,
    )  # fmt: skip


def batch(number: int, dtype: torch.dtype = torch.float64, times: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 4, generator=generator, dtype=dtype)
    part, recut = Part({"x": x, "y": times * x.sum(1)}, np.arange(8), False, np.arange(8)), None  # memory suffices
    return Batch([part], np.arange(8), 8, 8, 8, np.ones(8, dtype=np.int64), recut)


def test_a_layer_that_does_not_learn_is_as_if_it_were_not_there() -> None:
    """AdamW by the textbook, in which the norm, the moments and the decay know only the layers that learn."""
    model, twin = Tower().double(), Tower().double()
    settings = OptimConfig(lr=0.1, layer_decay=0.5, unfreeze=2, weight_decay=0.3, max_grad_norm=0.2)
    learning = learner(model, Accelerator(cpu=True), settings, updates=7, every=2)
    moments: dict[str, list[Any]] = {}
    for number in range(1, 8):
        report = learning.update(number, batch(number))
        (squares(twin, batch(number).parts[0].tensors) / 8).backward()
        active = {name: p for name, p in twin.named_parameters() if DEPTHS[name] <= (number - 1) // 2}
        assert len(active) == 2 * min(3, (number + 1) // 2)
        norm = torch.stack([p.grad.square().sum() for p in active.values() if p.grad is not None]).sum().sqrt()
        assert report.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)
        for name, p in active.items():
            assert p.grad is not None
            gradient = p.grad * (0.2 / (norm + 1e-6)).clamp(max=1)
            rate = 0.1 / number * 0.5 ** DEPTHS[name]
            step, first, second = moments.get(name, [0, 0.0, 0.0])
            step, first, second = step + 1, 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moments[name] = [step, first, second]
            with torch.no_grad():
                p.mul_(1 - rate * (0.3 if p.ndim > 1 else 0.0))
                p.sub_(rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8))
        twin.zero_grad()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-10, atol=1e-12)


def test_an_overflow_below_what_learns_is_not_seen_by_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with fp16 on a GPU: gradients scaled by 2^40 overflow float32, below the head alone."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=99)
    model = Tower()
    with torch.no_grad():
        model.head.weight.mul_(1e17)  # the gradient below it is so much larger
    settings = OptimConfig(lr=1e-3, unfreeze=3, weight_decay=0.0)
    learning = learner(model, accelerator, settings, updates=9, every=3)
    accelerator.native_amp = True  # after the model is prepared: what it computes stays float32
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    seen = []
    for number in range(1, 5):
        before = {name: p.clone() for name, p in model.named_parameters()}
        report = learning.update(number, batch(number, torch.float32, times=0.0))
        changed = {DEPTHS[name] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        seen.append((bool(torch.isfinite(report.grad_norm)), changed, accelerator.scaler.get_scale()))
    assert seen[:3] == [(True, {0}, 2.0**40)] * 3
    assert seen[3] == (False, set(), 2.0**39), "now the lower layer counts: left out, and the scale is halved"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__unfreeze": "1 epoch"}, r"optim.unfreeze: 1 epoch is 5 updates, so that the lowest of 3 layers "
         "below the head would begin to learn after update 15, but the run has only 13"),
        ({"optim__unfreeze": "50%"}, r"50% is 6 updates, .* after update 18"),
        ({"optim__layer_decay": 0}, "optim.layer_decay"),
        ({"optim__layer_decay": 1.5}, "optim.layer_decay"),
        ({"optim__unfreeze": 0}, "optim.unfreeze: .*more than nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be(changes: dict[str, Any], message: str, make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        carry_out(make_config(updates=UPDATES, **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_in_which_all_is_head_has_nothing_to_tell_apart() -> None:
    for settings in (OptimConfig(layer_decay=0.9), OptimConfig(unfreeze=3)):
        built = build_optimizer(Tower(), settings, dict.fromkeys(DEPTHS, 0))
        with pytest.raises(UserError, match="no layers below it"):
            scales(settings, built, 3 if settings.unfreeze else 0, 9)


def test_layer_decay_alone_lets_all_learn_at_once() -> None:
    settings = OptimConfig(layer_decay=0.5)
    built = build_optimizer(Tower(), settings, DEPTHS)
    at = scales(settings, built, 0, 5)
    assert [(group["depth"], group["weight_decay"]) for group in built.param_groups] == [
        (depth, decay) for depth in range(3) for decay in (0.01, 0.0)
    ]
    assert at(1) == at(5) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    plain = build_optimizer(Tower(), OptimConfig())
    assert len(plain.param_groups) == 2
    assert scales(OptimConfig(), plain, 0, 1)(1) == [1.0, 1.0]
