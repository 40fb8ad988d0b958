"""The operators of a .tflite file that can be imported: what is read of each, and what it computes.

`OPERATORS` has one row for each kind. A further operator is a further row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tflite
from jax import lax

from experiments.models.resize import doubled
from experiments.models.tflite_file import Node, Unsupported

Weights = dict[str, np.ndarray]
"""Parameter name -> float32 array in Flax's layout."""

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
"""Operators that multiply their input with weights; in names they share one running number."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator, hashable and without weights.

    Attributes:
        kind: a key of `OPERATORS`.
        name: unique and stable: prefix and running number in the whole file, so that pruning renames nothing.
        inputs: tensor indices of the values read, without weights.
        output: tensor index of the value written.
        activation: fused activation, a key of `ACTIVATIONS`.
        stored: place and shape of the operand that the file stores, which is a parameter and not in ``inputs``.
        settings: arguments of nn.Conv and nn.Dense, or keyword arguments of ``Operator.run``.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    activation: str = "none"
    stored: tuple[int, tuple[int, ...]] | None = None
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One kind of operator.

    Attributes:
        run: what it computes, of its operands and settings; None for operators with weights.
        settings: read from the file; raises `Unsupported`.
        weights: read from the file, too.
        operands: how many of the inputs are operands of `run`; None: all.
        binary: one of the operands may be stored in the file.
        prefix: of the names; the kind in small letters where empty.
    """

    run: Callable[..., jax.Array] | None = None
    settings: Callable[[Node], dict[str, Any]] = lambda node: {}
    weights: Callable[[Node], Weights] = lambda node: {}
    operands: int | None = 1
    binary: bool = False
    prefix: str = ""


def read(node: Node, name: str) -> tuple[Op, Weights]:
    """An operator of a kind in `OPERATORS`, and its weights.

    Raises:
        Unsupported: says why.
    """
    operator, file = OPERATORS[node.kind], node.file
    if (kind := file.type(node.outputs[0])) != "FLOAT32":
        raise Unsupported(f"a result of type {kind}, expected FLOAT32")
    inputs, weights, stored = list(node.inputs[: operator.operands]), operator.weights(node), None
    constants = [place for place, index in enumerate(inputs) if file.is_constant(index)]
    if len(constants) > operator.binary:
        raise Unsupported(f"{len(constants)} constant operand(s)")
    if constants:
        value = file.constant(inputs.pop(constants[0]))
        value = value.reshape((1,) * (len(node.result) - value.ndim) + value.shape)
        if value.shape[:1] != (1,):
            raise Unsupported(f"a constant of shape {value.shape}, expected 1 along the leading axis")
        stored, weights = (constants[0], value.shape), {"constant": value}
    if operator.binary and any(len(file.shape(index)) != len(node.result) for index in inputs):
        raise Unsupported("operands of different rank")
    made = Op(
        kind=node.kind,
        name=name,
        inputs=tuple(inputs),
        output=node.outputs[0],
        activation=_activation(node),
        stored=stored,
        settings=tuple(operator.settings(node).items()),
    )
    return made, weights


def compute(op: Op, inputs: Sequence[jax.Array], *, plain: bool = False) -> jax.Array:
    """One operator without weights, its stored operand among the inputs, and without its fused activation (`ACTIVATIONS`).

    `plain`: `jax.image.resize` for twice the size.
    """
    settings = dict(op.settings)
    if settings.get("places") == ():
        return doubled(inputs[0], implementation="xla" if plain else "blend")
    run = OPERATORS[op.kind].run
    assert run is not None
    return run(*inputs, **settings)


def _clipped(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -1, 1)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda x: x,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "relu_n1_to_1": _clipped,
}


def _activation(node: Node) -> str:
    if not node.has_options or not hasattr(node.options, "FusedActivationFunction"):
        return "none"
    number = node.options.FusedActivationFunction()
    for name in ACTIVATIONS:
        if getattr(tflite.ActivationFunctionType, name.upper()) == number:
            return name
    raise Unsupported(f"fused activation number {number}, expected one of {', '.join(ACTIVATIONS)}")


# --- what is read -----------------------------------------------------------------------------------------------------


def _layer(*order: int) -> Callable[[Node], Weights]:
    """Kernel, its axes in that order, and bias."""

    def weights(node: Node) -> Weights:
        kernel = {"kernel": np.ascontiguousarray(node.constant(1).transpose(order))}
        return kernel | ({"bias": node.constant(2)} if _has_bias(node) else {})

    return weights


def _has_bias(node: Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] >= 0


def _window(node: Node) -> dict[str, Any]:
    options = node.options
    padding = {tflite.Padding.SAME: "SAME", tflite.Padding.VALID: "VALID"}[options.Padding()]
    return {"strides": (options.StrideH(), options.StrideW()), "padding": padding}


def _convolution(node: Node, *, depthwise: bool = False) -> dict[str, Any]:
    outputs, height, width, inputs = node.constant(1).shape
    groups = node.source[3] if depthwise else 1
    features, inputs = (inputs, outputs) if depthwise else (outputs, inputs)
    if inputs * groups != node.source[3]:
        raise Unsupported(f"weights with {inputs} input channels per group, expected {node.source[3] // groups}")
    return {
        "features": features,
        "kernel_size": (height, width),
        **_window(node),
        "kernel_dilation": (node.options.DilationHFactor(), node.options.DilationWFactor()),
        "feature_group_count": groups,
        "use_bias": _has_bias(node),
    }


def _dense(node: Node) -> dict[str, Any]:
    if node.options.WeightsFormat() != tflite.FullyConnectedOptionsWeightsFormat.DEFAULT:
        raise Unsupported("shuffled weights")
    features, inputs = node.constant(1).shape
    if node.source != (1, inputs):
        raise Unsupported(f"an input of shape {node.source}, expected (1, {inputs})")
    return {"features": features, "use_bias": _has_bias(node)}


def _slopes(node: Node) -> Weights:
    slope = node.constant(1)
    if slope.size != slope.shape[-1]:
        raise Unsupported(f"slopes of shape {slope.shape}, expected one per channel")
    return {"slope": slope.reshape(-1)}


def _pool(node: Node) -> dict[str, Any]:
    return {"window": (node.options.FilterHeight(), node.options.FilterWidth()), **_window(node)}


def _pads(node: Node) -> dict[str, Any]:
    pads = tuple((int(low), int(high)) for low, high in node.constant(1))
    if pads[0] != (0, 0):
        raise Unsupported(f"pads {pads[0]} on the leading axis, expected (0, 0)")
    return {"pads": pads}


def _resize(node: Node) -> dict[str, Any]:
    """For each row and each column of the result, its position in the input; empty: twice the size with half-pixel centres."""
    options, before, after = node.options, node.source, node.result
    corners, half, nearest = bool(options.AlignCorners()), bool(options.HalfPixelCenters()), "NEAREST" in node.kind
    if after == (before[0], 2 * before[1], 2 * before[2], before[3]) and half and not corners and not nearest:
        return {"places": ()}
    return {
        "places": tuple(_places(*sizes, corners, half, nearest) for sizes in zip(before[1:3], after[1:3], strict=True))
    }


def _places(before: int, after: int, corners: bool, half: bool, nearest: bool) -> tuple[float, ...]:
    """Positions of `after` values in an axis of `before`, as TensorFlow Lite computes them, in float32."""
    aligned = corners and after > 1
    scale = np.float32(before - 1) / np.float32(after - 1) if aligned else np.float32(before) / np.float32(after)
    offset = np.float32(0.5 if half else 0.0)
    places = (np.arange(after, dtype=np.float32) + offset) * scale
    if nearest:
        places = np.floor(places + np.float32(0.5)) if corners else np.floor(places)
    else:
        places = places - offset
    return tuple(np.clip(places, 0, before - 1).tolist())


def _shape(node: Node) -> dict[str, Any]:
    before, after = node.source, node.result
    if before[:1] != (1,) or after[:1] != (1,) or min(after) < 1:
        raise Unsupported(f"{before} to {after} mixes the leading axis with others")
    return {"shape": after[1:]}


def _axis(node: Node) -> dict[str, Any]:
    axis = node.options.Axis() % len(node.result)
    if axis == 0:
        raise Unsupported("along the leading axis")
    return {"axis": axis}


def _axes(node: Node) -> dict[str, Any]:
    axes = tuple(sorted({axis % len(node.source) for axis in node.integers(1)}))
    if 0 in axes:
        raise Unsupported("over the leading axis")
    return {"axes": axes, "shape": node.result[1:]}


def _order(node: Node) -> dict[str, Any]:
    axes = tuple(node.integers(1))
    if axes[0] != 0:
        raise Unsupported(f"to the axes {axes}, expected the leading one first")
    return {"axes": axes}


def _slice(node: Node) -> dict[str, Any]:
    ranges = zip(node.integers(1), node.integers(2), strict=True)
    return _cut(node, [(begin, None if size < 0 else begin + size, 1) for begin, size in ranges])


def _strided_slice(node: Node) -> dict[str, Any]:
    options = node.options
    if options.EllipsisMask() or options.NewAxisMask() or options.Offset() or options.ShrinkAxisMask() & 1:
        raise Unsupported("an ellipsis, a new axis, ends as offsets, or without the leading axis")
    cuts: list[tuple[int | None, int | None, int]] = []
    for axis, (begin, end, step) in enumerate(zip(*(node.integers(place) for place in (1, 2, 3)), strict=True)):
        if options.ShrinkAxisMask() >> axis & 1:
            begin %= node.source[axis]
            cuts.append((begin, begin + 1, 1))
        else:
            start = None if options.BeginMask() >> axis & 1 else begin
            cuts.append((start, None if options.EndMask() >> axis & 1 else end, step))
    return _cut(node, cuts)


def _cut(node: Node, cuts: list[tuple[int | None, int | None, int]]) -> dict[str, Any]:
    leading = range(node.source[0])
    if leading[slice(*cuts[0])] != leading:
        raise Unsupported("of the leading axis")
    return {"cuts": tuple(cuts[1:]), "shape": node.result[1:]}


def _beta(node: Node) -> dict[str, Any]:
    if len(node.source) < 2:
        raise Unsupported("over the leading axis")
    return {"beta": node.options.Beta()}


# --- what is computed -------------------------------------------------------------------------------------------------


def _mean_pool(x: jax.Array, window: tuple, strides: tuple, padding: str) -> jax.Array:
    """Means over windows, padding not counted (``nn.avg_pool`` would count in float64 where x64 is on)."""

    def sums(value: jax.Array) -> jax.Array:
        zero = np.zeros((), value.dtype)
        return lax.reduce_window(value, zero, lax.add, (1, *window, 1), (1, *strides, 1), padding)

    return sums(x) / sums(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _resized(x: jax.Array, places: tuple[tuple[float, ...], ...]) -> jax.Array:
    """Rows, then columns, blended of the two beside each position."""
    for axis, positions in enumerate(places, start=1):
        below = np.floor(positions).astype(np.int32)
        share = np.asarray(positions) - below
        lower = jnp.take(x, below, axis=axis)
        if share.any():
            upper = jnp.take(x, np.ceil(positions).astype(np.int32), axis=axis)
            along = [-1 if number == axis else 1 for number in range(x.ndim)]
            lower = lower + (upper - lower) * share.astype(x.dtype).reshape(along)
        x = lower
    return x


def _to_space(x: jax.Array, block: int) -> jax.Array:
    count, height, width, _ = x.shape
    squares = x.reshape(count, height, width, block, block, -1).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(count, height * block, width * block, -1)


def _to_depth(x: jax.Array, block: int) -> jax.Array:
    count, height, width = x.shape[0], x.shape[1] // block, x.shape[2] // block
    squares = x.reshape(count, height, block, width, block, -1).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(count, height, width, -1)


def _reshape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return x.reshape(x.shape[0], *shape)


def _sliced(x: jax.Array, cuts: tuple, shape: tuple[int, ...]) -> jax.Array:
    return _reshape(x[:, *(slice(*cut) for cut in cuts)], shape)


def _reduction(function: Callable[..., jax.Array]) -> Operator:
    return Operator(settings=_axes, run=lambda x, axes, shape: _reshape(function(x, axis=axes), shape))


def _binary(function: Callable[..., jax.Array]) -> Operator:
    return Operator(run=function, operands=2, binary=True)


def _block(node: Node) -> dict[str, Any]:
    return {"block": node.options.BlockSize()}


OPERATORS: dict[str, Operator] = {
    "CONV_2D": Operator(prefix="conv", settings=_convolution, weights=_layer(1, 2, 3, 0)),  # OHWI -> HWIO
    "DEPTHWISE_CONV_2D": Operator(  # 1HWC -> HW1C
        prefix="depthwise", settings=lambda node: _convolution(node, depthwise=True), weights=_layer(1, 2, 0, 3)
    ),
    "FULLY_CONNECTED": Operator(prefix="dense", settings=_dense, weights=_layer(1, 0)),  # OI -> IO
    "PRELU": Operator(weights=_slopes),
    "MAX_POOL_2D": Operator(
        prefix="max_pool", settings=_pool, run=lambda x, **window: nn.max_pool(x, *window.values())
    ),
    "AVERAGE_POOL_2D": Operator(prefix="avg_pool", settings=_pool, run=_mean_pool),
    "PAD": Operator(settings=_pads, run=lambda x, pads: jnp.pad(x, pads)),
    "RESIZE_BILINEAR": Operator(prefix="resize", settings=_resize, run=_resized),
    "RESIZE_NEAREST_NEIGHBOR": Operator(prefix="nearest", settings=_resize, run=_resized),
    **dict.fromkeys(("RESHAPE", "SQUEEZE", "EXPAND_DIMS"), Operator(settings=_shape, run=_reshape)),
    "TRANSPOSE": Operator(settings=_order, run=lambda x, axes: x.transpose(axes)),
    "SLICE": Operator(settings=_slice, run=_sliced),
    "STRIDED_SLICE": Operator(settings=_strided_slice, run=_sliced),
    "CONCATENATION": Operator(
        prefix="concat", settings=_axis, run=lambda *x, axis: jnp.concatenate(x, axis), operands=None
    ),
    "DEPTH_TO_SPACE": Operator(settings=_block, run=_to_space),
    "SPACE_TO_DEPTH": Operator(settings=_block, run=_to_depth),
    "ADD": _binary(jnp.add),
    "SUB": _binary(jnp.subtract),
    "MUL": _binary(jnp.multiply),
    "DIV": _binary(jnp.divide),
    "MAXIMUM": _binary(jnp.maximum),
    "MINIMUM": _binary(jnp.minimum),
    "MEAN": _reduction(jnp.mean),
    "SUM": _reduction(jnp.sum),
    "REDUCE_MAX": _reduction(jnp.max),
    "SOFTMAX": Operator(settings=_beta, run=lambda x, beta: nn.softmax(beta * x, axis=-1)),
    "LEAKY_RELU": Operator(
        settings=lambda node: {"alpha": node.options.Alpha()}, run=lambda x, alpha: nn.leaky_relu(x, alpha)
    ),
    "LOGISTIC": Operator(prefix="sigmoid", run=nn.sigmoid),
    "RELU_N1_TO_1": Operator(run=_clipped),
    **{kind: Operator(run=getattr(nn, kind.lower())) for kind in ("RELU", "RELU6", "ELU", "HARD_SWISH", "TANH")},
    **{kind: Operator(run=getattr(lax, kind.lower())) for kind in "EXP LOG SQRT RSQRT SQUARE ABS NEG".split()},
}
