"""The figure of the comparison with PyHessian and curvlinops."""

from collections.abc import Sequence

from experiments.lib.plots import BLUE, PALETTE, RED, Figure, plt
from experiments.peers_curvature.rows import CURVLINOPS, JOINT, MATRIX, PASSES, PER_LAYER, PLAIN, PYHESSIAN, Row

COLOURS = {MATRIX: BLUE, PLAIN: PALETTE[5], PYHESSIAN: RED, CURVLINOPS: PALETTE[3]}
MARKERS = {JOINT: "o", PER_LAYER: "D"}


def times(rows: Sequence[Row]) -> Figure:
    """Time of a gradient, of an HVP and of all layer traces, per tool; one panel per network."""
    names = list(dict.fromkeys(row.network for row in rows))
    panels = {name: _lines([row for row in rows if row.network == name]) for name in names}
    heights = [0.5 * len(lines) + 0.5 for lines in panels.values()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 1.2 + sum(heights)), squeeze=False, height_ratios=heights)
    for axis, (name, lines) in zip(axes[:, 0], panels.items(), strict=True):
        for y, (_, some, key) in enumerate(lines):
            for i, row in enumerate(some):
                height, colour = y + 0.16 * (i - (len(some) - 1) / 2), COLOURS[row.tool]
                if key == "seconds":
                    axis.plot([row.seconds_q1, row.seconds_q3], [height, height], color=colour, linewidth=2.5)
                axis.plot(getattr(row, key), height, MARKERS.get(row.method, "o"), color=colour, markersize=6)
        axis.set_xscale("log")
        axis.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=9)
        axis.set(ylim=(len(lines) - 0.5, -0.5), title=name)
        axis.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel("seconds (bars: quartiles)")
    tools = {row.tool for row in rows}
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=t) for t, c in COLOURS.items() if t in tools]
    for marker, label in ((MARKERS[JOINT], "all layers from each probe"), (MARKERS[PER_LAYER], "layer by layer")):
        handles.append(plt.Line2D([], [], marker=marker, linestyle="", color="grey", label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=10)
    return figure


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[Row], str]]:
    """(label, rows, which time) from top to bottom."""
    lines = [(label, [row for row in rows if row.quantity == name], "seconds") for name, label in PASSES.items()]
    if traces := [row for row in rows if row.quantity == "layer_traces"]:
        lines.append((f"all layer traces,\n{traces[0].probes} probes", traces, "seconds"))
        lines.append(("all layer traces,\n10 % standard error", traces, "seconds_at_target"))
    return lines
