"""The figures of experiments/number_formats."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.patches import Patch, Rectangle

from experiments.lib.plots import PALETTE, Axes, Figure, plt
from experiments.number_formats.core import GRIDS, VALUE, Grid

Histograms = Mapping[str, Mapping[str, Sequence[float]]]
BLACK, GREY = PALETTE[6], "#888888"
COLOURS = dict(
    zip(
        (grid.name for grid in GRIDS),
        (BLACK, BLACK, PALETTE[5], PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[3], PALETTE[4], GREY, GREY),
        strict=True,
    )
)
_PARTS = {"sign": BLACK, "exponent": PALETTE[4], "mantissa": PALETTE[0], "integer": "#D5E8F3", "unused": "white"}

_NAMES = {  # where a format's name stands in the figure of errors: magnitude, error, alignment
    "float64": (3e1, 1.8e-16, "bottom"),
    "float32": (3e1, 9e-8, "bottom"),
    "tensorfloat32": (1.5e-10, 5.5e-4, "bottom"),
    "bfloat16": (1.5e-10, 4.3e-3, "bottom"),
    "float16": (1.5e-4, 4.4e-4, "top"),
    "float8_e4m3fn": (7e0, 5.7e-2, "top"),
    "float8_e5m2": (1.2e3, 1.15e-1, "top"),
    "float4_e2m1fn": (7.7e0, 2.5e-1, "center"),
    "int8": (1.3e0, 4.3e-3, "bottom"),
    "int4": (1.3e0, 8.6e-2, "center"),
}


def layouts() -> Figure:
    """One bar per format, a cell per bit, most significant bit first."""
    figure, axes = plt.subplots(figsize=(10, 4.6))
    for line, grid in enumerate(GRIDS):
        value = "mantissa" if grid.exponent_bits else "integer"
        parts = (
            ("sign", 1),
            ("exponent", grid.exponent_bits),
            (value, grid.mantissa_bits),
            ("unused", grid.stored_bits - grid.bits),
        )
        start = 0
        for part, width in parts:
            _cells(axes, part, start, line, width)
            start += width
        stored = "" if grid.bits == grid.stored_bits else f" of {grid.stored_bits}"
        axes.text(start + 0.6, line, f"{grid.bits}{stored} bits", va="center", fontsize=9)
    axes.set(xlim=(-0.2, 71), ylim=(len(GRIDS) - 0.4, -0.6))
    axes.set_yticks(range(len(GRIDS)), [grid.name for grid in GRIDS])
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    handles = [
        Patch(facecolor=colour, edgecolor="#666666", label={"integer": "integer value"}.get(part, part))
        for part, colour in _PARTS.items()
    ]
    axes.legend(handles=handles, loc="lower right", fontsize=9)
    return figure


def _cells(axes: Axes, part: str, start: int, line: int, width: int) -> None:
    """The bits of one part of a format, and their number in the middle."""
    colour = _PARTS[part]
    axes.barh(
        [line] * width, 1, 0.72, range(start, start + width), align="center", color=colour, edgecolor="#666666",
        linewidth=0.5, linestyle=":" if part == "unused" else "-",
    )  # fmt: skip
    if width:
        patch = {"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"} if width > 2 else None
        ink = "white" if part in ("sign", "mantissa") else "black"
        axes.text(start + width / 2, line, str(width), ha="center", va="center", fontsize=9, color=ink, bbox=patch)


def errors() -> Figure:
    """The largest relative rounding error of each format against magnitude, log-log, with a cut in the vertical axis."""
    x = np.geomspace(1e-10, 1e7, 4000)
    dashes = {"tensorfloat32": (0, (6, 3)), "int8": (0, (4, 1, 1, 1)), "int4": (0, (4, 1, 1, 1))}
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(10, 6.2), gridspec_kw={"height_ratios": [4, 1]})
    for grid in GRIDS:
        error = grid.worst_error(x)
        axes = lower if grid.mantissa_bits > 10 and grid.exponent_bits else upper
        shown = np.where(error < 1, error, np.nan)
        axes.plot(x, shown, color=COLOURS[grid.name], linestyle=dashes.get(grid.name, "-"), linewidth=2)
        largest = float(grid.max)
        if largest < x[-1]:
            end = error[np.isfinite(error)][-1]
            axes.plot([largest, largest], [end, 1], color=COLOURS[grid.name], linestyle=":", linewidth=1.2)
            axes.plot(largest, end, "o", color=COLOURS[grid.name], markersize=5)
        where, height, side = _NAMES[grid.name]
        axes.text(where, height, grid.name, color="black", fontsize=9, va=side)
    upper.set_ylim(1e-4, 2)
    lower.set_ylim(2e-17, 1e-5)
    upper.axhline(1, color=GREY, linewidth=0.8)
    upper.text(1.5e-10, 1.1, "1: rounded to 0", fontsize=9, va="bottom")
    for axes in (upper, lower):
        axes.set(xscale="log", yscale="log")
        axes.minorticks_off()
    lower.set_yticks([1e-16, 1e-12, 1e-8])
    upper.set_xlim(x[0], x[-1])
    upper.spines["bottom"].set_visible(False)
    upper.tick_params(bottom=False)
    upper.set_ylabel("largest relative rounding error")
    lower.set_xlabel("magnitude (left: subnormal numbers, then rounded to 0; dot and dotted line: the largest number)")
    return figure


def number_line() -> Figure:
    """The numbers of each format around 0.3952: a wide window, and a narrow one for the formats of many bits."""
    value = float(VALUE)
    figure, (wide, narrow) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=[1.25, 1])
    grids = [grid for grid in GRIDS if grid.name != "float64"]
    _ticks(wide, grids, (-0.02, 0.53), "numbers between 0 and 0.53")
    _ticks(narrow, grids, (value - 0.0024, value + 0.0024), f"within {value} ± 0.0024")
    wide.set_yticks(range(len(grids)), [grid.name for grid in grids])
    narrow.set_yticks(range(len(grids)), [""] * len(grids))
    narrow.set_xticks([value - 0.002, value, value + 0.002])
    wide.set_xticks([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    return figure


def _ticks(axes: Axes, grids: Sequence[Grid], window: tuple[float, float], title: str) -> None:
    low, high = window
    per_inch = 60  # more numbers than that are a band
    for line, grid in enumerate(grids):
        gap, nearest = float(grid.gap(VALUE)), float(grid.nearest(VALUE))
        if (high - low) / gap > 5 * per_inch:
            axes.add_patch(
                Rectangle((max(low, 0.0), line - 0.28), high - max(low, 0.0), 0.56, color="#cccccc", linewidth=0)
            )
        else:
            axes.vlines(grid.around(max(low, 0.0), high), line - 0.28, line + 0.28, color="#666666", linewidth=0.9)
        if low <= nearest <= high:
            axes.plot(nearest, line, "o", color=PALETTE[1], markersize=7, markeredgecolor="white", zorder=4)
        else:
            place, text = (0.99, f"{nearest:.5g} ▸") if nearest > high else (0.01, f"◂ {nearest:.5g}")
            side: Literal["right", "left"] = "right" if nearest > high else "left"
            axes.text(place, line, text, transform=axes.get_yaxis_transform(), fontsize=9, va="center", ha=side)
    axes.axvline(float(VALUE), color=PALETTE[0], linewidth=1.2, zorder=3)
    axes.set(title=title, xlim=(low, high), ylim=(len(grids) - 0.5, -0.7))
    axes.tick_params(left=False)
    axes.grid(False)
    axes.spines["left"].set_visible(False)


def ranges(histograms: Histograms, titles: Mapping[str, str]) -> Figure:
    """Share of the numbers in each factor of two, and below them each format's range.

    Args:
        histograms: name -> `exponent` and `share`, of the bins [2^e, 2^(e+1)) that hold numbers.
        titles: name -> the panel's.
    """
    bins = [bin for part in histograms.values() for bin in zip(part["exponent"], part["share"], strict=True)]
    taken = [exponent for exponent, share in bins if share > 1e-6]
    low, high = min([-30, *taken]) - 1, max([20, *taken]) + 1
    count = len(histograms)
    figure, axes = plt.subplots(
        count + 1, 1, sharex=True, figsize=(10, 2.1 * count + 4), gridspec_kw={"height_ratios": [2] * count + [3.2]}
    )
    for axis, (name, part), colour in zip(axes, histograms.items(), (PALETTE[0], PALETTE[1]), strict=False):
        axis.bar(np.array(part["exponent"]) + 0.5, part["share"], width=0.92, color=colour)
        axis.set_ylabel("share per\nfactor of 2")
        axis.set_title(titles[name], fontsize=11)
    _spans(axes[-1], low, high)
    return figure


def _spans(axes: Axes, low: float, high: float) -> None:
    """A bar per format: thick from the smallest normal to the largest number, thin over the subnormal ones."""
    for line, grid in enumerate(GRIDS):
        smallest, normal, largest = (
            np.log2(float(number)) for number in (grid.min_subnormal, grid.min_normal, grid.max)
        )
        axes.plot(
            [max(smallest, low), max(normal, low)], [line, line], color="#777777", linewidth=2.5, solid_capstyle="butt"
        )
        axes.barh(line, min(largest, high) - max(normal, low), left=max(normal, low), height=0.56, color="#bbbbbb")
        if smallest < low:
            axes.text(low + 0.3, line, f"◂ {smallest:.0f}", va="center", fontsize=9)
        if largest > high:
            axes.text(high - 0.3, line, f"{largest:.0f} ▸", va="center", ha="right", fontsize=9)
    axes.set_yticks(range(len(GRIDS)), [grid.name for grid in GRIDS])
    axes.set(xlim=(low, high), ylim=(len(GRIDS) - 0.4, -0.6))
    axes.set_xlabel(
        "log₂ of the magnitude (formats unscaled, integers with largest number 1; thin line: subnormal numbers)"
    )
