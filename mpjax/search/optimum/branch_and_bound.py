"""Maximise a linear gain of 0-1 variables within a convex quadratic limit: branch and bound with bounds from boxes.

maximise aᵀx subject to ½ xᵀGx ≤ t, x in {0, 1}ⁿ, at most one of a group. A node whose least ½ xᵀGx with more gain than the best
so far is proved to be beyond t is closed. docs/search.md describes what makes it fast: `split`, probes before branching, and
bounds of many boxes at once from inexact minima.

Sources: d: Billionnet and Elloumi, Mathematical Programming 109 (2007); probing: Savelsbergh, doi 10.1287/ijoc.6.4.445.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpjax.search.optimum.solution import MARGIN
from mpjax.search.problem import Floats, Index

_BATCH = 64  # nodes that are branched on at once
_MOST = 200_000  # open nodes, at most
_PRICES, _SWEEPS = 14, 4  # multipliers, and sweeps at each, of a probe

Points: TypeAlias = NDArray[np.bool_]


class Maximum(NamedTuple):
    """The best point, and a proved bound: no point within the limit gains more. `nodes` were bounded."""

    point: Points
    bound: float
    nodes: int


def split(gram: Floats, deadline: float = math.inf) -> tuple[Floats, Floats]:
    """(d, R): xᵀGx = dᵀx + xᵀRx for every 0-1 vector x, R positive semi-definite, Σ d about as large as it can be.

    The larger d, the less a fractional x can gain. Maximises Σ d + μ log det R over the scaled matrix, one entry of d at a time
    and in closed form, with μ falling, where Billionnet and Elloumi (Mathematical Programming 109, 2007) solve a semidefinite
    program. Past the deadline (`time.perf_counter`) μ stays as it is.
    """
    diagonal = np.diagonal(gram)
    used = np.flatnonzero(diagonal > 0)
    straight = np.zeros(len(gram))
    if not used.size:
        return straight, gram.copy()
    scale = np.sqrt(diagonal[used])
    scaled = gram[np.ix_(used, used)] / scale[:, None] / scale[None, :]
    taken = np.zeros(len(used))
    rest = scaled + 1e-9 * np.eye(len(used))
    for barrier in np.geomspace(1.0, 1e-4, 20):
        inverse = np.linalg.inv(rest)
        for i in range(len(used)):
            step = 1.0 / inverse[i, i] - barrier
            column = inverse[:, i].copy()
            inverse += np.outer(column, column) * (step / (1.0 - step * column[i]))
            rest[i, i] -= step
            taken[i] += step
        if time.perf_counter() > deadline:
            break
    taken += min(0.0, float(np.linalg.eigvalsh(scaled - np.diag(taken)).min()))
    straight[used] = taken * diagonal[used]
    return straight, gram - np.diag(straight)


# --- bounds of boxes ---------------------------------------------------------------------------------------------------


class _Boxes(NamedTuple):
    """B boxes low ≤ x ≤ high of n variables, each with a point in it and a multiplier of the gain to start from."""

    low: Floats
    high: Floats
    point: Floats
    price: Floats

    def take(self, which: Index | Points) -> "_Boxes":
        return _Boxes(*(values[which] for values in self))

    def joined(self, other: "_Boxes") -> "_Boxes":
        return _Boxes(*map(np.concatenate, zip(self, other, strict=True)))


class _Bounds(NamedTuple):
    """Lower bounds of the loss in B boxes.

    `loss` (B,) is at most that of any point of the box that gains enough; it rises by `at_one` and `at_zero`, (B, n), for points
    with a variable at 1, or at 0.
    """

    loss: Floats
    boxes: _Boxes
    at_one: Floats
    at_zero: Floats


class _Quadratic:
    """constant + linear·x + ½ xᵀRx, with R positive semi-definite, and the gain a of x; groups side by side."""

    def __init__(self, linear: Floats, rest: Floats, constant: float, gain: Floats, groups: Index) -> None:
        self.linear, self.rest, self.constant, self.gain = linear, rest, constant, gain
        self.curvature = np.diagonal(rest)
        self.least = max(1e-12 * float(np.abs(rest).max(initial=0.0)), 1e-150)
        self.starts = np.flatnonzero(np.diff(groups, prepend=-1))
        self.sizes = np.diff(self.starts, append=len(groups))
        self.same = (groups[:, None] == groups[None, :]) & ~np.eye(len(groups), dtype=np.bool_)
        self.others = [np.flatnonzero(row) for row in self.same]

    def bounds(self, boxes: _Boxes, needed: float, *, prices: int, sweeps: int, deadline: float = math.inf) -> _Bounds:
        """Of the boxes' points that gain at least `needed`: a few sweeps of coordinate descent at each of a few multipliers.

        At a multiplier λ ≥ 0 and any x, loss(y) ≥ loss(x) + λ (needed - aᵀx) + min over y of (slope - λ a)ᵀ(y - x) for every y of
        the box with aᵀy ≥ needed, as loss is convex. Past the deadline no more multiplier is tried.
        """
        price = boxes.price.copy()
        x = np.clip(boxes.point, boxes.low, boxes.high)
        slope = x @ self.rest + self.linear
        best = _Bounds(
            np.full(len(x), -np.inf),
            boxes._replace(point=x.copy(), price=price.copy()),
            np.zeros_like(x),
            np.zeros_like(x),
        )
        below, above = np.zeros(len(x)), np.full(len(x), np.inf)  # multipliers with too little gain, and with enough
        for _ in range(prices):
            for _ in range(sweeps):
                self.sweep(x, slope, price, boxes)
            slope = x @ self.rest + self.linear  # anew: the sweeps' sums round
            gained = x @ self.gain
            tilted = slope - price[:, None] * self.gain
            end, at_one, at_zero = self.ends(tilted, boxes)
            loss = self.constant + 0.5 * (x * (slope + self.linear)).sum(axis=1) + price * (needed - gained)
            loss += end - (tilted * x).sum(axis=1)
            better = loss > best.loss
            stored = (best.loss, best.at_one, best.at_zero, best.boxes.point, best.boxes.price)
            for target, values in zip(stored, (loss, at_one, at_zero, x, price), strict=True):
                target[better] = values[better]
            enough = gained >= needed
            below, above = np.where(enough, below, price), np.where(enough, price, above)
            bracketed = np.sqrt(np.maximum(below, 1e-300)) * np.sqrt(np.where(np.isfinite(above), above, 0.0))
            price = np.where(np.isfinite(above), np.where(below > 0, bracketed, price / 4), 2 * price)
            if time.perf_counter() > deadline:
                break
        return best

    def sweep(self, x: Floats, slope: Floats, price: Floats, boxes: _Boxes) -> None:
        """Moves each variable, and each pair of a group against each other, to the minimum, in place."""
        low, high = boxes.low, boxes.high
        for j, others in enumerate(self.others):
            most = high[:, j] if not others.size else np.minimum(high[:, j], 1.0 - x[:, others].sum(axis=1))
            most = np.maximum(most, low[:, j])
            down = (slope[:, j] - price * self.gain[j]) / max(self.curvature[j], self.least)
            move = np.clip(x[:, j] - down, low[:, j], most) - x[:, j]
            x[:, j] += move
            slope += move[:, None] * self.rest[j]
            for k in others[others > j]:
                across = self.rest[j] - self.rest[k]
                down = slope[:, j] - slope[:, k] - price * (self.gain[j] - self.gain[k])
                least = np.maximum(low[:, j] - x[:, j], x[:, k] - high[:, k])
                most = np.minimum(high[:, j] - x[:, j], x[:, k] - low[:, k])
                move = -down / max(across[j] - across[k], self.least)
                move = np.clip(move, np.minimum(least, 0.0), np.maximum(most, 0.0))
                x[:, j] += move
                x[:, k] -= move
                slope += move[:, None] * across

    def ends(self, tilted: Floats, boxes: _Boxes) -> tuple[Floats, Floats, Floats]:
        """The least tilted·y over 0-1 points of the box, (B,), and how it rises with a variable at 1, and at 0."""
        forced = np.add.reduceat(boxes.low, self.starts, axis=1) > 0
        barred = (boxes.high <= 0) | (np.repeat(forced, self.sizes, axis=1) & (boxes.low == 0))
        usable = np.where(barred, np.inf, tilted)
        nothing = np.where(forced, np.inf, 0.0)
        first = np.minimum(np.minimum.reduceat(usable, self.starts, axis=1), nothing)
        at_one = usable - np.repeat(first, self.sizes, axis=1)
        chosen = usable == np.repeat(first, self.sizes, axis=1)
        second = np.minimum(np.minimum.reduceat(np.where(chosen, np.inf, usable), self.starts, axis=1), nothing)
        equals = np.add.reduceat(chosen, self.starts, axis=1, dtype=np.int64) > 1
        rise = np.where(equals, 0.0, second - first)  # of equals any
        return first.sum(axis=1), at_one, np.where(chosen, np.repeat(rise, self.sizes, axis=1), 0.0)


# --- the search --------------------------------------------------------------------------------------------------------


@dataclass
class BranchAndBound:
    """The best point so far, and the variables that are not fixed yet; `run` solves.

    Attributes:
        gain: (n,) a. A variable with an infinite negative gain is never taken.
        gram: (n, n) G, symmetric and positive semi-definite.
        limit: t ≥ 0.
        whole: all gains are whole numbers, and so is the bound; otherwise points whose gains differ by less than a millionth
            of the largest gain count as equal.
        groups: (n,) number of each variable's group, ascending.
        improve: makes a point near the given one that is within the limit.
        time_limit: seconds.

    Raises:
        ValueError: a limit that is negative or not a number, groups that do not ascend, gains that are not numbers.
    """

    gain: Floats
    gram: Floats
    limit: float
    whole: bool
    groups: Index
    improve: Callable[[Points], Points]
    time_limit: float

    def __post_init__(self) -> None:
        if not self.limit >= 0:
            raise ValueError(f"limit must be ≥ 0; got {self.limit}")
        if (np.diff(self.groups) < 0).any():
            raise ValueError("groups must ascend: the variables of a group stand side by side")
        if np.isnan(self.gain).any() or np.isposinf(self.gain).any():
            raise ValueError("gains must be numbers, minus infinity for a variable that is never taken")
        largest = float(np.abs(self.gram).max(initial=0.0))
        self.accepted = self.limit * (1 + MARGIN)
        self.beyond = self.accepted + 1e-13 * len(self.gain) * largest  # for bounds, which round as sums of G do
        finite = np.isfinite(self.gain)
        self.step = 1.0 if self.whole else 1e-6 * float(np.abs(self.gain[finite]).max(initial=0.0)) or 1.0
        self.least_price = max(1e-9 * largest, 1e-150)
        now = time.perf_counter()
        self.deadline = now + 0.8 * self.time_limit
        self.end = now + 0.95 * self.time_limit  # of the bound of the nodes that stay open
        self.best, self.gained, self.nodes = np.zeros(len(self.gain), np.bool_), 0.0, 0
        self.free, self.taken = np.flatnonzero(finite), np.zeros(0, np.int64)  # not fixed yet; fixed to 1

    def run(self) -> Maximum:
        """The point of the most gain, proved, unless time was up."""
        self.offer(self.improve(self.best))
        quadratic, root = self.probed()
        reached = -math.inf
        if root is not None:
            loss, boxes = self.branched(quadratic, root)
            if len(loss):
                reached = min(self.reach(loss, boxes), self.farthest(quadratic, root))
        bound = max(self.gained, reached)
        # No other point gains as much as the best one and a step.
        bound = math.floor(bound + 1e-6) if self.whole else max(bound, self.gained + self.step)
        return Maximum(self.best, float(bound), self.nodes)

    @property
    def fixed_gain(self) -> float:
        return float(self.gain[self.taken].sum())

    @property
    def needed(self) -> float:
        """The gain of the free variables in a better point."""
        return self.gained + self.step - self.fixed_gain

    @property
    def left(self) -> bool:
        """Whether there is time."""
        return time.perf_counter() < self.deadline

    def offer(self, point: Points) -> None:
        """Takes a point within the limit as the best if it gains more."""
        gained = float(self.gain[point].sum())
        if gained > self.gained and 0.5 * float(self.gram[np.ix_(point, point)].sum()) <= self.accepted:
            self.best, self.gained = point, gained

    def reach(self, loss: Floats, boxes: _Boxes) -> float:
        """The most that the boxes can gain: a point within the limit satisfies λ (gain - needed) ≤ limit - loss."""
        with np.errstate(over="ignore"):
            most = self.needed + (self.beyond - loss) / np.maximum(boxes.price, 1e-300)
        everything = np.maximum(self.gain[self.free], 0.0) @ boxes.high.T
        return float(np.minimum(most, everything).max()) + self.fixed_gain

    def farthest(self, quadratic: _Quadratic, root: _Bounds) -> float:
        """As `reach`, of all free points: the gain that the bound of the whole box allows, by bisection."""
        possible, impossible = self.needed, self.reach(root.loss, root.boxes) - self.fixed_gain
        for _ in range(8):
            if time.perf_counter() > self.end:
                break
            middle = 0.5 * (possible + impossible)
            bounds = quadratic.bounds(root.boxes, middle, prices=8, sweeps=2, deadline=self.end)
            if bounds.loss[0] > self.beyond:
                impossible = middle
            else:
                possible, root = middle, bounds
        return impossible + self.fixed_gain

    def quadratic(self) -> _Quadratic:
        """The loss as a function of the free variables."""
        now = time.perf_counter()
        straight, rest = split(self.gram[np.ix_(self.free, self.free)], now + 0.2 * (self.deadline - now))
        linear = 0.5 * straight + self.gram[np.ix_(self.free, self.taken)].sum(axis=1)
        constant = 0.5 * float(self.gram[np.ix_(self.taken, self.taken)].sum())
        return _Quadratic(linear, rest, constant, self.gain[self.free], self.groups[self.free])

    def probed(self) -> tuple[_Quadratic, _Bounds | None]:
        """Fixes variables until nothing more follows; None if no better point is left, else the bound of the whole box."""
        price = max(self.beyond / max(self.gained, self.step), self.least_price)
        while True:
            count = len(self.free)
            quadratic = self.quadratic()
            if not count:
                self.offer(self.rounded(np.zeros(0)))
                return quadratic, None
            box = _Boxes(np.zeros((1, count)), np.ones((1, count)), np.full((1, count), 0.5), np.full(1, price))
            root = quadratic.bounds(box, self.needed, prices=_PRICES, sweeps=_SWEEPS, deadline=self.deadline)
            before = self.gained
            self.offer(self.improve(self.rounded(root.boxes.point[0])))
            if self.gained > before and self.left:
                continue
            if root.loss[0] > self.beyond:
                return quadratic, None
            not_one, not_zero = self.probes(quadratic, root)
            groups = self.groups[self.free]
            if (not_one & not_zero).any() or (np.bincount(groups[not_zero]) > 1).any():
                return quadratic, None
            not_one |= np.isin(groups, groups[not_zero]) & ~not_zero
            if not (not_one | not_zero).any() or not self.left:
                return quadratic, root
            self.taken = np.concatenate([self.taken, self.free[not_zero]])
            self.free = self.free[~(not_one | not_zero)]
            price = max(float(root.boxes.price[0]), self.least_price)

    def probes(self, quadratic: _Quadratic, root: _Bounds) -> tuple[Points, Points]:
        """Which free variables cannot be 1, and which cannot be 0, in a better point; while there is time."""
        count = len(self.free)
        excluded = np.zeros((2, count), np.bool_)
        size = max(8, 2**16 // count)  # at once: more is faster, but time is looked at in between
        for value in (1, 0):
            for start in range(0, count, size):
                if not self.left:
                    break
                probed = np.arange(start, min(start + size, count))
                boxes = root.boxes.take(np.zeros(len(probed), np.int64))
                (boxes.low if value else boxes.high)[np.arange(len(probed)), probed] = value
                boxes = boxes._replace(point=np.full_like(boxes.point, 0.5))
                bounds = quadratic.bounds(boxes, self.needed, prices=_PRICES, sweeps=_SWEEPS, deadline=self.deadline)
                self.nodes += len(probed)
                excluded[value, probed] = bounds.loss > self.beyond
        return excluded[1], excluded[0]

    def rounded(self, values: Floats) -> Points:
        """A point from values of the free variables, the larger half of them taken, one of a group."""
        point = np.zeros(len(self.gain), np.bool_)
        point[self.taken] = True
        order = np.argsort(-values, kind="stable")
        order = self.free[order[values[order] > 0.5]]
        point[order[np.unique(self.groups[order], return_index=True)[1]]] = True
        return point

    def branched(self, quadratic: _Quadratic, root: _Bounds) -> tuple[Floats, _Boxes]:
        """Branches until nothing is open; returns the open nodes when time is up."""
        size = np.sqrt(np.maximum(np.diagonal(quadratic.rest), 0.0)) + 1e-300
        loss, boxes = root.loss, root.boxes
        while len(loss) and self.left and len(loss) < _MOST:
            order = np.argsort(loss, kind="stable")
            now, later = order[:_BATCH], order[_BATCH:]
            children = self.children(boxes.take(now), size, quadratic.same)
            bounds = quadratic.bounds(children, self.needed, prices=5, sweeps=2, deadline=self.deadline)
            self.nodes += len(bounds.loss)
            for best in np.argsort(bounds.loss)[:2]:
                self.offer(self.improve(self.rounded(bounds.boxes.point[best])))
            new_loss, new_boxes = self.fixed(bounds, quadratic.same)
            loss, boxes = np.concatenate([loss[later], new_loss]), boxes.take(later).joined(new_boxes)
        return loss, boxes

    def children(self, boxes: _Boxes, size: Floats, same: Points) -> _Boxes:
        """Two of each box: the undecided variable of the most weight at 1 (the others of its group at 0), and at 0."""
        undecided = boxes.high > boxes.low
        weight = np.where(undecided, (np.minimum(boxes.point, 1 - boxes.point) + 1e-9) * size, -1.0)
        variable, rows = np.argmax(weight, axis=1), np.arange(len(weight))
        one = boxes._replace(low=boxes.low.copy(), high=np.where(same[variable], 0.0, boxes.high))
        one.low[rows, variable] = one.high[rows, variable] = 1.0
        zero = boxes._replace(high=boxes.high.copy())
        zero.high[rows, variable] = 0.0
        return one.joined(zero)

    def fixed(self, bounds: _Bounds, same: Points) -> tuple[Floats, _Boxes]:
        """The boxes that stay open, in which variables are fixed that cannot leave their end."""
        boxes, room = bounds.boxes, (self.beyond - bounds.loss)[:, None]
        undecided = boxes.high > boxes.low
        low = np.where(undecided & (bounds.at_zero > room), 1.0, boxes.low)
        high = np.where(undecided & (bounds.at_one > room), 0.0, boxes.high)
        high = np.where(low @ same > 0, 0.0, high)  # one of a group
        possible = (bounds.loss <= self.beyond) & (low <= high).all(axis=1)
        decided = (low == high).all(axis=1)
        for point in low[possible & decided]:
            self.offer(self.rounded(point))
        still = possible & ~decided
        return bounds.loss[still], boxes._replace(low=low, high=high).take(still)
