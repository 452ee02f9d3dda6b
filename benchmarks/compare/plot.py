"""The same figures as bars."""

from __future__ import annotations

from pathlib import Path

from benchmarks.compare.figures import Rounds, interval, speed


def draw(rounds: Rounds, title: str, file: Path) -> None:
    """Write a PNG: real tokens a second of each peer that did not fail, medians with their 95 % intervals.

    Raises `ImportError` where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {peer: [speed(told) for told in tellings if told] for peer, tellings in rounds.items()}
    bars = {peer: interval(values) for peer, values in found.items() if values}
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.45 * len(bars)))
    names, medians = list(bars), [bar[0] for bar in bars.values()]
    around = [[bar[0] - bar[1] for bar in bars.values()], [bar[2] - bar[0] for bar in bars.values()]]
    colours = ["#1f77b4" if name.startswith("ours") else "#b0b0b0" for name in names]
    drawn = axes.barh(names, medians, xerr=around, color=colours, capsize=3)
    axes.bar_label(drawn, labels=[f"{median:,.0f}" for median in medians], padding=6)
    axes.invert_yaxis()
    axes.set_xlim(0, max(bar[2] for bar in bars.values()) * 1.15)
    axes.set_xlabel("real tokens a second")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
