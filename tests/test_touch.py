"""What a new number format and a new estimator touch: nothing but what is written here, at run time."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import linen

import mpjax
from mpjax import compiled, cost, emulation, search, sensitivity
from mpjax.apply import apply
from mpjax.evaluation import Evaluation
from mpjax.formats import FLOAT32, FORMATS, Format, parse, register, storage
from mpjax.ledger import Ledger
from mpjax.sensitivity import Scores

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model_and_batches():
    return linen(nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(8)]), 4, 48)


def error(low, reference):
    return np.abs(low - reference).max(axis=1)


def solved(model, batches, scores, name, calibration=None):
    """The search's result where every layer may be lowered."""
    problem = search.Problem.from_scores(scores)
    evaluate = Evaluation(model, batches, (name,), error, calibration=calibration)
    strategy = search.ilp() if scores.kind == "loss" else search.binary()
    return search.solve(problem, strategy, evaluate=evaluate, tolerance=10.0)


@pytest.mark.parametrize(
    ("fmt", "largest", "bytes_of_32_by_8"),
    [
        (
            Format(
                name="float8_e4m3fnuz",
                storage="float8_e4m3fnuz",
                operand="float8_e4m3fnuz",
                per_tensor=True,
                activations="static",
            ),
            240,
            256,
        ),
        (Format(name="int8_w16", storage="int8", group=16), 127, 256 + 2 * 8 * 2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_format_of_a_known_scheme_is_one_line(model_and_batches, request, fmt, largest, bytes_of_32_by_8):
    """Its numbers are those of ml_dtypes over its scales, everywhere from the scores to the report."""
    register(fmt)
    request.addfinalizer(lambda: FORMATS.pop(fmt.name))
    model, batches = model_and_batches
    ranges = emulation.calibrate(model, batches)
    scores = sensitivity.local_rounding()(model, batches, (fmt.name,), KEY)
    assert (scores.value > 0).all() and (scores.status == "ok").all()
    result = solved(model, batches, scores, fmt.name, ranges)
    assert result.assignment.lowered == model.names and 0 < result.measurement.value < 0.5

    mixed = apply(model, result.assignment, calibration=ranges)
    kernel = np.asarray(model.params["layers_2/kernel"])
    groups = kernel.reshape(2, 16, 8) if fmt.group else kernel.reshape(1, 32, 8)
    axes = 1 if fmt.group else None
    scales = np.asarray(
        jnp.asarray(np.abs(groups).max(axes, keepdims=True) / largest, storage.scale_dtype(fmt)), np.float32
    )
    numbers = np.clip(groups / scales, -largest, largest)
    numbers = (np.round(numbers) if fmt.group else numbers).astype(jnp.dtype(fmt.storage)).astype(np.float32)
    stored = storage.stands_for(mixed.params["layers_2/kernel"], fmt, kernel.shape, (0,), ())
    np.testing.assert_allclose(stored, (numbers * scales).reshape(kernel.shape), rtol=1e-6)

    program = compiled.compile(mixed, batches)
    emulated = model.call(model.params, *batches[0], override=emulation.in_format(mixed.formats, calibration=ranges))
    np.testing.assert_allclose(program(*batches[0]), emulated, atol=1e-2 * float(jnp.abs(emulated).max()))
    report = program.report()
    assert [row["requested"] for row in report.rows] == [fmt.name] * 2 and fmt.name in str(report)
    assert report.rows[1]["weight_bytes"] == bytes_of_32_by_8
    assert report.rows[1]["executed"] in ("float32", "float16", fmt.operand)

    costs = cost.measure(model, (fmt.name,), *batches[0], rounds=1, implementation="rule")
    assert costs.weight_bytes[1].tolist() == [32 * 8 * 4, bytes_of_32_by_8] and np.isfinite(costs.seconds).all()
    assert cost.predicted(costs, result.assignment) > 0
    assert {row["format"] for row in cost.table(costs)} == {FLOAT32.name, fmt.name}


def test_only_formats_and_arithmetic_ask_what_a_scheme_is():
    package = Path(mpjax.__file__).parent
    asks = re.compile(r"\.(scaled|zero_point|per_tensor|accumulate|group)\b(?!\()")
    asking = {str(path.relative_to(package)) for path in package.rglob("*.py") if asks.search(path.read_text())}
    assert {name for name in asking if not name.startswith("formats")} == {"arithmetic.py"}


def test_an_estimator_is_one_function(model_and_batches):
    """Written in the form of all others, a `Scorer`, it ranks the layers of a search."""

    def largest_rounding(model, batches, formats, key):
        """The largest rounding error of a layer's weights."""
        weights = [model.params[layer.kernel] for layer in model.layers]
        value = np.array(
            [[float(jnp.abs(storage.round_weights(w, parse(fmt)) - w).max()) for fmt in formats] for w in weights]
        )
        return Scores(
            estimator="largest_rounding",
            loss="none",
            value=value,
            stderr=np.zeros_like(value),
            residual=np.zeros_like(value),
            layers=model.names,
            formats=tuple(formats),
            kind="ranking",
            status=np.full(value.shape, "ok"),
            ledger=Ledger(),
            seconds=0.0,
            compile_seconds=0.0,
            peak_mb=0.0,
        )

    scorer: sensitivity.Scorer = largest_rounding
    model, batches = model_and_batches
    scores = scorer(model, batches, ("bfloat16",), KEY)
    result = solved(model, batches, scores, "bfloat16")
    assert result.assignment.lowered == model.names
    assert scores.ranking("bfloat16") == tuple(np.array(model.names)[np.argsort(scores.column("bfloat16"))])
