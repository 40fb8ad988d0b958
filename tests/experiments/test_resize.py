"""Doubling against a loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.models import resize


def by_hand(x):
    for axis in (1, 2):
        size = x.shape[axis]
        centres = (np.arange(2 * size) + 0.5) / 2 - 0.5
        low = np.floor(centres).astype(int)
        share = (centres - low).reshape([-1 if number == axis else 1 for number in range(4)])
        at = [np.take(x, np.clip(low + step, 0, size - 1), axis=axis) for step in (0, 1)]
        x = (1 - share) * at[0] + share * at[1]
    return x


@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, 5) for _ in range(4))),
    seed=st.integers(0, 99),
    implementation=st.sampled_from(resize.IMPLEMENTATIONS),
)
def test_any_size_equals_a_plain_loop(shape, seed, implementation):
    x = np.random.default_rng(seed).normal(size=shape)
    out = jax.jit(resize.doubled, static_argnames="implementation")(jnp.float32(x), implementation=implementation)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, by_hand(x), atol=2e-6 * max(1.0, np.abs(x).max()))
    narrow = resize.doubled(jnp.float32(x).astype("bfloat16"), implementation=implementation)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(narrow), by_hand(x), atol=3e-2 * max(1.0, np.abs(x).max()))


def test_clear_errors():
    with pytest.raises(ValueError, match=r"found shape \(3, 4\) of float32"):
        resize.doubled(jnp.zeros((3, 4), jnp.float32))
    with pytest.raises(ValueError, match="floating-point numbers .* of int32"):
        resize.doubled(jnp.zeros((1, 2, 2, 1), jnp.int32))
    with pytest.raises(ValueError, match="Unknown implementation 'cubic'. Known: xla, blend"):
        resize.doubled(jnp.zeros((1, 2, 2, 1), jnp.float32), implementation="cubic")
