"""Baseline: the node search of onnxconverter-common's auto_mixed_precision, written from its description."""

import numpy as np

from mpjax.search.problem import Problem
from mpjax.search.strategies.strategy import Probe, Strategy, by_segments, only_format


def segments() -> Strategy:
    """Baseline: lowers the largest untried run of layers beside those already good, and halves it if that fails.

    The first of equally long runs comes first. No scores: evaluations grow with the number of sensitive layers. Needs one low
    format.
    """

    def strategy(problem: Problem, probe: Probe) -> None:
        only_format(problem, "segments")
        probe(problem.baseline, "all layers in float32")
        by_segments(problem, probe, np.ones(len(problem.layers), np.int64))

    return strategy
