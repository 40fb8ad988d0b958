"""The user's metric over one compiled program."""

import flax.linen as nn
import numpy as np
import pytest
from refusals import refused
from toys import linen

from mpjax import emulation, metrics
from mpjax.evaluation import Evaluation
from mpjax.formats import parse
from mpjax.ledger import Ledger

pytestmark = pytest.mark.usefixtures("relaxed_promotion")
FORMATS = ("bfloat16", "float8_e4m3fn")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="first")(x))
        return {"a": nn.Dense(3, name="second")(x), "b": nn.Dense(2, name="third")(x)}


@pytest.fixture(scope="module")
def net(relaxed_promotion):
    model, batches = linen(Net(), 4, 6)
    return model, batches, emulation.calibrate(model, batches)


def error(low, reference):
    return np.abs(low - reference).max(axis=1)


def outputs(model, batches, override):
    outs = [model.call(model.params, *batch, override=override) for batch in batches]
    return np.float64(np.concatenate([np.concatenate([out["a"], out["b"]], axis=1) for out in outs]))


def test_it_measures_the_emulated_model_and_compiles_once(net) -> None:
    model, batches, calibration = net
    blocks = np.repeat([0, 1, 2, 3], 2)
    evaluate = Evaluation(model, batches, FORMATS, error, calibration=calibration, blocks=blocks, confidence=0.9)
    for assignment in ({"first": "bfloat16", "third": "float8_e4m3fn"}, {"second": "float8_e4m3fn"}, {}):
        measurement = evaluate(assignment)
        named = {name: parse(fmt) for name, fmt in assignment.items()}
        override = emulation.in_format(named, calibration=calibration)
        expected = error(outputs(model, batches, override), outputs(model, batches, None))
        np.testing.assert_allclose(measurement.per_sample, expected, atol=2e-6)
        interval = metrics.mean_interval(measurement.per_sample, blocks, confidence=0.9)
        assert (measurement.low, measurement.high, measurement.confidence) == (interval.low, interval.high, 0.9)
    assert evaluate.ledger == Ledger(forward=4 * 8, evaluations=3, compilations=1)
    assert evaluate._run._cache_size() == 1
    other = evaluate.over([(batches[0][0] + 1,)], [0, 0, 1, 1])
    assert other({"first": "bfloat16"}).value != evaluate({"first": "bfloat16"}).value
    assert other.ledger == Ledger(forward=8, evaluations=1, compilations=1) and evaluate._run._cache_size() == 1


def test_a_nan_is_measured_as_one_and_no_blocks_give_no_interval(net) -> None:
    model, batches, _ = net
    evaluate = Evaluation(model, batches, ("bfloat16",), lambda low, reference: np.full(len(low), np.nan))
    measurement = evaluate({"first": "bfloat16"})
    assert np.isnan(measurement.value) and measurement.low is None and measurement.high is None


def test_what_does_not_fit_is_refused(net) -> None:
    model, batches, calibration = net

    def evaluation(formats=FORMATS, metric=error, **options):
        return lambda: Evaluation(model, batches, formats, metric, **options)

    low = ("bfloat16",)
    refused(
        (r"got \(8,\) and \(2,\)", evaluation(low, blocks=[0, 1])),
        ("at least 2 blocks", evaluation(low, blocks=[1] * 8)),
        ("confidence must lie in", evaluation(low, blocks=range(8), confidence=95)),
        ("calibrat", evaluation()),
        ("Unknown format", evaluation(("bf16",))),
        (r"shape \(8,\) over all batches, found \(8, 5\)", evaluation(low, lambda a, b: a - b)(), {}),
        ("built for", evaluation(low)(), {"first": "float8_e4m3fn"}),
    )
