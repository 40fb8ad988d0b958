"""The comparison of searches, on a tiny model: rows, the enumerated optimum, resumption and the report."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.problems import searches_tasks
from experiments.problems.benchmarks import Benchmark
from experiments.problems.searches_tasks import SETS, Task
from experiments.searches import __main__ as searches
from experiments.searches.__main__ import Config
from experiments.searches.steps import BUDGET, Timer, entrants
from mpjax import plan
from mpjax.apply import apply
from mpjax.program import from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for number in range(4):
            x = x + nn.Dense(6, name=f"dense{number}")(nn.relu(x))
        return nn.Dense(3, name="head")(x)


def make_task() -> Task:
    x = jax.random.normal(jax.random.key(0), (16, 6), jnp.float32)
    model = from_linen(Net(), Net().init(jax.random.key(1), x), x)
    benchmark = Benchmark(
        name="digits_cnn",
        model=model,
        batches=[(x[:4],), (x[4:8],)],
        error=lambda low, reference: np.abs(low - reference).mean(axis=1),
        error_name="error",
    )
    return Task(
        benchmark=benchmark,
        blocks=np.arange(8),
        heldout=[(x[8:12],), (x[12:],)],
        heldout_blocks=np.arange(8),
        scored=8,
        costed=(x[:4],),
        enumerated=4,
    )


def run_once(folder):
    """The whole experiment on the toy; its summary."""
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        patch.setattr(searches_tasks, "load", lambda name, quick: make_task())
        searches.main(Config(quick=True, models=("digits_cnn",), tolerances=(0.1, 0.5), results=folder))
    return json.loads((folder / "searches" / "summary.json").read_text())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return folder, run_once(folder)


def test_every_result_was_within_on_calibration(ran) -> None:
    rows = ran[1]["rows"]
    assert len(rows) == 2 * sum(len(entrants(formats, 0)) for formats in SETS)
    for row in rows:
        assert row["metric_calibration"] <= row["tolerance_value"] and row["evaluations"] <= BUDGET
        assert row["within_tolerance"] == (row["metric_heldout"] <= row["tolerance_value"])
        assert row["metric_heldout_low"] <= row["metric_heldout"] <= row["metric_heldout_high"]
        assert row["bound"] is None or row["objective"] != "layers" or row["bound"] <= -row["layers_low"]
    assert {row["formats"] for row in rows} == {"bfloat16", "bfloat16+float8_e4m3fn", "float16_acc16"}


def test_the_enumerated_optimum_is_one_and_no_strategy_beats_it(ran) -> None:
    rows = ran[1]["enumerated"]
    assert all(row["missing"] >= 0 and row["layers"] == 5 for row in rows)
    assert all(len({r["optimum"] for r in rows if r["tolerance"] == t}) == 1 for t in (0.1, 0.5))
    assert max(row["missing"] for row in rows if row["strategy"] in ("ilp", "iqp")) <= 1


def test_the_quadratic_solver_is_timed_on_the_models_own_interactions(ran) -> None:
    rows = [row for row in ran[1]["solvers"] if row["solver"] == "quadratic"]
    assert len(rows) == 3 * 2 and all(row["seconds"] < 6 and row["gap"] < 1e-6 for row in rows)


def test_a_second_run_measures_nothing_and_gives_the_same(ran, monkeypatch) -> None:
    folder, summary = ran
    monkeypatch.setattr(Timer, "__call__", lambda self, assignment: pytest.fail("measured again"))
    again = run_once(folder)
    assert all(again[name] == summary[name] for name in ("rows", "enumerated", "pareto"))


def test_plans_can_be_applied_again(ran) -> None:
    """The model that a plan makes gives the error that the search measured, up to XLA's order of sums."""
    task = make_task()
    model, batches = task.benchmark.model, task.benchmark.batches
    paths = sorted((ran[0] / "searches" / "plans").iterdir())
    assert paths
    for path in (path for path in paths if "acc16" not in path.name and "0.5" in path.name):
        loaded = plan.load(path)
        mixed = apply(model, loaded.for_model(model.names), calibration=loaded.calibration)
        errors = [
            task.benchmark.error(
                np.float64(mixed.call(mixed.params, *batch)), np.float64(model.call(model.params, *batch))
            )
            for batch in batches
        ]
        assert np.mean(errors) == pytest.approx(loaded.metric["value"], rel=0.02, abs=1e-6)
        assert loaded.data and loaded.metric["value"] <= loaded.metric["tolerance"]


def test_figures_are_written(ran) -> None:
    for name in ("lowered", "evaluations", "enumerated", "costs", "pareto_digits_cnn"):
        assert (ran[0] / "searches" / f"{name}.png").stat().st_size > 5_000


def test_configurations_without_a_meaning_are_refused() -> None:
    with pytest.raises(SystemExit, match="face"):
        Config(models=("face",))
    with pytest.raises(SystemExit, match="shares in"):
        Config(tolerances=(10.0,))
    assert "iris_landmark" not in Config(quick=True).effective.models


def test_subsets_are_spread_over_the_ranking() -> None:
    gram = np.diag(np.repeat(np.arange(40.0), 3))
    costs = type("C", (), {"layers": tuple(f"l{i}" for i in range(40))})()
    taken = searches_tasks.subset(searches_tasks.Predicted(gram=gram, costs=costs, edges=()), "bfloat16")
    assert len(taken) == 12 and taken[0] == "l0" and taken[-1] == "l39"
