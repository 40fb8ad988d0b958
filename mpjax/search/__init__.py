"""From scores to an assignment that was measured: budget, memory, trail. NumPy and SciPy only, no jax.

    problem = Problem.from_scores(scores)
    result = solve(problem, ilp(), evaluate=my_metric, tolerance=0.01)

A strategy proposes assignments; `solve` measures each of them with the user's metric, once, and returns the best one, by the
problem's objective, that was within the tolerance. An assignment that was only predicted is never returned.

`problem`: assignments, penalties, costs, constraints. `strategies`: which assignments are tried. `optimum`: the best within a
limit on the predicted loss, by prediction alone; `allocators`: within a budget. `pareto`: the whole trade-off.
"""

from mpjax.search import allocators, optimum
from mpjax.search import pareto as pareto
from mpjax.search.pareto import Point as Point
from mpjax.search.pareto import sweep
from mpjax.search.problem import REFERENCE as REFERENCE
from mpjax.search.problem import Assignment, InfeasibleError, Measurement, Problem
from mpjax.search.problem import Evaluate as Evaluate
from mpjax.search.problem import Limit as Limit
from mpjax.search.solve import Result as Result
from mpjax.search.solve import SearchInterrupted, ToleranceError, solve
from mpjax.search.solve import UnsteadyMetricError as UnsteadyMetricError
from mpjax.search.strategies.binary import binary
from mpjax.search.strategies.bisect_precision import bisect_precision
from mpjax.search.strategies.exhaustive import exhaustive
from mpjax.search.strategies.greedy import greedy
from mpjax.search.strategies.ilp import ilp
from mpjax.search.strategies.iqp import iqp
from mpjax.search.strategies.last_first import last_first
from mpjax.search.strategies.random_order import random_order
from mpjax.search.strategies.segments import segments
from mpjax.search.strategies.strategy import Probe as Probe
from mpjax.search.strategies.strategy import Step as Step
from mpjax.search.strategies.strategy import Strategy as Strategy

__all__ = [
    "Assignment",
    "InfeasibleError",
    "Measurement",
    "Problem",
    "SearchInterrupted",
    "ToleranceError",
    "allocators",
    "binary",
    "bisect_precision",
    "exhaustive",
    "greedy",
    "ilp",
    "iqp",
    "last_first",
    "optimum",
    "random_order",
    "segments",
    "solve",
    "sweep",
]
