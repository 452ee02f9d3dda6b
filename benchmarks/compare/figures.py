"""Figures of the rounds → medians, ratios with their intervals, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Told = Mapping[str, Any] | None
Rounds = Mapping[str, Sequence[Told]]
"""By peer: what each round told (see `meter`); None where it failed."""


@dataclass(frozen=True)
class Machine:
    """What it can do: operations a second, as stated for it (None: nothing is) and as the best matmul measured here."""

    stated: float | None
    matmul: float


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


def table(rounds: Rounds, work_per_token: float, machine: Machine) -> list[str]:
    """Return the lines of a table in Markdown.

    work_per_token: floating point operations of a real token, forward and backward.
    """
    lines = [
        "| | real tokens/s | targets/s | ours / this (95 %) | padding efficiency | MFU | of best matmul | memory | "
        "first update | mean loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for peer, tellings in rounds.items():
        found = [told for told in tellings if told is not None]
        if not found:
            if tellings:
                lines.append(f"| {peer} | failed | | | | | | | | |")
            continue
        pairs = [(one, told) for one, told in zip(rounds["ours"], tellings, strict=False) if one and told]
        against = "–"
        if pairs:
            median, low, high = ratio([speed(one) for one, _ in pairs], [speed(told) for _, told in pairs])
            against = f"{median:.2f} ({low:.2f} to {high:.2f})" if len(pairs) > 2 else f"{median:.2f}"
        tokens, targets = (np.median([speed(told, kind) for told in found]) for kind in ("tokens", "targets"))
        efficiency, memory, first = (
            float(np.median([told[key] for told in found])) for key in ("efficiency", "memory", "first_update")
        )
        stated = f"{tokens * work_per_token / machine.stated:.2f}" if machine.stated else "–"
        loss = np.mean([np.mean(told["losses"]) for told in found])
        lines.append(
            f"| {peer} | {tokens:,.0f} | {targets:,.0f} | {against} | {efficiency:.2f} | {stated} | "
            f"{tokens * work_per_token / machine.matmul:.2f} | {memory:,.0f} MB | {first:.1f} s | {loss:.4f} |"
        )
    return lines
