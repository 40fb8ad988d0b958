"""Calibration, and the traced formats against fixed assignments."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import SmallConv, linen

from mpjax import emulation, formats
from mpjax.program import from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


@pytest.fixture(scope="module")
def small():
    return linen(SmallConv(), 4, 8, 8, 3)


def test_calibration_is_the_largest_input(small):
    model, batches = small
    ranges = emulation.calibrate(model, batches)
    largest = max(float(jnp.abs(x).max()) for (x,) in batches)
    assert ranges["stem"] == pytest.approx(largest, rel=1e-6)
    assert set(ranges) == set(model.names) and min(ranges.values()) > 0


def test_calibration_works_under_scan():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            return 1.0 + nn.Dense(4, name="dense")(x), None

    x = jax.random.normal(jax.random.key(0), (2, 4), jnp.float32)
    module = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="body")
    model = from_linen(module, module.init(jax.random.key(1), x), x)
    inputs, kernel, bias = [np.asarray(x)], model.params["dense/kernel"], model.params["dense/bias"]
    for i in range(2):
        inputs.append(1 + inputs[-1] @ np.asarray(kernel[i]) + np.asarray(bias[i]))
    ranges = emulation.calibrate(model, [(x,)])
    assert ranges["dense"] == pytest.approx(max(np.abs(array).max() for array in inputs), rel=1e-5)


def test_one_compilation_serves_every_assignment(small):
    model, ((x,), _) = small
    low = formats.parse_all(("bfloat16", "float16_acc16", "float8_e4m3fn"))
    ranges = emulation.calibrate(model, [(x,)])

    @jax.jit
    def run(params, numbers, x):
        override = emulation.in_formats(numbers, model.names, low, calibration=ranges)
        return model.call(params, x, override=override)

    for assignment in (
        {},
        {"stem": "bfloat16"},
        {"head": "float16_acc16", "first": "float8_e4m3fn"},
        dict.fromkeys(model.names, "float16_acc16"),
    ):
        numbers = emulation.format_numbers(assignment, model.names, low)
        fixed = emulation.in_format({k: formats.parse(v) for k, v in assignment.items()}, calibration=ranges)
        expected = model.call(model.params, x, override=fixed)
        np.testing.assert_allclose(run(model.params, numbers, x), expected, rtol=1e-5, atol=1e-6)
    assert run._cache_size() == 1
    with pytest.raises(ValueError, match="unknown layers: nose"):
        emulation.format_numbers({"nose": "bfloat16"}, model.names, low)
    with pytest.raises(ValueError, match="float16; this program was built for"):
        emulation.format_numbers({"stem": "float16"}, model.names, low)
