"""MediaPipe's .tflite models, fetched, as mpjax models."""

import jax.numpy as jnp

from experiments.lib import assets
from experiments.models.tflite_import import load_tflite
from mpjax.program import Model, from_linen


def imported(name: str, outputs: tuple[str, ...], size: int) -> Model:
    """A fetched model with some of its outputs, for crops of `size` pixels.

    Raises:
        experiments.lib.assets.AssetError: it could not be fetched.
    """
    graph = load_tflite(assets.fetch(name), outputs=outputs)
    return from_linen(graph.module, graph.variables, jnp.zeros((1, size, size, 3), jnp.float32))
