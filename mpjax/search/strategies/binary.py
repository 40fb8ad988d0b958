"""A prefix of the ranking, its length bisected."""

import numpy as np

from mpjax.search.problem import Index, Problem
from mpjax.search.strategies.strategy import Strategy, by_ranking


def binary(*, repair: int = 3) -> Strategy:
    """Lowers a prefix of the layers ranked by penalty, and bisects its length on the measured metric.

    Tries none, then all, then bisects: at most 2 + ceil(log2 L) evaluations, 9 for 72 layers. Only the order of the penalties
    is used; ties keep the layers' order, a penalty that is not finite, or a negative loss, comes last. Needs one low format.

    Bisection is right if the metric grows with the prefix. If a longer prefix came out better than the shortest one that
    failed, up to `repair` longer prefixes are tried as well, in the middle of the widest gaps.
    """
    if repair < 0:
        raise ValueError(f"repair must be at least 0; got {repair}")

    def ranked(problem: Problem) -> Index:
        penalty = problem.penalty[:, 0]
        usable = np.isfinite(penalty) & ((penalty >= 0) | (problem.kind == "ranking"))
        return np.argsort(np.where(usable, penalty, np.inf), kind="stable")

    return by_ranking("binary", ranked, "the {} least sensitive layers in {}", repair=repair)
