"""Weights that are kept in bf16 beside those in fp32: nothing else changes, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional

from train import adamw, halves, output_layer, shards, strategy
from train.optim import OptimConfig, build_optimizer

WIDTH = 24


class Net(nn.Module):
    """Linear layers of all kinds of use: one after the other, often, tied to a table, never; one also directly."""

    def __init__(self, *, directly: bool = False) -> None:
        super().__init__()
        self.directly = directly
        self.words = nn.Embedding(30, WIDTH)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.often = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, 30, bias=False)
        self.tied.weight = self.words.weight
        self.never = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.second(functional.gelu(self.first(self.words(ids))))
        hidden = self.norm(self.often(self.often(hidden)) + self.last(hidden))
        loss = self.tied(hidden).float().logsumexp(-1).sum()
        return loss + functional.linear(hidden, self.last.weight).float().square().sum() if self.directly else loss


@pytest.fixture(autouse=True)
def bf16() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(model: nn.Module, settings: OptimConfig | None = None, precision: str = "bf16") -> strategy.Prepared:
    mixed = precision if precision == "bf16" else "no"
    built = build_optimizer(model, settings or OptimConfig(lr=0.01))
    found: Any = strategy.prepare(Accelerator(cpu=True, mixed_precision=mixed), model, built, precision)
    return found


def plainly(model: nn.Module) -> strategy.Prepared:
    """The same, of a model whose weights autocast rounds, by PyTorch's own optimizer."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    groups = build_optimizer(model, OptimConfig(lr=0.01)).param_groups
    return strategy.Prepared(accelerator, *accelerator.prepare(model, torch.optim.AdamW(groups, fused=True)))


def both(*, directly: bool = False) -> tuple[strategy.Prepared, strategy.Prepared]:
    torch.manual_seed(0)
    model = Net(directly=directly)
    plain = copy.deepcopy(model)
    return prepared(model), plainly(plain)


def learn(each: strategy.Prepared, ids: Tensor, cut: int = 1, factor: float = 1.0, without: str = "") -> Tensor:
    """Make an update; return the norm of its gradients."""
    parts = ids.chunk(cut)
    for place, part in enumerate(parts, 1):
        with each.part(last=place == len(parts)):
            each.backward(each.model(part) * factor / ids.numel())
    for name, parameter in each.net.named_parameters():
        if without and name.startswith(without):
            parameter.grad = None
    return each.step(torch.tensor(factor), 0.5)[0]


def equal(ours: strategy.Prepared, plain: strategy.Prepared) -> bool:
    pairs = zip(ours.net.parameters(), plain.net.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("piece", [2**20, 704])
def test_what_is_learned_is_the_same(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several micro-batches, an update that is left out, one in which a layer does not learn; weights in pieces too."""
    monkeypatch.setattr(adamw, "PIECE", piece)
    ours, plain = both()
    net: Any = ours.net
    assert net.second.weight.numel() > 704
    for update in range(1, 12):
        ids = torch.randint(0, 30, (6, 7))
        options: dict[str, Any] = {"cut": 3} if update in (4, 7) else {}
        options |= {"factor": torch.nan} if update == 3 else {"without": "second"} if update in (5, 6) else {}
        norm, expected = (learn(each, ids, **options) for each in (ours, plain))
        assert torch.allclose(norm, expected, rtol=1e-6, equal_nan=True)
        assert equal(ours, plain), update
    held = {name for name, each in net.named_parameters() if ours.halves.rounded(each) is not None}
    assert held == {"first.weight", "first.bias", "second.weight", "often.weight", "often.bias", "last.weight",
                    "last.bias"}  # fmt: skip
    for name in held:
        parameter = net.get_parameter(name)
        kept: Any = ours.halves.rounded(parameter)
        assert torch.equal(kept, parameter.to(torch.bfloat16)), "as the optimizer has left it"


def test_gradients_are_in_bf16_where_an_update_is_one_micro_batch() -> None:
    """But not of what is used otherwise too, whose uses are added up in fp32 (by autocast in bf16)."""
    ours, plain = both(directly=True)
    for cut, expected in ((1, torch.bfloat16), (2, torch.float32)):
        ids = torch.randint(0, 30, (6, 7))
        for each in (ours, plain):
            for place, part in enumerate(ids.chunk(cut), 1):
                with each.part(last=place == cut):
                    each.backward(each.model(part))
        for (name, one), other in zip(ours.net.named_parameters(), plain.net.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None) == name.startswith("never")
            if one.grad is not None and other.grad is not None:
                narrow = name.split(".")[0] in ("first", "second", "often") or name == "last.bias"
                assert one.grad.dtype == (expected if narrow else torch.float32), name
                exact = {"rtol": 0.0, "atol": 0.0} if narrow else {"rtol": 2e-2, "atol": 2e-2}
                assert torch.allclose(one.grad.float(), other.grad, **exact), name
        for each in (ours, plain):
            each.optimizer.zero_grad()


def test_values_that_others_have_changed_are_seen(tmp_path: Path) -> None:
    """A checkpoint that is loaded, with what the optimizer remembers; and a model that is copied."""
    ours, plain = both()
    ids = torch.randint(0, 30, (6, 7))
    for each in (ours, plain):
        learn(each, ids)
    for name, tensors in (("model", ours.model_tensors()), ("optimizer", ours.optimizer_tensors())):
        shards.save(tensors, tmp_path / name)
    for each in (ours, plain):
        learn(each, ids)
        each.load(tmp_path / "model", tmp_path / "optimizer")
        with torch.no_grad():
            losses = each.model(ids), each.accelerator.autocast()(copy.deepcopy(each.net))(ids)
        assert torch.equal(*losses)
        for _ in range(2):
            learn(each, ids)
    assert equal(ours, plain)
    with torch.no_grad():
        ours.net.get_parameter("first.weight").mul_(2)
        plain.net.get_parameter("first.weight").mul_(2)
        assert torch.equal(ours.model(ids), plain.model(ids))


def test_without_autocast_it_is_a_linear_layer() -> None:
    ours, plain = both()
    ids = torch.randint(0, 30, (6, 7))
    for each in (ours, plain):
        learn(each, ids)
    hidden = torch.randn(3, WIDTH)
    nets: list[Any] = [each.net for each in (ours, plain)]
    found, expected = (net.first(hidden) for net in nets)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    for output in (found, expected):
        output.sum().backward()
    assert torch.equal(*(net.first.weight.grad for net in nets))


def test_a_micro_batch_that_fails_leaves_nothing() -> None:
    ours, plain = both()
    ids = torch.randint(0, 30, (6, 7))

    class Failed(RuntimeError): ...

    with pytest.raises(Failed), ours.part(last=True):
        ours.backward(ours.model(ids))
        raise Failed
    ours.optimizer.zero_grad()
    for each in (ours, plain):
        learn(each, ids)
    assert equal(ours, plain)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        (OptimConfig(name="sgd"), "bf16"),
        (OptimConfig(states="8bit"), "bf16"),
        (OptimConfig(), "fp32"),
    ],
)
def test_who_does_not_know_of_them_is_given_none(settings: OptimConfig, precision: str) -> None:
    assert not prepared(Net(), settings, precision).halves.kept


def test_memory_that_does_not_suffice_where_gradients_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is made again, and nothing of the first try is in it."""
    ours, plain = both()
    ids, failed, really = torch.randint(0, 30, (6, 7)), [], Tensor.float

    def once(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.dim() == 2 and not failed:
            failed.append(True)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return really(tensor)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="allocate"):
        patched.setattr(Tensor, "float", once)
        learn(ours, ids, cut=2)
    ours.optimizer.zero_grad()
    for each in (ours, plain):
        learn(each, ids, cut=2)
    assert failed and equal(ours, plain)


def test_a_second_time_and_copies_begin_anew() -> None:
    ours, plain = both()
    ids = torch.randint(0, 30, (6, 7))
    for each in (ours, plain):
        learn(each, ids)
    copied = copy.deepcopy(ours.net.first)
    with torch.no_grad():
        copied.weight.mul_(2)  # type: ignore[operator]
        expected = functional.linear(torch.ones(1, WIDTH), copied.weight, copied.bias)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(copied(torch.ones(1, WIDTH)).float(), expected, atol=2e-2)  # type: ignore[operator]
    assert len(halves.keep(ours.net).kept) == len(ours.halves.kept)


def test_not_of_layers_that_are_otherwise() -> None:
    """Whose weight is made of others, which gives losses, or which is of a model with its own code."""
    model = Net()
    nn.utils.parametrizations.weight_norm(model.first)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.second)
    model.last.register_forward_pre_hook(output_layer._before)
    kept = halves.keep(model).kept
    assert set(kept) == {*model.often.parameters(), *model.never.parameters()}
    foreign = type("Foreign", (Net,), {"__module__": "transformers_modules.somebody"})
    assert not halves.keep(foreign()).kept


def test_not_of_what_is_compiled_or_does_not_learn() -> None:
    model = Net()
    model.first.requires_grad_(False)
    assert not halves.keep(model).kept.keys() & set(model.first.parameters())
    assert type(model.first) is nn.Linear
    compiled = Net()
    compiled.first.compile(backend="eager")
    assert not halves.keep(compiled).kept
