"""The sweep: its points are measured once each, and the front is what no other point beats."""

import numpy as np
import pytest

from mpjax.search import pareto
from mpjax.search import predicted
from mpjax.search.problem import Assignment, Measurement, Problem


def problem(seed: int = 0, layers: int = 12) -> Problem:
    rng = np.random.default_rng(seed)
    return Problem(
        layers=tuple(f"l{i}" for i in range(layers)), formats=("f", "g"), objective="cost_min",
        penalty=rng.exponential(size=(layers, 2)) * [1.0, 5.0],
        cost=np.stack([np.full(layers, 0.5), np.full(layers, 0.25)], 1), float32_cost=np.ones(layers),
    )  # fmt: skip


class Metric:
    def __init__(self, p: Problem) -> None:
        self.problem, self.asked = p, []

    def __call__(self, assignment: Assignment) -> Measurement:
        self.asked.append(assignment)
        return Measurement(value=self.problem.penalty_of(self.problem.index(assignment)) ** 0.5)


@pytest.mark.parametrize("choose", [predicted.linear, predicted.greedy])
def test_the_sweep_runs_from_nothing_to_everything(choose) -> None:
    p = problem()
    metric = Metric(p)
    axes = {"bytes": lambda assignment: 4.0 - len(assignment.lowered) / 12}
    points = pareto.sweep(p, evaluate=metric, count=9, axes=axes, choose=choose)
    assert len(metric.asked) == len(set(metric.asked)) == len(points) <= 10
    assert points[0].assignment.lowered == () and points[-1].axes["cost"] == pytest.approx(3.0)
    assert [point.penalty for point in points] == sorted(point.penalty for point in points)
    assert set(points[0].axes) == {"layers in float32", "cost", "bytes"}
    if choose is predicted.linear:  # the metric grows with the prediction, so that every optimum is on the front
        assert all("cost" in point.best_on for point in points)
    with pytest.raises(ValueError, match="count must be at least 2"):
        pareto.sweep(p, evaluate=metric, count=1)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_other_point_beats(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, 30).astype(float), rng.integers(0, 5, 30).astype(float)
    a[3] = np.nan
    found = pareto.non_dominated(a, b)
    for i in range(30):
        beaten = any(
            a[j] <= a[i] and b[j] <= b[i] and (a[j] < a[i] or b[j] < b[i]) for j in range(30) if np.isfinite(a[j])
        )
        assert found[i] == (not beaten and np.isfinite(a[i]))


def test_what_is_known_is_not_measured_again_and_nothing_is_lost() -> None:
    p = problem(2)
    metric, known = Metric(p), {}

    def breaks(assignment: Assignment) -> Measurement:
        if len(metric.asked) == 3:
            raise OSError("gone")
        return metric(assignment)

    with pytest.raises(OSError, match="gone"):
        pareto.sweep(p, evaluate=breaks, count=8, known=known)
    assert len(known) == 3
    points = pareto.sweep(p, evaluate=metric, count=8, known=known)
    assert len(metric.asked) == len(points) == len(known)
