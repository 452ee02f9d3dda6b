"""How a batch is cut: every row once, bounds kept, equal counts, the least cost, little padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from data.order import Order
from data.plan import WITH_PADDING, Bounds, MicroBatch, computed, cut, plan_batch, plan_evaluation

# Examples by length in tokens: the training set of SST-2 (67,349 rows) under the tokenizer of MiniLM.
SST2 = {
    3: 1978, 4: 5322, 5: 6065, 6: 5345, 7: 4749, 8: 4155, 9: 3713, 10: 3267, 11: 2947, 12: 2650, 13: 2413, 14: 2138,
    15: 1950, 16: 1777, 17: 1661, 18: 1515, 19: 1373, 20: 1285, 21: 1132, 22: 1106, 23: 1046, 24: 909, 25: 820,
    26: 806, 27: 733, 28: 692, 29: 628, 30: 538, 31: 491, 32: 442, 33: 448, 34: 400, 35: 337, 36: 304, 37: 286,
    38: 242, 39: 195, 40: 203, 41: 192, 42: 155, 43: 148, 44: 130, 45: 89, 46: 82, 47: 85, 48: 73, 49: 55, 50: 42,
    51: 50, 52: 40, 53: 36, 54: 19, 55: 21, 56: 22, 57: 15, 58: 8, 59: 6, 60: 3, 61: 2, 62: 5, 63: 5, 64: 1, 65: 2,
    66: 2,
}  # fmt: skip

lengths_of = some.lists(some.integers(1, 60), min_size=1, max_size=40).map(np.array)
bounds_of = some.builds(
    Bounds,
    rows=some.none() | some.integers(1, 10),
    tokens=some.none() | some.integers(1, 200),
    overhead=some.integers(0, 100),
)

dealt_of = bounds_of | bounds_of.map(lambda bounds: replace(bounds, padding_free=True))


def cost(lengths: np.ndarray, groups: list[np.ndarray] | list[list[int]], overhead: int) -> int:
    return sum(len(group) * max(int(lengths[row]) for row in group) + overhead for group in groups)


def busiest(lengths: np.ndarray, plan: list[list[MicroBatch]], bounds: Bounds) -> int:
    """What the process that takes longest computes, in tokens, the overhead of micro-batches counted."""
    return max(cost(lengths, [part.rows for part in share], bounds.overhead) for share in plan)


def fits(lengths: np.ndarray, rows: np.ndarray | list[int], bounds: Bounds) -> bool:
    padded, real = len(rows) * max(int(lengths[row]) for row in rows), sum(int(lengths[row]) for row in rows)
    in_rows, tokens = bounds.rows is None or len(rows) <= bounds.rows, bounds.tokens or 10**6
    held = real <= tokens and padded <= WITH_PADDING * tokens if bounds.padding_free else padded <= tokens
    return len(rows) == 1 or (in_rows and held)


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    """Every way to put rows into groups, contiguous or not."""
    if not rows:
        yield []
        return
    first, rest = rows[0], rows[1:]
    for groups in partitions(rest):
        yield [[first], *groups]
        for number, group in enumerate(groups):
            yield [*groups[:number], [first, *group], *groups[number + 1 :]]


@given(lengths=some.lists(some.integers(1, 40), min_size=1, max_size=7).map(np.array), bounds=dealt_of)
@settings(max_examples=100, deadline=None)
def test_the_cut_costs_least_of_all_ways_to_group(lengths: np.ndarray, bounds: Bounds) -> None:
    possible = (ways for ways in partitions([*range(len(lengths))]) if all(fits(lengths, g, bounds) for g in ways))
    least = min(cost(lengths, ways, bounds.overhead) for ways in possible)
    assert cost(lengths, cut(lengths, bounds), bounds.overhead) == least


@given(lengths=lengths_of, bounds=dealt_of, world=some.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_plan_holds_every_row_once_in_bounds_and_equal_counts(lengths: np.ndarray, bounds: Bounds, world: int) -> None:
    plan = plan_batch(lengths, bounds, world)
    assert len(plan) == world
    assert len({len(share) for share in plan}) == 1
    counted = [row for share in plan for part in share if not part.filler for row in part.rows.tolist()]
    assert sorted(counted) == list(range(len(lengths)))
    for share in plan:
        for part in share:
            assert fits(lengths, part.rows, bounds)
            assert len(part.rows) == 1 or not part.filler
    for parts in zip(*plan, strict=True):  # the processes go through the model side by side
        assert not all(part.filler for part in parts)
    for share in plan:
        each = [int(lengths[part.rows].sum() if bounds.padding_free else len(part.rows) * lengths[part.rows].max())
                for part in share]  # fmt: skip
        costs = [(part.filler, -cost) for part, cost in zip(share, each, strict=True)]
        assert world == 1 or costs == sorted(costs), "like cost stands beside like"


@given(lengths=lengths_of, bounds=dealt_of, world=some.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_fillers_only_where_rows_do_not_go_round(lengths: np.ndarray, bounds: Bounds, world: int) -> None:
    plan = plan_batch(lengths, bounds, world)
    fillers = sum(part.filler for share in plan for part in share)
    assert fillers < world
    if len(lengths) % world == 0:
        assert fillers == 0


@given(lengths=lengths_of, bounds=bounds_of, world=some.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_evaluation_is_cut_the_same_for_any_world(lengths: np.ndarray, bounds: Bounds, world: int) -> None:
    alone = [part.rows.tolist() for part in plan_evaluation(lengths, bounds, 1)[0]]
    plan = plan_evaluation(lengths, bounds, world)
    counted = [part.rows.tolist() for share in plan for part in share if not part.filler]
    assert sorted(counted) == sorted(alone)
    assert sorted(row for rows in counted for row in rows) == list(range(len(lengths)))
    assert len({len(share) for share in plan}) == 1
    assert sum(part.filler for share in plan for part in share) == -len(alone) % world


@given(lengths=lengths_of, bounds=bounds_of, world=some.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_processes_never_take_longer_than_with_like_rows(lengths: np.ndarray, bounds: Bounds, world: int) -> None:
    """Each row `world` times: no process has more to do than if each had every row once and cut them as one would."""
    alone = cost(lengths, cut(lengths, bounds), bounds.overhead)
    assert busiest(np.repeat(lengths, world), plan_batch(np.repeat(lengths, world), bounds, world), bounds) <= alone


@given(lengths=lengths_of, bounds=bounds_of, world=some.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_without_padding_processes_never_take_longer_than_with_neighbours_dealt_out(
    lengths: np.ndarray, bounds: Bounds, world: int
) -> None:
    """The lengths of the busiest's rows, and the overhead of its micro-batches, of which there are not more either."""

    def busy(plan: list[list[MicroBatch]]) -> int:
        tokens = [sum(int(lengths[part.rows].sum()) for part in share if not part.filler) for share in plan]
        return max(tokens) + bounds.overhead * len(plan[0])

    free = plan_batch(lengths, replace(bounds, padding_free=True), world)
    groups = cut(lengths, bounds, world)
    dealt = sum(-(-len(group) // world) * int(lengths[group[0]]) for group in groups)
    assert busy(free) <= dealt + bounds.overhead * len(groups)
    assert len(free[0]) <= max(len(groups), len(lengths) // world)


def test_without_padding_a_micro_batch_holds_as_many_tokens_as_are_real() -> None:
    """Rows that would take 32 x 512 with padding go at once, but not what would take 4 times the bound with it."""
    mixed, free = np.array([512, *[40] * 31]), Bounds(tokens=4096, overhead=2**20, padding_free=True)
    assert [len(group) for group in cut(mixed, free)] == [32]
    assert [len(group) for group in cut(mixed, replace(free, padding_free=False))] == [1, 31]
    assert [len(group) for group in cut(np.array([512, *[5] * 63]), free)] == [1, 63]
    assert [len(group) for group in cut(np.full(32, 512), free)] == [8] * 4


@pytest.mark.parametrize(("rows", "most"), [(64, 1.08), (256, 1.025)])
@pytest.mark.parametrize("overhead", [1000, 2**20])
def test_without_padding_the_busiest_has_hardly_more_than_the_mean(rows: int, most: float, overhead: int) -> None:
    """On eight processes, on average; dealt out as if padding cost 1.17 and 1.15. And no more micro-batches."""
    generator, found = np.random.default_rng(0), []
    for _ in range(20):
        lengths = generator.lognormal(5, 0.8, rows).clip(5, 512).astype(np.int64)
        bounds = Bounds(tokens=16_384, overhead=overhead, padding_free=True)
        plan = plan_batch(lengths, bounds, 8)
        tokens = [sum(int(lengths[part.rows].sum()) for part in share) for share in plan]
        found.append(max(tokens) / np.mean(tokens))
        assert len(plan[0]) <= len(plan_batch(lengths, replace(bounds, padding_free=False), 8)[0])
    assert np.mean(found) < most


@given(lengths=lengths_of, bounds=bounds_of, world=some.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_processes_never_take_longer_than_with_neighbours_dealt_out(
    lengths: np.ndarray, bounds: Bounds, world: int
) -> None:
    """Row by row in order of length, whatever the micro-batches: the way of dealing that runs of rows are to beat."""
    groups = cut(lengths, bounds, world)
    tall = [int(lengths[group[0]]) for group in groups]
    most = sum(-(-len(group) // world) * longest + bounds.overhead for group, longest in zip(groups, tall, strict=True))
    assert busiest(lengths, plan_batch(lengths, bounds, world), bounds) <= most


@given(lengths=lengths_of, bounds=bounds_of, world=some.integers(2, 6), seed=some.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_plan_knows_lengths_only(lengths: np.ndarray, bounds: Bounds, world: int, seed: int) -> None:
    """All processes make the same plan, and where rows stand in the batch plays no part."""
    mixed = np.random.default_rng(seed).permutation(lengths)
    plans = [
        [[(lengths[part.rows].tolist(), part.filler) for part in share] for share in plan_batch(lengths, bounds, world)]
        for lengths in (lengths, lengths.copy(), mixed)
    ]
    assert plans[0] == plans[1] == plans[2]


@given(lengths=lengths_of, bounds=bounds_of)
@settings(max_examples=60, deadline=None)
def test_one_process_cuts_at_the_least_cost(lengths: np.ndarray, bounds: Bounds) -> None:
    (share,) = plan_batch(lengths, bounds, 1)
    assert [part.rows.tolist() for part in share] == [group.tolist() for group in cut(lengths, bounds)]


def test_a_row_longer_than_the_bound_goes_alone() -> None:
    groups = cut(np.array([5, 100, 5, 5]), Bounds(tokens=15))
    assert [group.tolist() for group in groups] == [[1], [0, 2, 3]]


def test_without_bounds_and_with_dear_micro_batches_everything_goes_at_once() -> None:
    assert [len(group) for group in cut(np.arange(1, 33), Bounds(overhead=10**6))] == [32]


def test_free_micro_batches_hold_one_length_each() -> None:
    lengths = np.array([3, 9, 3, 9, 9, 1])
    groups = cut(lengths, Bounds(overhead=0))
    assert all(len(set(lengths[group])) == 1 for group in groups)


def test_fewer_rows_than_processes_are_filled_up() -> None:
    plan = plan_batch(np.array([7]), Bounds(tokens=100), 3)
    assert [[part.filler for part in share] for share in plan].count([False]) == 1
    assert all(part.rows.tolist() == [0] for share in plan for part in share)


def test_equal_lengths_are_cut_the_same_each_time() -> None:
    lengths = np.array([4] * 10)
    assert [group.tolist() for group in cut(lengths, Bounds(rows=4))] == [
        group.tolist() for group in cut(lengths.copy(), Bounds(rows=4))
    ]


def test_small_integer_types_do_not_overflow() -> None:
    lengths = np.full(3000, 500, dtype=np.int16)
    assert sum(len(group) for group in cut(lengths, Bounds(tokens=10**6, overhead=10))) == 3000
    parts = [MicroBatch(group) for group in cut(lengths, Bounds(tokens=10**6))]
    assert computed(lengths, parts, Bounds()) == 1_500_000


def test_fillers_count_as_computed() -> None:
    lengths = np.array([4, 2])
    parts = [MicroBatch(np.array([0, 1])), MicroBatch(np.array([1]), filler=True)]
    assert computed(lengths, parts, Bounds()) == 10
    assert computed(lengths, parts, Bounds(padding_free=True)) == 8


@pytest.mark.parametrize(("world", "least"), [(1, 0.90), (2, 0.86), (4, 0.80)])
def test_padding_efficiency_on_lengths_of_sst2(world: int, least: float) -> None:
    """Each process pads alone: the fewer of the 32 rows it has, the fewer it finds of like length."""
    lengths = np.repeat(list(SST2), list(SST2.values()))
    assert len(lengths) == 67_349
    order = Order((len(lengths),), (len(lengths),), 32, 0)
    batches = [lengths[order.examples(update)] for update in range(1, 301)]
    bounds = Bounds(tokens=16_384, overhead=12)
    plans = [(batch, plan_batch(batch, bounds, world)) for batch in batches]
    taken = sum(computed(batch, share, bounds) for batch, plan in plans for share in plan)
    assert sum(int(batch.sum()) for batch in batches) / taken >= least


@pytest.mark.parametrize("world", [2, 4, 8, 16])
@pytest.mark.parametrize("batch", [16, 32, 64, 128, 256, 512])
def test_processes_have_equal_work_on_lengths_of_chats(batch: int, world: int) -> None:
    """The costliest has at most 1.05 of the mean to do, on average over updates, from 8 rows a process on.

    With fewer, a single row is often longer than that: then it has at most 1.05 of that row.
    """
    generator, ratios, against_least = np.random.default_rng(0), [], []
    for _ in range(40):
        lengths = np.clip(generator.lognormal(5, 1, batch).astype(np.int64), 1, 2048)
        plan = plan_batch(lengths, Bounds(tokens=8192, overhead=100), world)
        costs = [sum(len(part.rows) * int(lengths[part.rows].max()) for part in share) for share in plan]
        ratios.append(max(costs) / np.mean(costs))
        against_least.append(max(costs) / max(lengths.max(), np.mean(costs)))
    assert np.mean(against_least) <= 1.05
    assert np.mean(ratios) <= 1.05 or batch < 8 * world


@pytest.mark.parametrize("world", [2, 8])
def test_a_bound_on_rows_does_not_make_work_unequal(world: int) -> None:
    """Micro-batches of equally many rows leave nothing to even out with: then rows are dealt out one by one."""
    generator, ratios = np.random.default_rng(0), []
    for _ in range(40):
        lengths = np.clip(generator.lognormal(5, 1, 32 * world).astype(np.int64), 1, 2048)
        plan = plan_batch(lengths, Bounds(rows=8, overhead=100), world)
        assert all(len(part.rows) <= 8 for share in plan for part in share)
        costs = [sum(len(part.rows) * int(lengths[part.rows].max()) for part in share) for share in plan]
        ratios.append(max(costs) / np.mean(costs))
    assert np.mean(ratios) <= 1.05
