"""What only a GPU computes, in a minute: JAX_PLATFORMS=cuda python -m pytest -m gpu tests/test_gpu.py"""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax import lax

from experiments.models.encoder import random_encoder
from mpjax import arithmetic, compiled
from mpjax.apply import apply
from mpjax.formats import parse
from mpjax.formats.storage import Stored, quantize, stands_for
from mpjax.kernels import stored
from mpjax.program import from_linen
from mpjax.program.product import Product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.optimised,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
    pytest.mark.usefixtures("relaxed_promotion"),
]

DOT = Product(kind="dot", function=lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))
FORMS = {
    "bfloat16_w": ("parts", "reduce"),
    "int8_w": ("parts", "reduce", "kernel"),
    "float8_e4m3fn_w": ("parts", "reduce", "kernel"),
    "int4_w": ("reduce", "kernel"),
}


@pytest.fixture(autouse=True, scope="module")
def without_x64() -> Iterator[None]:
    """As users run."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


def operands(rows, inputs, channels):
    x = jax.random.normal(jax.random.key(1), (rows, inputs), np.float32)
    return x, jax.random.normal(jax.random.key(0), (inputs, channels), np.float32)


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
@pytest.mark.parametrize(("rows", "inputs", "channels"), [(1, 2048, 1024), (3, 576, 64)])
def test_forms_are_the_product_in_float64(name, form, rows, inputs, channels):
    fmt, (x, weights) = parse(name), operands(rows, inputs, channels)
    small = Stored(*quantize(weights, fmt, (0,)))
    assert form in stored.forms(DOT, x, small, fmt, weights.shape)
    exact = np.asarray(x, np.float64) @ np.asarray(stands_for(small, fmt, weights.shape, (0,)), np.float64)
    out = jax.jit(lambda x, small: stored.compute(form, DOT, x, small, weights.shape))(x, small)
    assert np.abs(out - exact).max() <= 2e-6 * np.abs(exact).max()


@pytest.mark.parametrize(("name", "most"), [("tensorfloat32", 2e-3), ("bfloat16_x3", 1e-4), ("bfloat16_x6", 4e-6)])
def test_algorithms_of_float32_products(name, most):
    """Error over the largest number."""
    x, weights = operands(64, 512, 128)
    exact = np.asarray(x, np.float64) @ np.asarray(weights, np.float64)
    fmt = parse(name)
    with jax.default_matmul_precision("highest"):
        out, plain = (
            jax.jit(lambda x, w, fmt=fmt: arithmetic.executed(fmt, DOT, x, w))(x, weights)
            for fmt in (fmt, parse("float32"))
        )
    error, least = (np.abs(value - exact).max() / np.abs(exact).max() for value in (out, plain))
    assert least <= 1e-6 and error <= most
    if name == "tensorfloat32":
        assert error > 1e-5


@pytest.mark.parametrize("name", ["bfloat16", "float16", "tensorfloat32"])
def test_a_right_program_is_accepted(name):
    module, variables, x = random_encoder(2, 128, 4, tokens=32, batch=4)
    model = from_linen(module, variables, x[:1])
    mixed = apply(model, dict.fromkeys(model.names, name))
    program = compiled.compile(mixed, [(x[:2],), (x[2:],)], weights="small")
    assert program.verification.agrees
