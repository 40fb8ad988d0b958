"""The table and the figure of a measured trade-off."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.lib import report
from experiments.lib.pages import Column
from mpjax.search.pareto import Point, rows


def write(folder: Path, name: str, points: Sequence[Point], *, metric: str = "measured loss") -> Path:
    """Writes `<name>.csv`, `<name>.tex` and the figure; returns the figure's path."""
    axes = list(points[0].axes)
    columns = [
        Column(key="layers_low", title="layers lowered"),
        Column(key="penalty", title="predicted", format=".4g"),
        Column(key="loss", title=metric, format=".4g"),
        Column(key="loss_low", title="low", format=".4g"),
        Column(key="loss_high", title="high", format=".4g"),
        *(Column(key=each, title=each, format=".4g") for each in axes),
        Column(key="best_on", title="on the front of"),
    ]
    report.write_table(folder, name, rows(points), columns)
    with report.style():
        figure, plots = plt.subplots(1, len(axes), figsize=(3.6 * len(axes), 3.2), squeeze=False, layout="constrained")
        for plot, axis in zip(plots[0], axes, strict=True):
            for chosen, colour, label in ((False, "0.7", "beaten"), (True, report.PALETTE[0], "front")):
                some = [point for point in points if (axis in point.best_on) == chosen]
                plot.plot(
                    [point.axes[axis] for point in some], [point.measurement.value for point in some],
                    "o", color=colour, markersize=4, label=label,
                )  # fmt: skip
            front = sorted((p.axes[axis], p.measurement.value) for p in points if axis in p.best_on)
            plot.step([x for x, _ in front], [y for _, y in front], where="post", color=report.PALETTE[0], linewidth=1)
            plot.set_xlabel(axis)
            positive = [p.measurement.value for p in points if p.measurement.value > 0]
            if positive:
                plot.set_yscale("symlog", linthresh=min(positive))
        plots[0][0].set_ylabel(metric)
        plots[0][-1].legend()
        return report.save_figure(folder, name, figure)
