"""The figures of experiments/estimators."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter

from experiments.estimators.judge import FORMATS
from experiments.lib import report
from mpjax import metrics

Row = Mapping[str, Any]
COLOURS = dict(zip(FORMATS, (report.PALETTE[1], report.BLUE, report.GREEN), strict=True))
MARKERS = dict(zip(FORMATS, ("o", "s", "^"), strict=True))
GREY = "#777777"


def label(row: Row) -> str:
    """The estimator, and its loss where that is not the output loss."""
    return row["estimator"] if row["loss"] in ("output", "none") else f"{row['estimator']} · {row['loss']}"


def agreement_cost(folder: Path, rows: Sequence[Row]) -> Path:
    """Spearman against seconds, one panel per model; each estimator is a column of three formats, named above it."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    with report.style():
        figure, axes = plt.subplots(len(models), 1, figsize=(11, 5.6 * len(models)), squeeze=False)
        for axis, model in zip(axes[:, 0], models, strict=True):
            own = [row for row in rows if row["model"] == model and row["spearman"] is not None]
            timed = [row["seconds"] for row in own if row["seconds"] > 0]
            free = min(timed, default=1.0) / 3  # baselines that compute nothing stand at the left edge
            groups: dict[str, list[Row]] = {}
            for row in own:
                groups.setdefault(label(row), []).append(row)
            places = {name: max(each[0]["seconds"], free) for name, each in groups.items()}
            axis.set_xscale("log")
            axis.set_xlim(free / 1.6, max(places.values(), default=1.0) * 1.6)
            bottom = min((row["spearman"] for row in own), default=0.0)
            axis.set_ylim(min(bottom - 0.05, -0.05), 1.04)
            for name, each in groups.items():
                values = [row["spearman"] for row in each]
                axis.plot([places[name]] * 2, [min(values), max(values)], color="#cccccc", linewidth=1, zorder=1)
                for row in each:
                    axis.plot(
                        places[name],
                        row["spearman"],
                        MARKERS[row["format"]],
                        color=COLOURS[row["format"]],
                        markersize=6,
                    )
            _names_above(
                axis, {name: (places[name], max(r["spearman"] for r in each)) for name, each in groups.items()}
            )
            axis.axhline(0.95, color=GREY, linewidth=0.8, linestyle=":")
            axis.set_ylabel(f"{model}\nSpearman with measured")
        axes[-1, 0].set_xlabel("seconds for all layers and formats, without compilation (left edge: no computation)")
        handles = [plt.Line2D([], [], marker=MARKERS[f], color=COLOURS[f], linestyle="", label=f) for f in FORMATS]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(FORMATS))
        return report.save_figure(folder, "agreement_cost", figure)


def _names_above(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names above the panel, evenly apart and in the order of their points, each with a thin line to its point."""
    names = sorted(points, key=lambda name: points[name])
    low, high = np.log10(axis.get_xlim())
    wanted = np.array([(np.log10(points[name][0]) - low) / (high - low) for name in names])
    for name, place in zip(names, spread(wanted, 1.0 / max(len(names), 36)), strict=True):
        axis.annotate(
            name,
            xy=points[name],
            xytext=(place, 1.03),
            textcoords="axes fraction",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "color": "#bbbbbb",
                "linewidth": 0.6,
                "relpos": (0.5, 0),
                "shrinkA": 0,
                "shrinkB": 3,
            },
            annotation_clip=False,
        )


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Ascending places in [0, 1] at least `gap` apart (as far as they fit), near the wanted ones (ascending)."""
    count = len(wanted)
    gap = min(gap, 1.0 / max(count - 1, 1))
    places = np.array(wanted, float)
    for _ in range(500):
        for i in range(1, count):
            overlap = gap - (places[i] - places[i - 1])
            if overlap > 0:
                places[i - 1] -= overlap / 2
                places[i] += overlap / 2
        places = np.clip(places, 0.0, 1.0)
    for i in range(1, count):  # what rounding left
        places[i] = max(places[i], places[i - 1] + gap)
    return places - max(places[-1] - 1.0, 0.0) if count else places


def ranks(folder: Path, model: str, names: Sequence[str], values: Mapping[str, np.ndarray], truth: np.ndarray) -> Path:
    """Each layer's rank by an estimator against its measured rank: a row per estimator, a column per format.

    Args:
        values: name -> (L, F); names that are missing are zero by construction.
        truth: (F, L).
    """
    with report.style():
        figure, axes = plt.subplots(
            len(names), len(FORMATS), figsize=(9, 2.7 * len(names)), sharex=True, sharey=True, squeeze=False
        )
        for line, name in zip(axes, names, strict=True):
            for number, (axis, fmt) in enumerate(zip(line, FORMATS, strict=True)):
                column = values[name][:, number] if name in values else np.zeros(truth.shape[1])
                agreed = metrics.spearman(column, truth[number])
                if agreed is None:
                    axis.text(0.5, 0.5, "zero by\nconstruction", ha="center", va="center", transform=axis.transAxes)
                else:
                    axis.plot([1, len(column)], [1, len(column)], color="#cccccc", linewidth=1)
                    axis.plot(_ranks(truth[number]), _ranks(column), MARKERS[fmt], color=COLOURS[fmt], markersize=4)
                axis.set_title(f"{fmt}: {agreed:.2f}" if agreed is not None else fmt, fontsize=10)
            line[0].set_ylabel(f"{name}\nrank", fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("measured rank")
        figure.suptitle(f"{model}: layers ranked, least sensitive first; titles: Spearman")
        return report.save_figure(folder, "ranks", figure)


def lowered(folder: Path, rows: Sequence[Row], field: str, title: str) -> Path:
    """Layers lowered per estimator of the output loss, one panel per model, a bar per format."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    shown = [row for row in rows if row["loss"] in ("output", "none")]
    names = [
        name
        for name in dict.fromkeys(map(label, shown))
        if any(r[field] is not None for r in shown if label(r) == name)
    ]
    found = {(row["model"], label(row), row["format"]): row[field] for row in rows}
    with report.style():
        figure, axes = plt.subplots(
            1, len(models), figsize=(3.2 * len(models) + 2.4, 0.36 * len(names) + 1.6), sharey=True, squeeze=False
        )
        for axis, model in zip(axes[0], models, strict=True):
            for offset, fmt in zip((-0.27, 0.0, 0.27), FORMATS, strict=True):
                for position, name in enumerate(names):
                    count = found.get((model, name, fmt))
                    if count is None:
                        axis.text(0, position + offset, "–", fontsize=7, color=COLOURS[fmt], va="center")
                    else:
                        axis.barh(position + offset, count, height=0.25, color=COLOURS[fmt])
            total = max(row["layers"] for row in rows if row["model"] == model)
            axis.set_title(model)
            axis.set_xlim(0, total)
            axis.set_xlabel(f"layers of {total}")
            axis.grid(axis="y", visible=False)
        axes[0, 0].set_yticks(range(len(names)), names, fontsize=9)
        axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[fmt], label=fmt) for fmt in FORMATS]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(FORMATS))
        figure.suptitle(title)
        return report.save_figure(folder, "layers_lowered", figure)


def interactions(folder: Path, found: Mapping[str, Mapping[str, np.ndarray]], verdicts: Sequence[Row]) -> Path:
    """Measured against predicted loss of random subsets, with cross terms and without: a row per model."""
    kinds = (("cross_terms", "xᵀGx", "o", report.BLUE), ("diagonal", "diagonal only", "x", report.PALETTE[1]))
    better = {(row["model"], row["format"]): row["better"] for row in verdicts}
    with report.style():
        figure, axes = plt.subplots(len(found), len(FORMATS), figsize=(10, 3.2 * len(found)), squeeze=False)
        for line, (model, arrays) in zip(axes, found.items(), strict=True):
            for number, (axis, fmt) in enumerate(zip(line, FORMATS, strict=True)):
                measured = arrays["measured"][number]
                axis.set_xscale("log")
                axis.set_yscale("log")
                ends = []
                for kind, name, marker, colour in kinds:
                    predicted = arrays[kind][number]
                    good = np.isfinite(predicted) & np.isfinite(measured) & (predicted > 0) & (measured > 0)
                    axis.plot(
                        measured[good], predicted[good], marker, color=colour, markersize=5, label=name, alpha=0.8
                    )
                    ends += [*predicted[good], *measured[good]]
                if ends:
                    low, high = min(ends), max(ends)
                    axis.plot([low, high], [low, high], color=GREY, linewidth=1, zorder=0)
                    ticks = np.geomspace(low, high, 3)
                    for one in (axis.xaxis, axis.yaxis):
                        one.set_major_locator(FixedLocator(ticks.tolist()))
                        one.set_major_formatter("{x:.0e}")
                        one.set_minor_formatter(NullFormatter())
                axis.set_title(f"{fmt}\nbetter: {better[model, fmt]}", fontsize=10)
            line[0].set_ylabel(f"{model}\npredicted output loss", fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("measured output loss")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return report.save_figure(folder, "interactions", figure)


def damping(
    folder: Path,
    scores: Mapping[str, np.ndarray],
    truth: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    epsilons: Sequence[float],
) -> Path:
    """Each layer's rank by log-determinant over ε (left), and Spearman with the measured error over ε (right)."""
    with report.style():
        figure, axes = plt.subplots(len(scores), 2, figsize=(10, 3.6 * len(scores)), squeeze=False)
        for (left, right), (model, values) in zip(axes, scores.items(), strict=True):
            order = np.array([_ranks(each) for each in values])  # (E, L)
            count = values.shape[1]
            top = _ranks(truth[model][FORMATS.index("bfloat16")]) > count - max(1, round(count / 5))
            for layer in np.argsort(top, kind="stable"):
                colour, width = (report.PALETTE[1], 1.4) if top[layer] else ("#bbbbbb", 0.7)
                left.plot(epsilons, order[:, layer], color=colour, linewidth=width)
            left.set_ylabel(f"{model}\nrank (largest: most sensitive)")
            left.set_title("orange: the fifth that is most sensitive in bfloat16", fontsize=10)
            own = [row for row in rows if row["model"] == model]
            for fmt in FORMATS:
                agreed = [np.nan if row[f"spearman_{fmt}"] is None else row[f"spearman_{fmt}"] for row in own]
                right.plot(epsilons, agreed, MARKERS[fmt] + "-", color=COLOURS[fmt], label=fmt)
            right.set_ylim(-1.05, 1.05)
            right.set_ylabel("Spearman with measured")
            for axis in (left, right):
                axis.set_xscale("log")
                axis.set_xlabel("ε over the mean non-zero eigenvalue")
            left.set_yticks(np.unique(np.linspace(1, count, min(count, 5)).round().astype(int)))
        handles, labels = axes[0, 1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(FORMATS))
        return report.save_figure(folder, "damping", figure)


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; ties in order."""
    order = np.argsort(values, kind="stable")
    found = np.empty(len(values))
    found[order] = np.arange(1, len(values) + 1)
    return found
