"""A dozen architectures, and other people's models, each from its definition to a verified mixed program."""

import json
from collections import Counter

import jax
import numpy as np
import pytest

from experiments.models import architectures, zoo
from experiments.tour import __main__ as tour
from mpjax import compiled
from mpjax.apply import apply
from mpjax.xla import hlo

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
FOLDED = ("resnet", "lstm")  # factors of batch norms; gates' weights, one beside the other


QUICK = ("mlp", "gpt")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in architectures.NAMES]
)
def test_layers_are_found_and_the_identity_changes_nothing(name):
    subject = architectures.architecture(name)
    model, (x,) = subject.make(), subject.batches[0]
    assert len(model.layers) >= LAYERS[name], model.summary()
    norm = ("scale", "bias")  # scanned, they have two axes
    left = {
        other.path
        for other in model.others
        if len(other.shape) > 1 and not other.path.endswith(norm) and not other.folded
    }
    if name != "lstm":  # the optimised cell keeps its weights to itself
        assert len(model.layers) == LAYERS[name] and left == LEFT.get(name, set())
    plain = jax.jit(model.call)(model.params, x)
    same = jax.jit(lambda params, x: model.call(params, x, override=lambda layer, product, a, b: product(a, b)))
    np.testing.assert_array_equal(same(model.params, x), plain)
    alone = jax.jit(subject.plain)
    np.testing.assert_array_equal(alone(subject.params, x), plain)
    ours, theirs = (
        Counter(instruction.opcode for instruction in hlo.instructions(run.lower(params, x).compile().as_text()))
        for run, params in ((same, model.params), (alone, subject.params))
    )
    ours.pop("bitcast", 0), theirs.pop("bitcast", 0)  # which moves nothing: a bias in a scan takes its shape before it
    folded = [weight.name for weight in model.traced.first.weights if weight.folded]
    assert not ours - theirs, (
        ours - theirs,
        theirs - ours,
    )  # what depends on nothing is computed once: so not more time
    assert bool(folded) == (name in FOLDED)
    assert all(layer.name in model.summary() for layer in model.layers)
    mixed = apply(model, dict.fromkeys((layer.name for layer in model.lowerable), "bfloat16"))
    low = compiled.compile(mixed, subject.batches)(x)
    error = np.linalg.norm(low - plain) / np.linalg.norm(plain)
    assert 1e-4 < error < 0.1 and low.dtype == plain.dtype


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in architectures.NAMES[1:])]
)
def test_an_architecture_goes_the_whole_way(name):
    row, text, ledger = tour.toured(architectures.architecture(name))
    assert row.verified and 0 <= row.layers_low <= row.layers
    assert row.error <= row.error_limit < 0.05 and 0 < row.error_all < 0.1
    assert row.weight_bytes < row.weight_bytes_fp32 and 0.9 < row.reached <= 1
    assert row.difference == 0 or row.folded
    assert ledger.forward > 0 and "layers hold" in text


def test_a_model_of_the_zoo_goes_the_whole_way():
    row, _, ledger = tour.toured(tour.of_zoo("zoo/haiku_mobilenet"))
    assert row.verified and row.reached == 1 and row.left == "" and row.folded > 0  # batch norms' factors
    assert row.difference < 1e-5 and 0 < row.error_all < 0.1 and row.layers_low is None
    assert row.source.startswith("Haiku") and ledger.forward > 0


def test_the_tour_leaves_a_report(tmp_path, monkeypatch, capsys):
    def missing():
        raise ImportError("no such package")

    def broken():
        raise ValueError("it cannot be made")

    for name, make in {"missing": missing, "broken": broken}.items():
        monkeypatch.setitem(zoo.ZOO, name, zoo.Case(name=name, source="a test", make=make))
    monkeypatch.setattr(tour, "EVERY", ("mlp", "zoo/missing", "zoo/broken"))
    with pytest.raises(SystemExit, match="zoo/broken: ValueError: it cannot be made"):
        tour.main(tour.Config(models=tour.EVERY, results=tmp_path))
    assert "Left out, 1 models of packages that are not installed: pip install 'mpjax[zoo]'" in capsys.readouterr().out
    summary = json.loads((tmp_path / "tour/summary.json").read_text())
    assert [row["architecture"] for row in summary["rows"]] == ["mlp"] and summary["missing"] == ["zoo/missing"]
    assert "Dense_0" in (tmp_path / "tour/report.html").read_text()
    with pytest.raises(SystemExit, match="found nothing_known"):
        tour.Config(models=("nothing_known",))
