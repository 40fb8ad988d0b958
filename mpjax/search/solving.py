"""From scores to an assignment that was measured: budget, memory, trail. NumPy and SciPy only, no jax.

    problem = Problem(layers=scores.layers, formats=("bfloat16",), penalty=scores.value)
    result = solve(problem, ilp(), evaluate=my_metric, tolerance=0.01)

A strategy proposes assignments; `solve` measures each of them with the user's metric, once, and returns the best one, by the
problem's own objective, that was within the tolerance. The scores only say where to look: a predicted assignment is never
returned.

Where to look: `problem` (assignments, penalties, costs), `strategies` (what is tried in which order), `predicted` (the best by
prediction alone).
"""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass

from mpjax.ledger import Ledger
from mpjax.search.problem import Assignment, Evaluate, Measurement, Problem
from mpjax.search.strategies import (
    Strategy,
    Trial,
)

Known = MutableMapping[Assignment, Measurement]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One entry of the trail: what was tried and what came of it.

    `measurement` is None where nothing was measured: the budget was spent, or the evaluation failed. `bound`: what no
    assignment within the predicted limit can better, where the strategy proved one.
    """

    assignment: Assignment
    measurement: Measurement | None
    accepted: bool
    note: str = ""
    bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """Where a search ended.

    Attributes:
        assignment: the best accepted one; it has been measured.
        measurement: of that assignment.
        penalty: its predicted loss; None for a ranking, or where it is not finite.
        cost: its cost, casts included; None where the problem has none.
        bound: no assignment of the predicted loss that was the limit when this one was proposed has a smaller objective: with an
            exact solver its own objective, unless time was up. None where its strategy proved none, as when a layer was added
            at the end.
        ledger: evaluations: different assignments that were asked for.
        trail: every step in order.
    """

    assignment: Assignment
    measurement: Measurement
    penalty: float | None
    cost: float | None
    bound: float | None
    ledger: Ledger
    trail: tuple[Step, ...]


class ToleranceError(ValueError):
    """Not even all layers in float32 meet the tolerance."""


class SearchInterrupted(RuntimeError):
    """`evaluate` raised; the cause is chained.

    Attributes:
        trail: every step so far, the failed one last.
        best: the best accepted assignment, or None.
    """

    def __init__(self, message: str, *, trail: tuple[Step, ...], best: Assignment | None) -> None:
        super().__init__(message)
        self.trail = trail
        self.best = best


class UnsteadyMetricError(SearchInterrupted):
    """The metric gave two values for one assignment."""


def solve(
    problem: Problem,
    strategy: Strategy,
    *,
    evaluate: Evaluate,
    tolerance: float,
    confidence: float | None = None,
    max_evaluations: int | None = None,
    known: Known | None = None,
    confirm: bool = False,
) -> Result:
    """Searches the best assignment whose measured loss is within the tolerance.

    Args:
        problem: layers, formats, penalties, costs and the objective.
        strategy: `ilp()`, `binary()`, …
        evaluate: the user's metric. An assignment that repeats is not evaluated again.
        tolerance: largest accepted loss, in the unit of `Measurement.value`.
        confidence: None accepts by the measured value; a level in (0, 1) accepts by the upper bound `high`, which `evaluate`
            must then return, computed at that level.
        max_evaluations: different assignments that may be asked for; the search ends with the result so far when they are
            spent, and the trail says so.
        known: measurements that are there already; new ones are added as soon as they are made, so that an interrupted search
            goes on from them and several searches share them. They count as evaluations all the same: a search takes the same
            way with and without them.
        confirm: measure the chosen assignment once more.

    Raises:
        ToleranceError: all-float32 misses the tolerance.
        SearchInterrupted: `evaluate` raised an exception; it carries the trail and the best so far.
        UnsteadyMetricError: with `confirm`, the second value is not the first.
        ValueError, TypeError: a tolerance, confidence, budget or measurement that makes no sense, a problem that the strategy
            cannot take.
    """
    if not math.isfinite(tolerance):
        raise ValueError(f"tolerance must be finite, in the unit of the measured value; got {tolerance}")
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), e.g. 0.95, or be None; got {confidence}")
    if max_evaluations is not None and max_evaluations < 1:
        raise ValueError(f"max_evaluations must be at least 1, for all-float32; got {max_evaluations}")
    search = _Search(problem, evaluate, tolerance, confidence, max_evaluations, {} if known is None else known)
    try:
        strategy(problem, search)
        search(problem.baseline, "all layers in float32")
    except _BudgetSpent:
        pass
    except RuntimeError as error:
        if isinstance(error, SearchInterrupted):
            raise
        raise search.interrupted(f"the strategy failed with {error!r}") from error
    end = search.best
    assert end is not None and end.measurement is not None  # all-float32 at least
    if confirm:
        _confirm(search, end)
    index = problem.index(end.assignment)
    penalty = problem.penalty_of(index) if problem.kind == "loss" else math.nan
    return Result(
        assignment=end.assignment,
        measurement=end.measurement,
        penalty=penalty if math.isfinite(penalty) else None,
        cost=problem.cost_of(index),
        bound=end.bound if end.bound is not None and math.isfinite(end.bound) else None,
        ledger=Ledger(evaluations=len(search.tried)),
        trail=tuple(search.trail),
    )


class _BudgetSpent(Exception):
    """Ends a strategy from inside its probe."""


class _Search:
    """The probe that `solve` hands to a strategy: memoised, budgeted, and it keeps the trail."""

    def __init__(
        self,
        problem: Problem,
        evaluate: Evaluate,
        tolerance: float,
        confidence: float | None,
        max_evaluations: int | None,
        known: Known,
    ) -> None:
        self.problem = problem
        self.evaluate = evaluate
        self.tolerance = tolerance
        self.confidence = confidence
        self.max_evaluations = max_evaluations
        self.known = known
        self.trail: list[Step] = []
        self.tried: dict[Assignment, Trial] = {}

    @property
    def best(self) -> Step | None:
        """The accepted step of the best objective; the smaller measured loss among equals, then the earlier one."""
        accepted = [step for step in self.trail if step.accepted]

        def rank(step: Step) -> tuple[float, float, float, float]:
            assert step.measurement is not None
            objective, cost, penalty = self.problem.rank(self.problem.index(step.assignment))
            return objective, cost, step.measurement.value, penalty

        return min(accepted, key=rank, default=None)

    def __call__(self, assignment: Assignment, note: str = "", bound: float | None = None) -> Trial:
        if assignment in self.tried:
            return self.tried[assignment]
        if not self.tried and assignment != self.problem.baseline:
            self(self.problem.baseline, "all layers in float32")
        if self.max_evaluations is not None and len(self.tried) >= self.max_evaluations:
            self._record(assignment, None, False, f"stopped: max_evaluations={self.max_evaluations} spent")
            raise _BudgetSpent
        measurement = self.known[assignment] if assignment in self.known else self._measure(assignment)
        value = _compared(measurement, self.confidence)
        self.known[assignment] = measurement
        accepted = not math.isnan(measurement.value) and value <= self.tolerance
        self.tried[assignment] = trial = Trial(accepted=accepted, value=value)
        self._record(assignment, measurement, accepted, note, bound)
        if assignment == self.problem.baseline and not accepted:
            raise ToleranceError(
                f"with all layers in float32 the metric is {value:.6g}, over the tolerance {self.tolerance:.6g}; raise the "
                "tolerance, or check that the metric is a loss (lower is better) against the float32 output"
            )
        return trial

    def _measure(self, assignment: Assignment) -> Measurement:
        try:
            return self.evaluate(assignment)
        except Exception as error:
            self._record(assignment, None, False, f"failed: {error!r}")
            raise self.interrupted(f"evaluation {len(self.tried) + 1} failed with {error!r}") from error

    def interrupted(self, message: str, kind: type[SearchInterrupted] = SearchInterrupted) -> SearchInterrupted:
        """The error that carries what there is."""
        best = self.best
        return kind(
            f"{message}; see .trail and .best",
            trail=tuple(self.trail),
            best=None if best is None else best.assignment,
        )

    def _record(
        self,
        assignment: Assignment,
        measurement: Measurement | None,
        accepted: bool,
        note: str,
        bound: float | None = None,
    ) -> None:
        step = Step(assignment=assignment, measurement=measurement, accepted=accepted, note=note, bound=bound)
        self.trail.append(step)


def _confirm(search: _Search, end: Step) -> None:
    """Refuse a metric that does not give the same value again."""
    assert end.measurement is not None
    try:
        again = search.evaluate(end.assignment)
    except Exception as error:
        raise search.interrupted(f"measuring the chosen assignment again failed with {error!r}") from error
    pairs = zip(("value", "low", "high"), *((m.value, m.low, m.high) for m in (end.measurement, again)), strict=True)
    for name, before, after in pairs:
        if None not in (before, after) and not math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-12):
            raise search.interrupted(
                f"the chosen assignment ({len(end.assignment.lowered)} layers lowered) measured {name} {before:.6g} and then "
                f"{after:.6g}: fix the metric's data, seeds and order",
                UnsteadyMetricError,
            )


def _compared(measurement: Measurement, confidence: float | None) -> float:
    """The number that the tolerance is compared with."""
    if not isinstance(measurement, Measurement):
        raise TypeError(f"evaluate must return a Measurement; got {type(measurement).__name__}: {measurement!r}")
    if confidence is None:
        return measurement.value
    if measurement.high is None:
        raise ValueError(f"confidence={confidence} needs Measurement.high (metrics.mean_interval); got None")
    if measurement.confidence not in (None, confidence):
        raise ValueError(f"the interval was measured at {measurement.confidence}, asked for is {confidence}")
    return measurement.high
