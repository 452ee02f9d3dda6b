"""Figures of the rounds → medians, ratios with their intervals, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Told = Mapping[str, Any] | None
Rounds = Mapping[str, Sequence[Told]]
"""By peer: what each round told (see `meter`); None where it failed."""


LAST = 10
"""Updates of which the mean is the final loss, or as many as are counted."""


def speed(told: Mapping[str, Any], kind: str = "tokens") -> float:
    """Return real tokens a second, end to end; or targets."""
    return float(told[kind] / told["seconds"])


def interval(values: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """Return the median and its 95 % interval by bootstrap."""
    each = np.array(values)
    drawn = np.random.default_rng(0).choice(each, (draws, len(each)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(each)), float(low), float(high)


def ratio(ones: Sequence[float], others: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """Return the median of the rounds' ratios, and its 95 % interval by bootstrap over rounds.

    Round by round, since the peers of a round ran one after the other on the same machine in the same mood.
    """
    return interval((np.array(ones) / np.array(others)).tolist(), draws)


def table(rounds: Rounds, work_per_token: float, stated: float | None) -> list[str]:
    """Return the lines of a table in Markdown, and what is missing from it.

    work_per_token: floating point operations of a real token, forward and backward. stated: operations a second that
    are stated for the machine, None if nothing is. The best matmul is the median of all that the peers measured, each
    in its own process when it had learned.
    """
    lines = [
        "| | real tokens/s | targets/s | ours / this (95 %) | padding efficiency | MFU | of best matmul | memory | "
        "first update | mean loss | final loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    best = _best_matmul(rounds)
    for peer, tellings in rounds.items():
        found = [told for told in tellings if told is not None]
        if not found:
            lines.append(f"| {peer} | {'failed' if tellings else 'not begun'} | | | | | | | | | |")
            continue
        tokens, targets = (np.median([speed(told, kind) for told in found]) for kind in ("tokens", "targets"))
        efficiency, memory, first = (
            float(np.median([told[key] for told in found])) for key in ("efficiency", "memory", "first_update")
        )
        of_stated = f"{tokens * work_per_token / stated:.2f}" if stated else "–"
        mean, final = (float(np.mean([losses(told)[last] for told in found])) for last in (0, 1))
        lines.append(
            f"| {peer} | {tokens:,.0f} | {targets:,.0f} | {_against(rounds['ours'], tellings)} | {efficiency:.2f} | "
            f"{of_stated} | {tokens * work_per_token / best:.2f} | {memory:,.0f} MB | {first:.1f} s | {mean:.4f} | "
            f"{final:.4f} |"
        )
    return [*lines, *_others(rounds), *missing(rounds)]


def _others(rounds: Rounds) -> list[str]:
    """Return a line that says what others took of the processors in the meantime."""
    parts = [told["others"] for tellings in rounds.values() for told in tellings if told is not None]
    if not parts:
        return []
    return ["", f"Of the processors others took {np.median(parts):.1%} while a peer learned, at most {max(parts):.1%}."]


def losses(told: Mapping[str, Any]) -> tuple[float, float]:
    """Return the mean loss of the updates that are counted, and of the last of them.

    Where a peer goes from long rows to short ones the last are of other rows than the others': the first says more.
    """
    counted = told["losses"][told["warm"] :]
    return float(np.mean(counted)), float(np.mean(counted[-LAST:]))


def missing(rounds: Rounds) -> list[str]:
    """Return a line for each peer that was not measured in as many rounds as others were."""
    most = max(map(len, rounds.values()), default=0)
    lines = []
    for peer, tellings in rounds.items():
        measured = sum(told is not None for told in tellings)
        if measured < len(tellings):
            lines.append(f"{peer}: failed, measured in {measured} of {most} rounds.")
        elif measured < most or not most:
            lines.append(f"{peer}: for want of time, measured in {measured} of {most} rounds.")
    return ["", *lines] if lines else []


def _best_matmul(rounds: Rounds) -> float:
    found = [told["matmul"] for tellings in rounds.values() for told in tellings if told is not None]
    return float(np.median(found)) if found else float("nan")


def _against(ours: Sequence[Told], tellings: Sequence[Told]) -> str:
    pairs = [(speed(one), speed(told)) for one, told in zip(ours, tellings, strict=False) if one and told]
    if not pairs:
        return "–"
    median, low, high = ratio(*zip(*pairs, strict=True))
    return f"{median:.2f} ({low:.2f} to {high:.2f})" if len(pairs) > 2 else f"{median:.2f}"
