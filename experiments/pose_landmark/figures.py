"""The figures of the pose experiment."""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.lib.plots import GREEN, PALETTE, RED, Axes, Figure, plt
from mpjax.sensitivity import Scores, Status

# Limbs of the 33 landmarks, for drawing only.
LIMBS = (
    *((11, 12), (11, 13), (13, 15), (12, 14), (14, 16), (11, 23), (12, 24), (23, 24)),
    *((23, 25), (25, 27), (24, 26), (26, 28), (27, 31), (28, 32), (27, 29), (28, 30)),
)

Curve = Mapping[int, float]  # number of lowered layers -> mean NME on the calibration crops


def sensitivity(scores: Sequence[Scores], fmt: str, lowered: frozenset[str]) -> Figure:
    """One bar chart per estimator, layers in execution order; layers that the search lowered in green."""
    names = scores[0].layers
    figure, axes = plt.subplots(len(scores), 1, sharex=True, figsize=(10, 2.0 * len(scores) + 0.6))
    for axis, score in zip(axes, scores, strict=True):
        values, kind = score.column(fmt), "" if score.kind == "loss" else "  (does not depend on the format)"
        colours = [GREEN if name in lowered else RED for name in names]
        axis.bar(np.arange(len(names)), np.where(np.isfinite(values), values, 0), color=colours, width=0.8)
        positive = values[np.isfinite(values) & (values > 0)]
        if np.all(score.statuses(fmt) == Status.ZERO):
            axis.text(
                0.5, 0.5, f"zero by construction: no weight changes in {fmt}", ha="center", transform=axis.transAxes
            )
            axis.set_yticks([])
        elif score.kind == "loss" and positive.size:
            axis.set_yscale("log")
            axis.set_ylim(bottom=positive.min() / 2)
        axis.set(title=score.estimator + kind, ylabel="output loss" if score.kind == "loss" else "score")
    ticks = np.arange(0, len(names), 6)
    axes[-1].set_xticks(ticks, [names[i] for i in ticks], rotation=45, ha="right", fontsize=8)
    axes[-1].set(xlim=(-1, len(names)), xlabel=f"layer in execution order ({fmt}; green: lowered by the search)")
    return figure


def nme_against_layers(
    curves: Mapping[str, Mapping[str, Curve]], chosen: Mapping[str, tuple[int, float]], limit: Mapping[str, float]
) -> Figure:
    """NME of prefixes of a ranking, by format and label, with the tolerance and the point that the search chose."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5.2 * len(curves), 4), squeeze=False)
    for axis, (fmt, lines) in zip(axes[0], curves.items(), strict=True):
        for (label, curve), colour in zip(lines.items(), (GREEN, PALETTE[3], PALETTE[5]), strict=False):
            counts = sorted(curve)
            axis.plot(counts, [curve[count] for count in counts], ".-", color=colour, label=label)
        axis.axhline(limit[fmt], color="black", linewidth=1, linestyle="--", label="tolerance")
        axis.plot(*chosen[fmt], "o", markersize=11, markerfacecolor="none", markeredgecolor="black", label="chosen")
        axis.set_yscale("symlog", linthresh=max(limit[fmt] / 3, 1e-6))
        axis.set(title=fmt, xlabel="layers lowered, least sensitive first", ylabel="NME against float32 (calibration)")
        axis.legend(loc="lower right", fontsize=9)
    return figure


def landmarks(
    images: np.ndarray, truth: np.ndarray, low: Mapping[str, np.ndarray], errors: Mapping[str, np.ndarray]
) -> Figure:
    """Landmarks on crops: float32 green, low precision blue; a column for each entry of `low` and `errors`."""
    figure, axes = plt.subplots(len(images), len(low), figsize=(7.2, 3.7 * len(images)), squeeze=False)
    for i, image in enumerate(images):
        for axis, (title, xy) in zip(axes[i], low.items(), strict=True):
            axis.imshow(image)
            _body(axis, truth[i], "#00e000", 3.0, 9)
            _body(axis, xy[i], "#1040ff", 1.0, 3.5)
            axis.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))
            axis.set_axis_off()
            axis.set_title(f"{title}: NME {errors[title][i]:.4f}", fontsize=10)
    return figure


def _body(axis: Axes, points: np.ndarray, colour: str, width: float, size: float) -> None:
    for a, b in LIMBS:
        axis.plot(*points[[a, b]].T, color=colour, linewidth=width)
    axis.plot(*points.T, ".", color=colour, markersize=size)
