"""A transformer encoder stack as BERT has it, with random weights: what a text model's layers cost.

Post-norm blocks of self-attention and an MLP; six ``nn.Dense`` each, named ``block_00/query``, ``block_00/key``,
``block_00/value``, ``block_00/out``, ``block_00/up`` and ``block_00/down``.  Queries times keys and attention times
values are products of two activations: no layers, but an assignment may name them (``block_00/scores``, ``block_00/values``).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ENCODERS = {"encoder_6x384": (6, 384, 12), "encoder_12x768": (12, 768, 12)}  # layers, width, heads

_SPREAD = 0.1  # standard deviation of random biases, and of norm scales around 1


class Block(nn.Module):
    """x + attention, normed; then + MLP (width, 4 width, width), normed."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, width) -> (N, T, width)."""
        width = x.shape[-1]
        attended = self._dense("out", width)(self._attention(x))
        x = nn.LayerNorm(dtype=self.dtype, name="attention_norm")(x + attended)
        hidden = nn.gelu(self._dense("up", 4 * width)(x), approximate=False)
        return nn.LayerNorm(dtype=self.dtype, name="mlp_norm")(x + self._dense("down", width)(hidden))

    def _attention(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1] // self.heads
        query, key, value = (
            self._dense(name, x.shape[-1])(x).reshape(*x.shape[:2], self.heads, size).transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        # Heads before tokens: on a CPU faster than an einsum that leaves them behind, in float32 as in bfloat16.
        attention = nn.softmax(query @ key.swapaxes(2, 3) * size**-0.5, axis=-1)
        return (attention @ value).transpose(0, 2, 1, 3).reshape(x.shape)

    def _dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, name=name)


class EncoderStack(nn.Module):
    """`layers` blocks, one after the other.

    `dtype` is handed to every Dense and LayerNorm, Flax's plain way to lower precision; parameters stay float32.
    """

    layers: int = 6
    width: int = 384
    heads: int = 12
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Embeddings (N, T, width) -> (N, T, width)."""
        for number in range(self.layers):
            x = Block(heads=self.heads, dtype=self.dtype, name=f"block_{number:02}")(x)
        return x


def random_encoder(
    layers: int, width: int, heads: int, *, tokens: int, batch: int, seed: int = 0
) -> tuple[EncoderStack, Mapping[str, Any], jax.Array]:
    """A stack, variables and inputs (batch, tokens, width), float32; of tokens and batch the weights do not depend.

    Kernels as Flax initialises them; biases are normal around 0 and norm scales around 1, so that each of them matters.
    """
    module = EncoderStack(layers=layers, width=width, heads=heads)
    kernels, vectors, data = jax.random.split(jax.random.key(seed), 3)
    params = module.init(kernels, jnp.zeros((1, 1, width), jnp.float32))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(vectors, len(leaves))
    spread = [
        leaf + _SPREAD * jax.random.normal(key, leaf.shape, leaf.dtype) if leaf.ndim == 1 else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    inputs = jax.random.normal(data, (batch, tokens, width), jnp.float32)
    return module, {"params": jax.tree.unflatten(tree, spread)}, inputs
