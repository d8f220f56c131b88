"""Figures: how a loss fell, what was learned, whether predicted intervals hold what they promise; spectra.

Needs matplotlib (``pip install ritz[plot]``). Figures are built without pyplot: no window, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#6f6f6f"  # Okabe and Ito: told apart by everyone, and in print


def training_curve(axes: Axes, steps: Sequence[float], loss: Sequence[float], *, title: str, color: str = BLUE) -> None:
    """The loss over the steps of one phase.

    Args:
        axes: where to draw.
        steps: step numbers, increasing.
        loss: what is minimised, at each step; non-finite values leave a gap.
        title: what is being fitted, by what.
    """
    from matplotlib.ticker import MaxNLocator

    marker = "o" if len(steps) <= 60 else None
    axes.plot(steps, loss, color=color, marker=marker, markersize=3, linewidth=1.4)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(axes)


def calibration(axes: Axes, nominal: Sequence[float], observed: Sequence[float], *, rows: int, title: str) -> None:
    """Share of targets inside central intervals, against the level the intervals were made for.

    The band is where a calibrated model's points lie with probability 0.95 each, given ``rows`` independent rows.

    Args:
        axes: where to draw.
        nominal: levels in (0, 1), increasing.
        observed: share of the targets inside the interval of each level.
        rows: number of targets.
        title: above the panel.
    """
    grid = [i / 100 for i in range(101)]
    half = [1.96 * math.sqrt(p * (1 - p) / rows) for p in grid]
    low = [max(p - h, 0.0) for p, h in zip(grid, half)]
    high = [min(p + h, 1.0) for p, h in zip(grid, half)]
    axes.fill_between(grid, low, high, color=GREY, alpha=0.25, linewidth=0, label=f"chance, {rows} rows")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    axes.plot(nominal, observed, color=ORANGE, marker="o", markersize=3, linewidth=1.4, label="this model")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_title(title)
    axes.set_xlabel("nominal level of the central interval")
    axes.set_ylabel("share of test targets inside")
    axes.text(0.05, 0.66, "above the line:\nintervals too wide", transform=axes.transAxes, fontsize=8, color=GREY)
    axes.text(0.95, 0.22, "below the line:\ntoo narrow", transform=axes.transAxes, fontsize=8, color=GREY, ha="right")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _tidy(axes)


def length_scales(axes: Axes, names: Sequence[str], values: Sequence[float], *, title: str, most: int = 20) -> None:
    """Length-scales of the inputs, shortest (the input that the function depends on most) at the top.

    Args:
        axes: where to draw.
        names: of the inputs.
        values: their length-scales, positive, in units of each input's standard deviation.
        title: above the panel.
        most: how many are shown; a note says how many were left out.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])[:most]
    heights = list(range(len(order)))[::-1]
    low = min(values[i] for i in order) / 1.6
    axes.hlines(heights, low, [values[i] for i in order], color=GREY, alpha=0.35, linewidth=1.2)
    axes.plot([values[i] for i in order], heights, color=BLUE, marker="o", markersize=4.5, linestyle="none")
    axes.set_xscale("log")
    axes.set_xlim(left=low)
    axes.set_yticks(heights, [names[i] for i in order], fontsize=8)
    axes.set_title(title)
    more = f" ({len(values) - most} longer ones not shown)" if len(values) > most else ""
    axes.set_xlabel(f"standard deviations of the input{more}")
    _tidy(axes)


def fit_figure(
    phases: Sequence[Mapping[str, Any]],
    coverage: Mapping[str, Any],
    *,
    rows: int,
    title: str,
    scales: Mapping[str, float] | None = None,
) -> Figure:
    """One panel for each phase of the training, one for the length-scales, one for the calibration on held-out rows.

    Args:
        phases: each with ``title``, ``steps`` and ``loss``; phases without steps are left out.
        coverage: ``nominal`` levels and the ``observed`` share of targets inside.
        rows: number of held-out targets.
        title: above the figure.
        scales: length-scales by the name of the input; None or a single one leaves the panel out.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.
    """
    from matplotlib.figure import Figure

    shown = [phase for phase in phases if phase["steps"]]
    learned = scales is not None and len(scales) > 1
    panels = len(shown) + 1 + learned
    wide = min(panels, 2) if panels != 3 else 3
    tall = -(-panels // wide)
    figure = Figure(figsize=(4.3 * wide + 0.3, 4.1 * tall), layout="constrained", dpi=130)
    all_axes = list(figure.subplots(tall, wide, squeeze=False).flat)
    for axes, phase in zip(all_axes, shown):
        training_curve(axes, phase["steps"], phase["loss"], title=phase["title"])
    if shown:
        all_axes[0].set_ylabel("negative log evidence a row")
    if scales is not None and learned:
        length_scales(all_axes[len(shown)], list(scales), list(scales.values()), title="learned length-scales")
    calibration(
        all_axes[panels - 1], coverage["nominal"], coverage["observed"], rows=rows, title="calibration on held-out rows"
    )
    for axes in all_axes[panels:]:
        axes.set_axis_off()
    figure.suptitle(title)
    return figure


def spectrum(
    axes: Axes, grid: Sequence[float], density: Sequence[float], error: Sequence[float], *, title: str, log: bool = True
) -> None:
    """An eigenvalue density with a band of two standard errors, as :func:`ritz.spectral_density` returns it.

    Args:
        axes: where to draw.
        grid: points (g,).
        density, error: eigenvalues per unit length, and their standard error, (g,).
        title: above the panel.
        log: a logarithmic axis of the density; what is below a millionth of the largest is cut off.
    """
    points, height, half = ([float(v) for v in values] for values in (grid, density, error))
    floor = 1e-6 * max(height)
    low = [max(d - 2 * e, floor if log else d - 2 * e) for d, e in zip(height, half)]
    high = [max(d + 2 * e, floor) for d, e in zip(height, half)]
    axes.fill_between(points, low, high, color=BLUE, alpha=0.25, linewidth=0, label="two standard errors")
    axes.plot(points, [max(d, floor) if log else d for d in height], color=BLUE, linewidth=1.4)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
    axes.set_title(title)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("eigenvalues per unit length")
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
