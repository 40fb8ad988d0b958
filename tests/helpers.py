"""What several test files make."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mpjax.program import Batches, Model, from_linen


def linen(module: nn.Module, *shape: int) -> tuple[Model, Batches]:
    """The module with random weights, and two batches of normal numbers of this shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    batches = [(jax.random.normal(key, shape, jnp.float32),) for key in keys[1:]]
    return from_linen(module, module.init(keys[0], *batches[0]), *batches[0]), batches
