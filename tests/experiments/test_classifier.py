"""The classifier's experiment on a tiny network: images, rows, resumption."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.classifier import __main__ as classifier
from experiments.classifier import steps
from experiments.classifier.steps import FORMATS, FORMS, Data, Size, top1
from experiments.lib import assets
from experiments.problems import classifier_data
from experiments.problems.classifier_data import Part
from experiments.problems.data import DataError
from mpjax.program import from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

SIZE = Size(images=8, scored=2, probes=2, points=3, tolerances=(0.02, 0.1, 0.5))


class Net(nn.Module):
    """One coarse convolution and two dense layers; the norm is kept or left out, to have two forms."""

    norm: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), strides=(16, 16), name="stem")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=True, name="stem_norm")(x)
        x = nn.relu(x).reshape(x.shape[0], 7, 2, 7, 2, 6).mean(axis=(2, 4)).reshape(x.shape[0], -1)
        return nn.Dense(5, name="classifier")(nn.relu(nn.Dense(12, name="dense")(x)))


def make_data() -> Data:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (16, 7, 7, 3), np.uint8).repeat(32, axis=1).repeat(32, axis=2)
    return Data(
        calibration=Part(images=images[:8], block=np.arange(8)),
        heldout=Part(images=images[8:], block=np.arange(8, 16)),
        sanity=random.integers(0, 256, (20, 224, 224, 3), np.uint8),
        labels=random.integers(0, 5, 20),
    )


def run(folder, monkeypatch, scale=1.0) -> dict:
    """The summary of a run on the tiny network."""

    def load_model(batch_norm):
        module, x = Net(norm=batch_norm == "kept"), jnp.zeros((1, 224, 224, 3), jnp.float32)
        model = from_linen(module, module.init(jax.random.key(1), x), x)
        model.params["classifier/kernel"] *= scale
        return model

    monkeypatch.setattr(steps, "FULL", SIZE)
    monkeypatch.setattr(steps, "load_data", lambda images, seed: make_data())
    monkeypatch.setattr(steps, "load_model", load_model)
    classifier.main(classifier.Config(results=folder))
    return json.loads((folder / "classifier" / "summary.json").read_text())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        pytest.MonkeyPatch.context() as patch,
    ):
        return folder, run(folder, patch)


def select(rows, **fields) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def test_rows(ran) -> None:
    rows = ran[1]["rows"]
    assert len(rows) == len(FORMS) * (1 + len(FORMATS) * (1 + len(SIZE.tolerances)))
    for row in rows:
        assert row["layers"] == 3 and 0 <= row["top1_agreement"] <= 1 and 0 <= row["sanity_top1"] <= 1
        assert (row["tolerance"] is None) == (row["name"] != "mixed")
        expected = {"fp32": 0, "all": 3}
        assert row["layers_low"] == expected.get(row["name"], row["layers_low"])
        if row["name"] == "fp32":
            assert (row["format"], row["kl"], row["top1_agreement"]) == ("float32", 0.0, 1.0)
        else:
            assert row["kl"] >= -1e-12
    assert all(row["kl"] > 0 for row in select(rows, name="all"))


def test_searches_keep_their_limit_on_the_calibration_images(ran) -> None:
    summary = ran[1]
    for row in summary["searches"]:
        assert row["kl_calibration"] <= row["tolerance_value"]
        same = select(summary["searches"], format=row["format"], tolerance=row["tolerance"])
        assert len({other["tolerance_value"] for other in same}) == 1  # one limit for both forms
        assert row["within_tolerance"] == (row["kl_heldout"] <= row["tolerance_value"])
        assert row["kl_heldout_low"] <= row["kl_heldout"] <= row["kl_heldout_high"]
        names = {name: row[name] for name in ("format", "batch_norm", "tolerance")}
        (mixed,) = select(summary["rows"], name="mixed", **names)
        assert (mixed["layers_low"], mixed["kl"]) == (row["layers_low"], row["kl_heldout"])
        scores = select(summary["scores"], format=row["format"], batch_norm=row["batch_norm"])
        lowered = [r for r in scores if r["lowered_at"] is not None and r["lowered_at"] <= row["tolerance"]]
        assert len(scores) == 3 and len(lowered) >= row["layers_low"]
    counts = [row["layers_low"] for row in select(summary["searches"], format="bfloat16", batch_norm="kept")]
    assert counts == sorted(counts)


def test_a_second_run_computes_nothing_and_has_the_same_rows(ran, monkeypatch) -> None:
    folder, summary = ran
    monkeypatch.setattr(steps.Evaluation, "outputs", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(steps.emulation, "calibrate", lambda *_: pytest.fail("calibrated again"))
    again = run(folder, monkeypatch)
    assert all(again[name] == summary[name] for name in ("rows", "searches", "curves", "scores", "facts", "ledger"))


def test_overflow_is_a_missing_number_and_not_an_error(tmp_path, monkeypatch) -> None:
    """Weights beyond float16's range: the KL is null, the limit comes from log 1000, the search leaves the layer alone."""
    monkeypatch.setattr(steps, "FORMATS", ("float16_acc16",))
    summary = run(tmp_path, monkeypatch, scale=1e6)
    rows = select(summary["rows"], format="float16_acc16")
    assert all(row["kl"] is None and row["top1_agreement"] == 0 for row in select(rows, name="all"))
    assert all(row["kl"] is not None and row["layers_low"] < 3 for row in select(rows, name="mixed"))
    scores = select(summary["scores"], layer="classifier")
    assert all(row["score"] is None and row["lowered_at"] is None for row in scores)


def test_top1_counts_equal_classes_and_no_undefined_ones() -> None:
    reference = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    low = np.array([[0.5, 0.6], [0.0, 1.0], [np.nan, 1.0], [np.inf, 0.0]])
    assert top1(low, reference.argmax(axis=1)).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="a label for each of 4"):
        top1(reference, np.array([1]))


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


def test_what_cannot_be_decoded_is_named(tmp_path) -> None:
    path = tmp_path / "none.mp4"
    path.write_bytes(b"not a video")
    with pytest.raises(DataError, match=r"none\.mp4: OpenCV cannot decode this video"):
        classifier_data.video_blocks(str(path), np.random.default_rng(0))


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
