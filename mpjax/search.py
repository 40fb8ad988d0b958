"""From scores to an assignment that was measured: strategies, budget, trail. NumPy only, no jax.

A strategy proposes assignments; `solve` measures each of them with the user's metric, once, and returns the
last one that was within the tolerance. The scores only say where to look: a predicted assignment is never
returned.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpjax.ledger import Ledger

FLOAT32 = "float32"


class Assignment(Mapping[str, str]):
    """Layer -> format name, in layer order; immutable and hashable. Saved as JSON, it is the plan.

    Equal to any mapping with the same items, whatever their order. `dict(assignment)` and `Assignment(dict)`
    are inverse to each other.
    """

    __slots__ = ("_formats",)

    def __init__(self, formats: Mapping[str, str]) -> None:
        for layer, name in formats.items():
            if not isinstance(layer, str) or not isinstance(name, str):
                raise TypeError(f"expected layer name -> format name, both strings; got {layer!r}: {name!r}")
        self._formats = dict(formats)

    @classmethod
    def uniform(cls, layers: Iterable[str], name: str = FLOAT32) -> "Assignment":
        """Every layer in one format."""
        return cls(dict.fromkeys(layers, name))

    @classmethod
    def from_json(cls, text: str) -> "Assignment":
        """Inverse of `to_json`.

        Raises:
            ValueError: not a JSON object of strings.
        """
        formats = json.loads(text)
        if not isinstance(formats, dict) or not all(isinstance(name, str) for name in formats.values()):
            raise ValueError(f"expected a JSON object of layer -> format name; got {text[:80]!r}")
        return cls(formats)

    def to_json(self) -> str:
        """A JSON object, layers in order."""
        return json.dumps(self._formats)

    @property
    def lowered(self) -> tuple[str, ...]:
        """The layers that are not in float32, in layer order."""
        return tuple(layer for layer, name in self._formats.items() if name != FLOAT32)

    def replace(self, formats: Mapping[str, str]) -> "Assignment":
        """This assignment with some layers in other formats.

        Raises:
            ValueError: an unknown layer.
        """
        for layer in formats:
            if layer not in self._formats:
                near = difflib.get_close_matches(layer, self._formats, n=1, cutoff=0.0)
                raise ValueError(f"unknown layer {layer!r}; the nearest of {len(self)} is {near}")
        return Assignment({**self._formats, **formats})

    def __getitem__(self, layer: str) -> str:
        return self._formats[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def __hash__(self) -> int:
        return hash(frozenset(self._formats.items()))

    def __repr__(self) -> str:
        return f"Assignment({len(self.lowered)} of {len(self)} layers lowered: {self._formats})"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the user's metric says about an assignment; lower is better.

    Attributes:
        value: loss of the metric against the float32 model, e.g. the mean NME. NaN is never accepted.
        low, high: its confidence interval, where there is one.
        confidence: level of that interval, where it is stated; `solve` refuses another level than it asks
            for.
        per_sample: (N,) values behind the mean, kept for the report and not compared.
    """

    value: float
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    per_sample: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)


Evaluate: TypeAlias = Callable[[Assignment], Measurement]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Which layers may be lowered, to what, at which predicted penalty and known cost.

    Attributes:
        layers: L distinct names, in execution order. (The arrays below may be given as nested lists.)
        formats: F distinct low formats; float32 is always available and not listed.
        penalty: (L, F) predicted loss of accuracy of each layer alone in each format. A value that is not
            finite means most sensitive.
        kind: "loss" if penalties may be added up (≥ 0, one unit), "ranking" if only their order means
            something.
        cost: (L, F) latency, bytes or FLOPs of each layer in each format, finite; or None.
        float32_cost: (L,) the same in float32; given exactly where `cost` is.

    Raises:
        ValueError: shapes that do not match, repeated or empty names, float32 among the formats, a bad kind
            or cost.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    penalty: NDArray[np.float64]
    kind: Literal["loss", "ranking"] = "loss"
    cost: NDArray[np.float64] | None = None
    float32_cost: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        for what, names in (("layers", self.layers), ("formats", self.formats)):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{what} must be distinct names, at least one; got {names}")
        if FLOAT32 in self.formats:
            raise ValueError(f"formats lists the low formats only, float32 is implicit; got {self.formats}")
        if self.kind not in ("loss", "ranking"):
            raise ValueError(f"kind must be 'loss' or 'ranking'; got {self.kind!r}")
        if (self.cost is None) != (self.float32_cost is None):
            raise ValueError("cost and float32_cost belong together: give both or neither")
        shape = (len(self.layers), len(self.formats))
        self._set("penalty", shape)
        if self.cost is not None:
            self._set("cost", shape, finite=True)
            self._set("float32_cost", shape[:1], finite=True)

    def _set(self, name: str, shape: tuple[int, ...], finite: bool = False) -> None:
        array = np.array(getattr(self, name), dtype=np.float64)
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} (layers, formats); got {array.shape}")
        if finite and not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite; got {array[~np.isfinite(array)][:3]}")
        array.flags.writeable = False
        object.__setattr__(self, name, array)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One entry of the trail: what was tried and what came of it.

    `measurement` is None where nothing was measured: the budget was spent, or the evaluation failed.
    """

    assignment: Assignment
    measurement: Measurement | None
    accepted: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Where a search ended.

    Attributes:
        assignment: the last accepted one; it has been measured.
        measurement: of that assignment.
        penalty: sum of its layers' penalties; None for a ranking, or where one of them is not finite.
        cost: sum of its layers' costs; None where the problem has none.
        ledger: evaluations of the metric, repeats not counted.
        trail: every step in order.
    """

    assignment: Assignment
    measurement: Measurement
    penalty: float | None
    cost: float | None
    ledger: Ledger
    trail: tuple[Step, ...]


class ToleranceError(ValueError):
    """Not even all layers in float32 meet the tolerance."""


class SearchInterrupted(RuntimeError):
    """`evaluate` raised; the cause is chained.

    Attributes:
        trail: every step so far, the failed one last.
        best: the last accepted assignment, or None.
    """

    def __init__(self, message: str, *, trail: tuple[Step, ...], best: Assignment | None) -> None:
        super().__init__(message)
        self.trail = trail
        self.best = best


class Try(Protocol):
    """Measures an assignment, unless it has been measured, and says whether it is within the tolerance."""

    def __call__(self, assignment: Assignment, note: str = "") -> bool: ...


Strategy: TypeAlias = Callable[[Problem, Try], None]
"""Tries all-float32 first, and after that only assignments that it prefers to those accepted so far: `solve`
returns the last accepted one, also when the budget ends the strategy early."""


def solve(
    problem: Problem,
    strategy: Strategy,
    *,
    evaluate: Evaluate,
    tolerance: float,
    confidence: float | None = None,
    max_evaluations: int | None = None,
) -> Result:
    """Searches an assignment whose measured loss is within the tolerance.

    Args:
        problem: layers, formats and their penalties.
        strategy: `binary()` or `greedy()`.
        evaluate: the user's metric. An assignment that repeats is not evaluated again.
        tolerance: largest accepted loss, in the unit of `Measurement.value`.
        confidence: None accepts by the measured value; a level in (0, 1) accepts by the upper bound `high`,
            which `evaluate` must then return, computed at that level.
        max_evaluations: the search ends with the result so far when it is spent; the trail says so.

    Raises:
        ToleranceError: all-float32 misses the tolerance.
        SearchInterrupted: `evaluate` raised an exception; it carries the trail and the best so far.
        ValueError, TypeError: a tolerance, confidence, budget or measurement that makes no sense, a problem
            that the strategy cannot take.
    """
    if not math.isfinite(tolerance):
        raise ValueError(f"tolerance must be finite, in the unit of the measured value; got {tolerance}")
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), e.g. 0.95, or be None; got {confidence}")
    if max_evaluations is not None and max_evaluations < 1:
        raise ValueError(f"max_evaluations must be at least 1, for all-float32; got {max_evaluations}")
    search = _Search(problem, evaluate, tolerance, confidence, max_evaluations)
    try:
        strategy(problem, search)
        search(search.baseline)
    except _BudgetSpent:
        pass
    end = search.best
    assert end is not None and end.measurement is not None  # all-float32 at least
    return Result(
        assignment=end.assignment,
        measurement=end.measurement,
        penalty=_penalty(problem, end.assignment),
        cost=_cost(problem, end.assignment),
        ledger=Ledger(evaluations=len(search.measured)),
        trail=tuple(search.trail),
    )


def binary() -> Strategy:
    """Lowers a prefix of the layers ranked by penalty, and bisects its length on the measured metric.

    Tries none, then all, then bisects: at most 2 + ceil(log2 L) evaluations, 9 for 72 layers. Only the order
    of the penalties is used; ties keep the layers' order, a penalty that is not finite comes last. Returns
    the longest measured prefix within the tolerance, the longest of all where the metric grows with the
    prefix. Needs one low format.
    """

    def strategy(problem: Problem, try_: Try) -> None:
        low = _one_format(problem, "binary")
        penalty = problem.penalty[:, 0]
        ranked = np.argsort(np.where(np.isfinite(penalty), penalty, np.inf), kind="stable")
        baseline = Assignment.uniform(problem.layers)

        def prefix_passes(length: int) -> bool:
            lowered = {problem.layers[i]: low for i in ranked[:length]}
            return try_(baseline.replace(lowered), f"the {length} least sensitive layers in {low}")

        prefix_passes(0)
        passed, failed = 0, len(ranked)
        if prefix_passes(failed):
            return
        while failed - passed > 1:
            middle = (passed + failed) // 2
            if prefix_passes(middle):
                passed = middle
            else:
                failed = middle

    return strategy


def greedy() -> Strategy:
    """Lowers one layer at a time, keeps it if the metric stays within the tolerance, otherwise goes on
    without it.

    Layers come by ascending penalty; with a cost, by ascending penalty per cost saved, and layers that save
    nothing stay in float32. Ties keep the layers' order (with a cost: the larger saving first); a penalty
    that is not finite comes last. At most 1 + L evaluations. Needs one low format; a cost needs penalties of
    kind "loss".
    """

    def strategy(problem: Problem, try_: Try) -> None:
        low = _one_format(problem, "greedy")
        current = Assignment.uniform(problem.layers)
        order = _greedy_order(problem)
        try_(current, "all layers in float32")
        for i in order:
            candidate = current.replace({problem.layers[i]: low})
            if try_(candidate, f"{problem.layers[i]} in {low}"):
                current = candidate

    return strategy


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
    ) -> None:
        self.evaluate = evaluate
        self.tolerance = tolerance
        self.confidence = confidence
        self.max_evaluations = max_evaluations
        self.baseline = Assignment.uniform(problem.layers)
        self.trail: list[Step] = []
        self.measured: dict[Assignment, bool] = {}

    @property
    def best(self) -> Step | None:
        return next((step for step in reversed(self.trail) if step.accepted), None)

    def __call__(self, assignment: Assignment, note: str = "") -> bool:
        if assignment in self.measured:
            return self.measured[assignment]
        if self.max_evaluations is not None and len(self.measured) >= self.max_evaluations:
            self._record(assignment, None, False, f"stopped: max_evaluations={self.max_evaluations} spent")
            raise _BudgetSpent
        try:
            measurement = self.evaluate(assignment)
        except Exception as error:
            best = self.best
            self._record(assignment, None, False, f"failed: {error!r}")
            raise SearchInterrupted(
                f"evaluation {len(self.measured) + 1} failed with {error!r}; see .trail and .best",
                trail=tuple(self.trail),
                best=None if best is None else best.assignment,
            ) from error
        bound = _bound(measurement, self.confidence)
        accepted = not math.isnan(measurement.value) and bound <= self.tolerance
        self.measured[assignment] = accepted
        self._record(assignment, measurement, accepted, note)
        if assignment == self.baseline and not accepted:
            raise ToleranceError(
                f"with all layers in float32 the metric is {bound:.6g}, over the tolerance "
                f"{self.tolerance:.6g}; raise the tolerance, or check that the metric is a loss "
                "(lower is better) against the float32 output"
            )
        return accepted

    def _record(self, assignment: Assignment, measurement: Measurement | None, accepted: bool, note: str) -> None:
        self.trail.append(Step(assignment=assignment, measurement=measurement, accepted=accepted, note=note))


def _bound(measurement: Measurement, confidence: float | None) -> float:
    """The number that the tolerance is compared with."""
    if not isinstance(measurement, Measurement):
        raise TypeError(f"evaluate must return a Measurement; got {type(measurement).__name__}: {measurement!r}")
    if confidence is None:
        return measurement.value
    if measurement.high is None:
        raise ValueError(f"confidence={confidence} needs Measurement.high (metrics.bootstrap_interval); got None")
    if measurement.confidence not in (None, confidence):
        raise ValueError(f"the interval was measured at {measurement.confidence}, asked for is {confidence}")
    return measurement.high


def _one_format(problem: Problem, strategy: str) -> str:
    if len(problem.formats) != 1:
        raise ValueError(
            f"{strategy} takes exactly one low format; got {problem.formats}. Search once per format; "
            "choosing among several is for ilp, quadratic and exhaustive (planned, not in this version)"
        )
    return problem.formats[0]


def _greedy_order(problem: Problem) -> list[int]:
    """Layer indices, first to lower first."""
    penalty = np.where(np.isfinite(problem.penalty[:, 0]), problem.penalty[:, 0], np.inf)
    if problem.cost is None or problem.float32_cost is None:
        return [int(i) for i in np.argsort(penalty, kind="stable")]
    if problem.kind != "loss":
        raise ValueError("greedy with a cost divides by penalties: it needs kind='loss', not a ranking; leave cost out")
    saved = problem.float32_cost - problem.cost[:, 0]
    useful = np.flatnonzero(saved > 0)
    ratio = np.maximum(penalty[useful], 0) / saved[useful]
    return [int(i) for i in useful[np.lexsort((-saved[useful], ratio))]]


def _penalty(problem: Problem, assignment: Assignment) -> float | None:
    if problem.kind == "ranking":
        return None
    total = _total(problem, assignment, problem.penalty, np.zeros(len(problem.layers)))
    return total if math.isfinite(total) else None


def _cost(problem: Problem, assignment: Assignment) -> float | None:
    if problem.cost is None or problem.float32_cost is None:
        return None
    return _total(problem, assignment, problem.cost, problem.float32_cost)


def _total(problem: Problem, assignment: Assignment, low: NDArray[np.float64], float32: NDArray[np.float64]) -> float:
    column = {name: low[:, f] for f, name in enumerate(problem.formats)} | {FLOAT32: float32}
    return float(sum(column[assignment[layer]][i] for i, layer in enumerate(problem.layers)))
