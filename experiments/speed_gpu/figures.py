"""The figure of each model."""

from collections.abc import Sequence

import numpy as np

from experiments.lib.plots import PALETTE, Figure, plt
from experiments.speed_gpu.rows import Row

VARIANTS = ("fp32", "tf32", "flax_bf16", "bf16", "fp16", "bf16_activations", "fp8")
COLOURS = dict(zip(VARIANTS, (PALETTE[-1], *PALETTE[:-1]), strict=True))


def bars(name: str, rows: Sequence[Row]) -> Figure:
    """Time relative to fp32, one group of bars for each batch."""
    batches, variants = (list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("batch", "variant"))
    ratios = {(row.batch, row.variant): np.nan if row.vs_fp32 is None else row.vs_fp32 for row in rows}
    width = 0.85 / len(variants)
    figure, axis = plt.subplots()
    for number, variant in enumerate(variants):
        places = np.arange(len(batches)) + (number - (len(variants) - 1) / 2) * width
        heights = [ratios[batch, variant] for batch in batches]
        axis.bar(places, heights, width, color=COLOURS[variant], label=variant)
    axis.axhline(1.0, color="#777777", linewidth=0.8)
    axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axis.set(ylabel="time / fp32", title=name)
    figure.legend(loc="outside lower center", ncols=4)
    return figure
