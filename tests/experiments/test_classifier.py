"""The classifier's experiment on a tiny network: images, rows, resumption, findings and the report."""

import copy
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.classifier import __main__ as classifier
from experiments.classifier import report as classifier_report
from experiments.classifier.__main__ import (
    FORMATS,
    FORMS,
    ROW_FIELDS,
    TOLERANCES,
    Config,
    Data,
    Form,
    Size,
    agreement,
    top1,
)
from experiments.lib import assets, common, report
from experiments.problems import classifier_data
from experiments.problems.classifier_data import Part
from experiments.problems.data import DataError
from mpjax import xla
from mpjax.program import from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

SIZE = Size(images=8, scored=2, probes=2, points=3)


class Net(nn.Module):
    """One coarse convolution and three dense layers; the norm is kept or left out, to have two forms."""

    norm: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), strides=(16, 16), name="stem")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=True, name="stem_norm")(x)
        x = nn.relu(x).reshape(x.shape[0], 7, 2, 7, 2, 6).mean(axis=(2, 4)).reshape(x.shape[0], -1)
        for number in range(2):
            x = nn.relu(nn.Dense(12, name=f"dense{number}")(x))
        return nn.Dense(5, name="classifier")(x)


def make_data() -> Data:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (16, 7, 7, 3), np.uint8).repeat(32, axis=1).repeat(32, axis=2)
    return Data(
        calibration=Part(images=images[:8], block=np.arange(8)),
        heldout=Part(images=images[8:], block=np.arange(8, 16)),
        sanity=random.integers(0, 256, (20, 224, 224, 3), np.uint8),
        labels=random.integers(0, 5, 20),
    )


def make_forms(folder) -> dict:
    pieces = common.Pieces(folder, {"test": 1}, fresh=False)
    x = jnp.zeros((1, 224, 224, 3), jnp.float32)
    forms = {}
    for form in FORMS:
        module = Net(norm=form == "kept")
        model = from_linen(module, module.init(jax.random.key(1), x), x)
        forms[form] = Form(form, model, make_data(), SIZE, pieces, 0)
    return forms


def summarised(tables, pieces) -> dict:
    summary = report.jsonable(
        {
            "schema": report.SCHEMA,
            "experiment": "classifier",
            "command": "test",
            "config": report.jsonable(Config()),
            "environment": xla.environment(),
            "seconds": 1.0,
            "ledger": pieces.ledger.as_dict(),
            **tables,
            "facts": classifier.facts(make_data(), SIZE),
            "commit": "0",
            "reused_pieces": [],
            "pieces_seconds": 60.0,
            "peak_rss_mb": 900.0,
        }
    )
    return summary | {"targets": classifier_report.targets(summary)}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        folder = tmp_path_factory.mktemp("classifier")
        forms = make_forms(folder / "pieces")
        steps = []
        tables = classifier.run(forms, TOLERANCES, lambda steps_=1: steps.append(steps_))
        return folder, tables, summarised(tables, forms["kept"].pieces), steps


def test_rows_keep_the_contract(ran) -> None:
    _, _, summary, steps = ran
    report.validate(summary, row_fields=ROW_FIELDS)
    rows = summary["rows"]
    assert len(rows) == len(FORMS) * (1 + len(FORMATS) * (1 + len(TOLERANCES)))
    assert len(steps) == len(FORMS) * (1 + len(FORMATS) * (2 + len(TOLERANCES)))
    for row in rows:
        assert row["layers"] == 4 and 0 <= row["top1_agreement"] <= 1 and 0 <= row["sanity_top1"] <= 1
        assert (row["tolerance"] is None) == (row["name"] != "mixed")
        expected = {"fp32": 0, "all": 4}
        assert row["layers_low"] == expected.get(row["name"], row["layers_low"])
        if row["name"] == "fp32":
            assert (row["format"], row["kl"], row["top1_agreement"]) == ("float32", 0.0, 1.0)
        else:
            assert row["kl"] >= -1e-12


def test_searches_keep_their_limit_on_the_calibration_images(ran) -> None:
    _, _, summary, _ = ran
    whole = {(r["format"], r["batch_norm"]): r for r in summary["rows"] if r["name"] == "all"}
    mixed = {(r["format"], r["batch_norm"], r["tolerance"]): r for r in summary["rows"] if r["name"] == "mixed"}
    for row in summary["searches"]:
        assert row["kl_calibration"] <= row["tolerance_value"]
        same = [
            each
            for each in summary["searches"]
            if (each["format"], each["tolerance"]) == (row["format"], row["tolerance"])
        ]
        assert len({each["tolerance_value"] for each in same}) == 1  # one limit for both forms
        assert row["within_tolerance"] == (row["kl_heldout"] <= row["tolerance_value"])
        assert row["kl_heldout_low"] <= row["kl_heldout"] <= row["kl_heldout_high"]
        own = mixed[row["format"], row["batch_norm"], row["tolerance"]]
        assert (own["layers_low"], own["kl"]) == (row["layers_low"], row["kl_heldout"])
    assert all(row["kl"] > 0 for row in whole.values())
    counts = [r["layers_low"] for r in summary["searches"] if (r["format"], r["batch_norm"]) == ("bfloat16", "kept")]
    assert counts == sorted(counts)


def test_scores_say_from_which_tolerance_a_layer_was_lowered(ran) -> None:
    _, _, summary, _ = ran
    for row in summary["searches"]:
        own = [r for r in summary["scores"] if (r["format"], r["batch_norm"]) == (row["format"], row["batch_norm"])]
        assert len(own) == 4
        low = [r for r in own if r["lowered_at"] is not None and r["lowered_at"] <= row["tolerance"]]
        assert len(low) >= row["layers_low"]


def test_a_second_run_computes_nothing_and_says_the_same(ran, monkeypatch) -> None:
    folder, _, summary, _ = ran
    monkeypatch.setattr(classifier.Evaluation, "outputs", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(classifier.emulate, "calibrate", lambda *_: pytest.fail("calibrated again"))
    forms = make_forms(folder / "pieces")
    tables = classifier.run(forms, TOLERANCES, lambda steps=1: None)
    again = report.jsonable(tables)
    assert all(
        again[name] == summary[name]
        for name in ("rows", "searches", "curves", "scores", "folding_error", "top_probability")
    )
    assert forms["kept"].pieces.ledger.as_dict() == summary["ledger"]


def test_the_report_is_written(ran, tmp_path, capsys) -> None:
    summary = ran[2]
    classifier_report.write(tmp_path, summary)
    page = (tmp_path / "report.html").read_text()
    for word in ("sanity check", "kept", "folded", "2 places", "astronaut", "float16_acc16"):
        assert word in page
    for name in ("kl_against_layers", "agreement", *(f"sensitivity_{fmt}" for fmt in FORMATS)):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    assert (tmp_path / "rows.csv").read_text().count("\n") == 1 + len(summary["rows"])
    assert "EfficientNet-Lite0 against its float32 output" in capsys.readouterr().out


def test_findings_are_computed_from_the_numbers(ran) -> None:
    summary = copy.deepcopy(ran[2])
    for row in summary["rows"]:
        if (row["name"], row["format"], row["batch_norm"]) == ("all", "float8_e4m3fn", "folded"):
            row["kl"], row["top1_agreement"] = None, 0.0
        if row["name"] == "fp32":
            row["sanity_top1"] = 0.9
    for row in summary["searches"]:
        row["within_tolerance"] = row["format"] == "bfloat16"
    for row in summary["scores"]:
        row["score"] = 3.0 if row["layer"] == "stem" else None if row["format"] == "float16_acc16" else 0.5
    said = classifier_report.findings(summary)
    assert "batch norm folded, top-1 agreement 0%, KL not finite" in said[2]
    assert "Most sensitive: folded, stem (67% of all predicted KL)" in said[0] and "classifier (not finite)" in said[1]
    assert f"{2 * len(TOLERANCES)} of {6 * len(TOLERANCES)} results are within their limit" in said[4]
    assert "in the median of the 8 held-out images; one image is 12.5% of agreement" in said[3]
    assert "90% with batch norm folded, 90% with batch norm kept of 20 labelled images" in said[-1]
    met = {row["target"]: row["met"] for row in classifier_report.targets(summary)}
    assert met["sanity images right in float32, at least"]
    summary["rows"][0]["sanity_top1"] = 0.85
    assert not classifier_report.targets(summary)[0]["met"]


def test_overflow_is_a_number_that_is_missing_and_not_an_error(tmp_path, monkeypatch) -> None:
    """Weights beyond float16's range: the KL is null, the limit comes from log 1000, the search leaves the layer alone."""
    monkeypatch.setattr(classifier, "FORMATS", ("float16_acc16",))
    forms = make_forms(tmp_path)
    for form in forms.values():
        form.model.params["classifier/kernel"] *= 1e6
    tables = report.jsonable(classifier.run(forms, (0.5,), lambda steps=1: None))
    report.validate(summarised(tables, forms["kept"].pieces), row_fields=ROW_FIELDS)
    whole = [row for row in tables["rows"] if (row["name"], row["format"]) == ("all", "float16_acc16")]
    assert all(row["kl"] is None and row["top1_agreement"] == 0 for row in whole)
    mixed = [row for row in tables["rows"] if (row["name"], row["format"]) == ("mixed", "float16_acc16")]
    assert all(row["kl"] is not None and row["layers_low"] < 4 for row in mixed)
    scores = [r for r in tables["scores"] if (r["format"], r["layer"]) == ("float16_acc16", "classifier")]
    assert all(row["score"] is None and row["lowered_at"] is None for row in scores)
    classifier_report.write(tmp_path, summarised(tables, forms["kept"].pieces))


# --- metrics and misuse -----------------------------------------------------------------------------------------------


def test_agreement_counts_equal_classes_and_no_undefined_ones() -> None:
    reference = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    low = np.array([[0.5, 0.6], [0.0, 1.0], [np.nan, 1.0], [np.inf, 0.0]])
    assert agreement(low, reference).tolist() == [True, False, False, False]
    assert top1(reference, np.array([1, 1, 1, 0])).tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="a label for each of 4"):
        top1(reference, np.array([1]))


@pytest.mark.parametrize("tolerances", [(), (0.0,), (10.0,), (0.1, -0.5)])
def test_tolerances_that_are_no_shares_are_refused(tolerances) -> None:
    with pytest.raises(SystemExit, match="expected shares in"):
        Config(tolerances=tolerances)


def test_quick_means_two_tolerances_unless_others_are_given() -> None:
    assert Config().effective.tolerances == TOLERANCES
    assert Config(quick=True).effective.tolerances == (0.1, 0.5)
    assert Config(quick=True, tolerances=(0.3,)).effective.tolerances == (0.3,)


# --- images -----------------------------------------------------------------------------------------------------------


def test_no_block_is_in_both_parts_and_the_first_images_are_of_different_ones() -> None:
    photographs = [np.full((5, 2, 2, 3), 10 * number, np.uint8) for number in range(8)]
    videos = [np.full((2, 4, 2, 2, 3), 100 + number, np.uint8) for number in range(9)]
    arrays = classifier_data.deal(photographs, videos, np.random.default_rng(0))
    blocks = {name: arrays[f"{name}_block"] for name in ("calibration", "heldout")}
    assert not set(blocks["calibration"]) & set(blocks["heldout"])
    for name, block in blocks.items():
        assert len(block) == len(arrays[f"{name}_images"]) == 4 * 5 + 9 * 4
        assert len(set(block[:13].tolist())) == len(set(block.tolist())) == 13
        values = arrays[f"{name}_images"][:, 0, 0, 0]
        for value, number in zip(values, block, strict=True):
            assert value == (10 * number if number < 8 else 100 + (number - 8) // 2)


def test_windows_of_a_video_do_not_overlap_and_lie_inside() -> None:
    for height, width in ((994, 1768), (1080, 1920), (300, 900)):
        covered = np.zeros((height, width), int)
        for x, y, side in classifier_data._corners(height, width):
            assert 0 <= x and x + side <= width and 0 <= y and y + side <= height
            covered[y : y + side, x : x + side] += 1
        assert covered.max() == 1


def test_views_of_a_photograph() -> None:
    image = np.zeros((300, 400, 3), np.uint8)
    image[:, 50:350, 0] = 255  # the central square
    image[:210, :210, 1] = 255  # the upper left window, which overlaps the lower right one
    views = classifier_data.photograph_views(image)
    assert views.shape == (5, 224, 224, 3)
    assert views[0, ..., 0].min() == 255 and views[1, ..., 1].min() == 255 and not views[4, 150:, 150:, 1].any()


def test_parts_are_cut_and_batched() -> None:
    part = make_data().calibration
    assert part.first(4).images.shape == (4, 224, 224, 3)
    assert [batch[0].shape for batch in part.batches] == [(4, 224, 224, 3)] * 2
    assert part.batches[0][0].dtype == jnp.float32
    for count in (0, 9):
        with pytest.raises(ValueError, match="8 images in this part"):
            part.first(count)


def test_what_cannot_be_decoded_is_named(tmp_path) -> None:
    path = tmp_path / "none.mp4"
    path.write_bytes(b"not a video")
    with pytest.raises(DataError, match=r"none\.mp4: OpenCV cannot decode this video"):
        classifier_data.video_blocks(str(path), np.random.default_rng(0))
    with pytest.raises(DataError, match="an image of 3 bytes"):
        classifier_data._decoded(b"abc")


def test_a_package_without_the_labelled_images_is_refused(tmp_path, monkeypatch) -> None:
    with zipfile.ZipFile(tmp_path / "foolbox.whl", "w") as wheel:
        wheel.writestr("foolbox/data/cifar10_00_3.jpg", b"")
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / "foolbox.whl")
    with pytest.raises(DataError, match="0 images in foolbox's package, 20 expected"):
        classifier_data.sanity_images()


@pytest.mark.slow
def test_real_images_are_the_same_each_time() -> None:
    try:
        parts = classifier_data.frames()
        images, labels = classifier_data.sanity_images()
    except assets.RegistryUnreachable as error:
        pytest.skip(str(error))
    assert [len(part.images) for part in parts] == [56, 56]
    again = classifier_data.frames()
    assert all((a.images == b.images).all() and a.images.std() > 30 for a, b in zip(parts, again, strict=True))
    assert images.shape == (20, 224, 224, 3) and labels[:3].tolist() == [243, 559, 438]
