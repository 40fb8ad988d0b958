"""What a strategy is, and the searches by halving that several strategies share."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from mpjax.search.problem import REFERENCE, Assignment, Index, Measurement, Problem

BASELINE = "the most precise formats"  # note of the first step: all layers in float32, where they may be


@dataclass(frozen=True, kw_only=True)
class Step:
    """An assignment that was tried.

    Attributes:
        measurement: None if nothing was measured: the budget was spent, or the evaluation failed.
        value: the number that was compared with the tolerance.
        accepted: whether it is within the tolerance.
        bound: proved bound on the objective within the predicted limit, if the strategy has one.
    """

    assignment: Assignment
    measurement: Measurement | None = None
    value: float = math.nan
    accepted: bool = False
    note: str = ""
    bound: float | None = None


class Probe(Protocol):
    """Measures an assignment, unless it has been measured already; `note` and `bound` go into the trail."""

    tolerance: float

    def __call__(self, assignment: Assignment, note: str = "", bound: float | None = None) -> Step: ...


Strategy: TypeAlias = Callable[[Problem, Probe], None]


def only_other(problem: Problem, strategy: str) -> tuple[Index, str]:
    """Each layer's only choice besides the one in `start`, or that; and the formats' names. More choices are refused."""
    if (problem.allowed.sum(axis=1) > 2).any():
        raise ValueError(
            f"{strategy} takes exactly one low format; got {problem.formats}. Search once per format, or choose among several "
            "with ilp, iqp, greedy or exhaustive"
        )
    others = problem.allowed & (np.arange(problem.allowed.shape[1]) != problem.start[:, None])
    target = np.where(others.any(axis=1), others.argmax(axis=1), problem.start).astype(np.int64)
    moved = np.unique(target[target != problem.start])
    return target, " and ".join((REFERENCE, *problem.formats)[number] for number in moved)


def bisect(passes: Callable[[int], bool], passed: int, failed: int) -> int:
    """The number next to one that fails, for a predicate that is true at `passed` and false at `failed`, which is larger."""
    while failed - passed > 1:
        middle = (passed + failed) // 2
        passed, failed = (middle, failed) if passes(middle) else (passed, middle)
    return passed


def by_ranking(name: str, order: Callable[[Problem], Iterable[int]], note: str, *, repair: int = 0) -> Strategy:
    """The strategy that bisects how many layers of an order can be lowered; `repair`: see `binary`."""

    def strategy(problem: Problem, probe: Probe) -> None:
        target, low = only_other(problem, name)
        layers = [number for number in order(problem) if target[number] != problem.start[number]]
        values: dict[int, float] = {}

        def passes(length: int) -> bool:
            index = problem.start.copy()
            index[layers[:length]] = target[layers[:length]]
            step = probe(problem.assignment(index), note.format(length, low))
            values[length] = math.inf if math.isnan(step.value) else step.value
            return step.accepted

        passes(0)
        if passes(len(layers)):
            return
        passed = bisect(passes, 0, len(layers))
        for _ in range(repair):
            above = sorted(length for length in values if length > passed)
            if not above or min(values[length] for length in above) >= values[above[0]]:
                return  # no longer prefix came out better than the shortest that failed
            gap, middle = max((b - a, (a + b) // 2) for a, b in itertools.pairwise([passed, *above]))
            if gap < 2:
                return
            passed = middle if passes(middle) else passed

    return strategy


def by_segments(problem: Problem, probe: Probe, top: Index) -> Index:
    """Lowers runs of layers to their formats in `top`, halving those that fail; returns the accepted index."""
    good = problem.start.copy()
    runs = [np.flatnonzero(top != good)]
    while runs:
        at = max(range(len(runs)), key=lambda i: len(runs[i]))  # the first of the longest
        run = runs.pop(at)
        other = good.copy()
        other[run] = top[run]
        if probe(
            problem.assignment(other), f"{np.count_nonzero(good != problem.start)} good layers and {len(run)} more"
        ).accepted:
            good = other
        elif len(run) > 1:
            runs[at:at] = [run[: len(run) // 2], run[len(run) // 2 :]]
    return good
