"""The figures of the comparison of estimators."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FixedLocator, NullFormatter
from scipy.stats import rankdata

from experiments.estimators.checks import EPSILONS
from experiments.estimators.rows import FORMATS, Damping, Interaction, Row
from experiments.lib.plots import BLUE, GREEN, RED, Axes, Figure, plt

COLOURS = dict(zip(FORMATS, (RED, BLUE, GREEN), strict=True))
MARKERS = dict(zip(FORMATS, ("o", "s", "^"), strict=True))
GREY = "#777777"


def agreement_cost(rows: Sequence[Row]) -> Figure:
    """Spearman against seconds, one panel per model; each estimator is a column of three formats, named above it."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(len(models), 1, figsize=(11, 5.6 * len(models)), squeeze=False)
    for axis, model in zip(axes[:, 0], models, strict=True):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.model == model and row.spearman is not None:
                groups.setdefault(row.label, []).append(row)
        seconds = {name: group[0].seconds or 0.0 for name, group in groups.items()}
        free = min((t for t in seconds.values() if t > 0), default=1.0) / 3  # what computes nothing: at the left edge
        tops = {}
        for name, group in groups.items():
            place, values = max(seconds[name], free), [row.spearman or 0.0 for row in group]
            tops[name] = (place, max(values))
            axis.plot([place] * 2, [min(values), max(values)], color="#cccccc", linewidth=1, zorder=1)
            for row in group:
                axis.plot(place, row.spearman, MARKERS[row.format], color=COLOURS[row.format], markersize=6)
        axis.set_xscale("log")
        axis.set_ylim(top=1.04)
        axis.axhline(0.95, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_ylabel(f"{model}\nSpearman with measured")
        _names_above(axis, tops)
    axes[-1, 0].set_xlabel("seconds for all layers and formats, without compilation (left edge: no computation)")
    handles = [plt.Line2D([], [], marker=MARKERS[f], color=COLOURS[f], linestyle="", label=f) for f in FORMATS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(FORMATS))
    return figure


def _names_above(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names above the panel, in the order of their points and not too close, each with a thin line to its point."""
    names = sorted(points, key=lambda name: points[name])
    low, high = np.log10(axis.get_xlim())
    places, gap = [(np.log10(points[name][0]) - low) / (high - low) for name in names], 1 / max(len(names), 36)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1 - gap * (len(places) - 1 - i))
    line = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "relpos": (0.5, 0), "shrinkA": 0, "shrinkB": 3}
    for name, place in zip(names, places, strict=True):
        axis.annotate(
            name, points[name], (place, 1.03), textcoords="axes fraction", rotation=90, ha="center", va="bottom",
            fontsize=8, arrowprops=line, annotation_clip=False,
        )  # fmt: skip


def layers_lowered(rows: Sequence[Row]) -> Figure:
    """Layers lowered at 10 % of the all-low error per estimator of the output loss: a panel per model, a bar per format."""
    shown = [row for row in rows if row.loss in ("output", "none")]
    models = list(dict.fromkeys(row.model for row in shown))
    names = list(dict.fromkeys(row.label for row in shown if row.layers_low_10 is not None))
    counts = {(row.model, row.label, row.format): row.layers_low_10 for row in shown}
    size = (3.2 * len(models) + 2.4, 0.36 * len(names) + 1.6)
    figure, axes = plt.subplots(1, len(models), figsize=size, sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for offset, fmt in zip((-0.27, 0.0, 0.27), FORMATS, strict=True):
            for position, name in enumerate(names):
                count = counts.get((model, name, fmt))
                if count is None:
                    axis.text(0, position + offset, "–", fontsize=7, color=COLOURS[fmt], va="center")
                else:
                    axis.barh(position + offset, count, height=0.25, color=COLOURS[fmt])
        total = max(row.layers for row in shown if row.model == model)
        axis.set(title=model, xlim=(0, total), xlabel=f"layers of {total}")
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[fmt], label=fmt) for fmt in FORMATS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(FORMATS))
    figure.suptitle("layers lowered at 10 % of the all-low error")
    return figure


def interactions(pairs: Mapping[str, Mapping[str, np.ndarray]], verdicts: Sequence[Interaction]) -> Figure:
    """Measured against predicted loss of random subsets, with cross terms and without: a row per model."""
    kinds = (("cross_terms", "xᵀGx", "o", BLUE), ("diagonal", "diagonal only", "x", RED))
    better = {(row.model, row.format): row.better for row in verdicts}
    figure, axes = plt.subplots(len(pairs), len(FORMATS), figsize=(10, 3.2 * len(pairs)), squeeze=False)
    for line, (model, arrays) in zip(axes, pairs.items(), strict=True):
        for number, (axis, fmt) in enumerate(zip(line, FORMATS, strict=True)):
            measured, ends = arrays["measured"][number], []
            for kind, name, marker, colour in kinds:
                predicted = arrays[kind][number]
                good = np.isfinite(predicted) & np.isfinite(measured) & (predicted > 0) & (measured > 0)
                axis.loglog(measured[good], predicted[good], marker, color=colour, markersize=5, label=name, alpha=0.8)
                ends += [*predicted[good], *measured[good]]
            if ends:
                axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color=GREY, linewidth=1, zorder=0)
                for one in (axis.xaxis, axis.yaxis):
                    one.set_major_locator(FixedLocator(np.geomspace(min(ends), max(ends), 3).tolist()))
                    one.set_major_formatter("{x:.0e}")
                    one.set_minor_formatter(NullFormatter())
            axis.set_title(f"{fmt}\nbetter: {better[model, fmt]}", fontsize=10)
        line[0].set_ylabel(f"{model}\npredicted output loss", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("measured output loss")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def damping(scores: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], rows: Sequence[Damping]) -> Figure:
    """Each layer's rank by log-determinant over ε (left), and Spearman with the measured error over ε (right)."""
    figure, axes = plt.subplots(len(scores), 2, figsize=(10, 3.6 * len(scores)), squeeze=False)
    for (left, right), (model, values) in zip(axes, scores.items(), strict=True):
        order, count = np.array([_ranks(line) for line in values]), values.shape[1]  # (E, L)
        top = _ranks(truth[model][FORMATS.index("bfloat16")]) > count - max(1, round(count / 5))
        for layer in np.argsort(top, kind="stable"):
            colour, width = (RED, 1.4) if top[layer] else ("#bbbbbb", 0.7)
            left.plot(EPSILONS, order[:, layer], color=colour, linewidth=width)
        left.set_ylabel(f"{model}\nrank (largest: most sensitive)")
        left.set_title("orange: the fifth that is most sensitive in bfloat16", fontsize=10)
        left.set_yticks(np.unique(np.linspace(1, count, min(count, 5)).round().astype(int)))
        for fmt in FORMATS:
            agreed = [getattr(row, f"spearman_{fmt}") for row in rows if row.model == model]
            line = [np.nan if value is None else value for value in agreed]
            right.plot(EPSILONS, line, MARKERS[fmt] + "-", color=COLOURS[fmt], label=fmt)
        right.set(ylim=(-1.05, 1.05), ylabel="Spearman with measured")
        for axis in (left, right):
            axis.set(xscale="log", xlabel="ε over the mean non-zero eigenvalue")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=len(FORMATS))
    return figure


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; ties in order."""
    return np.asarray(rankdata(values, method="ordinal"))
