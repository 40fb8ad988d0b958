"""The figures of experiments/pose_landmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.lib import report
from mpjax.sensitivity import ZERO, Scores

# Limbs of the 33 landmarks, for drawing only.
LIMBS = (
    *((11, 12), (11, 13), (13, 15), (12, 14), (14, 16), (11, 23), (12, 24), (23, 24)),
    *((23, 25), (25, 27), (24, 26), (26, 28), (27, 31), (28, 32), (27, 29), (28, 30)),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """NME of prefixes of one ranking: number of lowered layers -> mean NME on the calibration crops."""

    label: str
    layers: Sequence[int]
    nme: Sequence[float]


def sensitivity_bars(folder: Path, scores: Sequence[Scores], fmt: str, lowered: frozenset[str]) -> Path:
    """One bar chart per estimator, layers in execution order; layers that the search lowered in green."""
    with report.style():
        figure, axes = plt.subplots(len(scores), 1, sharex=True, figsize=(10, 2.0 * len(scores) + 0.6))
        for axis, each in zip(axes, scores, strict=True):
            column = each.column(fmt)
            status = each.status[:, each.formats.index(fmt)]
            positions = np.arange(len(column))
            colours = [report.GREEN if name in lowered else report.PALETTE[1] for name in each.layers]
            axis.bar(positions, np.where(np.isfinite(column), column, 0), color=colours, width=0.8)
            positive = column[np.isfinite(column) & (column > 0)]
            if np.all(status == ZERO):
                axis.text(0.5, 0.5, f"zero by construction: no weight changes in {fmt}", ha="center",
                          transform=axis.transAxes)  # fmt: skip
                axis.set_yticks([])
            elif each.kind == "loss" and positive.size:
                axis.set_yscale("log")
                axis.set_ylim(bottom=positive.min() / 2)
            axis.set_title(f"{each.estimator}" + ("" if each.kind == "loss" else "  (does not depend on the format)"))
            axis.set_ylabel("output loss" if each.kind == "loss" else "score")
        axes[-1].set_xlabel(f"layer in execution order ({fmt}; green: lowered by the search)")
        ticks = np.arange(0, len(scores[0].layers), 6)
        axes[-1].set_xticks(ticks, [scores[0].layers[i] for i in ticks], rotation=45, ha="right", fontsize=8)
        axes[-1].set_xlim(-1, len(scores[0].layers))
        return report.save_figure(folder, f"sensitivity_{fmt}", figure)


def nme_against_layers(
    folder: Path,
    curves: Mapping[str, Sequence[Curve]],
    chosen: Mapping[str, tuple[int, float]],
    limit: Mapping[str, float],
) -> Path:
    """NME against the number of lowered layers, per format, with the tolerance and the point that the search chose."""
    with report.style():
        figure, axes = plt.subplots(1, len(curves), figsize=(5.2 * len(curves), 4), squeeze=False)
        for axis, (fmt, lines) in zip(axes[0], curves.items(), strict=True):
            for line, colour in zip(lines, (report.GREEN, report.PALETTE[3], report.PALETTE[5]), strict=False):
                axis.plot(line.layers, line.nme, ".-", color=colour, label=line.label)
            axis.axhline(limit[fmt], color="black", linewidth=1, linestyle="--", label="tolerance")
            axis.plot(*chosen[fmt], "o", markersize=11, markerfacecolor="none", markeredgecolor="black", label="chosen")
            axis.set_title(fmt)
            axis.set_xlabel("layers lowered, least sensitive first")
            axis.set_ylabel("NME against float32 (calibration)")
            axis.set_yscale("symlog", linthresh=max(limit[fmt] / 3, 1e-6))
            axis.legend(loc="lower right", fontsize=9)
        return report.save_figure(folder, "nme_against_layers", figure)


def landmarks(
    folder: Path,
    images: np.ndarray,
    truth: np.ndarray,
    mixed: np.ndarray,
    all_low: np.ndarray,
    *,
    fmt: str,
    titles: Sequence[tuple[str, str]],
) -> Path:
    """Landmarks on crops: float32 green, low precision blue; mixed on the left, all layers low on the right."""
    with report.style():
        figure, axes = plt.subplots(len(images), 2, figsize=(7.2, 3.7 * len(images)), squeeze=False)
        for row, image in enumerate(images):
            for axis, low, title in zip(axes[row], (mixed[row], all_low[row]), titles[row], strict=True):
                axis.imshow(image)
                for points, colour, width, size in ((truth[row], "#00e000", 3.0, 9), (low, "#1040ff", 1.0, 3.5)):
                    for a, b in LIMBS:
                        axis.plot(*points[[a, b]].T, color=colour, linewidth=width)
                    axis.plot(*points.T, ".", color=colour, markersize=size)
                axis.set_xlim(0, image.shape[1])
                axis.set_ylim(image.shape[0], 0)
                axis.set_axis_off()
                axis.set_title(title, fontsize=10)
        figure.suptitle(f"float32 green, {fmt} blue")
        return report.save_figure(folder, f"landmarks_{fmt}", figure)
