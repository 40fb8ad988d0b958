"""Branch and bound within a convex quadratic limit, against all points and against bounds that hold for all points."""

import itertools
import math

import numpy as np
import pytest

import mpjax.search.optimum.branch_and_bound as bb
from mpjax.search.optimum import MARGIN


def instance(seed: int, size: int, rank: int, group: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains (some negative), a Gram matrix of effects that partly cancel, groups."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(size, rank)) * 10.0 ** rng.uniform(-1, 0, size=(size, 1))
    return rng.uniform(-0.2, 1.0, size), effects @ effects.T, np.arange(size) // group


def points(groups: np.ndarray) -> np.ndarray:
    """All 0-1 points with at most one of a group."""
    every = np.array(list(itertools.product((False, True), repeat=len(groups))))
    counts = np.stack([every[:, groups == g].sum(axis=1) for g in np.unique(groups)], axis=1)
    return every[(counts <= 1).all(axis=1)]


def losses(every: np.ndarray, gram: np.ndarray) -> np.ndarray:
    return 0.5 * np.einsum("bi,ij,bj->b", 1.0 * every, gram, 1.0 * every)


def solved(gain, gram, groups, limit, *, whole=False, time_limit=60.0) -> bb.Maximum:
    """From nothing, without any help."""
    return bb.BranchAndBound(gain, gram, limit, whole, groups, lambda point: point, time_limit).run()


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("rank", [2, 20])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 2.0])
def test_the_most_gain_equals_that_of_all_points(group: int, rank: int, share: float) -> None:
    for seed in range(3):
        gain, gram, groups = instance(seed, 12, rank, group)
        every = points(groups)
        limit = share * 0.5 * gram.sum()
        best = (every @ gain)[losses(every, gram) <= limit * (1 + MARGIN)].max()
        maximum = solved(gain, gram, groups, limit)
        gained = gain @ maximum.point
        assert losses(maximum.point[None], gram)[0] <= limit * (1 + MARGIN)
        assert (np.bincount(groups[maximum.point]) <= 1).all()
        assert gained == pytest.approx(best, abs=2e-6) and best <= maximum.bound <= gained + 2e-6


def degenerate(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Few variables: equal, opposite and zero rows of G, groups of uneven size, and a limit at the very loss of a point."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 8))
    effects = rng.normal(size=(size, int(rng.integers(1, 4)))) * 10.0 ** rng.uniform(-2, 0, size=(size, 1))
    for row in range(1, size):
        effects[row] = {0: 0.0, 1: effects[row - 1], 2: -effects[row - 1]}.get(int(rng.integers(6)), effects[row])
    gram = effects @ effects.T
    groups = np.sort(rng.integers(0, max(1, size // 2 + 1), size)) if seed % 2 else np.arange(size)
    gain = rng.uniform(-0.3, 1.0, size) * 10.0 ** rng.integers(0, 3, size)
    every = losses(points(groups), gram)
    return gain, gram, groups, 0.0 if seed % 7 == 0 else float(every[rng.integers(len(every))])


@pytest.mark.parametrize("whole", [False, True])
def test_degenerate_instances_are_solved_and_bounded(whole: bool) -> None:
    for seed in range(100):
        gain, gram, groups, limit = degenerate(seed)
        gain, every = np.ones_like(gain) if whole else gain, points(groups)
        if seed % 3 == 0 and len(gain) > 1:
            gain[0], every = -np.inf, every[~every[:, 0]]  # never taken
        gains, loss = every @ np.where(gain > -np.inf, gain, 0.0), losses(every, gram)
        # within the rounding of G either answer is right
        strict, loose = (gains[loss <= limit + sign * 1e-9 * np.abs(gram).max()].max(initial=0.0) for sign in (-1, 1))
        maximum = solved(gain, gram, groups, limit, whole=whole, time_limit=20.0)
        slack = 0.0 if whole else 2e-6 * np.abs(gain[gain > -np.inf]).max(initial=0.0)
        assert strict - slack <= float(gain[maximum.point].sum()) <= loose + 1e-12, seed
        assert strict <= maximum.bound <= loose + slack, seed
        assert (np.bincount(groups[maximum.point]) <= 1).all(), seed


def test_near_cancellation_is_not_pruned_away() -> None:
    """Pairs of nearly opposite errors: the loss of all is far below the size of G."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        first = rng.normal(size=(4, 3))
        effects = np.concatenate([first, -first + 1e-5 * rng.normal(size=(4, 3))])
        gram = effects @ effects.T
        every = points(np.arange(8))
        loss = losses(every, gram)
        limit = float(np.sort(loss)[rng.integers(1, 30)]) + 1e-13
        best = every.sum(axis=1)[loss <= limit - 0.9e-13].max()  # sums round by 1e-15
        assert solved(np.ones(8), gram, np.arange(8), limit, whole=True).bound >= best, seed


def test_a_saving_of_millions_is_no_whole_number() -> None:
    gain = np.array([4e7, *np.linspace(1.2, 59.7, 7)])
    _, gram, groups = instance(3, 8, 4)
    every = points(groups)
    loss = losses(every, gram)
    for limit in np.quantile(loss, [0.2, 0.5, 0.8]):
        best = (every @ gain)[loss <= limit * (1 + MARGIN)].max()
        maximum = solved(gain, gram, groups, float(limit))
        assert gain @ maximum.point <= best + 1e-6 and best - 1e-6 <= maximum.bound <= best + 81.0


@pytest.mark.parametrize("stop", [0, 3, 10, 40, 160])
@pytest.mark.parametrize("seed", range(3))
def test_stopped_in_the_middle_the_bound_holds(seed: int, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps after so many looks at it."""
    looks = iter(range(10**9))
    monkeypatch.setattr(bb.time, "perf_counter", lambda: 0.0 if next(looks) < stop else 3.0)
    monkeypatch.setattr(bb, "_BATCH", 2)
    gain, gram, groups = instance(seed, 13, 4, 1 + seed)
    every = points(groups)
    limit = 0.05 * gram.sum()
    best = (every @ gain)[losses(every, gram) <= limit].max()
    maximum = solved(gain, gram, groups, limit, time_limit=3.0 if stop else 0.0)
    assert gain @ maximum.point <= best + 1e-12 and best <= maximum.bound + 1e-9
    assert maximum.bound <= np.maximum(gain, 0).sum() + 2e-6


def test_arguments_without_a_meaning_are_refused() -> None:
    gain, gram, groups = instance(0, 4, 3)
    for change, message in (
        ({"limit": -1.0}, "limit must be ≥ 0"),
        ({"limit": np.nan}, "limit must be ≥ 0"),
        ({"groups": groups[::-1]}, "groups must ascend"),
        ({"gain": np.array([1.0, np.nan, 0.0, 0.0])}, "gains must be numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            solved(**{"gain": gain, "gram": gram, "groups": groups, "limit": 1.0} | change)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group", [1, 3])
def test_bounds_of_boxes_hold_for_every_point_in_them(seed: int, group: int) -> None:
    """Also after a single sweep, from any start, and with a variable forced to an end."""
    gain, gram, groups = instance(seed, 9, 5, group)
    straight, rest = bb.split(gram)
    quadratic = bb._Quadratic(0.5 * straight, rest, 0.25, gain, groups)
    rng, every, needed = np.random.default_rng(seed), points(groups), 1.2
    low, high = np.zeros((8, 9)), np.ones((8, 9))
    for box in range(1, 8):
        taken, dropped = rng.permutation(9)[:2]
        low[box, taken], high[box, dropped] = 1.0, 0.0
    for sweeps, prices in ((1, 1), (3, 8)):
        boxes = bb._Boxes(low, high, rng.uniform(size=(8, 9)), rng.uniform(0.01, 1.0, 8))
        bounds = quadratic.bounds(boxes, needed, prices=prices, sweeps=sweeps)
        for box in range(8):
            inside = every[((every >= low[box]) & (every <= high[box])).all(axis=1) & (every @ gain >= needed)]
            loss = 0.25 + losses(inside, gram)
            assert bounds.loss[box] <= loss.min(initial=math.inf) + 1e-12
            for j, (end, rise) in itertools.product(range(9), ((True, bounds.at_one), (False, bounds.at_zero))):
                least = loss[inside[:, j] == end].min(initial=math.inf)
                assert bounds.loss[box] + rise[box, j] <= least + 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [3, 12, 40])
def test_the_split_is_exact_and_its_rest_positive_semi_definite(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(12, rank)) * 10.0 ** rng.uniform(-3, 0, size=(12, 1))
    effects[4] = 0.0
    gram = effects @ effects.T
    straight, rest = bb.split(gram)
    np.testing.assert_allclose(np.diag(straight) + rest, gram, atol=1e-12)
    assert np.linalg.eigvalsh(rest).min() > -1e-9 * np.abs(gram).max()
    if rank == 40:
        scale = np.sqrt(np.where(np.diag(gram) > 0, np.diag(gram), 1.0))
        least = np.linalg.eigvalsh(np.delete(np.delete(gram / scale / scale[:, None], 4, 0), 4, 1)).min()
        assert (straight / scale**2).sum() > 1.05 * 11 * least  # better than one share for all
