"""The sweep: its points are measured once each, and the front holds the points that no other beats."""

import numpy as np
import pytest

from mpjax.search import optimum, pareto
from mpjax.search.problem import Assignment, Measurement, Problem


def problem(seed: int = 0, layers: int = 12) -> Problem:
    penalty = np.random.default_rng(seed).exponential(size=(layers, 2)) * [1.0, 5.0]
    costs = {"cost": np.repeat([[1.0, 0.5, 0.25]], layers, axis=0)}
    names = tuple(f"l{i}" for i in range(layers))
    return Problem(layers=names, formats=("f", "g"), objective="cost_min", penalty=penalty, **costs)


class Metric:
    def __init__(self, p: Problem, failures: tuple[int, ...] = ()) -> None:
        self.problem, self.asked, self.failures = p, [], list(failures)

    def __call__(self, assignment: Assignment) -> Measurement:
        if len(self.asked) in self.failures:
            self.failures.remove(len(self.asked))
            raise OSError("gone")
        self.asked.append(assignment)
        return Measurement(value=self.problem.penalty_of(self.problem.index(assignment)) ** 0.5)


@pytest.mark.parametrize("solver", [optimum.linear, optimum.greedy])
def test_the_sweep_runs_from_nothing_to_everything(solver) -> None:
    p = problem()
    metric = Metric(p)
    axes = {"bytes": lambda assignment: 4.0 - len(assignment.lowered) / 12}
    points = pareto.sweep(p, evaluate=metric, count=9, axes=axes, solver=solver)
    assert len(metric.asked) == len(set(metric.asked)) == len(points) <= 10
    assert points[0].assignment.lowered == () and points[-1].axes["cost"] == pytest.approx(3.0)
    assert [point.penalty for point in points] == sorted(point.penalty for point in points)
    assert points[0].axes == {"layers in float32": 12.0, "cost": 12.0, "bytes": 4.0}
    if solver is optimum.linear:  # the metric grows with the prediction, so that every optimum is on the front
        assert all("cost" in point.best_on for point in points)
    with pytest.raises(ValueError, match="count must be at least 2"):
        pareto.sweep(p, evaluate=metric, count=1)


@pytest.mark.parametrize("seed", range(3))
def test_the_front_holds_the_points_that_no_other_beats(seed: int) -> None:
    a, b = np.random.default_rng(seed).integers(0, 5, (2, 30)).astype(float)
    a[3] = np.nan
    front = pareto.non_dominated(a, b)
    for i in range(30):
        beaten = any(
            a[j] <= a[i] and b[j] <= b[i] and (a[j] < a[i] or b[j] < b[i]) for j in range(30) if np.isfinite(a[j])
        )
        assert front[i] == (not beaten and np.isfinite(a[i]))


def test_known_measurements_are_not_repeated_and_nothing_is_lost() -> None:
    p, known = problem(2), {}
    metric = Metric(p, failures=(3,))
    with pytest.raises(OSError, match="gone"):
        pareto.sweep(p, evaluate=metric, count=8, known=known)
    assert len(known) == 3
    points = pareto.sweep(p, evaluate=metric, count=8, known=known)
    assert len(metric.asked) == len(points) == len(known)
