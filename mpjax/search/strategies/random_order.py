"""Baseline without scores: a random order."""

import numpy as np

from mpjax.search.problem import Index, Problem
from mpjax.search.strategies.strategy import Strategy, by_ranking


def random_order(*, seed: int) -> Strategy:
    """Baseline: lowers layers in a random order, their number bisected. Needs one low format, and no penalties."""

    def order(problem: Problem) -> Index:
        return np.random.default_rng(seed).permutation(len(problem.layers))

    return by_ranking("random_order", order, "{} random layers in {}")
