"""The figures."""

from collections.abc import Sequence

import numpy as np

from experiments.lib.plots import BLUE, PALETTE, RED, Figure, plt
from experiments.referee.rows import Additivity, Cell, Method


def methods(rows: Sequence[Method]) -> Figure:
    """Each method's mean regret with its interval, the least on top."""
    figure, axes = plt.subplots(figsize=(8, 0.26 * len(rows) + 1.2))
    places = np.arange(len(rows))[::-1]
    middle = np.array([row.regret for row in rows])
    low, high = (np.array([getattr(row, name) for row in rows]) for name in ("regret_low", "regret_high"))
    axes.errorbar(middle, places, xerr=[np.maximum(middle - low, 0), np.maximum(high - middle, 0)], fmt="o", color=BLUE)
    axes.scatter([row.worst for row in rows], places, marker="|", color=RED, label="worst cell")
    axes.set_yticks(places, [f"{row.estimator}, {row.allocator}" for row in rows], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("error / best known at the same budget")
    axes.legend(loc="lower right")
    return figure


def by_model(rows: Sequence[Cell]) -> Figure:
    """For each model the geometric mean of each estimator's regret, with the allocator that serves it best."""
    models, estimators = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("model", "estimator"))
    table = np.full((len(estimators), len(models)), np.nan)
    for i, estimator in enumerate(estimators):
        for j, model in enumerate(models):
            by_allocator: dict[str, list[float]] = {}
            for row in rows:
                if (row.estimator, row.model) == (estimator, model):
                    by_allocator.setdefault(row.allocator, []).append(row.regret)
            if by_allocator:
                table[i, j] = min(float(np.exp(np.mean(np.log(values)))) for values in by_allocator.values())
    figure, axes = plt.subplots(figsize=(1.5 * len(models) + 3, 0.3 * len(estimators) + 1.2))
    axes.grid(visible=False)
    image = axes.imshow(np.log2(table), cmap="viridis_r", aspect="auto", vmin=0, vmax=3)
    for i, j in np.ndindex(*table.shape):
        if np.isfinite(table[i, j]):
            axes.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", fontsize=8, color="white")
    axes.set_xticks(range(len(models)), models, rotation=20, fontsize=8)
    axes.set_yticks(range(len(estimators)), estimators, fontsize=8)
    figure.colorbar(image, label="log₂ (error / best known)")
    return figure


def additivity(rows: Sequence[Additivity]) -> Figure:
    """Loss of the whole over the sum of its layers' losses, against the bits of a weight."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for number, model in enumerate(dict.fromkeys(row.model for row in rows)):
        part = [row for row in rows if row.model == model and row.vs_predicted is not None]
        axes.plot(
            [row.bits for row in part],
            [row.vs_predicted or np.nan for row in part],
            "o",
            color=PALETTE[number % 7],
            label=model,
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("loss of the whole / Σ local rounding")
    axes.legend()
    return figure
