"""Baseline without scores: the last layers first."""

from mpjax.search.problem import Problem
from mpjax.search.strategies.strategy import Probe, Strategy, by_prefix, only_format


def last_first() -> Strategy:
    """Baseline: lowers the last layers first, their number bisected. Needs one low format, and no penalties."""

    def strategy(problem: Problem, probe: Probe) -> None:
        low = only_format(problem, "last_first")
        by_prefix(problem, probe, range(len(problem.layers))[::-1], lambda n: f"the last {n} layers in {low}")

    return strategy
