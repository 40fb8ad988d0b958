"""Baseline without scores: the last layers first."""

from mpjax.search.strategies.strategy import Strategy, by_ranking


def last_first() -> Strategy:
    """Baseline: lowers the last layers first, their number bisected. Needs one low format, and no penalties."""
    return by_ranking("last_first", lambda problem: range(len(problem.layers))[::-1], "the last {} layers in {}")
