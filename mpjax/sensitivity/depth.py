"""The position of a layer in the network."""

import numpy as np

from mpjax.sensitivity.scores import Scorer
from mpjax.sensitivity.task import exactly, scorer_of


def depth() -> Scorer:
    """−position: the layers nearest to the input are the most sensitive. Baseline; kind "ranking"."""
    return scorer_of(
        lambda task: task.scores("depth", exactly(-np.arange(float(len(task.names)))), kind="ranking"),
        None,
        weights_only=False,
    )
