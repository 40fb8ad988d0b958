"""Measure what a strategy proposes and return the best assignment within the tolerance. No jax."""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field

from mpjax.ledger import Ledger
from mpjax.search.problem import Assignment, Evaluate, Measurement, Problem
from mpjax.search.strategies.strategy import BASELINE, Step, Strategy

Known = MutableMapping[Assignment, Measurement]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of a search.

    Attributes:
        assignment: the best accepted one; it has been measured.
        measurement: of that assignment.
        penalty: its predicted loss; None for a ranking, or where it is not finite.
        cost: its cost, casts included; None if the problem has none.
        bound: no assignment within the predicted limit under which this one was proposed has a smaller objective; None where
            the strategy proved no bound, as for a layer that was added at the end.
        ledger: different assignments that were asked for, as evaluations.
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
    """Not even all layers in float32 meet the tolerance, or nothing that was measured meets it and the problem's limits."""


class SearchInterrupted(RuntimeError):
    """`evaluate` or the strategy raised; the cause is chained.

    Attributes:
        trail: every step so far; a failed evaluation is the last.
        best: the best accepted assignment, or None.
    """

    def __init__(self, message: str, *, trail: tuple[Step, ...], best: Assignment | None) -> None:
        super().__init__(f"{message}; see .trail and .best")
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
    """The best assignment, by the problem's objective, among those that were measured to be within the tolerance.

    Args:
        problem: layers, formats, penalties, costs, constraints and the objective. The strategy gets it contracted: a layer for
            each group of tied layers.
        strategy: `ilp()`, `binary()`, …
        evaluate: the user's metric. An assignment that repeats is not evaluated again.
        tolerance: largest accepted loss, in the unit of `Measurement.value`.
        confidence: None accepts by the measured value; a level in (0, 1) accepts by the upper bound `high`, which `evaluate`
            must then return, computed at that level.
        max_evaluations: different assignments that may be asked for, before the search ends with the result so far.
        known: measurements made before; new ones are added at once, so that an interrupted search can resume and several
            searches can share them. They count as evaluations: the course of a search does not depend on them.
        confirm: measure the chosen assignment once more.

    Raises:
        ToleranceError: all-float32 misses the tolerance; or, where float32 is not all layers' choice or there are limits, nothing
            that was measured meets both.
        InfeasibleError: no assignment meets the problem's limits.
        SearchInterrupted: `evaluate` or the strategy raised an exception; it carries the trail and the best so far.
        UnsteadyMetricError: with `confirm`, the second value differs from the first.
        ValueError, TypeError: a tolerance, confidence, budget or measurement without a meaning, or a problem that the strategy
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
        strategy(problem.contracted, search)
        search(problem.contracted.baseline, BASELINE)
    except _BudgetSpent:
        pass
    except SearchInterrupted:
        raise
    except RuntimeError as error:
        raise search.interrupted(f"the strategy failed with {error!r}") from error
    best = search.best
    if best is None:
        raise search.nothing()
    assert best.measurement is not None
    if confirm:
        search.confirm(best.assignment, best.measurement)
    index = problem.index(best.assignment)
    penalty = problem.penalty_of(index) if problem.kind == "loss" else math.nan
    return Result(
        assignment=best.assignment,
        measurement=best.measurement,
        penalty=penalty if math.isfinite(penalty) else None,
        cost=problem.cost_of(index),
        bound=best.bound if best.bound is not None and math.isfinite(best.bound) else None,
        ledger=Ledger(evaluations=len(search.tried)),
        trail=tuple(search.trail),
    )


class _BudgetSpent(Exception):
    """Ends a strategy from inside its probe."""


@dataclass
class _Search:
    """The probe that `solve` hands to a strategy, with its memory, budget and trail."""

    problem: Problem
    evaluate: Evaluate
    tolerance: float
    confidence: float | None
    max_evaluations: int | None
    known: Known
    trail: list[Step] = field(default_factory=list)
    tried: dict[Assignment, Step] = field(default_factory=dict)

    @property
    def best(self) -> Step | None:
        """The accepted step within the limits of the best objective and cost; among equals that of the smaller measured loss."""

        def rank(step: Step) -> tuple[float, float, float, float]:
            assert step.measurement is not None
            objective, cost, penalty = self.problem.rank(self.problem.index(step.assignment))
            return objective, cost, step.measurement.value, penalty

        return min((step for step in self.trail if step.accepted and not self.over(step)), key=rank, default=None)

    def over(self, step: Step) -> dict[str, float]:
        """The problem's limits that a step exceeds."""
        return self.problem.exceeded(self.problem.index(step.assignment))

    def nothing(self) -> ToleranceError:
        """The error of a search without a result."""
        measured = [step for step in self.trail if step.measurement is not None]
        inside = [step.value for step in measured if not self.over(step) and not math.isnan(step.value)]
        limits = " and ".join(f"{name} ≤ {most:.6g}" for name, (_, most) in self.problem.limits.items())
        return ToleranceError(
            f"none of {len(measured)} measured assignments is within the tolerance {self.tolerance:.6g}"
            + (f" and has {limits}" if limits else "")
            + (f"; the least {'such ' if limits else ''}loss is {min(inside):.6g}" if inside else "")
        )

    def __call__(self, assignment: Assignment, note: str = "", bound: float | None = None) -> Step:
        if self.problem.contracted is not self.problem:
            assignment = self.problem.expanded(assignment)
        if assignment in self.tried:
            return self.tried[assignment]
        baseline = assignment == self.problem.baseline
        if not self.tried and not baseline:
            self(self.problem.contracted.baseline, BASELINE)
        if self.max_evaluations is not None and len(self.tried) >= self.max_evaluations:
            self.trail.append(
                Step(assignment=assignment, note=f"stopped: max_evaluations={self.max_evaluations} spent")
            )
            raise _BudgetSpent
        if (measurement := self.known.get(assignment)) is None:
            measurement = self.measure(assignment, f"evaluation {len(self.tried) + 1}")
        value = compared(measurement, self.confidence)
        self.known[assignment] = measurement
        accepted = not math.isnan(measurement.value) and value <= self.tolerance
        step = Step(
            assignment=assignment, measurement=measurement, value=value, accepted=accepted, note=note, bound=bound
        )
        self.tried[assignment] = step
        self.trail.append(step)
        if baseline and not accepted and not assignment.lowered:
            raise ToleranceError(
                f"with all layers in float32 the metric is {value:.6g}, over the tolerance {self.tolerance:.6g}; raise the "
                "tolerance, or check that the metric is a loss (lower is better) against the float32 output"
            )
        return step

    def measure(self, assignment: Assignment, attempt: str) -> Measurement:
        try:
            return self.evaluate(assignment)
        except Exception as error:
            self.trail.append(Step(assignment=assignment, note=f"failed: {error!r}"))
            raise self.interrupted(f"{attempt} failed with {error!r}") from error

    def confirm(self, assignment: Assignment, first: Measurement) -> None:
        """Refuse a metric that does not give the same value again."""
        again = self.measure(assignment, "measuring the chosen assignment again")
        for name in ("value", "low", "high"):
            before, after = getattr(first, name), getattr(again, name)
            if None not in (before, after) and not math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-12):
                raise self.interrupted(
                    f"the chosen assignment ({len(assignment.lowered)} layers lowered) measured {name} {before:.6g} and then "
                    f"{after:.6g}: fix the metric's data, seeds and order",
                    UnsteadyMetricError,
                )

    def interrupted(self, message: str, kind: type[SearchInterrupted] = SearchInterrupted) -> SearchInterrupted:
        best = self.best
        return kind(message, trail=tuple(self.trail), best=None if best is None else best.assignment)


def compared(measurement: Measurement, confidence: float | None) -> float:
    """The number that is compared with the tolerance."""
    if not isinstance(measurement, Measurement):
        raise TypeError(f"evaluate must return a Measurement; got {type(measurement).__name__}: {measurement!r}")
    if confidence is None:
        return measurement.value
    if measurement.high is None:
        raise ValueError(f"confidence={confidence} needs Measurement.high (metrics.mean_interval); got None")
    if measurement.confidence not in (None, confidence):
        raise ValueError(f"the interval was measured at {measurement.confidence}, asked for is {confidence}")
    return measurement.high
