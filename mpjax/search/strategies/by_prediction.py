"""Predict, verify, rescale: the part that `ilp`, `iqp` and `greedy` share.

The best assignment within a limit on the predicted loss is measured, and the limit moved accordingly: predicted and measured
loss need neither one unit nor a linear relation.
"""

import math
from collections.abc import Sequence

import numpy as np

from mpjax.search.optimum import Solver
from mpjax.search.optimum.linear import least_penalty
from mpjax.search.problem import REFERENCE, Index, InfeasibleError, Problem
from mpjax.search.strategies.strategy import BASELINE, Probe, Strategy, by_segments


def by_prediction(name: str, solver: Solver, rounds: int, extend: int, exchange: int) -> Strategy:
    """The strategy of a solver; the knobs are those of `ilp`."""
    if rounds < 1 or extend < 0 or exchange < 0:
        raise ValueError(f"{name}: expected rounds ≥ 1, extend and exchange ≥ 0; got {rounds}, {extend} and {exchange}")

    def strategy(problem: Problem, probe: Probe) -> None:
        if problem.kind != "loss":
            raise ValueError(f"{name} adds penalties up: it needs kind='loss', not a ranking; take binary")
        best = _extended(problem, probe, _within_tolerance(problem, probe, name, solver, rounds), extend)
        for _ in range(exchange):
            other = _exchanged(problem, probe, best, extend)
            if not problem.rank(other)[:2] < problem.rank(best)[:2]:
                return
            best = other

    return strategy


def _within_tolerance(problem: Problem, probe: Probe, name: str, solver: Solver, rounds: int) -> Index:
    """The best measured solution over the limits."""
    start, best = probe(problem.baseline, BASELINE), problem.start
    solution = solver(problem, math.inf)
    never = [layer for layer, row in zip(problem.layers, problem.usable, strict=True) if not row[1:].any()]
    left_out = f"; never lowered, for want of a usable penalty: {', '.join(never)}" if never else ""
    step = probe(problem.assignment(solution.index), f"{name}: no limit{left_out}", solution.bound)
    if step.accepted:
        return solution.index
    if problem.exceeded(best):
        best = least_penalty(problem)[0]
        start = probe(problem.assignment(best), f"{name}: least predicted loss")
    # (predicted, measured) that passed, or is the least predicted, and that failed
    least = min(problem.penalty_of(best), problem.penalty_of(best, additive=True))
    low, high = (least if math.isfinite(least) else 0.0, start.value), (solution.penalty, step.value)
    if high[0] <= low[0]:  # the prediction does not tell layers apart
        return by_segments(problem, probe, solution.index)
    floor = 0.0  # the largest limit that leads to `best`
    for number in range(rounds):
        if high[0] <= max(low[0], floor):
            break
        limit = _next_limit(low, high, floor, probe.tolerance, halve=number % 3 == 2)
        try:
            solution = solver(problem, limit)
        except InfeasibleError:
            floor = limit
            continue
        if (solution.index == best).all():
            floor = limit
            if solver(problem, high[0] * (1 - 1e-6)).penalty <= solution.penalty:
                break  # nothing lies between what passed and what failed
            continue
        step = probe(problem.assignment(solution.index), f"{name}: predicted loss ≤ {limit:.4g}", solution.bound)
        if step.accepted:
            best = min(best, solution.index, key=problem.rank)
            low, floor = (solution.penalty, step.value), limit
        else:
            high = solution.penalty, step.value
    return best


def _next_limit(
    low: tuple[float, float], high: tuple[float, float], floor: float, tolerance: float, *, halve: bool
) -> float:
    """A limit between `low`, which passed, and `high`, which failed: where the measured loss meets the tolerance.

    Interpolates a power law, with exponent one half where only the failed point is informative; `halve`: the geometric mean.
    """
    above = high[0]
    below = max(low[0], floor) or 1e-6 * above
    guess = math.sqrt(below * above)
    if not halve and math.isfinite(high[1]) and high[1] > 0 and tolerance > 0:
        power = 0.5
        if low[0] > 0 and low[1] > 0 and high[1] > low[1]:
            power = min(3.0, max(0.2, math.log(high[1] / low[1]) / math.log(high[0] / low[0])))
        guess = above * (tolerance / high[1]) ** (1 / power)
    span = above / below
    return float(min(max(guess, below * span**0.05), below * span**0.95))


def _extended(problem: Problem, probe: Probe, index: Index, failures: int, left_out: Sequence[int] = ()) -> Index:
    """Lowers single layers further, the least predicted loss per gain first, as long as they pass."""
    untried = problem.usable.copy()
    untried[list(left_out)] = False
    while failures > 0:
        rate = np.where(untried, problem.changes(index)[2], np.inf)
        layer, low = divmod(int(np.argmin(rate)), rate.shape[1])
        if not math.isfinite(rate[layer, low]):
            break
        untried[layer, low] = False
        other = index.copy()
        other[layer] = low
        note = f"and {problem.layers[layer]} in {(REFERENCE, *problem.formats)[low]}"
        if probe(problem.assignment(other), note).accepted:
            index = other
        else:
            failures -= 1
    return index


def _exchanged(problem: Problem, probe: Probe, index: Index, failures: int) -> Index:
    """Without the lowered layer whose absence leaves the least measured loss, and lowered further; else `index`."""
    passed: dict[int, tuple[float, Index]] = {}
    for layer in np.flatnonzero(index != problem.start).tolist():
        other = index.copy()
        other[layer] = problem.start[layer]
        if problem.exceeded(other):
            continue
        step = probe(problem.assignment(other), f"without {problem.layers[layer]}")
        if step.accepted:
            passed[layer] = step.value, other
    if not passed:
        return index
    out = min(passed, key=lambda layer: passed[layer][0])
    return _extended(problem, probe, passed[out][1], failures, left_out=[out])
