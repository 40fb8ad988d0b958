"""A .tflite file as a Flax linen module with ordinary layers, and its parameters.

Convolutions are ``nn.Conv`` submodules, named by kind and running number (``conv_00``, ``depthwise_01`` …), with the same names
whatever outputs are asked for; each is called once. Slopes of a PReLU are parameters, too. The operators of MediaPipe's pose,
iris and face models can be imported; a further one is a case in `_read` and in `compute`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tflite

from experiments.lib import assets
from experiments.models.resize import doubled
from mpjax.program import Model, from_linen

LAYERS = {"CONV_2D": "conv", "DEPTHWISE_CONV_2D": "depthwise"}
"""Operators that multiply their input with weights, and how their names begin; they share one running number."""
ACTIVATIONS: dict[str, Callable[[Any], jax.Array]] = {"NONE": lambda x: x, "RELU": nn.relu, "RELU6": nn.relu6}


class TFLiteError(ValueError):
    """The file cannot be imported; the message says what it has and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator, hashable and without weights.

    Attributes:
        kind: as the schema has it (CONV_2D).
        name: unique: prefix and running number in the whole file, so that pruning renames nothing.
        inputs: tensor indices of the values read, without weights.
        output: tensor index of the value written.
        activation: fused activation, a key of `ACTIVATIONS`.
        settings: arguments of nn.Conv, or keyword arguments of what `compute` calls.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    activation: str = "NONE"
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The operators that the outputs need, in execution order; hashable, without weights.

    Attributes:
        input: tensor index of the one input.
        input_shape: (1, H, W, C); the leading axis is free.
        outputs: (name, tensor index) pairs.
    """

    ops: tuple[Op, ...]
    input: int
    input_shape: tuple[int, ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An imported model.

    Attributes:
        module: ``module.apply(variables, x)`` with x (N, H, W, C) returns a dict: output name -> (N, …).
        variables: ``{"params": …}``, float32, in Flax's usual layout.
        input_shape: (1, H, W, C); any N is accepted.
        outputs: names of the outputs, in the order asked for.
        layers: names of the convolutions, in execution order.
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
        outputs: names of the outputs to keep; operators that they do not need are dropped. None keeps all.
        dtype: handed to every layer, Flax's plain way of computing in another dtype; None computes in float32.
        plain: `jax.image.resize` for twice the size, in place of mpjax's, which is faster on a CPU.

    Raises:
        TFLiteError: an unknown output, or an operator that cannot be imported.
    """
    file = _File(path)
    indices = {file.name(index): index for index in file.graph.OutputsAsNumpy().tolist()}
    for name in outputs or ():
        if name not in indices:
            raise TFLiteError(f"{path}: no output {name!r}. Known: {', '.join(indices)}.")
    wanted = {name: indices[name] for name in outputs or indices}
    needed, operators = set(wanted.values()), []
    for operator in reversed(file.operators()):
        if operator.output in needed and operator.kind != "DEQUANTIZE":
            operators.append(operator)
            needed |= {*operator.inputs}
    pairs = [_read(operator) for operator in reversed(operators)]
    source = int(file.graph.Inputs(0))
    ops, shape = tuple(op for op, _ in pairs), file.shape(source)
    return Imported(
        module=TFLiteModule(Graph(ops=ops, input=source, input_shape=shape, outputs=(*wanted.items(),)), dtype, plain),
        variables={"params": {op.name: jax.tree.map(jnp.asarray, weights) for op, weights in pairs if weights}},
        input_shape=shape,
        outputs=tuple(wanted),
        layers=tuple(op.name for op in ops if op.kind in LAYERS),
    )


def fetched(name: str, outputs: tuple[str, ...], size: int) -> Model:
    """A published model, fetched, as mpjax's, with some of its outputs, for crops of `size` pixels.

    Raises:
        experiments.lib.assets.AssetError: it could not be fetched.
    """
    graph = load_tflite(assets.fetch(name), outputs=outputs)
    return from_linen(graph.module, graph.variables, jnp.zeros((1, size, size, 3), jnp.float32))


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
        if x.shape[1:] != self.graph.input_shape[1:]:
            raise ValueError(f"input of shape {x.shape}, expected (N, {str(self.graph.input_shape[1:])[1:]}")
        values = {self.graph.input: x}
        for op in self.graph.ops:
            inputs = [values[index] for index in op.inputs]
            if op.kind == "PRELU":
                out = PReLU(name=op.name)(*inputs)
            elif op.kind in LAYERS:
                out = nn.Conv(**dict(op.settings), dtype=self.dtype, name=op.name)(*inputs)
            else:
                out = compute(op, inputs, plain=self.plain)
            values[op.output] = ACTIVATIONS[op.activation](out)
        return {name: values[index] for name, index in self.graph.outputs}


def compute(op: Op, inputs: Sequence[jax.Array], *, plain: bool = False) -> jax.Array:
    """One operator without weights and without its fused activation; `plain`: `jax.image.resize` for twice the size."""
    x, settings = inputs[0], dict(op.settings)
    match op.kind:
        case "ADD":
            return x + inputs[1]
        case "PAD":
            return jnp.pad(x, settings["pads"])
        case "MAX_POOL_2D":
            return nn.max_pool(x, **settings)
        case "RESHAPE":
            return x.reshape(x.shape[0], *settings["shape"])
        case "RESIZE_BILINEAR":
            return doubled(x, implementation="xla" if plain else "blend")
        case _:
            return nn.sigmoid(x)


# --- the file ---------------------------------------------------------------------------------------------------------


def _names(enum: type) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


_KINDS, _OPTIONS = _names(tflite.BuiltinOperator), _names(tflite.BuiltinOptions)
_DTYPES = {tflite.TensorType.FLOAT32: np.float32, tflite.TensorType.FLOAT16: np.float16}


class _File:
    """A model with one subgraph and one input; constants in float16 behind a DEQUANTIZE are read where they are stored."""

    def __init__(self, path: Path | str) -> None:
        self.model = tflite.Model.GetRootAsModel(Path(path).read_bytes(), 0)
        self.graph = self.model.Subgraphs(0)
        self._stored: dict[int, int] = {}

    def operators(self) -> "list[_Operator]":
        """All of them, in execution order."""
        made, numbers = [], Counter[str]()
        for place in range(self.graph.OperatorsLength()):
            table = self.graph.Operators(place)
            code = self.model.OperatorCodes(table.OpcodeIndex())
            kind = _KINDS[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            sequence = "layer" if kind in LAYERS else kind.lower()
            name = f"{LAYERS.get(kind, sequence)}_{numbers[sequence]:02}"
            numbers[sequence] += 1
            made.append(_Operator(file=self, table=table, kind=kind, name=name))
            if kind == "DEQUANTIZE":
                self._stored[made[-1].output] = made[-1].inputs[0]
        return made

    def name(self, index: int) -> str:
        return self.graph.Tensors(index).Name().decode()

    def shape(self, index: int) -> tuple[int, ...]:
        return tuple(self.graph.Tensors(index).ShapeAsNumpy().tolist())

    def constant(self, index: int, dtype: Any = None) -> np.ndarray:
        """The stored value of a tensor, floats as float32."""
        index = self._stored.get(index, index)
        tensor = self.graph.Tensors(index)
        data = self.model.Buffers(tensor.Buffer()).DataAsNumpy().tobytes()
        values = np.frombuffer(data, dtype or _DTYPES[tensor.Type()]).reshape(self.shape(index))
        return values if dtype else values.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class _Operator:
    """One operator as the file has it."""

    file: _File
    table: Any
    kind: str
    name: str

    @property
    def inputs(self) -> list[int]:
        return self.table.InputsAsNumpy().tolist()

    @property
    def output(self) -> int:
        return int(self.table.Outputs(0))

    @property
    def options(self) -> Any:
        """The operator's table of the schema."""
        options = getattr(tflite, _OPTIONS[self.table.BuiltinOptionsType()])()
        options.Init(self.table.BuiltinOptions().Bytes, self.table.BuiltinOptions().Pos)
        return options


def _read(operator: _Operator) -> tuple[Op, dict[str, np.ndarray]]:
    """An operator, and its weights in Flax's layout."""
    file, kind, inputs = operator.file, operator.kind, operator.inputs
    before, after = file.shape(inputs[0]), file.shape(operator.output)
    settings, weights, operands = dict[str, Any](), dict[str, np.ndarray](), 1
    match kind:
        case "CONV_2D" | "DEPTHWISE_CONV_2D":
            depthwise = kind == "DEPTHWISE_CONV_2D"
            kernel = file.constant(inputs[1]).transpose((1, 2, 0, 3) if depthwise else (1, 2, 3, 0))
            weights = {"kernel": np.ascontiguousarray(kernel), "bias": file.constant(inputs[2])}
            settings = {
                "features": kernel.shape[3],
                "kernel_size": kernel.shape[:2],
                **_window(operator.options),
                "kernel_dilation": (operator.options.DilationHFactor(), operator.options.DilationWFactor()),
                "feature_group_count": before[3] if depthwise else 1,
            }
        case "PRELU":
            weights = {"slope": file.constant(inputs[1]).reshape(before[-1])}
        case "MAX_POOL_2D":
            window = (operator.options.FilterHeight(), operator.options.FilterWidth())
            settings = {"window_shape": window, **_window(operator.options)}
        case "PAD":
            settings = {"pads": tuple(map(tuple, file.constant(inputs[1], np.int32).tolist()))}
        case "RESHAPE":
            settings = {"shape": after[1:]}
        case "RESIZE_BILINEAR":
            half = operator.options.HalfPixelCenters() and not operator.options.AlignCorners()
            if not half or after != (before[0], 2 * before[1], 2 * before[2], before[3]):
                raise TFLiteError(f"{operator.name}: {before} to {after}, expected twice the size, half-pixel centres.")
        case "ADD":
            operands = 2
        case "LOGISTIC":
            pass
        case _:
            raise TFLiteError(f"{operator.name}: this operator cannot be imported. Add it to {__name__}.")
    activation = "NONE"
    if kind in LAYERS or kind in ("ADD", "MAX_POOL_2D"):
        activation = _names(tflite.ActivationFunctionType)[operator.options.FusedActivationFunction()]
        if activation not in ACTIVATIONS:
            raise TFLiteError(f"{operator.name}: activation {activation}, expected one of {', '.join(ACTIVATIONS)}.")
    op = Op(
        kind=kind,
        name=operator.name,
        inputs=tuple(inputs[:operands]),
        output=operator.output,
        activation=activation,
        settings=tuple(settings.items()),
    )
    return op, weights


def _window(options: Any) -> dict[str, Any]:
    padding = {tflite.Padding.SAME: "SAME", tflite.Padding.VALID: "VALID"}[options.Padding()]
    return {"strides": (options.StrideH(), options.StrideW()), "padding": padding}
