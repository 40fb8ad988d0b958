"""A .tflite file as a Flax linen module with ordinary layers, and its parameters.

``load_tflite(path)`` reads the operators (``tflite_graph``) and interprets them in execution order.
Convolutions and dense layers are ``nn.Conv`` and ``nn.Dense`` submodules named by kind and running number
(``conv_00``, ``depthwise_01`` …), the same names whatever outputs are kept; each is called once.  Depthwise
convolutions go through ``mpjax.depthwise``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.models.tflite_graph import LAYERS, Graph, Op, TFLiteError, read
from mpjax.depthwise import depthwise_conv
from mpjax.resize import doubled

__all__ = ["Imported", "TFLiteError", "TFLiteModule", "load_tflite"]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An imported model.

    Attributes:
        module: ``module.apply(variables, x)`` with x (N, H, W, C) returns a dict: output name -> (N, …).
        variables: ``{"params": …}``, float32, in Flax's usual layout.
        input_shape: (1, H, W, C); any N is accepted.
        outputs: names of the outputs, in the order asked for.
        layers: names of the convolutions and dense layers, in execution order.
    """

    module: "TFLiteModule"
    variables: Mapping[str, Any]
    input_shape: tuple[int, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def load_tflite(
    path: Path | str, *, outputs: tuple[str, ...] | None = None, dtype: Any = None, plain: bool = False
) -> Imported:
    """Import a .tflite file.

    Args:
        path: the file.
        outputs: names of the outputs to keep; operators that they do not need are dropped.  None keeps all.
        dtype: handed to every layer, Flax's own way of computing in another dtype; None computes in float32.
        plain: lax's grouped convolutions and `jax.image.resize`, in place of mpjax's own, which are faster on a CPU.

    Raises:
        TFLiteError: a foreign or damaged file, an unknown output, or operators that are not supported (all
            listed).
        FileNotFoundError: no such file.
    """
    graph, weights = read(path, outputs=outputs)
    params = {name: {key: jnp.asarray(value) for key, value in group.items()} for name, group in weights.items()}
    return Imported(
        module=TFLiteModule(graph=graph, dtype=dtype, plain=plain),
        variables={"params": params},
        input_shape=graph.input_shape,
        outputs=tuple(name for name, _ in graph.outputs),
        layers=tuple(op.name for op in graph.ops if op.kind in LAYERS),
    )


class PReLU(nn.Module):
    """x where x ≥ 0, else slope · x, with one slope per channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],), jnp.float32)
        slope = slope.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return jnp.where(x >= 0, x, slope * x)


class TFLiteModule(nn.Module):
    """The operators of a graph, one after the other."""

    graph: Graph
    dtype: Any = None
    plain: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """x (N, H, W, C) -> output name -> (N, …)."""
        if x.shape[1:] != self.graph.input_shape[1:] or x.ndim != len(self.graph.input_shape):
            expected = ("N", *self.graph.input_shape[1:])
            raise ValueError(f"input of shape {x.shape}, expected ({', '.join(map(str, expected))})")
        values = {self.graph.input: x}
        for op in self.graph.ops:
            inputs = [values[index] for index in op.inputs]
            with_weights = op.kind in (*LAYERS, "prelu")
            out = self._layer(op, inputs[0]) if with_weights else compute(op, inputs, plain=self.plain)
            values[op.output] = ACTIVATIONS[op.activation](out)
        return {name: values[index] for name, index in self.graph.outputs}

    def _layer(self, op: Op, x: jax.Array) -> jax.Array:
        """An operator with weights; the compact method that calls this adopts it."""
        if op.kind == "prelu":
            return PReLU(name=op.name)(x)
        if op.kind == "dense":
            return nn.Dense(op.features, use_bias=op.use_bias, dtype=self.dtype, name=op.name)(x)
        depthwise = op.kind == "depthwise"
        return nn.Conv(
            op.features,
            op.window,
            strides=op.strides,
            padding=op.padding,
            kernel_dilation=op.dilation,
            feature_group_count=x.shape[-1] if depthwise else 1,
            use_bias=op.use_bias,
            conv_general_dilated=depthwise_conv if depthwise and not self.plain else None,
            dtype=self.dtype,
            name=op.name,
        )(x)


ACTIVATIONS = {"none": lambda x: x, "relu": nn.relu, "relu6": nn.relu6}


def compute(op: Op, inputs: Sequence[jax.Array], *, plain: bool = False) -> jax.Array:
    """One operator without weights, and without its fused activation (`ACTIVATIONS`)."""
    x = inputs[0]
    match op.kind:
        case "add":
            return inputs[0] + inputs[1]
        case "mul":
            return inputs[0] * inputs[1]
        case "concat":
            return jnp.concatenate(inputs, axis=op.axis)
        case "pad":
            return jnp.pad(x, [pair for pair in op.padding if not isinstance(pair, str)])
        case "max_pool":
            return nn.max_pool(x, op.window, op.strides, op.padding)
        case "avg_pool":
            return _mean_pool(x, op)
        case "resize":
            return doubled(x, way="xla" if plain else "blend")
        case "reshape":
            return x.reshape(x.shape[0], *op.shape)
        case "sigmoid":
            return nn.sigmoid(x)
        case "relu" | "relu6":
            return ACTIVATIONS[op.kind](x)
    raise TFLiteError(f"operator {op.name}: no rule for kind {op.kind!r}")


def _mean_pool(x: jax.Array, op: Op) -> jax.Array:
    """Means over windows, padding not counted (``nn.avg_pool`` would count in float64 where x64 is on)."""
    window, strides = (1, *op.window, 1), (1, *op.strides, 1)

    def sums(value: jax.Array) -> jax.Array:
        zero = np.zeros((), value.dtype)
        return lax.reduce_window(value, zero, lax.add, window, strides, op.padding)

    return sums(x) / sums(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
