"""A prefix of the ranking, its length bisected."""

import numpy as np

from mpjax.search.problem import Index, Problem
from mpjax.search.strategies.strategy import Strategy, by_ranking, only_other


def binary(*, repair: int = 3) -> Strategy:
    """Lowers a prefix of the layers ranked by penalty, and bisects its length on the measured metric.

    Tries none, then all, then bisects: at most 2 + ceil(log2 L) evaluations, 9 for 72 layers. Only the order of the penalties
    is used; ties keep the layers' order, a penalty that is not finite, or a negative loss, comes last. Needs one low format.

    Bisection is right if the metric grows with the prefix. If a longer prefix came out better than the shortest one that
    failed, up to `repair` longer prefixes are tried as well, in the middle of the widest gaps.
    """
    if repair < 0:
        raise ValueError(f"repair must be at least 0; got {repair}")

    return by_ranking("binary", ranked, "the {} least sensitive layers in {}", repair=repair)


def ranked(problem: Problem) -> Index:
    """(L,) layers by what their only other choice adds to the penalty, the least first."""
    rows, target = np.arange(len(problem.layers)), only_other(problem, "binary")[0]
    usable = np.isfinite(problem.penalty) & ((problem.penalty >= 0) | (problem.kind == "ranking"))
    penalty = np.pad(np.where(usable, problem.penalty, np.inf), ((0, 0), (1, 0)))
    start = np.where(np.isfinite(penalty[rows, problem.start]), penalty[rows, problem.start], 0.0)
    return np.argsort(penalty[rows, target] - (start if problem.kind == "loss" else 0.0), kind="stable")
