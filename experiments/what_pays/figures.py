"""The figure: time over the fastest float32 program's."""

from collections.abc import Sequence

import numpy as np

from experiments.lib.plots import PALETTE, Figure, plt
from experiments.what_pays.rows import Row


def bars(rows: Sequence[Row]) -> Figure:
    """A group of bars for each model; the line is float32."""
    low = [row for row in rows if not row.format.startswith("float32")]
    models, formats = (list(dict.fromkeys(getattr(row, name) for row in low)) for name in ("model", "format"))
    figure, axes = plt.subplots(figsize=(1.6 * len(models) + 2, 3.2))
    width = 0.8 / len(formats)
    for number, fmt in enumerate(formats):
        values = {row.model: row.vs_float32 for row in low if row.format == fmt}
        x = np.array([models.index(model) for model in values]) + (number - (len(formats) - 1) / 2) * width
        axes.bar(x, list(values.values()), width, label=fmt, color=PALETTE[number % len(PALETTE)])
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(models)), [model.replace(", ", "\n") for model in models])
    axes.set_ylabel("time / fastest float32")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.25))
    return figure
