"""The best assignment by prediction, nothing measured: least cost, or most lowered layers, within a limit on the predicted loss.

`linear` adds penalties up, `quadratic` takes interactions into account, `greedy` does either without a proof. The least predicted
loss at a given cost: `search.allocators`.
"""

from mpjax.search.optimum.greedy import greedy
from mpjax.search.optimum.linear import linear
from mpjax.search.optimum.quadratic import quadratic
from mpjax.search.optimum.solution import MARGIN, Solution, Solver

__all__ = ["MARGIN", "Solution", "Solver", "greedy", "linear", "quadratic"]
