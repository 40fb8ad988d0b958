"""What pretrained NNX models share: their weights, another dtype of their layers, and Flax's own jitted call."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict


def filled(make: Callable[[], Any], tensors: Mapping[str, np.ndarray], source: Callable[[str], str]) -> Any:
    """The module that `make` makes, with weights of a file as float32; nothing random is computed.

    Args:
        make: the module.
        tensors: by the file's names; kernels are (outputs, inputs) there and (inputs, outputs) in Flax.
        source: slash path of a parameter -> its name in the file.

    Raises:
        ValueError: the file's tensors are not those of the module.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    parameters = {path: (source("/".join(map(str, path))), leaf.shape) for path, leaf in nnx.to_flat_state(state)}
    if differing := tensors.keys() ^ {name for name, _ in parameters.values()}:
        raise ValueError(f"Only the file or only the model has the weights {', '.join(sorted(differing)[:4])}.")
    values = {}
    for path, (name, shape) in parameters.items():
        tensor = np.ascontiguousarray(tensors[name].T) if path[-1] == "kernel" else tensors[name]
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tensor.shape}, expected {shape}.")
        values[path] = jnp.asarray(tensor, jnp.float32)
    nnx.replace_by_pure_dict(state, unflatten_dict(values))
    return nnx.merge(graphdef, state)


def in_dtype(module: Any, dtype: Any) -> Any:
    """The same weights, `dtype` handed to every layer; of a module made of its `shape`."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: type(module)(module.shape, dtype=dtype, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.state(module))


def jitted(module: nnx.Module) -> Callable[..., Any]:
    """The module as a Flax user runs it: jitted, its params as arguments."""
    graphdef, state = nnx.split(module)
    placed = jax.device_put(state)
    run = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    return lambda *inputs: run(placed, *inputs)
