"""Layers with interactions, predicted by an integer quadratic program."""

import functools

from mpjax.search import optimum
from mpjax.search.strategies.by_prediction import by_prediction
from mpjax.search.strategies.strategy import Strategy


def iqp(*, rounds: int = 10, extend: int = 6, exchange: int = 0, time_limit: float = 5.0) -> Strategy:
    """As `ilp`, with ½ xᵀGx for the predicted loss: needs a problem with interactions.

    Args:
        time_limit: seconds for one limit; if it ends without a proof, the best point so far is measured.
    """
    solver = functools.partial(optimum.quadratic, time_limit=time_limit)
    return by_prediction("iqp", solver, rounds, extend, exchange)
