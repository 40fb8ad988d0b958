"""How an estimator is judged: agreement with the measured truth, and how many layers its ranking lowers.

The truth is `sensitivity.measured` under the output loss: each layer lowered alone, by emulation. What a ranking is worth to a
user is measured too: its least sensitive layers are lowered, as many as the benchmark's own metric allows (bisection).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from experiments.estimators.rows import TOLERANCES
from experiments.lib import metrics
from mpjax import search
from mpjax.sensitivity import Status


def kendall(a: ArrayLike, b: ArrayLike) -> float | None:
    """Kendall's τ-b in [-1, 1]; None where it is undefined, as `metrics.spearman`. Source: doi 10.1093/biomet/33.3.239."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return None if _orders_nothing(x) or _orders_nothing(y) else float(stats.kendalltau(x, y).statistic)


def topk_overlap(score: ArrayLike, truth: ArrayLike) -> float | None:
    """Share of the k truly most sensitive layers that are among the score's k most sensitive; k = max(1, round(L / 5)).

    Ties keep the layers' order, as in a search. None where either side does not order anything.
    """
    x, y = np.asarray(score, np.float64), np.asarray(truth, np.float64)
    if _orders_nothing(x) or _orders_nothing(y):
        return None
    k = max(1, round(x.size / 5))
    return len(np.intersect1d(np.argsort(x, kind="stable")[-k:], np.argsort(y, kind="stable")[-k:])) / k


def agreement(draws: Sequence[ArrayLike], truth: ArrayLike) -> dict[str, float | None]:
    """Spearman, Kendall and top-k overlap with the truth (L,); the mean over the draws of a random score, None without any."""
    measures = {"spearman": metrics.spearman, "kendall": kendall, "topk_overlap": topk_overlap}
    values = {name: [measure(draw, truth) for draw in draws] for name, measure in measures.items()}
    return {
        name: None if None in drawn or not drawn else float(np.mean([value for value in drawn if value is not None]))
        for name, drawn in values.items()
    }


def layers_low(
    score: ArrayLike, layers: Sequence[str], fmt: str, error: Callable[[search.Assignment], search.Measurement]
) -> list[int | None]:
    """How many layers the ranking lowers at each of `TOLERANCES`, a fraction of the error with all layers low.

    The least sensitive layers are lowered, their number bisected (`search.binary`). None where the score does not order
    anything, or where the error with all layers low is 0 or not finite.
    """
    values = np.asarray(score, np.float64)
    if _orders_nothing(values):
        return [None] * len(TOLERANCES)
    everything = error(search.Assignment.uniform(layers, fmt)).value
    if not (math.isfinite(everything) and everything > 0):
        return [None] * len(TOLERANCES)
    problem = search.Problem(layers=tuple(layers), formats=(fmt,), penalty=values[:, None], kind="ranking")
    limits = [share * everything for share in TOLERANCES]
    results = [search.solve(problem, search.binary(), evaluate=error, tolerance=limit) for limit in limits]
    return [len(result.assignment.lowered) for result in results]


def row_status(statuses: Sequence[str]) -> str:
    """One word for the layers' statuses: "zero_by_construction" if all are, else the worst of them, "ok" if none is bad."""
    present = set(statuses)
    if present == {Status.ZERO}:
        return Status.ZERO
    return next(
        (bad for bad in (Status.OVERFLOW, Status.NOT_FINITE, Status.UNCONVERGED, Status.INDEFINITE) if bad in present),
        Status.OK,
    )


def _orders_nothing(values: np.ndarray) -> bool:
    """Too few values, all of them equal, or a NaN."""
    return values.size < 2 or bool(np.isnan(values).any()) or bool((values == values[0]).all())
