"""Baseline: the node search of onnxconverter-common's auto_mixed_precision, written from its description."""

from mpjax.search.problem import Problem
from mpjax.search.strategies.strategy import BASELINE, Probe, Strategy, by_segments, only_other


def segments() -> Strategy:
    """Baseline: lowers the largest untried run of layers beside those already good, and halves it if that fails.

    The first of equally long runs comes first. No scores: evaluations grow with the number of sensitive layers. Needs one low
    format.
    """

    def strategy(problem: Problem, probe: Probe) -> None:
        target, _ = only_other(problem, "segments")
        probe(problem.baseline, BASELINE)
        by_segments(problem, probe, target)

    return strategy
