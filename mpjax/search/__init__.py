"""From scores to an assignment that was measured: budget, memory, trail. NumPy and SciPy only, no jax.

    problem = Problem(layers=scores.layers, formats=("bfloat16",), penalty=scores.value)
    result = solve(problem, ilp(), evaluate=my_metric, tolerance=0.01)

A strategy proposes assignments; `solve` measures each of them with the user's metric, once, and returns the best one, by the
problem's own objective, that was within the tolerance. The scores only say where to look: a predicted assignment is never
returned.

Where to look: `problem` (assignments, penalties, costs), `strategies` (what is tried in which order), `predicted` (the best by
prediction alone).
"""

from mpjax.search import predicted
from mpjax.search.pareto import Point, sweep
from mpjax.search.problem import FLOAT32, Assignment, Evaluate, Measurement, Objective, Problem
from mpjax.search.solving import Result, SearchInterrupted, Step, ToleranceError, UnsteadyMetricError, solve
from mpjax.search.strategies import (
    Probe,
    Strategy,
    Trial,
    binary,
    bisect_precision,
    exhaustive,
    greedy,
    ilp,
    last_first,
    quadratic,
    random,
    segments,
)

__all__ = [
    "FLOAT32",
    "Assignment",
    "Evaluate",
    "Measurement",
    "Objective",
    "Point",
    "Probe",
    "Problem",
    "Result",
    "SearchInterrupted",
    "Step",
    "Strategy",
    "ToleranceError",
    "Trial",
    "UnsteadyMetricError",
    "binary",
    "bisect_precision",
    "exhaustive",
    "greedy",
    "ilp",
    "last_first",
    "predicted",
    "quadratic",
    "random",
    "segments",
    "solve",
    "sweep",
]
