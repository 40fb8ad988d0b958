"""What tests of traced programs draw and compare."""

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import emulation, sensitivity
from mpjax.apply import apply
from mpjax.formats import parse

FORMATS = ("bfloat16", "float16_acc16", "float8_e4m3fn", "int8_w", "int4_w")  # one for each path of the arithmetic


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def exactly(model, function, params, *inputs, rtol=0.0):
    """Compares the jitted model with the jitted function; `rtol`: of the largest number."""
    outputs, expected = jax.jit(model.call)(model.params, *inputs), jax.jit(function)(params, *inputs)
    assert jax.tree.structure(outputs) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(np.abs(b).max()))


def errors(model, inputs, formats=FORMATS, names=None):
    """Format -> (emulated to float32, executed to emulated): relative distances with these layers low, in one program."""
    names = names or model.names
    ranges = emulation.calibrate(model, [inputs]) if any(parse(fmt).needs_range for fmt in formats) else None
    mixed = [apply(model, dict.fromkeys(names, fmt), calibration=ranges) for fmt in formats]
    overrides = [emulation.in_format(dict.fromkeys(names, parse(fmt)), calibration=ranges) for fmt in formats]

    @jax.jit
    def outputs(params, stored, *inputs):
        emulated = [model.call(params, *inputs, override=override) for override in overrides]
        executed = [low.call(weights, *inputs) for low, weights in zip(mixed, stored, strict=True)]
        return model.call(params, *inputs), emulated, executed

    def joined(out):
        return np.concatenate([np.ravel(np.asarray(leaf, np.complex128)) for leaf in jax.tree.leaves(out)])

    exact, emulated, executed = outputs(model.params, [low.params for low in mixed], *inputs)
    norm = np.linalg.norm(joined(exact))

    def far(a, b):
        return float(np.linalg.norm(joined(a) - joined(b)) / norm)

    return {fmt: (far(low, exact), far(run, low)) for fmt, low, run in zip(formats, emulated, executed, strict=True)}


def agree(model, inputs, formats=FORMATS, names=None, least=0.0, most=0.6, apart=0.1):
    """What is scored is what runs: they differ by no more than flipped roundings explain."""
    for fmt, (emulated, difference) in errors(model, inputs, formats, names).items():
        assert least < emulated < most and difference <= apart * emulated + 2e-6, (fmt, emulated, difference)


def scored_as_measured(model, batches, formats=("bfloat16",), rtol=0.2):
    """Compares exact local rounding with the measured losses; both."""
    problem = model, batches, formats, jax.random.key(0)
    scores, truth = sensitivity.local_rounding(num_probes=None)(*problem), sensitivity.measured()(*problem)
    np.testing.assert_allclose(scores.value, truth.value, rtol=rtol, atol=1e-12)
    return scores, truth
