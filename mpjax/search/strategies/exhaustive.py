"""Every assignment of a small problem."""

import itertools
import math

import numpy as np

from mpjax.search.problem import Problem
from mpjax.search.strategies.strategy import Probe, Strategy

MOST = 2**16  # assignments that are measured


def exhaustive() -> Strategy:
    """Measures every allowed assignment within the limits, (1 + F)^L of them: the truth for small problems. At most 65,536."""

    def strategy(problem: Problem, probe: Probe) -> None:
        options = [np.flatnonzero(row).tolist() for row in problem.allowed]
        if (count := math.prod(map(len, options))) > MOST:
            raise ValueError(
                f"{len(options)} layers have {count:,} assignments, more than {MOST:,}: take a smaller problem, or ilp"
            )
        for choice in itertools.product(*options):
            index = np.array(choice, np.int64)
            if not problem.exceeded(index):
                probe(problem.assignment(index), "one of all")

    return strategy
