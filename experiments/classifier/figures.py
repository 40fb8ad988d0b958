"""The figures of the classifier's experiment."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.patches import Patch

from experiments.classifier.rows import Point, Row, Score, Search
from experiments.lib.plots import BLUE, PALETTE, Figure, plt

COLOURS = {"folded": PALETTE[1], "kept": BLUE}
NEVER = "#bbbbbb"


def sensitivity(scores: Sequence[Score], tolerances: Sequence[float], fmt: str) -> Figure:
    """Bars of the layers' predicted KL, one panel per form; colours say from which tolerance the search lowered them."""
    shades = plt.get_cmap("Greens_r")(np.linspace(0, 0.6, len(tolerances)))  # the least tolerance is the darkest
    colours: dict[float | None, str] = dict(zip(sorted(tolerances), map(to_hex, shades), strict=True))
    figure, axes = plt.subplots(2, 1, figsize=(11, 7), sharex=True, sharey=True)
    for axis, form in zip(axes, COLOURS, strict=True):
        rows = [row for row in scores if (row.format, row.batch_norm) == (fmt, form)]
        values = np.nan_to_num(np.array([row.score for row in rows], float), posinf=0)
        axis.bar(range(len(rows)), values, color=[colours.get(row.lowered_at, NEVER) for row in rows], width=0.8)
        axis.set(title=f"{fmt}, batch norm {form}", ylabel="predicted KL, nats", xlim=(-1, len(rows)))
        axis.set_xticks(range(len(rows)), [row.layer for row in rows], rotation=90, fontsize=7)
    positive = [row.score for row in scores if row.format == fmt and row.score and np.isfinite(row.score)]
    if positive:
        axis.set_yscale("log")
        axis.set_ylim(bottom=min(positive) / 2)
    handles = [Patch(color=colour, label=f"lowered from {tolerance:.0%}") for tolerance, colour in colours.items()]
    handles.append(Patch(color=NEVER, label="float32 at every tolerance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def kl_against_layers(curves: Sequence[Point], searches: Sequence[Search]) -> Figure:
    """Calibration KL of prefixes of the ranking, the limits, and what the searches chose (held-out KL)."""
    formats = list(dict.fromkeys(row.format for row in curves))
    figure, axes = plt.subplots(1, len(formats), figsize=(4.6 * len(formats), 4.6), squeeze=False)
    for axis, fmt in zip(axes[0], formats, strict=True):
        for form, colour in COLOURS.items():
            points = [row for row in curves if (row.format, row.batch_norm) == (fmt, form) and row.kl]
            chosen = [row for row in searches if (row.format, row.batch_norm) == (fmt, form)]
            line = {"color": colour, "label": f"{form}, calibration"}
            axis.plot([row.layers_low for row in points], [row.kl for row in points], ".-", **line)
            hollow = {"markersize": 9, "markerfacecolor": "none", "color": colour, "label": f"{form}, chosen: held out"}
            axis.plot([row.layers_low for row in chosen], [row.kl_heldout for row in chosen], "o", **hollow)
        for limit in sorted({row.tolerance_value for row in searches if row.format == fmt}):
            axis.axhline(limit, color="black", linewidth=0.8, linestyle="--", label="limits")
        axis.set(title=fmt, xlabel="layers lowered, least sensitive first", yscale="log")
    axes[0, 0].set_ylabel("KL from float32, nats")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3)
    return figure


def agreement(rows: Sequence[Row]) -> Figure:
    """Top-1 agreement, held out: each tolerance and all layers low, per format and form; layers lowered on the bars."""
    low = [row for row in rows if row.name != "fp32"]
    formats = list(dict.fromkeys(row.format for row in low))
    places = [*sorted({row.tolerance for row in low if row.tolerance is not None}), None]  # None: all layers low
    figure, axes = plt.subplots(1, len(formats), figsize=(4.2 * len(formats), 4), squeeze=False, sharey=True)
    for axis, fmt in zip(axes[0], formats, strict=True):
        for number, (form, colour) in enumerate(COLOURS.items()):
            by_tolerance = {row.tolerance: row for row in low if (row.format, row.batch_norm) == (fmt, form)}
            shown = [by_tolerance[place] for place in places]
            x, heights = np.arange(len(places)) + 0.4 * number - 0.2, [100 * row.top1_agreement for row in shown]
            bars = axis.bar(x, heights, width=0.38, color=colour, label=form)
            axis.bar_label(bars, [str(row.layers_low) for row in shown], fontsize=9, padding=1)
        axis.set_xticks(range(len(places)), ["all low" if place is None else f"{place:.0%}" for place in places])
        axis.set(title=fmt, xlabel="tolerance", ylim=(0, 108))
    axes[0, 0].set_ylabel("top-1 agreement, %")
    title = "batch norm; number of lowered layers on the bars"
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, title=title)
    return figure
