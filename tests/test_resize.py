"""Doubling against jax.image.resize and against a loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpjax import resize


def by_hand(x):
    for axis in (1, 2):
        size = x.shape[axis]
        centres = (np.arange(2 * size) + 0.5) / 2 - 0.5
        low = np.floor(centres).astype(int)
        share = (centres - low).reshape([-1 if each == axis else 1 for each in range(4)])
        at = [np.take(x, np.clip(low + step, 0, size - 1), axis=axis) for step in (0, 1)]
        x = (1 - share) * at[0] + share * at[1]
    return x


@given(
    shape=st.tuples(*(st.integers(1, 5) for _ in range(4))), seed=st.integers(0, 99), way=st.sampled_from(resize.WAYS)
)
def test_any_size_equals_a_plain_loop(shape, seed, way):
    x = np.random.default_rng(seed).normal(size=shape)
    found = jax.jit(resize.doubled, static_argnames="way")(jnp.float32(x), way=way)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, by_hand(x), atol=2e-6 * max(1.0, np.abs(x).max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", resize.WAYS)
def test_other_dtypes_stay(dtype, way):
    x = jnp.arange(24, dtype=jnp.float32).reshape(1, 3, 4, 2).astype(dtype)
    found = resize.doubled(x, way=way)
    assert found.dtype == jnp.dtype(dtype) and found.shape == (1, 6, 8, 2)
    np.testing.assert_allclose(np.float64(found), by_hand(np.float64(x)), rtol=2e-2)


def test_clear_errors():
    with pytest.raises(ValueError, match="found shape"):
        resize.doubled(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="Unknown way 'cubic'. Known: xla, blend"):
        resize.doubled(jnp.zeros((1, 2, 2, 1)), way="cubic")
