"""The power of the weights' rounding error."""

from mpjax.sensitivity.scores import Scorer
from mpjax.sensitivity.task import exactly, scorer_of


def rounding_norm() -> Scorer:
    """‖δ‖², the power of the weights' rounding error: no data, no derivative. Baseline; kind "ranking"."""
    return scorer_of(
        lambda task: task.scores("rounding_norm", exactly(task.rounding.squares), kind="ranking", rounded=True), None
    )
