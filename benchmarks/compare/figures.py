"""Figures of the rounds → medians, ratios with their intervals, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""By peer: what each round told (see `meter`)."""


def speed(told: Mapping[str, Any]) -> float:
    """Return real tokens a second, end to end."""
    return float(told["tokens"] / told["seconds"])


def ratio(ones: Sequence[float], others: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """Return the median of the rounds' ratios, and its 95 % interval by bootstrap over rounds.

    Round by round, since the peers of a round ran one after the other on the same machine in the same mood.
    """
    each = np.array(ones) / np.array(others)
    drawn = np.random.default_rng(0).choice(each, (draws, len(each)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(each)), float(low), float(high)


def table(rounds: Rounds, work_per_token: float, best_matmul: float) -> list[str]:
    """Return the lines of a table in Markdown.

    work_per_token: floating point operations of a real token, forward and backward; best_matmul: a second, as measured.
    """
    lines = [
        "| | real tokens/s | ours / this (95 %) | padding efficiency | of best matmul | memory | first update | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = [speed(told) for told in rounds["ours"]]
    for peer, tellings in rounds.items():
        speeds = [speed(told) for told in tellings]
        median, low, high = ratio(ours, speeds)
        efficiency, memory, first = (
            float(np.median([told[key] for told in tellings])) for key in ("efficiency", "memory", "first_update")
        )
        loss = np.mean([np.mean(told["losses"]) for told in tellings])
        lines.append(
            f"| {peer} | {np.median(speeds):,.0f} | {median:.2f} ({low:.2f} to {high:.2f}) | {efficiency:.2f} | "
            f"{np.median(speeds) * work_per_token / best_matmul:.2f} | {memory:,.0f} MB | {first:.1f} s | {loss:.4f} |"
        )
    return lines
