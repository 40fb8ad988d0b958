"""The figure of each model."""

from collections.abc import Sequence

import numpy as np

from experiments.lib.plots import PALETTE, Figure, plt
from experiments.speed.rows import Row

VARIANTS = ("fp32_naive", "fp32_tuned", "flax_bf16", "mixed", "bf16_profitable", "litert_fp32", "litert_fp16")
COLOURS = dict(zip(VARIANTS, PALETTE[6:] + PALETTE[:6], strict=True))
LABELS = {"litert_fp32": "LiteRT's float32", "fp32_tuned": "tuned float32", "fp32_naive": "jitted float32"}


def bars(model: str, rows: Sequence[Row]) -> Figure:
    """Time relative to LiteRT, or to tuned float32 where some group has no LiteRT; groups by outputs, batch and cores."""
    if model.startswith("encoder"):
        base = "fp32_naive"
    else:
        base = "litert_fp32" if all(row.vs_litert is not None for row in rows) else "fp32_tuned"
    field = {"litert_fp32": "vs_litert"}.get(base, f"vs_{base}")
    ratios = {((row.outputs, row.batch, row.cores), row.variant): getattr(row, field) for row in rows}
    groups, measured = list(dict.fromkeys(group for group, _ in ratios)), {name for _, name in ratios}
    # Naive float32 of a convolutional model takes twenty times as long as all others: it is in the table only.
    shown = [name for name in VARIANTS if name in measured and (name != "fp32_naive" or base == name)]
    top = min(1.15 * max(ratio for (_, name), ratio in ratios.items() if name in shown and ratio is not None), 3.0)
    figure, axes = plt.subplots(figsize=(max(7, 1.9 * len(groups)), 4.2))
    width = 0.8 / len(shown)
    for number, variant in enumerate(shown):
        values = [ratios.get((group, variant)) for group in groups]
        places = np.arange(len(groups)) + (number - (len(shown) - 1) / 2) * width
        heights = [np.nan if value is None else min(value, 0.96 * top) for value in values]
        drawn = axes.bar(places, heights, width, label=variant, color=COLOURS[variant])
        axes.bar_label(drawn, ["" if value is None else f"{value:.2f}" for value in values], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(
        range(len(groups)), [f"{outputs} outputs\nbatch {b}, {c} core{'s' * (c > 1)}" for outputs, b, c in groups]
    )
    axes.set(ylim=(0, top), ylabel=f"time / {LABELS[base]} (less is faster)", title=model)
    axes.legend(ncols=len(shown), loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8)
    return figure
