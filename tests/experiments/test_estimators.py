"""The comparison of estimators on a network of three layers: what is judged, kept and found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.estimators import __main__ as estimators
from experiments.estimators import checks
from experiments.estimators.findings import findings
from experiments.estimators.judge import agreement, kendall, layers_low, row_status, topk_overlap
from experiments.estimators.plan import QUICK, Sizes, cases
from experiments.estimators.rows import FORMATS, Row
from experiments.estimators.steps import Bench, Truth
from experiments.lib.run import Run
from experiments.problems.benchmarks import Benchmark, first
from mpjax import losses, sensitivity
from mpjax.program import from_linen
from mpjax.search import Assignment, Measurement

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


# --- agreement --------------------------------------------------------------------------------------------------


def test_kendall_of_hand_made_rankings() -> None:
    assert kendall([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)  # 5 pairs agree, 1 does not
    # τ-b: 5 concordant pairs, 1 tied in a, none discordant: 5 / √(5 · 6)
    assert kendall([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / np.sqrt(30))
    assert kendall([1, 2, np.inf], [1, 2, 3]) == pytest.approx(1)


@pytest.mark.parametrize("other", [[1.0, 1.0, 1.0], [1.0, np.nan, 2.0]])
def test_agreement_is_none_where_it_is_undefined(other: list[float]) -> None:
    fine = [1.0, 2.0, 3.0]
    for measure in (kendall, topk_overlap):
        assert measure(fine, other) is None and measure(other, fine) is None and measure([1.0], [1.0]) is None
    nothing = {"spearman": None, "kendall": None, "topk_overlap": None}
    assert agreement([other], fine) == agreement([], fine) == nothing


def test_topk_overlap_counts_the_most_sensitive_fifth() -> None:
    truth = np.arange(10.0)  # k = 2: layers 8 and 9
    assert topk_overlap(truth, truth) == 1 and topk_overlap(-truth, truth) == 0
    assert topk_overlap([0, 0, 0, 0, 0, 0, 0, 5, 0, 9], truth) == 0.5  # layers 7 and 9
    assert topk_overlap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1  # k = 1 at least


def test_agreement_of_a_random_score_is_the_mean_of_its_draws() -> None:
    truth = [1.0, 2.0, 3.0, 4.0, 5.0]
    means = {"spearman": pytest.approx(0.5), "kendall": pytest.approx(0.5), "topk_overlap": pytest.approx(0.75)}
    assert agreement([truth, truth[::-1], truth, truth], truth) == means


def test_layers_low_is_the_longest_prefix_of_an_additive_metric() -> None:
    cost = dict(zip("abcd", (4.0, 1.0, 3.0, 2.0), strict=True))  # all low: 10
    formats = set()

    def error(assignment: Assignment) -> Measurement:
        formats.update(set(assignment.values()) - {"float32"})
        return Measurement(value=sum(cost[layer] for layer in assignment.lowered))

    values = np.array([*cost.values()])
    assert layers_low(values, "abcd", "bfloat16", error) == [1, 1, 2]  # limits 1, 2.5, 5: prefix sums 1, 3, 6, 10
    assert layers_low(-values, "abcd", "bfloat16", error) == [0, 0, 1]  # most sensitive first: 4, 7, 9, 10
    assert layers_low([np.inf, 1.0, 3.0, 2.0], "abcd", "bfloat16", error) == [1, 1, 2]
    assert formats == {"bfloat16"} and layers_low([0.0] * 4, "abcd", "bfloat16", error) == [None] * 3


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_layers_low_is_none_without_a_limit(value: float) -> None:
    assert layers_low([1.0, 2.0], "ab", "bfloat16", lambda assignment: Measurement(value=value)) == [None] * 3


def test_row_status_is_the_worst_and_zero_only_where_all_are() -> None:
    zero, ok = sensitivity.Status.ZERO, sensitivity.Status.OK
    assert row_status([zero, zero]) == zero and row_status([zero, ok]) == ok
    assert row_status([ok, sensitivity.Status.INDEFINITE, sensitivity.Status.OVERFLOW]) == sensitivity.Status.OVERFLOW


def test_truth_of_fewer_examples_is_their_mean_and_overflow_stays_infinite() -> None:
    single = np.arange(12.0).reshape(1, 3, 4)
    whole = single.mean(axis=2)
    whole[0, 1] = np.inf
    truth = Truth(whole=whole, single=single)
    np.testing.assert_array_equal(truth.on(2), [[0.5, np.inf, 8.5]])
    for everything in (0, 4):
        np.testing.assert_array_equal(truth.on(everything), whole)


def test_first_keeps_order_and_equal_sizes() -> None:
    batches = [(jnp.arange(4.0) + 4 * i, jnp.arange(4) + 4 * i) for i in range(3)]
    for count, size in ((12, 4), (6, 3), (5, 1), (1, 1)):
        cut = first(batches, count)
        assert {len(array) for batch in cut for array in batch} == {size}
        np.testing.assert_array_equal(np.concatenate([batch[1] for batch in cut]), np.arange(count))
    assert [len(batch[0]) for batch in first(batches, 8, 3)] == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="1 to 12"):
        first(batches, 13)


def test_subsets_have_the_sizes_they_say() -> None:
    masks = checks.subsets(20, 9, seed=1)
    np.testing.assert_array_equal(masks.sum(axis=1), [2, 4, 6, 8, 10, 12, 14, 16, 18])
    assert (masks != checks.subsets(20, 9, seed=2)).any()


def test_the_verdict_follows_the_smaller_log_error() -> None:
    rng = np.random.default_rng(0)
    measured = np.exp(rng.normal(size=(3, 30)))
    off = measured * np.exp(0.5 * rng.normal(size=(3, 30)))
    arrays = {"measured": measured, "cross_terms": measured.copy(), "diagonal": off.copy()}
    arrays["cross_terms"][1], arrays["diagonal"][1] = off[1], measured[1]
    arrays["cross_terms"][2], arrays["diagonal"][2] = 2 * measured[2], measured[2] / 2
    arrays["cross_terms"][0, 3] = np.inf  # a subset with an overflowing layer
    rows = checks.interaction_rows("digits_cnn", "exact", arrays, seed=0)
    assert [row.better for row in rows] == ["cross terms", "diagonal", "no difference"]
    assert [row.usable for row in rows] == [29, 30, 30] and rows[2].spearman_diagonal == pytest.approx(1)
    assert rows[2].log_rmse_diagonal == pytest.approx(np.log(2)) == rows[2].log_rmse_cross_terms


# --- a whole run ------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size, name in ((6, "first"), (5, "second")):
            x = jnp.tanh(nn.Dense(size, name=name)(x))
        return nn.Dense(3, name="third")(x)


NAMES = ("local_rounding[4]", "first_order", "logdet[exact]", "depth", "random")
SIZES = Sizes(
    spectra=6, per_layer=2, joint_probes=2, layer_probes=1, xtrace=2, depth=2, slq_probes=1, subsets=4, costed=(1,),
    checked=1, check_probes=2, check_depth=2, random_searches=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Benchmark:
    x = jax.random.normal(jax.random.key(0), (6, 4), jnp.float32)
    model = from_linen(Tiny(), Tiny().init(jax.random.key(1), x), x)
    labels = jnp.argmax(model.call(model.params, x), axis=-1).astype(jnp.int32)
    return Benchmark(
        name="digits_cnn",
        model=model,
        batches=[(x[:3],), (x[3:],)],
        labelled=[(x[:3], labels[:3]), (x[3:], labels[3:])],
        error=lambda low, reference: np.abs(low - reference).mean(axis=1),
        error_name="mean change",
        facts={"accuracy": 1.0},
    )


def compare(folder: Path, tiny: Benchmark, names: tuple[str, ...] = NAMES, sizes: Sizes = SIZES) -> dict[str, Any]:
    config = estimators.Config(results=folder, estimators=names)
    return estimators.compare(config, [tiny], {"digits_cnn": sizes})


@pytest.fixture(scope="module")
def ran(tiny: Benchmark, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        folder = tmp_path_factory.mktemp("results")
        return folder, compare(folder, tiny)


@pytest.mark.slow
def test_every_estimator_runs_and_its_name_is_that_of_its_scores(tiny: Benchmark, tmp_path: Path) -> None:
    rows = compare(tmp_path, tiny, ())["rows"]
    plain = {row["estimator"] for row in rows if row["loss"] in ("output", "none")}
    assert len(plain) == 26 and len(rows) == 36 * len(FORMATS)
    assert {row["status"] for row in rows} <= {"ok", "zero_by_construction", "indefinite", "unconverged"}


def test_a_run_has_its_rows(tiny: Benchmark, ran: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = ran
    rows = summary["rows"]
    with_loss = {(row["estimator"], row["loss"]) for row in rows}
    assert {name for name, _ in with_loss} == {"measured", *NAMES} and len(rows) == len(with_loss) * len(FORMATS)
    assert {loss for name, loss in with_loss if name == "logdet[exact]"} == {"output", "cross_entropy"}
    assert {loss for name, loss in with_loss if name == "local_rounding[4]"} == {"output", "kl"}
    measured = [row for row in rows if (row["estimator"], row["loss"]) == ("measured", "output")]
    assert all(row["spearman"] == row["kendall"] == row["topk_overlap"] == row["ceiling"] == 1 for row in measured)
    examples = {row["estimator"]: row["examples"] for row in rows if row["loss"] in ("output", "none")}
    assert examples["measured"] == examples["logdet[exact]"] == 6 and examples["depth"] == 0
    assert summary["ledger"]["evaluations"] > 0 and summary["models"]["digits_cnn"] == {"accuracy": 1.0}
    for name in ("agreement_cost", "layers_lowered", "interactions", "damping"):
        assert (folder / f"estimators/{name}.png").stat().st_size > 10_000
    made = [Row(**row) for row in rows]
    assert findings(made)[0].startswith("Best agreement")
    few = [
        row for row in made if row.label in ("measured", "depth")
    ]  # as with --quick, which judges fewer on large models
    assert findings([*made, *(replace(row, model="iris_landmark") for row in few)])[0].startswith("Best agreement")


def test_cells_without_a_gradient_are_null(ran: tuple[Path, dict[str, Any]]) -> None:
    rows = [row for row in ran[1]["rows"] if row["status"] == sensitivity.Status.ZERO]
    assert {(row["estimator"], row["loss"]) for row in rows} == {("first_order", "output")}
    empty = ("spearman", "kendall", "topk_overlap", "layers_low_10", "layers_low_50", "seconds", "peak_mb")
    assert all(row[key] is None for row in rows for key in empty)
    for refused in (lambda: sensitivity.first_order(loss=losses.OUTPUT), lambda: sensitivity.fisher(kind="empirical")):
        with pytest.raises(ValueError, match="zero by construction"):
            refused()


def test_the_kept_pieces_are_what_the_library_computes(tiny: Benchmark, ran: tuple[Path, dict[str, Any]]) -> None:
    bench = Bench(tiny, SIZES, Run("again", estimators.Config(results=ran[0])), 0)
    alone = np.array([[bench.losses(assignment).mean() for assignment in bench.alone(fmt)] for fmt in FORMATS])
    pieces = ran[0] / "estimators/pieces"
    arrays = {}
    for name in ("measured%2C%20output", "spectra%2C%20output"):
        with np.load(next(path for path in pieces.iterdir() if name in path.name)) as file:
            arrays[name] = {key.removeprefix("array/"): file[key] for key in file.files if key != "note"}
    np.testing.assert_allclose(alone, arrays["measured%2C%20output"]["value"].T, rtol=1e-3)
    spectra = arrays["spectra%2C%20output"]
    assert {name: len(values) for name, values in spectra.items()} == {"first": 18, "second": 18, "third": 15}
    exact = sensitivity.logdet(max_outputs=18, damping=1e-2)(tiny.model, tiny.batches, FORMATS[:1], jax.random.key(0))
    mean = sum(values.sum() for values in spectra.values()) / sum(map(len, spectra.values()))
    ours = [np.log1p(np.maximum(values, 0) / (1e-2 * mean)).sum() for values in spectra.values()]
    np.testing.assert_allclose(ours, exact.value[:, 0], rtol=1e-6)
    error = bench.error(Assignment.uniform(bench.layers, "bfloat16"))
    before = bench.spent()
    assert bench.error(Assignment.uniform(bench.layers, "bfloat16")) is error and before.evaluations > 0
    assert bench.spent().evaluations == 0


def test_a_deleted_piece_alone_is_computed_again(tiny: Benchmark, ran: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = ran
    pieces = folder / "estimators/pieces"
    victim = next(path for path in pieces.iterdir() if "depth" in path.name)
    victim.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in pieces.iterdir()}
    again = compare(folder, tiny)
    assert len(again["reused_pieces"]) == len(before)
    assert {path.name for path in pieces.iterdir()} - set(before) == {victim.name}
    assert all((pieces / name).stat().st_mtime_ns == when for name, when in before.items())
    assert [row["spearman"] for row in again["rows"]] == [row["spearman"] for row in summary["rows"]]


def test_a_run_without_checks_has_no_pictures_of_them(tiny: Benchmark, tmp_path: Path) -> None:
    summary = compare(tmp_path, tiny, (), replace(SIZES, checks=False, judged=("depth",)))
    assert {row["estimator"] for row in summary["rows"]} == {"measured", "depth"} and not summary["interactions"]
    assert not (tmp_path / "estimators/interactions.png").exists()


def test_quick_judges_estimators_that_exist(tiny: Benchmark) -> None:
    few, many = (
        [(case.name, case.loss.name) for case in cases(tiny, sizes, {}, lambda loss: None)]  # type: ignore[arg-type,return-value]
        for sizes in (QUICK["digits_cnn"], SIZES)
    )
    assert few == many
    assert all(set(sizes.judged or ()) <= {name for name, _ in many} for sizes in QUICK.values())


def test_unknown_names_are_refused(tiny: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="logdet\\[exakt\\]"):
        compare(tmp_path, tiny, ("logdet[exakt]",))
    with pytest.raises(SystemExit, match="face"):
        estimators.Config(models=("face",))
