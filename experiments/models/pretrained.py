"""What pretrained NNX models share: their weights put in place, another dtype of their layers, and Flax's own jitted call."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class TextError(ValueError):
    """A model, tokenizer or text that cannot be used; the message says what was found, what was expected, what to do."""


def filled(
    make: Callable[[], Any], tensors: Mapping[str, np.ndarray], source: Callable[[str], str]
) -> tuple[Any, list[str]]:
    """The module that `make` makes, with weights of a file; nothing random is computed.

    Args:
        make: the module, its parameters float32.
        tensors: by the file's names; kernels are (outputs, inputs) there and (inputs, outputs) in Flax.
        source: slash path of a parameter -> its name in the file.

    Returns:
        The module, and what is wrong with the weights: those that are missing, then those of another shape or dtype. Where
        something is, the module is not to be used.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    pure: dict[Any, Any] = {}
    missing, wrong = [], []
    for path, leaf in nnx.to_flat_state(state):
        name = source("/".join(map(str, path)))
        tensor = tensors.get(name)
        if tensor is None:
            missing.append(f"{name} is missing")
            continue
        value = np.ascontiguousarray(tensor.T) if path[-1] == "kernel" else tensor
        if value.shape != leaf.shape or value.dtype != np.float32:
            wrong.append(f"{name} has shape {value.shape} and dtype {value.dtype}, expected {leaf.shape} float32")
            continue
        inside = pure
        for each in path[:-1]:
            inside = inside.setdefault(each, {})
        inside[path[-1]] = jnp.asarray(value)
    if not (missing or wrong):
        nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graphdef, state), [*missing, *wrong]


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
