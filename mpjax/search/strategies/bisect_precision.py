"""Baseline: the search of TensorRT Polygraphy's `debug precision`, written from its description."""

import numpy as np

from mpjax.search.problem import Problem
from mpjax.search.strategies.strategy import BASELINE, Probe, Strategy, bisect, only_other


def bisect_precision() -> Strategy:
    """Baseline: the first n layers stay in float32, n bisected (Polygraphy's `debug precision`, forward).

    No scores. Every layer before the last sensitive one stays in float32, needed or not. Needs one low format. Two differences
    to the tool: all layers low is tried as well, and the answer is the best that was measured.
    """

    def strategy(problem: Problem, probe: Probe) -> None:
        target, _ = only_other(problem, "bisect_precision")

        def fails(wide: int) -> bool:
            lowered = problem.assignment(np.concatenate([problem.start[:wide], target[wide:]]))
            return not probe(lowered, f"the first {wide} layers in float32").accepted

        probe(problem.baseline, BASELINE)
        bisect(fails, -1, len(problem.layers))

    return strategy
