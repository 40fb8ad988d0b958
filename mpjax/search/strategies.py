"""Strategies: what to measure next. Each one probes assignments; `search.solve` returns the best that was accepted.

Two kinds. By a ranking: the layers are put in an order and a prefix of it is lowered, its length bisected on the measured
metric (`binary`; and the baselines `last_first`, `random`, `segments`, `bisect_precision`). By prediction: the best assignment
within a limit on the predicted loss (`predicted`) is measured, and the limit moved by what came out (`ilp`, `quadratic`,
`greedy`): predicted and measured loss need not have one unit, nor a linear relation.

`segments` and `bisect_precision` are written from the description of what two tools do, so that a comparison can be made on
equal terms: the node search of onnxconverter-common's auto_mixed_precision, and TensorRT Polygraphy's `debug precision`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np

from mpjax.search import predicted
from mpjax.search.predicted import Choice
from mpjax.search.problem import FLOAT32, Assignment, Index, Problem

MOST = 2**16  # assignments that `exhaustive` measures


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of an assignment: whether it is within the tolerance, and the number that was compared with it."""

    accepted: bool
    value: float


class Probe(Protocol):
    """Measures an assignment, unless it has been measured already.

    `tolerance` is what the value is compared with; `bound` a proved bound on the predicted objective, kept in the trail.
    """

    tolerance: float

    def __call__(self, assignment: Assignment, note: str = "", bound: float | None = None) -> Trial: ...


Strategy: TypeAlias = Callable[[Problem, Probe], None]
Choose: TypeAlias = Callable[[Problem, float], Choice]


# --- by a ranking -----------------------------------------------------------------------------------------------------


def binary(*, repair: int = 3) -> Strategy:
    """Lowers a prefix of the layers ranked by penalty, and bisects its length on the measured metric.

    Tries none, then all, then bisects: at most 2 + ceil(log2 L) evaluations, 9 for 72 layers. Only the order of the penalties
    is used; ties keep the layers' order, a penalty that is not finite, or a negative loss, comes last. Needs one low format.

    Bisection is right where the metric grows with the prefix. Where a longer prefix came out better than the shortest one that
    failed, it did not, and up to `repair` of the lengths above the one found are tried as well, in the middle of the widest
    gaps.
    """
    if repair < 0:
        raise ValueError(f"repair must be at least 0; got {repair}")

    def strategy(problem: Problem, probe: Probe) -> None:
        low = _one_format(problem, "binary")
        penalty = problem.penalty[:, 0]
        known = np.isfinite(penalty) & ((penalty >= 0) | (problem.kind == "ranking"))
        ranked = np.argsort(np.where(known, penalty, np.inf), kind="stable")
        _by_prefix(problem, probe, ranked, lambda n: f"the {n} least sensitive layers in {low}", repair=repair)

    return strategy


def last_first() -> Strategy:
    """Baseline: lowers the last layers first, their number bisected. Needs one low format, and no penalties."""

    def strategy(problem: Problem, probe: Probe) -> None:
        low = _one_format(problem, "last_first")
        backwards = np.arange(len(problem.layers))[::-1]
        _by_prefix(problem, probe, backwards, lambda n: f"the last {n} layers in {low}")

    return strategy


def random(*, seed: int) -> Strategy:
    """Baseline: lowers layers in a random order, their number bisected. Needs one low format, and no penalties."""

    def strategy(problem: Problem, probe: Probe) -> None:
        low = _one_format(problem, "random")
        order = np.random.default_rng(seed).permutation(len(problem.layers))
        _by_prefix(problem, probe, order, lambda n: f"{n} random layers in {low}")

    return strategy


def bisect_precision(*, direction: Literal["forward", "reverse"] = "forward") -> Strategy:
    """Baseline: the first n layers stay in float32 ("reverse": the last n), n bisected (Polygraphy's `debug precision`).

    No scores. Every layer before the last sensitive one stays in float32, needed or not. Needs one low format. Departs from the
    tool in two points: all layers low is tried, too, and the answer is the best that was measured.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse'; got {direction!r}")

    def strategy(problem: Problem, probe: Probe) -> None:
        low, count = _one_format(problem, "bisect_precision"), len(problem.layers)
        probe(problem.baseline, "all layers in float32")
        enough, small = count, -1  # with `enough` layers in float32 it passes, with `small` it does not
        while enough - small > 1:
            kept = (enough + small) // 2
            lowered = problem.layers[kept:] if direction == "forward" else problem.layers[: count - kept]
            end = "first" if direction == "forward" else "last"
            trial = probe(problem.baseline.replace(dict.fromkeys(lowered, low)), f"the {end} {kept} layers in float32")
            enough, small = (kept, small) if trial.accepted else (enough, kept)

    return strategy


def segments() -> Strategy:
    """Baseline: tries to lower the largest untried run of layers together with those already good, the first of equal ones;
    halves it where that fails (onnxconverter-common's auto_mixed_precision).

    No scores: evaluations grow with the number of sensitive layers. Needs one low format.
    """

    def strategy(problem: Problem, probe: Probe) -> None:
        _one_format(problem, "segments")
        probe(problem.baseline, "all layers in float32")
        _by_segments(problem, probe, np.ones(len(problem.layers), np.int64))

    return strategy


def exhaustive() -> Strategy:
    """Measures every assignment, (1 + F)^L of them: the truth for small problems. At most 65,536."""

    def strategy(problem: Problem, probe: Probe) -> None:
        options = 1 + len(problem.formats)
        count = options ** len(problem.layers)
        if count > MOST:
            raise ValueError(
                f"{len(problem.layers)} layers in {options} formats are {count:,} assignments, more than {MOST:,}: "
                "take a smaller problem, or ilp"
            )
        for index in itertools.product(range(options), repeat=len(problem.layers)):
            probe(problem.assignment(index), "one of all")

    return strategy


# --- by prediction, then measured -------------------------------------------------------------------------------------


def ilp(*, rounds: int = 10, extend: int = 6, exchange: int = 0) -> Strategy:
    """Predict, verify, rescale: the exact optimum within a limit on Σ penalties, over any number of formats and casts.

    The limit starts from the measured loss of the unlimited optimum (loss ∝ √penalty) and is then interpolated, in logarithms,
    between the best that passed and the best that failed. At the end single layers are lowered further, those with the least
    predicted loss first, until `extend` of them failed.

    Args:
        rounds: limits that are tried at most.
        extend: failures that end the last part; 0 leaves it out.
        exchange: how often, at most, the lowered layer without which the measured loss is least goes back to float32 and others
            are tried in its place: an evaluation for each lowered layer and each one tried. It finds what the prediction does not
            know of: one layer that tips the output over.
    """
    return _verified(predicted.linear, "ilp", rounds, extend, exchange)


def quadratic(*, rounds: int = 10, extend: int = 6, exchange: int = 0, time_limit: float = 5.0) -> Strategy:
    """As `ilp`, with ½ xᵀGx for the predicted loss: needs a problem with interactions.

    Args:
        time_limit: seconds for one limit; the incumbent is measured where it ends without a proof.
    """

    def choose(problem: Problem, limit: float) -> Choice:
        return predicted.quadratic(problem, limit, time_limit=time_limit)

    return _verified(choose, "quadratic", rounds, extend, exchange)


def greedy(*, rounds: int = 10, extend: int = 6, exchange: int = 0) -> Strategy:
    """As `ilp`, with the greedy choice: most gain per additional predicted loss first, computed anew with interactions."""
    return _verified(predicted.greedy, "greedy", rounds, extend, exchange)


def _verified(choose: Choose, name: str, rounds: int, extend: int, exchange: int) -> Strategy:
    if rounds < 1 or extend < 0 or exchange < 0:
        raise ValueError(f"{name}: expected rounds ≥ 1, extend and exchange ≥ 0; got {rounds}, {extend} and {exchange}")

    def strategy(problem: Problem, probe: Probe) -> None:
        if problem.kind != "loss":
            raise ValueError(f"{name} adds penalties up: it needs kind='loss', not a ranking; take binary")
        start = probe(problem.baseline, "all layers in float32")
        best = np.zeros(len(problem.layers), np.int64)
        choice = choose(problem, math.inf)
        never = [name for name, row in zip(problem.layers, problem.allowed, strict=True) if not row.any()]
        left_out = f"; never lowered, for want of a usable penalty: {', '.join(never)}" if never else ""
        trial = probe(problem.assignment(choice.index), f"{name}: no limit{left_out}", choice.bound)
        if trial.accepted:
            best = choice.index
        elif choice.penalty <= 0:  # the prediction says nothing
            best = _by_segments(problem, probe, choice.index)
        else:
            low, high = (0.0, start.value), (choice.penalty, trial.value)
            floor = 0.0  # the largest limit that leads to `best`
            for number in range(rounds):
                if high[0] <= max(low[0], floor):
                    break
                limit = _next_limit(low, high, floor, probe.tolerance, halve=number % 3 == 2)
                choice = choose(problem, limit)
                if (choice.index == best).all():
                    floor = limit
                    if choose(problem, high[0] * (1 - 1e-6)).penalty <= choice.penalty:
                        break  # nothing lies between what passed and what failed
                    continue
                trial = probe(problem.assignment(choice.index), f"{name}: predicted loss ≤ {limit:.4g}", choice.bound)
                if trial.accepted:
                    best = min(best, choice.index, key=problem.rank)
                    low, floor = (choice.penalty, trial.value), limit
                else:
                    high = choice.penalty, trial.value
        best = _extend(problem, probe, best, extend)
        for _ in range(exchange):
            other = _exchanged(problem, probe, best, extend)
            if not problem.rank(other)[:2] < problem.rank(best)[:2]:
                return
            best = other

    return strategy


def _next_limit(
    low: tuple[float, float], high: tuple[float, float], floor: float, tolerance: float, *, halve: bool
) -> float:
    """A limit between what passed and what failed, each (predicted, measured): where the measured loss meets the tolerance.

    Interpolates a power law; one half where only the failed point says something.
    """
    below, above = max(low[0], floor), high[0]
    if below <= 0:
        below = 1e-6 * above
    guess = math.sqrt(below * above)
    known = math.isfinite(high[1]) and high[1] > 0 and tolerance > 0
    if known and not halve:
        power = 0.5
        if low[0] > 0 and low[1] > 0 and high[1] > low[1]:
            power = min(3.0, max(0.2, math.log(high[1] / low[1]) / math.log(high[0] / low[0])))
        guess = above * (tolerance / high[1]) ** (1 / power)
    span = above / below
    return float(min(max(guess, below * span**0.05), below * span**0.95))


def _extend(problem: Problem, probe: Probe, index: Index, failures: int, left_out: Sequence[int] = ()) -> Index:
    """Lowers single layers further, the least predicted loss per gain first, and keeps what passes."""
    tried: set[tuple[int, int]] = set()
    while failures > 0:
        loss, value = problem.changes(index)
        rate = np.where((value < 0) & np.isfinite(loss), loss / np.where(value < 0, -value, 1.0), np.inf)
        rate[list(left_out)] = np.inf
        for move in tried:
            rate[move] = np.inf
        layer, low = divmod(int(np.argmin(rate)), rate.shape[1])
        if not math.isfinite(rate[layer, low]):
            return index
        tried.add((layer, low))
        other = index.copy()
        other[layer] = low
        note = f"and {problem.layers[layer]} in {(FLOAT32, *problem.formats)[low]}"
        if probe(problem.assignment(other), note).accepted:
            index = other
        else:
            failures -= 1
    return index


def _exchanged(problem: Problem, probe: Probe, index: Index, failures: int) -> Index:
    """Without the lowered layer that the measured loss is least without, and lowered further; `index` where that fails."""
    trials: dict[int, Trial] = {}
    for layer in np.flatnonzero(index).tolist():
        other = index.copy()
        other[layer] = 0
        trials[layer] = probe(problem.assignment(other), f"without {problem.layers[layer]}")
    passed = {layer: trial.value for layer, trial in trials.items() if trial.accepted}
    if not passed:
        return index
    out = min(passed, key=lambda layer: passed[layer])
    other = index.copy()
    other[out] = 0
    return _extend(problem, probe, other, failures, left_out=[out])


# --- helpers ----------------------------------------------------------------------------------------------------------


def _by_prefix(
    problem: Problem, probe: Probe, order: Sequence[int] | Index, note: Callable[[int], str], *, repair: int = 0
) -> None:
    """Bisects how many of the layers, in this order, can be lowered."""
    low, count = problem.formats[0], len(order)
    values: dict[int, Trial] = {}

    def passes(length: int) -> bool:
        lowered = {problem.layers[i]: low for i in order[:length]}
        values[length] = probe(problem.baseline.replace(lowered), note(length))
        return values[length].accepted

    def bisect(passed: int, failed: int) -> int:
        while failed - passed > 1:
            middle = (passed + failed) // 2
            passed, failed = (middle, failed) if passes(middle) else (passed, middle)
        return passed

    passes(0)
    if passes(count):
        return
    passed = bisect(0, count)
    while repair > 0 and _mends(values, passed):
        lengths = [passed, *sorted(n for n in values if n > passed)]
        gaps = [(b - a, a, b) for a, b in itertools.pairwise(lengths) if b - a > 1]
        if not gaps:
            return
        _, a, b = max(gaps)
        repair -= 1
        if passes((a + b) // 2):
            passed = (a + b) // 2


def _by_segments(problem: Problem, probe: Probe, top: Index) -> Index:
    """Lowers runs of layers to their formats in `top`, halving those that fail; returns what was good."""
    good = np.zeros(len(problem.layers), np.int64)
    open_ = [np.flatnonzero(top)]
    while open_:
        at = max(range(len(open_)), key=lambda i: len(open_[i]))  # the first of the longest
        run = open_.pop(at)
        other = good.copy()
        other[run] = top[run]
        note = f"{np.count_nonzero(good)} good layers and {len(run)} more"
        if probe(problem.assignment(other), note).accepted:
            good = other
        elif len(run) > 1:
            open_[at:at] = [run[: len(run) // 2], run[len(run) // 2 :]]
    return good


def _mends(values: dict[int, Trial], passed: int) -> bool:
    """Whether a longer prefix came out better than the shortest one that failed; a NaN counts as worst."""
    above = [values[n].value for n in sorted(values) if n > passed]
    worst_first = [math.inf if math.isnan(value) else value for value in above]
    return bool(worst_first) and min(worst_first) < worst_first[0]


def _one_format(problem: Problem, strategy: str) -> str:
    if len(problem.formats) != 1:
        raise ValueError(
            f"{strategy} takes exactly one low format; got {problem.formats}. Search once per format, or choose among several "
            "with ilp, quadratic, greedy or exhaustive"
        )
    return problem.formats[0]
