"""The cost model against random mixes, on a toy. No speed is asserted."""

import json

import numpy as np
import pytest
from toys import SmallConv, linen

from experiments.cost_model import __main__ as cost_model

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def toy(name):
    model, batches = linen(SmallConv(), 2, 8, 8, 3)
    return model, tuple(batches[0])


def test_predicted_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_model, "load", toy)
    cost_model.main(cost_model.Config(models=("iris_landmark",), quick=True, results=tmp_path))
    summary = json.loads((tmp_path / "cost_model" / "summary.json").read_text())
    named = {row["program"]: row for row in summary["rows"]}
    assert list(named) == [
        "float32",
        "all bfloat16",
        "pick by attributed",
        "pick by alone",
        *(f"mix {n}" for n in range(1, 7)),
    ]
    assert named["float32"]["layers_low"] == 0 and named["all bfloat16"]["layers_low"] == 5
    for row in named.values():
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["ms"] - 1)
        assert row["ms_q1"] <= row["ms"] <= row["ms_q3"] and row["alone_ms"] > 0
    (model,) = summary["cost_model"]
    errors = np.abs([row["error"] for name, row in named.items() if name.startswith("mix")])
    assert model["mixes"] == 6 and model["median_error"] == pytest.approx(np.median(errors))
    assert (tmp_path / "cost_model" / "predicted.png").exists()


def test_mixes_and_the_fastest_assignment():
    layers = tuple(f"layer{n}" for n in range(100))
    mixes = cost_model.random_mixes(layers, 4, seed=0)
    assert mixes == cost_model.random_mixes(layers, 4, seed=0)
    np.testing.assert_allclose([len(mix) for mix in mixes], [12.5, 37.5, 62.5, 87.5], atol=15)
    costs = type("Costs", (), {"layers": ("a", "b", "c")})()
    assert cost_model.fastest(costs, np.array([[2.0, 1], [1, 2], [3, 1]])) == {"a": "bfloat16", "c": "bfloat16"}
