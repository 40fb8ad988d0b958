"""Every assignment of a small problem."""

import itertools

from mpjax.search.problem import Problem
from mpjax.search.strategies.strategy import Probe, Strategy

MOST = 2**16  # assignments that are measured


def exhaustive() -> Strategy:
    """Measures every assignment, (1 + F)^L of them: the truth for small problems. At most 65,536."""

    def strategy(problem: Problem, probe: Probe) -> None:
        layers, options = len(problem.layers), 1 + len(problem.formats)
        if options**layers > MOST:
            raise ValueError(
                f"{layers} layers in {options} formats are {options**layers:,} assignments, more than {MOST:,}: "
                "take a smaller problem, or ilp"
            )
        for index in itertools.product(range(options), repeat=layers):
            probe(problem.assignment(index), "one of all")

    return strategy
