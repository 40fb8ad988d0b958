"""A dozen architectures, each from its definition to a verified mixed program."""

from collections import Counter

import jax
import numpy as np
import pytest

from experiments import tour
from experiments.models import architectures
from mpjax import apply, compiled, hlo, models

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

LAYERS = {
    "mlp": 3,
    "resnet": 7,
    "mobilenet": 6,
    "unet": 4,
    "vit": 14,
    "bert": 16,
    "gpt": 7,
    "lstm": 9,
    "gru": 7,
    "mixer": 10,
    "experts": 4,
    "llama": 16,
}
LEFT = {"vit": {"class_token", "position"}}


QUICK = ("mlp", "gpt")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in architectures.NAMES]
)
def test_layers_are_found_and_the_identity_changes_nothing(name):
    subject = architectures.architecture(name)
    model, (x,) = subject.model, subject.batches[0]
    assert len(model.layers) >= LAYERS[name], models.summary(model)
    norm = ("scale", "bias")  # scanned, they have two axes
    left = {each.path for each in model.others if len(each.shape) > 1 and not each.path.endswith(norm)}
    if name != "lstm":  # the optimised cell keeps its weights to itself
        assert len(model.layers) == LAYERS[name] and left == LEFT.get(name, set())
    plain = jax.jit(model.call)(model.params, x)
    same = jax.jit(lambda params, x: model.call(params, x, override=lambda layer, product, a, b: product(a, b)))
    np.testing.assert_array_equal(same(model.params, x), plain)
    flax = jax.jit(subject.plain)
    np.testing.assert_array_equal(flax(model.params, x), plain)
    ours, theirs = (
        Counter(each.opcode for each in hlo.instructions(run.lower(model.params, x).compile().as_text()))
        for run in (same, flax)
    )
    assert ours == theirs, (ours - theirs, theirs - ours)  # the same program, so the same time
    assert all(layer.name in models.summary(model) for layer in model.layers)
    mixed = apply.apply(model, dict.fromkeys(model.names, "bfloat16"), attention="bfloat16")
    low = compiled.compile(mixed, subject.batches)(x)
    error = np.linalg.norm(low - plain) / np.linalg.norm(plain)
    assert 1e-4 < error < 0.1 and low.dtype == plain.dtype


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(each, marks=pytest.mark.slow) for each in architectures.NAMES[1:])]
)
def test_an_architecture_goes_the_whole_way(name):
    row, ledger = tour.toured(architectures.architecture(name))
    assert row["verified"] and 0 <= row["layers_low"] <= row["layers"]
    assert row["error"] <= 0.5 * row["error_all"] and row["error_all"] < 0.1
    assert (row["weight_bytes"] < row["weight_bytes_fp32"]) == (row["layers_low"] > 0)
    assert ledger.forward > 0


def test_the_tour_leaves_a_report(tmp_path):
    tour.main(tour.Config(models=("mlp",), results=tmp_path))
    assert "Dense_0" in (tmp_path / "tour/report.html").read_text()
    with pytest.raises(SystemExit, match="found nothing_known"):
        tour.Config(models=("nothing_known",))
