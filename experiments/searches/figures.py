"""The figures of the comparison of searches."""

from collections.abc import Sequence

import numpy as np

from experiments.lib.plots import BLUE, PALETTE, RED, Figure, plt
from experiments.problems.benchmarks import SHORT
from experiments.searches.rows import Cost, Enumerated, Row
from mpjax.search import Point

RANKED = ("binary", "greedy", "ilp", "ilp[extend=0]", "iqp[extend=24]", "iqp")
BASELINES = ("last_first", "random", "segments", "bisect_precision")
COLOURS = dict(zip((*RANKED, *BASELINES), 2 * tuple(PALETTE), strict=False))
MARKERS = dict(zip((*RANKED, *BASELINES), "osDd<^vPX*", strict=True))


def lowered(rows: Sequence[Row]) -> Figure:
    """Layers lowered against the tolerance; a panel per model and format."""
    models, formats = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("model", "formats"))
    size = (5.2 * len(formats), 3.4 * len(models))
    figure, axes = plt.subplots(len(models), len(formats), figsize=size, squeeze=False, sharex=True)
    for (i, model), (j, fmt) in ((m, f) for m in enumerate(models) for f in enumerate(formats)):
        axis, panel = axes[i, j], [row for row in rows if (row.model, row.formats) == (model, fmt)]
        for name in dict.fromkeys(row.strategy for row in panel):
            points = sorted((100 * row.tolerance, row.layers_low) for row in panel if row.strategy == name)
            line = MARKERS[name] + ("-" if name in RANKED else ":")
            axis.plot(*zip(*points, strict=True), line, color=COLOURS[name], label=name, markersize=5)
        axis.set(xscale="log", title=f"{SHORT.get(model, model)}, {fmt}: {panel[0].layers} layers" if panel else "")
    for axis in axes[-1]:
        axis.set_xlabel("tolerance, % of the error with all layers low")
    for axis in axes[:, 0]:
        axis.set_ylabel("layers lowered")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def evaluations(rows: Sequence[Row]) -> Figure:
    """Layers lowered against evaluations at the tolerance nearest to 10 %."""
    tolerance = min({row.tolerance for row in rows}, key=lambda value: abs(value - 0.1))
    panels = list(dict.fromkeys((row.model, row.formats) for row in rows))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(5.2 * across, 3.2 * down), squeeze=False)
    for spare in axes.ravel()[len(panels) :]:
        spare.set_axis_off()
    for axis, (model, fmt) in zip(axes.ravel(), panels, strict=False):
        for row in rows:
            if (row.model, row.formats, row.tolerance) == (model, fmt, tolerance):
                name = row.strategy
                axis.plot(row.evaluations, row.layers_low, MARKERS[name], color=COLOURS[name], label=name, markersize=8)
        axis.set(xscale="log", ylabel=f"layers lowered at {tolerance:.0%}", title=f"{SHORT.get(model, model)}, {fmt}")
    for axis in axes[-1]:
        axis.set_xlabel("evaluations")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def enumerated(rows: Sequence[Enumerated]) -> Figure:
    """Layers that a strategy lacks to the optimum, one cell per model and tolerance."""
    models, names, tolerances = (
        list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("model", "strategy", "tolerance")
    )
    missing = {(row.model, row.strategy, row.tolerance): row.missing for row in rows}
    figure, axes = plt.subplots(1, len(models), figsize=(4.6 * len(models), 3.6), squeeze=False, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        table = np.array([[missing[model, name, tolerance] for tolerance in tolerances] for name in names])
        axis.imshow(table, cmap="Oranges", vmin=0, vmax=max(4, int(table.max())), aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            axis.text(j, i, str(value), ha="center", va="center", fontsize=9)
        axis.set_xticks(range(len(tolerances)), [f"{tolerance:.0%}" for tolerance in tolerances])
        axis.set_yticks(range(len(names)), names)
        axis.grid(False)
        axis.set(title=SHORT.get(model, model), xlabel="tolerance")
    return figure


def costs(rows: Sequence[Cost]) -> Figure:
    """Each layer's latency in the low formats over float32's, in execution order."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(len(models), 1, figsize=(11, 2.8 * len(models)), squeeze=False)
    for axis, model in zip(axes[:, 0], models, strict=True):
        for fmt, colour in (("bfloat16", BLUE), ("float8_e4m3fn", RED)):
            ratios = [row.vs_float32 for row in rows if (row.model, row.format) == (model, fmt)]
            shown = [np.nan if ratio is None else ratio for ratio in ratios]
            axis.plot(range(len(shown)), shown, "o", markersize=4, color=colour, label=fmt)
        axis.axhline(1.0, color="#777777", linewidth=0.8)
        axis.set(yscale="log", ylabel=f"{SHORT.get(model, model)}\nseconds, vs float32")
    axes[0, 0].legend(ncols=2)
    axes[-1, 0].set_xlabel("layer, in execution order")
    return figure


def front(points: Sequence[Point], metric: str) -> Figure:
    """The measured trade-off, an axis a panel; points that no other one beats are joined."""
    names = list(points[0].axes)
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), squeeze=False)
    positive = [point.measurement.value for point in points if point.measurement.value > 0]
    for axis, name in zip(axes[0], names, strict=True):
        for best, colour, label in ((False, "0.7", "beaten"), (True, BLUE, "front")):
            shown = [(p.axes[name], p.measurement.value) for p in points if (name in p.best_on) == best]
            if shown:
                axis.plot(*zip(*shown, strict=True), "o", color=colour, markersize=4, label=label)
            if best and shown:
                axis.step(*zip(*sorted(shown), strict=True), where="post", color=BLUE, linewidth=1)
        axis.set_xlabel(name)
        if positive:
            axis.set_yscale("symlog", linthresh=min(positive))
    axes[0][0].set_ylabel(metric)
    axes[0][-1].legend()
    return figure
