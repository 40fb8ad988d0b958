"""From scores to an assignment that was measured: budget, memory, trail. NumPy and SciPy only, no jax.

    problem = Problem.from_scores(scores)
    result = solve(problem, ilp(), evaluate=my_metric, tolerance=0.01)

A strategy proposes assignments; `solve` measures each of them with the user's metric, once, and returns the best one, by the
problem's objective, that was within the tolerance. An assignment that was only predicted is never returned.

`problem`: assignments, penalties, costs. `strategies`: which assignments are tried. `optimum`: the best by prediction alone.
`pareto`: the whole trade-off.
"""

from mpjax.search import optimum, pareto
from mpjax.search.pareto import Point, sweep
from mpjax.search.problem import REFERENCE, Assignment, Evaluate, Measurement, Problem
from mpjax.search.solve import Result, SearchInterrupted, ToleranceError, UnsteadyMetricError, solve
from mpjax.search.strategies.binary import binary
from mpjax.search.strategies.bisect_precision import bisect_precision
from mpjax.search.strategies.exhaustive import exhaustive
from mpjax.search.strategies.greedy import greedy
from mpjax.search.strategies.ilp import ilp
from mpjax.search.strategies.iqp import iqp
from mpjax.search.strategies.last_first import last_first
from mpjax.search.strategies.random import random
from mpjax.search.strategies.segments import segments
from mpjax.search.strategies.strategy import Probe, Step, Strategy

__all__ = [
    "REFERENCE",
    "Assignment",
    "Evaluate",
    "Measurement",
    "Point",
    "Probe",
    "Problem",
    "Result",
    "SearchInterrupted",
    "Step",
    "Strategy",
    "ToleranceError",
    "UnsteadyMetricError",
    "binary",
    "bisect_precision",
    "exhaustive",
    "greedy",
    "ilp",
    "iqp",
    "last_first",
    "optimum",
    "pareto",
    "random",
    "segments",
    "solve",
    "sweep",
]
