"""The figure: time over LiteRT's."""

from collections.abc import Sequence

from experiments.lib.plots import Figure, plt
from experiments.litert.rows import Row


def bars(rows: Sequence[Row]) -> Figure:
    """A group of bars for each model and batch; the line is LiteRT."""
    groups = list(dict.fromkeys((row.model, row.batch) for row in rows))
    counts = sorted({row.cores for row in rows})
    figure, axes = plt.subplots(figsize=(1.5 * len(groups) + 2, 3.2))
    width = 0.8 / len(counts)
    for number, cores in enumerate(counts):
        shown = [row for row in rows if row.cores == cores]
        x = [groups.index((row.model, row.batch)) + (number - (len(counts) - 1) / 2) * width for row in shown]
        drawn = axes.bar(x, [row.vs_litert for row in shown], width, label=f"{cores} core{'s' * (cores > 1)}")
        axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{model}\nbatch {batch}" for model, batch in groups], fontsize=8)
    axes.set_ylabel("time / LiteRT's")
    axes.legend(ncols=len(counts))
    return figure
