"""Branch and bound within a convex quadratic limit, against all points and against bounds that hold for all points."""

import itertools
import math

import numpy as np
import pytest

from mpjax import branch


def problem(seed: int, size: int, rank: int, group: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains (some negative), a Gram matrix of effects that partly cancel, groups."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(size, rank)) * 10.0 ** rng.uniform(-1, 0, size=(size, 1))
    return rng.uniform(-0.2, 1.0, size), effects @ effects.T, np.arange(size) // group


def points(size: int, groups: np.ndarray) -> np.ndarray:
    """All 0-1 points with at most one of a group."""
    every = np.array(list(itertools.product((False, True), repeat=size)))
    counts = np.stack([every[:, groups == g].sum(axis=1) for g in np.unique(groups)], axis=1)
    return every[(counts <= 1).all(axis=1)]


def losses(every: np.ndarray, gram: np.ndarray) -> np.ndarray:
    return 0.5 * np.einsum("bi,ij,bj->b", 1.0 * every, gram, 1.0 * every)


def solved(gain, gram, groups, limit, *, step=1e-6, time_limit=60.0) -> branch.Found:
    """From nothing, without any help."""
    start = np.zeros(len(gain), np.bool_)
    return branch.most(
        gain, gram, limit, start, step=step, groups=groups, improve=lambda point: point, time_limit=time_limit
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("rank", [2, 20])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 2.0])
def test_the_most_gain_equals_that_of_all_points(seed: int, group: int, rank: int, share: float) -> None:
    gain, gram, groups = problem(seed, 12, rank, group)
    every = points(12, groups)
    limit = share * losses(np.ones((1, 12)), gram)[0]
    best = (every @ gain)[losses(every, gram) <= limit * (1 + branch.MARGIN)].max()
    found = solved(gain, gram, groups, limit)
    assert losses(found.point[None], gram)[0] <= limit * (1 + branch.MARGIN)
    assert all(found.point[groups == g].sum() <= 1 for g in groups)
    assert gain @ found.point == pytest.approx(best, abs=2e-6) and best <= found.bound <= gain @ found.point + 2e-6


@pytest.mark.parametrize("seed", range(6))
def test_whole_gains_are_proved_exactly(seed: int) -> None:
    _, gram, groups = problem(seed, 14, 6)
    every, gain = points(14, groups), np.ones(14)
    gain[3] = -np.inf  # never taken
    limit = 0.1 * losses(np.ones((1, 14)), gram)[0]
    best = (every @ np.ones(14))[(losses(every, gram) <= limit) & ~every[:, 3]].max()
    found = solved(gain, gram, groups, limit, step=1.0)
    assert found.point.sum() == found.bound == best and not found.point[3]


@pytest.mark.parametrize("seed", range(4))
def test_without_time_the_bound_still_holds(seed: int) -> None:
    gain, gram, groups = problem(seed, 14, 4, 2)
    every = points(14, groups)
    limit = 0.2 * losses(np.ones((1, 14)), gram)[0]
    best = (every @ gain)[losses(every, gram) <= limit].max()
    found = solved(gain, gram, groups, limit, time_limit=0.0)
    assert best <= found.bound + 1e-9 and found.bound <= np.maximum(gain, 0).sum() + 2e-6


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [1, 3])
def test_bounds_of_boxes_hold_for_every_point_in_them(seed: int, group: int) -> None:
    """Also after no sweep worth the name, from any start, and with a variable forced to an end."""
    gain, gram, groups = problem(seed, 9, 5, group)
    straight, rest = branch.split(gram)
    quadratic = branch._Quadratic(0.5 * straight, rest, 0.25, gain, groups)
    rng, every, needed = np.random.default_rng(seed), points(9, groups), 1.2
    low, high = np.zeros((8, 9)), np.ones((8, 9))
    for box in range(1, 8):
        taken, dropped = rng.permutation(9)[:2]
        low[box, taken], high[box, dropped] = 1.0, 0.0
    for sweeps, prices in ((1, 1), (3, 8)):
        boxes = branch._Boxes(low, high, rng.uniform(size=(8, 9)), rng.uniform(0.01, 1.0, 8))
        found = quadratic.bounds(boxes, needed, prices=prices, sweeps=sweeps)
        for box in range(8):
            inside = every[((every >= low[box]) & (every <= high[box])).all(axis=1) & (every @ gain >= needed)]
            loss = 0.25 + losses(inside, gram)
            assert found.loss[box] <= loss.min(initial=math.inf) + 1e-12
            for j in range(9):
                for end, rise in ((True, found.at_one), (False, found.at_zero)):
                    least = loss[inside[:, j] == end].min(initial=math.inf)
                    assert found.loss[box] + rise[box, j] <= least + 1e-12


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [3, 12, 40])
def test_the_split_is_exact_and_its_rest_positive_semi_definite(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(12, rank)) * 10.0 ** rng.uniform(-3, 0, size=(12, 1))
    effects[4] = 0.0
    gram = effects @ effects.T
    straight, rest = branch.split(gram)
    np.testing.assert_allclose(np.diag(straight) + rest, gram, atol=1e-12)
    assert np.linalg.eigvalsh(rest).min() > -1e-9 * np.abs(gram).max()
    if rank == 40:
        scale = np.sqrt(np.where(np.diag(gram) > 0, np.diag(gram), 1.0))
        least = np.linalg.eigvalsh(np.delete(np.delete(gram / scale / scale[:, None], 4, 0), 4, 1)).min()
        relative = straight / scale**2
        assert relative.sum() > 1.05 * 11 * least  # better than one share for all
