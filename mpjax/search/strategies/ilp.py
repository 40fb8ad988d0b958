"""Additive penalties, costs and casts, predicted exactly by an integer linear program."""

from mpjax.search import optimum
from mpjax.search.strategies.by_prediction import by_prediction
from mpjax.search.strategies.strategy import Strategy


def ilp(*, rounds: int = 10, extend: int = 6, exchange: int = 0) -> Strategy:
    """Predict, verify, rescale: the exact optimum within a limit on Σ penalties, over any number of formats and casts.

    The limit starts from the measured loss of the unlimited optimum (loss ∝ √penalty) and is then interpolated, in logarithms,
    between the best that passed and the best that failed. At the end single layers are lowered further, those with the least
    predicted loss first, until `extend` of them failed.

    Args:
        rounds: limits that are tried at most.
        extend: failures that end the last part; 0 leaves it out.
        exchange: how often, at most, the lowered layer without which the measured loss is least goes back to float32 and others
            are tried in its place: one evaluation for each lowered layer and for each one tried. It corrects a prediction that
            misjudges a single layer.
    """
    return by_prediction("ilp", optimum.linear, rounds, extend, exchange)
