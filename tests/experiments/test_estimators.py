"""The judging of estimators: agreement in closed form, bisected counts, and a whole run on a tiny model."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.estimators import __main__ as estimators
from experiments.estimators import checks as estimators_checks
from experiments.estimators import findings as estimators_findings
from experiments.estimators import report as estimators_report
from experiments.estimators.core import ROW_FIELDS, Truth
from experiments.estimators.figures import spread
from experiments.estimators.judge import (
    FORMATS,
    Evaluator,
    agreement,
    first,
    kendall,
    layers_low,
    row_status,
    topk_overlap,
)
from experiments.estimators.plan import QUICK, Sizes, cases
from experiments.lib import common, report
from experiments.problems.benchmarks import Benchmark
from mpjax import losses, sensitivity, xla
from mpjax.ledger import Ledger
from mpjax.program import from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


# --- agreement ----------------------------------------------------------------------------------------------------------


def test_kendall_of_hand_made_rankings():
    assert kendall([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert kendall([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)  # 5 pairs agree, 1 does not
    # τ-b: 5 concordant pairs, 1 tied in a, none discordant: 5 / √(5 · 6)
    assert kendall([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / np.sqrt(30))
    assert kendall([1, 2, np.inf], [1, 2, 3]) == pytest.approx(1)


@pytest.mark.parametrize("other", [[1.0, 1.0, 1.0], [1.0, np.nan, 2.0]])
def test_agreement_is_none_where_it_is_undefined(other):
    fine = [1.0, 2.0, 3.0]
    for measure in (kendall, topk_overlap):
        assert measure(fine, other) is None and measure(other, fine) is None
        assert measure([1.0], [1.0]) is None
        with pytest.raises(ValueError, match="got"):
            measure([1.0, 2.0], fine)
    assert agreement([other], fine) == {"spearman": None, "kendall": None, "topk_overlap": None}


def test_topk_overlap_counts_the_most_sensitive_fifth():
    truth = np.arange(10.0)  # k = 2: layers 8 and 9
    assert topk_overlap(truth, truth) == 1
    assert topk_overlap(-truth, truth) == 0
    assert topk_overlap([0, 0, 0, 0, 0, 0, 0, 5, 0, 9], truth) == 0.5  # layers 7 and 9
    assert topk_overlap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1  # k = 1 at least


def test_agreement_of_a_random_score_is_the_mean_of_its_draws():
    truth = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = agreement([truth, truth[::-1], truth, truth], truth)
    assert found == {"spearman": pytest.approx(0.5), "kendall": pytest.approx(0.5), "topk_overlap": pytest.approx(0.75)}


def test_layers_low_is_the_longest_prefix_of_an_additive_metric():
    cost = np.array([4.0, 1.0, 3.0, 2.0])  # all low: 10
    calls = []

    def metric(fmt, mask):
        calls.append((fmt, tuple(mask)))
        return float(cost @ mask)

    layers = ("a", "b", "c", "d")
    assert layers_low(cost, layers, "bfloat16", metric) == [1, 1, 2]  # limits 1, 2.5, 5: prefix sums 1, 3, 6, 10
    assert layers_low(-cost, layers, "bfloat16", metric) == [0, 0, 1]  # most sensitive first: 4, 7, 9, 10
    assert {fmt for fmt, _ in calls} == {"bfloat16"}
    with_infinite = [np.inf, 1.0, 3.0, 2.0]
    assert layers_low(with_infinite, layers, "bfloat16", metric) == [1, 1, 2]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_layers_low_is_none_without_a_limit(value):
    assert layers_low([1.0, 2.0], ("a", "b"), "bfloat16", lambda fmt, mask: value) == [None] * 3


def test_layers_low_is_none_without_a_ranking():
    assert layers_low([0.0, 0.0], ("a", "b"), "bfloat16", lambda fmt, mask: 1.0) == [None] * 3


def test_row_status_is_the_worst_and_zero_only_where_all_are():
    zero, ok = sensitivity.Status.ZERO, sensitivity.Status.OK
    assert row_status([zero, zero]) == zero
    assert row_status([zero, ok]) == ok
    assert row_status([ok, sensitivity.Status.INDEFINITE, sensitivity.Status.OVERFLOW]) == sensitivity.Status.OVERFLOW


def test_truth_of_fewer_examples_is_their_mean_and_overflow_stays_infinite():
    single = np.arange(12.0).reshape(1, 3, 4)
    whole = single.mean(axis=2)
    whole[0, 1] = np.inf
    truth = Truth(whole=whole, single=single)
    np.testing.assert_array_equal(truth.on(2), [[0.5, np.inf, 8.5]])
    np.testing.assert_array_equal(truth.on(0), whole)
    np.testing.assert_array_equal(truth.on(4), whole)


def test_first_keeps_order_and_equal_sizes():
    batches = [(jnp.arange(4.0) + 4 * i, jnp.arange(4) + 4 * i) for i in range(3)]
    for count, size in ((12, 4), (6, 3), (5, 1), (1, 1)):
        found = first(batches, count)
        assert {len(array) for batch in found for array in batch} == {size}
        np.testing.assert_array_equal(np.concatenate([batch[1] for batch in found]), np.arange(count))
    assert [len(batch[0]) for batch in first(batches, 8, 3)] == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="1 to 12"):
        first(batches, 13)


@pytest.mark.parametrize("seed", range(3))
def test_spread_keeps_order_and_distance(seed):
    wanted = np.sort(np.random.default_rng(seed).uniform(0, 1, 20) ** 3)
    found = spread(wanted, 0.03)
    assert np.diff(found).min() > 0.03 - 1e-9 and found[0] > -1e-9 and found[-1] < 1 + 1e-9
    np.testing.assert_array_equal(spread(np.array([0.1, 0.5, 0.9]), 0.1), [0.1, 0.5, 0.9])


# --- interactions -------------------------------------------------------------------------------------------------------


def test_subsets_have_the_sizes_they_say():
    masks = estimators_checks.subsets(20, 9, seed=1)
    np.testing.assert_array_equal(masks.sum(axis=1), [2, 4, 6, 8, 10, 12, 14, 16, 18])
    assert (masks != estimators_checks.subsets(20, 9, seed=2)).any()


def test_the_verdict_follows_the_smaller_log_error():
    rng = np.random.default_rng(0)
    measured = np.exp(rng.normal(size=(3, 30)))
    off = measured * np.exp(0.5 * rng.normal(size=(3, 30)))
    arrays = {"measured": measured, "cross_terms": measured.copy(), "diagonal": off.copy()}
    arrays["cross_terms"][1], arrays["diagonal"][1] = off[1], measured[1]
    arrays["cross_terms"][2], arrays["diagonal"][2] = 2 * measured[2], measured[2] / 2
    arrays["cross_terms"][0, 3] = np.inf  # a subset with an overflowing layer
    rows = estimators_checks.interaction_rows("digits_cnn", arrays, seed=0)
    assert [row["better"] for row in rows] == ["cross terms", "diagonal", "no difference"]
    assert [row["usable"] for row in rows] == [29, 30, 30]
    assert rows[2]["log_rmse_diagonal"] == pytest.approx(np.log(2)) == rows[2]["log_rmse_cross_terms"]
    assert rows[2]["spearman_diagonal"] == pytest.approx(1)


# --- a whole run --------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(6, name="first")(x))
        x = jnp.tanh(nn.Dense(5, name="second")(x))
        return nn.Dense(3, name="third")(x)


SOME = (
    "local_rounding[4]",
    "quadratic[gauss_newton]",
    "first_order",
    "fisher[empirical,elementwise]",
    "logdet[exact]",
    "depth",
    "random",
)
SIZES = Sizes(
    spectra=6, per_layer=2, joint_probes=2, layer_probes=1, xtrace=2, depth=2, slq_probes=1, subsets=4, costed=(1,),
    checked=1, check_probes=2, check_depth=2, random_searches=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
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


def pieces_in(folder):
    return common.Pieces(folder, {"test": 1}, fresh=False)


def summary_of(tables, pieces):
    summary = report.jsonable(
        {
            "schema": report.SCHEMA,
            "experiment": "estimators",
            "command": "test",
            "config": {"quick": False},
            "environment": xla.environment(),
            "seconds": 1.0,
            "ledger": pieces.ledger.as_dict(),
            **tables,
            "compact": estimators_report.compact(tables["rows"]),
            "commit": "0",
            "reused_pieces": [],
            "pieces_seconds": 90.0,
            "peak_rss_mb": 1.0,
        }
    )
    return {**summary, "targets": estimators_findings.targets(summary)}


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        folder = tmp_path_factory.mktemp("pieces")
        pieces = pieces_in(folder)
        tables, drawn = estimators.run([tiny], {"digits_cnn": SIZES}, 0, pieces, only=SOME)
        return folder, tables, drawn, summary_of(tables, pieces)


@pytest.mark.slow
def test_every_estimator_runs_and_its_name_is_that_of_its_scores(tiny, tmp_path):
    pieces = pieces_in(tmp_path)
    tables, _ = estimators.run([tiny], {"digits_cnn": SIZES}, 0, pieces)
    report.validate(summary_of(tables, pieces), row_fields=ROW_FIELDS)
    rows = tables["rows"]
    labelled = {(row["estimator"], row["loss"]) for row in rows if row["loss"] not in ("output", "none")}
    plain = {row["estimator"] for row in rows if row["loss"] in ("output", "none")}
    assert len(plain) == 26 and len(labelled) == 10 and len(rows) == 36 * len(FORMATS)
    assert {row["status"] for row in rows} <= {"ok", "zero_by_construction", "indefinite", "unconverged"}


def test_a_run_has_its_rows_and_keeps_the_contract(ran):
    _, tables, _, summary = ran
    report.validate(summary, row_fields=ROW_FIELDS)
    rows = tables["rows"]
    with_loss = {(row["estimator"], row["loss"]) for row in rows}
    assert {name for name, _ in with_loss} == {"measured", *SOME}
    assert {loss for name, loss in with_loss if name == "quadratic[gauss_newton]"} == {"output", "cross_entropy"}
    assert {loss for name, loss in with_loss if name == "local_rounding[4]"} == {"output", "kl"}
    assert len(rows) == len(with_loss) * len(FORMATS)
    measured = [row for row in rows if (row["estimator"], row["loss"]) == ("measured", "output")]
    assert all(row["spearman"] == row["kendall"] == row["topk_overlap"] == 1 for row in measured)
    assert summary["ledger"]["evaluations"] > 0


def test_cells_without_a_gradient_are_null(ran):
    rows = [row for row in ran[1]["rows"] if row["status"] == sensitivity.Status.ZERO]
    names = {"first_order", "fisher[empirical,elementwise]"}
    assert {row["estimator"] for row in rows} == names and {row["loss"] for row in rows} == {"output"}
    empty = ("spearman", "kendall", "topk_overlap", "layers_low_10", "layers_low_50", "seconds", "peak_mb")
    assert all(row[key] is None for row in rows for key in empty)
    assert {row["loss"] for row in ran[1]["rows"] if row["estimator"] == "first_order"} == {"output", "cross_entropy"}
    for refused in (lambda: sensitivity.first_order(loss=losses.OUTPUT), lambda: sensitivity.fisher(kind="empirical")):
        with pytest.raises(ValueError, match="zero by construction"):
            refused()


def test_measured_agrees_with_the_losses_example_by_example(tiny, ran):
    evaluator = Evaluator(tiny)
    alone = np.array([[evaluator.losses(fmt, mask).mean() for mask in np.eye(3, dtype=bool)] for fmt in FORMATS])
    np.testing.assert_allclose(alone, ran[2]["digits_cnn"].truth, rtol=1e-3)


def test_examples_say_what_fewer_examples_cost(ran):
    rows = {(row["estimator"], row["loss"]): row for row in ran[1]["examples"]}
    assert rows["measured", "output"]["examples"] == 6 and rows["measured", "output"]["ceiling_bfloat16"] == 1
    assert rows["logdet[exact]", "output"]["examples"] == 6 and rows["depth", "output"]["examples"] == 0
    assert "32 draws" in rows["random", "output"]["settings"]


def test_spectra_are_kept_also_where_a_layer_has_fewer_weights_than_there_are_outputs(tiny, ran):
    folder, _, drawn, _ = ran
    saved = next(path for path in folder.iterdir() if "spectra%2C%20output" in path.name)
    with np.load(saved) as file:
        sizes = {name.removeprefix("array/"): file[name].size for name in file.files if name != "note"}
    assert sizes == {"first": 18, "second": 18, "third": 15}  # 6 examples × 3 outputs; 24, 30 and 15 weights
    exact = sensitivity.logdet(max_outputs=18, damping=1e-2)(tiny.model, tiny.batches, FORMATS[:1], jax.random.key(0))
    third = estimators_checks.EPSILONS.index(1e-2)
    np.testing.assert_allclose(drawn["digits_cnn"].damping[third], exact.value[:, 0], rtol=1e-6)


def test_a_deleted_piece_alone_is_computed_again(tiny, ran):
    folder, tables, _, _ = ran
    victim = next(path for path in folder.iterdir() if "depth" in path.name)
    victim.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    pieces = pieces_in(folder)
    again, _ = estimators.run([tiny], {"digits_cnn": SIZES}, 0, pieces, only=SOME)
    assert len(pieces.reused) == len(before)
    assert {path.name for path in folder.iterdir()} - set(before) == {victim.name}
    assert all((folder / name).stat().st_mtime_ns == when for name, when in before.items())
    assert [row["spearman"] for row in again["rows"]] == [row["spearman"] for row in tables["rows"]]


def test_known_errors_are_not_measured_again(tiny):
    evaluator = Evaluator(tiny)
    mask = np.array([True, False, True])
    value = evaluator.error("bfloat16", mask)
    assert evaluator.evaluations == 1 and evaluator.error("bfloat16", mask) == value and evaluator.evaluations == 1
    other = Evaluator(tiny)
    other.add(evaluator.export())
    assert other.error("bfloat16", mask) == value and other.evaluations == 0
    assert len(evaluator.export()["error_value"]) == 0
    assert evaluator.ledger() == Ledger(forward=6, evaluations=1, compilations=1)


def test_the_report_is_written(ran, tmp_path, capsys):
    _, _, drawn, summary = ran
    estimators_report.write(tmp_path, summary, drawn)
    page = (tmp_path / "report.html").read_text()
    assert "local_rounding[4]" in capsys.readouterr().out
    for word in ("local_rounding[4]", "zero by construction", "cross terms", "mean change"):
        assert word in page
    for name in ("agreement_cost", "ranks", "layers_lowered", "interactions", "damping"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert len((tmp_path / "estimators.csv").read_text().splitlines()) == len(summary["rows"]) + 1


def test_targets_say_what_was_reached_and_leave_out_what_is_destroyed(ran):
    summary = ran[3]
    found = {(row["target"].split(",")[0], row["format"]): row for row in summary["targets"]}
    fmt = FORMATS[1]
    reached = found["Spearman of local_rounding[4] with measured", fmt]
    row = next(r for r in summary["rows"] if (r["estimator"], r["format"]) == ("local_rounding[4]", fmt))
    assert reached["met"] == (row["spearman"] >= 0.95) and reached["value"] == row["spearman"]
    assert found["the whole run: minutes", "–"]["met"] and found["the whole run: minutes", "–"]["value"] >= 1.5
    worse = {**summary, "all_low": [{**each, "error": 0.2} for each in summary["all_low"]], "pieces_seconds": 4000.0}
    again = {(row["target"].split(",")[0], row["format"]): row["met"] for row in estimators_findings.targets(worse)}
    assert again["Spearman of local_rounding[4] with measured", fmt] is None
    assert again["the whole run: minutes", "–"] is False


def test_a_run_without_checks_has_no_pictures_of_them(tiny, ran, tmp_path, capsys):
    folder, _, _, summary = ran
    sizes = {"digits_cnn": replace(SIZES, checks=False, judged=("depth",))}
    tables, drawn = estimators.run([tiny], sizes, 0, pieces_in(tmp_path))
    assert {row["estimator"] for row in tables["rows"]} == {"measured", "depth"} and not tables["interactions"]
    written = {**summary, **tables, "compact": estimators_report.compact(tables["rows"])}
    estimators_report.write(tmp_path, written, drawn)
    assert (tmp_path / "report.html").exists() and not (tmp_path / "interactions.png").exists()
    capsys.readouterr()


def test_an_estimator_that_one_model_alone_has_is_shown(ran, tmp_path, capsys):
    """As with --quick, which judges fewer estimators on the large models."""
    _, _, drawn, summary = ran
    other = [{**row, "model": "iris_landmark"} for row in summary["rows"] if row["estimator"] in ("measured", "depth")]
    rows = [*summary["rows"], *other]
    written = {**summary, "rows": rows, "compact": estimators_report.compact(rows)}
    estimators_report.write(tmp_path, written, drawn)
    assert "local_rounding[4]" in capsys.readouterr().out and (tmp_path / "report.html").exists()


def test_quick_judges_estimators_that_exist(tiny):
    evaluator = Evaluator(tiny)
    few, many = (
        [(case.name, case.loss.name) for case in cases(tiny, sizes, evaluator.calibration, lambda loss: None)]
        for sizes in (QUICK["digits_cnn"], SIZES)
    )
    assert few == many
    known = {name for name, _ in many}
    assert all(set(sizes.judged or ()) <= known for sizes in QUICK.values())
    assert set(QUICK) == set(estimators.MODELS)


def test_unknown_names_are_refused(tiny, tmp_path):
    with pytest.raises(SystemExit, match="logdet\\[exakt\\]"):
        estimators.run([tiny], {"digits_cnn": SIZES}, 0, pieces_in(tmp_path), only=("logdet[exakt]",))
    with pytest.raises(SystemExit, match="face"):
        estimators.Config(models=("face",))
