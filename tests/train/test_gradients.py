"""The norm of gradients; and tables of embeddings, of whose gradients a few rows are touched: nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from train import adamw, gradients, strategy
from train.optim import OptimConfig, build_optimizer

ROWS, WIDTH = 50, 4


class Reader(nn.Module):
    """Reads rows of a table, of which 0 is padding, and of a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH, padding_idx=0)
        self.places = nn.Embedding(7, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids) + self.places(torch.arange(ids.shape[1]))).square().sum()


@pytest.fixture(autouse=True)
def small_tables_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LARGE", ROWS * WIDTH)


def learners(model: nn.Module, settings: OptimConfig) -> tuple[strategy.Prepared, strategy.Prepared]:
    """The model, and a copy of it whose gradients are whole."""
    plain = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    found: list[Any] = [strategy.prepare(accelerator, each, build_optimizer(each, settings), "fp32")
                        for each in (model, plain)]  # fmt: skip
    for module in plain.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    return found[0], found[1]


def test_the_norm_of_large_gradients() -> None:
    """To 1e-6 in fp32, whatever their shape; of 12 million values in one piece PyTorch loses more than 1e-4."""
    torch.manual_seed(0)
    some = [torch.randn(30_000, 384), torch.randn(384), torch.randn(3, 4, 5), torch.tensor(2.0)]
    exact = torch.cat([gradient.double().flatten() for gradient in some]).norm()
    assert gradients.norm(some).item() == pytest.approx(exact.item(), rel=1e-6)
    assert gradients.norm([gradient.double() for gradient in some]).item() == pytest.approx(exact.item(), rel=1e-9)
    assert not gradients.norm([]).item()
    assert gradients.norm([torch.ones(2), torch.full((2, 2), torch.nan)]).isnan()
    model = nn.ParameterList([torch.zeros_like(gradient) for gradient in some])
    prepared = strategy.prepare(Accelerator(cpu=True), model, build_optimizer(model, OptimConfig()), "fp32")
    for parameter, gradient in zip(model.parameters(), some, strict=True):
        parameter.grad = gradient
    assert prepared.step(torch.tensor(1.0), None)[0].item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize(("name", "states"), [("adamw", "fp32"), ("adamw", "bf16"), ("adamw", "8bit"), ("sgd", "fp32")])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("piece", [2**20, 16 * WIDTH])
def test_what_is_learned_is_the_same(
    name: Literal["adamw", "sgd"], states: Literal["fp32", "bf16", "8bit"], max_norm: float | None, piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rows that come again within an update, updates of two micro-batches, one that is left out, one in which the table
    does not learn: bit-equal where an update is one micro-batch, and all zeros are zeros in between."""
    monkeypatch.setattr(adamw, "PIECE", piece)
    torch.manual_seed(0)
    model = Reader()
    ours, plain = learners(model, OptimConfig(name=name, lr=0.01, states=states))
    words: Any = model.words
    assert list(ours.tables.zeros) == [words.weight]
    for update in range(1, 9):
        cut = update == 5
        ids = torch.randint(0, ROWS if update % 2 else 9, (6, 7))
        factor = torch.nan if update == 3 else 1.0
        found = []
        for each in (ours, plain):
            for group in each.optimizer.param_groups:
                group["update"] = update
            for part in ids.chunk(2 if cut else 1):
                each.backward(each.model(part) * factor)
            if update == 4:
                each.model.words.weight.grad = None
            found.append(each.step(torch.tensor(factor), max_norm))
        (norm, skipped), (expected, _) = found
        assert torch.allclose(norm, expected, rtol=1e-6, equal_nan=True) and bool(skipped) == (update == 3)
        assert not any(zeros.any() for zeros in ours.tables.zeros.values()) and words.weight.grad is None
        for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
            if update < 5 and max_norm is None:
                assert torch.equal(one, other)
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
        if states != "fp32":  # what is rounded at random, from another number, may end at the next one
            plain.model.load_state_dict(ours.model.state_dict())
    assert torch.equal(model.words.weight[0], torch.zeros(WIDTH))
    rows = (name, states) == ("adamw", "fp32")
    assert len(ours.tables.zeros[words.weight]) == (0 if rows else ROWS), (
        "zeros were made, where an optimizer needs them"
    )


def test_many_micro_batches_take_no_more_memory_than_the_table() -> None:
    torch.manual_seed(0)
    ours, plain = learners(Reader(), OptimConfig(name="sgd", lr=1e-4))
    words: Any = ours.model.words
    for ids in torch.randint(1, 9, (30, 2, 7)):
        for each in (ours, plain):
            each.backward(each.model(ids))
        grad = words.weight.grad
        assert not grad.is_sparse or grad._nnz() <= ROWS
    assert not grad.is_sparse
    for each in (ours, plain):
        each.step(torch.tensor(1.0), 1.0)
    for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_whole_all_the_same() -> None:
    """What is used by somebody else too has one, whichever comes first."""

    class Both(Reader):
        def forward(self, ids: Tensor) -> Tensor:
            read = super().forward(ids)
            return read + nn.functional.linear(read.view(1, 1).expand(1, WIDTH), self.words.weight).square().sum()

    torch.manual_seed(0)
    ours, plain = learners(Both(), OptimConfig(name="sgd", lr=1e-5))
    for _ in range(3):
        ids = torch.randint(0, 9, (2, 7))
        for each in (ours, plain):
            each.backward(each.model(ids))
            each.step(torch.tensor(1.0), 1.0)
        for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def tied(model: Reader) -> None:
    model.head = nn.Linear(WIDTH, ROWS, bias=False)
    model.head.weight = model.words.weight


def read_twice(model: Reader) -> None:
    model.others = nn.Embedding(ROWS, WIDTH)
    model.others.weight = model.words.weight


def frozen(model: Reader) -> None:
    model.words.weight.requires_grad_(False)


def double(model: Reader) -> None:
    model.double()


def partly_bf16(model: Reader) -> None:
    model.head.to(torch.bfloat16)


def by_frequency(model: Reader) -> None:
    model.words.scale_grad_by_freq = True


def bounded(model: Reader) -> None:
    model.words.max_norm = 1.0


@pytest.mark.parametrize("other", [tied, read_twice, frozen, double, partly_bf16, by_frequency, bounded])
def test_tables_that_are_left_alone(other: Callable[[Reader], None]) -> None:
    model = Reader()
    other(model)
    assert not gradients.sparse_tables(model).zeros
    assert not any(module.sparse for module in model.modules() if isinstance(module, nn.Embedding))


def test_several_processes_meet_in_whole_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, accelerator = Reader(), Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.MULTI_CPU)
    monkeypatch.setattr(accelerator, "prepare", lambda *prepared: prepared)
    spread: Any = strategy.prepare(accelerator, model, build_optimizer(model, OptimConfig()), "fp32")
    assert not spread.tables.zeros and not model.words.sparse
