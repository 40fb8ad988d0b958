"""Segment splitting by prediction."""

import math

from mpjax.search.allocators.allocator import allocation, two_levels, with_budget
from mpjax.search.optimum.solution import Solution
from mpjax.search.problem import Assignment, Index, Problem
from mpjax.search.strategies.strategy import Step, by_segments, only_other


def segments(problem: Problem, budget: float, seed: int = 0) -> Solution:
    """Runs of layers are lowered where the predicted loss stays within a threshold, and halved where not; it is bisected.

    Between the neighbouring uniform formats around the budget; the least threshold of 40 bisections, in the logarithm, at which
    the budget is met. Cost: at most 80 L predicted losses.
    Source: the node search of onnxconverter-common's auto_mixed_precision
    (https://github.com/microsoft/onnxconverter-common), with predictions for measurements.

    Raises:
        InfeasibleError: not even all layers lowered meet the limits.
        ValueError: as `ilp`.
    """
    limited = with_budget(problem, budget)
    levels = two_levels(limited)
    target, _ = only_other(levels, "segments")

    def within(threshold: float) -> Index:
        return by_segments(levels, _Predicted(levels, threshold), target)

    best = within(math.inf)
    least, most = levels.penalty_of(levels.start), levels.penalty_of(best)
    if not levels.exceeded(levels.start):
        return allocation(problem, limited, levels.start)
    spans = levels.penalty[levels.usable[:, 1:] & (levels.penalty > 0)]
    low, high = 1e-3 * float(spans.min(initial=1.0)), max(most - least, float(spans.sum()), 1e-300)
    for _ in range(40):
        middle = math.sqrt(low * high)
        if levels.exceeded(index := within(least + middle)):
            low = middle
        else:
            high, best = middle, index
    return allocation(problem, limited, best)


class _Predicted:
    """A probe that predicts."""

    def __init__(self, problem: Problem, tolerance: float) -> None:
        self.problem, self.tolerance = problem, tolerance

    def __call__(self, assignment: Assignment, note: str = "", bound: float | None = None) -> Step:
        value = self.problem.penalty_of(self.problem.index(assignment))
        return Step(assignment=assignment, value=value, accepted=bool(value <= self.tolerance))
