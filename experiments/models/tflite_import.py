"""A .tflite file as a Flax linen module with ordinary layers, and its parameters.

``load_tflite(path)`` reads the operators (``tflite_graph``) and interprets them in execution order.
Convolutions and dense layers are ``nn.Conv`` and ``nn.Dense`` submodules named by kind and running number
(``conv_00``, ``depthwise_01`` …), the same names whatever outputs are kept; each is called once.  Slopes and operands that the
file stores are parameters, too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.models.tflite_graph import LAYERS, Graph, Op, TFLiteError, read
from mpjax.kernels.resize import doubled

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
        outputs: names of the outputs to keep, or of any other value that an operator computes; operators that they do not need
            are dropped.  None keeps all outputs.
        dtype: handed to every layer, Flax's own way of computing in another dtype; None computes in float32.
        plain: `jax.image.resize` for twice the size, in place of mpjax's own, which is faster on a CPU.

    Raises:
        TFLiteError: a foreign or damaged file, an unknown output, or operators that are not supported (all kinds listed).
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


class Constant(nn.Module):
    """An operand that the file stores."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("constant", nn.initializers.zeros, self.shape, jnp.float32)


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
            if op.stored is not None:
                inputs.insert(op.stored, Constant(op.shape, name=op.name)().astype(inputs[0].dtype))
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
        return nn.Conv(
            op.features,
            op.window,
            strides=op.strides,
            padding=op.padding,
            kernel_dilation=op.dilation,
            feature_group_count=x.shape[-1] if op.kind == "depthwise" else 1,
            use_bias=op.use_bias,
            dtype=self.dtype,
            name=op.name,
        )(x)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "relu_n1_to_1": lambda x: jnp.clip(x, -1, 1),
    "elu": nn.elu,
    "hard_swish": nn.hard_swish,
    "exp": jnp.exp,
    "log": jnp.log,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "square": jnp.square,
    "abs": jnp.abs,
    "neg": jnp.negative,
}
ACTIVATIONS = {"none": lambda x: x, **{name: _FUNCTIONS[name] for name in ("relu", "relu6", "relu_n1_to_1")}}
_OF_TWO: dict[str, Callable[..., Any]] = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": jnp.divide,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
}
_REDUCTIONS: dict[str, Callable[..., Any]] = {"mean": jnp.mean, "sum": jnp.sum, "reduce_max": jnp.max}


def compute(op: Op, inputs: Sequence[jax.Array], *, plain: bool = False) -> jax.Array:
    """One operator without weights, its stored operand among the inputs, and without its fused activation (`ACTIVATIONS`)."""
    x = inputs[0]
    if op.kind in _FUNCTIONS:
        return _FUNCTIONS[op.kind](x)
    if op.kind in _OF_TWO:
        return _OF_TWO[op.kind](inputs[0], inputs[1])
    if op.kind in _REDUCTIONS:
        return _REDUCTIONS[op.kind](x, axis=op.axes).reshape(x.shape[0], *op.shape)
    match op.kind:
        case "concat":
            return jnp.concatenate(inputs, axis=op.axis)
        case "pad":
            return jnp.pad(x, [pair for pair in op.padding if not isinstance(pair, str)])
        case "max_pool":
            return nn.max_pool(x, op.window, op.strides, op.padding)
        case "avg_pool":
            return _mean_pool(x, op)
        case "resize":
            return _resized(x, op.places) if op.places else doubled(x, implementation="xla" if plain else "blend")
        case "reshape":
            return x.reshape(x.shape[0], *op.shape)
        case "transpose":
            return x.transpose(op.axes)
        case "slice":
            return x[:, *(slice(*cut) for cut in op.cuts)].reshape(x.shape[0], *op.shape)
        case "depth_to_space":
            count, height, width, _ = x.shape
            squares = x.reshape(count, height, width, op.block, op.block, -1).transpose(0, 1, 3, 2, 4, 5)
            return squares.reshape(count, height * op.block, width * op.block, -1)
        case "space_to_depth":
            count, height, width = x.shape[0], x.shape[1] // op.block, x.shape[2] // op.block
            squares = x.reshape(count, height, op.block, width, op.block, -1).transpose(0, 1, 3, 2, 4, 5)
            return squares.reshape(count, height, width, -1)
        case "softmax":
            return nn.softmax(op.number * x, axis=-1)
        case "leaky_relu":
            return nn.leaky_relu(x, op.number)
    raise TFLiteError(f"operator {op.name}: no rule for kind {op.kind!r}")


def _resized(x: jax.Array, places: tuple[tuple[float, ...], ...]) -> jax.Array:
    """Rows, then columns, blended of the two beside each place."""
    for axis, each in enumerate(places, start=1):
        below = np.floor(each).astype(np.int32)
        share = np.asarray(each) - below
        lower = jnp.take(x, below, axis=axis)
        if share.any():
            upper = jnp.take(x, np.ceil(each).astype(np.int32), axis=axis)
            along = [-1 if number == axis else 1 for number in range(x.ndim)]
            lower = lower + (upper - lower) * share.astype(x.dtype).reshape(along)
        x = lower
    return x


def _mean_pool(x: jax.Array, op: Op) -> jax.Array:
    """Means over windows, padding not counted (``nn.avg_pool`` would count in float64 where x64 is on)."""
    window, strides = (1, *op.window, 1), (1, *op.strides, 1)

    def sums(value: jax.Array) -> jax.Array:
        zero = np.zeros((), value.dtype)
        return lax.reduce_window(value, zero, lax.add, window, strides, op.padding)

    return sums(x) / sums(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
