"""Figures of what `companion.metrics` computed: intervals, differences, confusion, reliability, over time.

Every function takes the Axes to draw on, makes a figure where there is none, and returns the Axes. Colours
are those of the style in use (`plt.style.use("companion.style")`), and nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.ticker import MaxNLocator

from companion.metrics import Calibration, Estimate, Paired

_ENDS = ("value", "low", "high")  # an Estimate's numbers: None becomes NaN, which is not drawn


def intervals(estimates: Mapping[str, Estimate], ax: Axes | None = None) -> Axes:
    """Each estimate by name, from the top: a point with its interval. One that is not defined says so."""
    ax = ax or plt.subplots()[1]
    _rows(ax, list(estimates), list(estimates.values()))
    names = {estimate.what for estimate in estimates.values()}
    ax.set_xlabel(names.pop() if len(names) == 1 else "")
    return ax


def differences(pairs: Mapping[str, Paired], ax: Axes | None = None) -> Axes:
    """Each paired difference by name, and a line at 0. Points are hollow where the interval holds 0."""
    ax = ax or plt.subplots()[1]
    found = [pair.difference for pair in pairs.values()]
    clear = [one.low is not None and not one.low <= 0 <= one.high for one in found]
    ax.axvline(0, color=rcParams["axes.edgecolor"], linewidth=1, linestyle="--", zorder=0)
    _rows(ax, list(pairs), found, clear)
    ax.set_xlabel("difference")
    return ax


def _rows(ax: Axes, names: list[str], found: list[Estimate], filled: list[bool] | None = None) -> None:
    for row, estimate in enumerate(found):
        if estimate.value is None:
            # Placed within the axes whatever the numbers of the others are.
            ax.text(0.02, row, "not defined", transform=ax.get_yaxis_transform(), va="center", style="italic")
            continue
        face = "C0" if filled is None or filled[row] else ax.get_facecolor()
        ax.errorbar(
            estimate.value,
            row,
            xerr=_ends(estimate),
            fmt="o",
            color="C0",
            markerfacecolor=face,
            capsize=3,
        )
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _ends(estimate: Estimate) -> np.ndarray | None:
    """The lengths of an interval to both sides, as matplotlib wants them."""
    if estimate.low is None or estimate.high is None:
        return None
    return np.maximum([[estimate.value - estimate.low], [estimate.high - estimate.value]], 0)


def confusion(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Counts by true label (rows) and given label (columns), as `metrics.confusion` gives them.

    The shade is the share of the row, so that rare labels show as well as frequent ones.
    """
    ax = ax or plt.subplots()[1]
    ground, ink = ax.get_facecolor(), rcParams["text.color"]
    shades = LinearSegmentedColormap.from_list("counts", [ground, "C0"])
    counts = table.to_numpy()
    if not counts.size:
        ax.text(0.5, 0.5, "no samples", ha="center", va="center", style="italic", transform=ax.transAxes)
        return ax
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap=shades, vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        back = shades(shares[row, column])
        color = max(ink, ground, key=lambda text, back=back: _contrast(text, back))
        ax.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    ax.set_xticks(range(counts.shape[1]), table.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(counts.shape[0]), table.index)
    ax.set(xlabel="said", ylabel="truth")
    return ax


def _contrast(one: Any, other: Any) -> float:
    """The contrast of two colours, 1 to 21 (WCAG 2.2)."""
    light = sorted(_luminance(color) for color in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


def _luminance(color: Any) -> float:
    rgb = np.array(to_rgb(color))
    return float(
        np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    )


def reliability(found: Calibration, ax: Axes | None = None) -> Axes:
    """The share right at each confidence, with its interval; on the dashed line both are the same."""
    ax = ax or plt.subplots()[1]
    table = found.table
    ends = np.maximum([table["right"] - table["low"], table["high"] - table["right"]], 0)
    ax.plot([0, 1], [0, 1], color=rcParams["axes.edgecolor"], linewidth=1, linestyle="--")
    ax.errorbar(table["confidence"], table["right"], yerr=ends, fmt="o", color="C0", capsize=3)
    ax.set(xlabel="confidence", ylabel="share right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return ax


def over_time(when: Sequence[Any], estimates: Sequence[Estimate], ax: Axes | None = None) -> Axes:
    """Estimates in the order of time, with their intervals; a gap where one is not defined.

    when: for each estimate its date, its number or its name.
    """
    if len(when) != len(estimates):
        raise ValueError(f"there are {len(when)} times for {len(estimates)} estimates: give one for each")
    ax = ax or plt.subplots()[1]
    value, low, high = (np.array([getattr(one, end) for one in estimates], float) for end in _ENDS)
    ends = np.maximum([value - low, high - value], 0)
    ax.errorbar(when, value, yerr=ends, marker="o", color="C0", capsize=3)
    names = {one.what for one in estimates}
    ax.set_ylabel(names.pop() if len(names) == 1 else "")
    if all(isinstance(one, int) for one in when):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax
