"""The greedy prediction, with or without interactions."""

from mpjax.search import optimum
from mpjax.search.strategies.by_prediction import by_prediction
from mpjax.search.strategies.strategy import Strategy


def greedy(*, rounds: int = 10, extend: int = 6, exchange: int = 0) -> Strategy:
    """As `ilp`, with the greedy choice: most gain per additional predicted loss first, computed anew with interactions."""
    return by_prediction("greedy", optimum.greedy, rounds, extend, exchange)
