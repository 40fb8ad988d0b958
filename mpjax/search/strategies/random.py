"""Baseline without scores: a random order."""

import numpy as np

from mpjax.search.problem import Problem
from mpjax.search.strategies.strategy import Probe, Strategy, by_prefix, only_format


def random(*, seed: int) -> Strategy:
    """Baseline: lowers layers in a random order, their number bisected. Needs one low format, and no penalties."""

    def strategy(problem: Problem, probe: Probe) -> None:
        low = only_format(problem, "random")
        order = np.random.default_rng(seed).permutation(len(problem.layers))
        by_prefix(problem, probe, order, lambda n: f"{n} random layers in {low}")

    return strategy
