"""A .tflite file read into a plain list of operators and float32 weights: no jax, no Flax.

Format: the TensorFlow Lite flatbuffer schema, file identifier ``TFL3``, read with the ``tflite`` package.
Convolution weights are OHWI in the file and HWIO here, depthwise weights 1HWC and HW1C, dense weights OI and
IO.  Weights stored as fp16 behind a DEQUANTIZE operator become float32 and the operator disappears.
"""

import difflib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tflite

_IDENTIFIER = b"TFL3"
_KINDS = {value: name for name, value in vars(tflite.BuiltinOperator).items() if isinstance(value, int)}
_TYPES = {value: name for name, value in vars(tflite.TensorType).items() if isinstance(value, int)}
_DTYPES = {"FLOAT32": np.float32, "FLOAT16": np.float16, "INT32": np.int32}
_ACTIVATIONS = {
    tflite.ActivationFunctionType.NONE: "none",
    tflite.ActivationFunctionType.RELU: "relu",
    tflite.ActivationFunctionType.RELU6: "relu6",
}
_PADDINGS = {tflite.Padding.SAME: "SAME", tflite.Padding.VALID: "VALID"}

LAYERS = ("conv", "depthwise", "dense")
"""The kinds of operator that multiply their input with weights: they share one running number."""


class TFLiteError(ValueError):
    """The file cannot be imported; the message says what was found, what was expected, what to do."""


class _Unsupported(Exception):
    """One operator that cannot be imported; collected, so that all are reported at once."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator.  Sizes and steps are (height, width).

    Attributes:
        kind: conv, depthwise, dense, prelu, add, mul, concat, pad, max_pool, avg_pool, resize, reshape,
            sigmoid, relu, relu6.
        name: unique and stable: kind and running number in the whole file, so that pruning renames nothing.
        inputs: tensor indices of the values read, without weights.
        output: tensor index of the value written.
        activation: fused activation: none, relu or relu6.
        strides, dilation, window: of a convolution or pool; ``window`` is the kernel size.
        padding: SAME or VALID of a convolution or pool; (low, high) per axis of a pad.
        features: output channels of a layer.
        use_bias: whether a layer has a bias.
        shape: result of a reshape, without the leading axis.
        axis: of a concat.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    activation: str = "none"
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    window: tuple[int, int] = (1, 1)
    padding: str | tuple[tuple[int, int], ...] = "VALID"
    features: int = 0
    use_bias: bool = False
    shape: tuple[int, ...] = ()
    axis: int = 0


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The operators in execution order; hashable, without weights.

    Attributes:
        ops: only what the outputs need.
        input: tensor index of the one input.
        input_shape: (1, H, W, C); the leading axis is free.
        outputs: (name, tensor index) pairs.
    """

    ops: tuple[Op, ...]
    input: int
    input_shape: tuple[int, ...]
    outputs: tuple[tuple[str, int], ...]


Weights = dict[str, dict[str, np.ndarray]]
"""Operator name -> parameter name -> float32 array in Flax's layout."""


def read(path: Path | str, *, outputs: tuple[str, ...] | None = None) -> tuple[Graph, Weights]:
    """Read a .tflite file.

    Args:
        path: the file.
        outputs: names of the outputs to keep, in the order wanted; what they do not need is dropped.  None
            keeps all.

    Raises:
        TFLiteError: a foreign or damaged file, an unknown output, or operators that are not supported (all
            listed).
    """
    data = Path(path).read_bytes()
    if data[4:8] != _IDENTIFIER:
        raise TFLiteError(
            f"{path}: not a .tflite file: found {data[4:8]!r} at bytes 4-8, expected {_IDENTIFIER!r}."
            " Give the path of a TensorFlow Lite model."
        )
    try:
        return _Reader(data, str(path)).read(outputs)
    except TFLiteError:
        raise
    except (
        struct.error,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        MemoryError,
        AttributeError,
    ) as error:
        raise TFLiteError(
            f"{path}: a damaged or truncated .tflite file of {len(data)} bytes"
            f" ({type(error).__name__}: {error})."
            " Compare its checksum with the source and fetch it again."
        ) from error


class _Reader:
    """One pass over the flatbuffer of a model with a single subgraph."""

    def __init__(self, data: bytes, path: str):
        self.path = path
        self.model = tflite.Model.GetRootAsModel(data, 0)
        if self.model.SubgraphsLength() != 1:
            raise TFLiteError(f"{path}: found {self.model.SubgraphsLength()} subgraphs, expected one.")
        self.graph = self.model.Subgraphs(0)
        self.ops = [self.graph.Operators(index) for index in range(self.graph.OperatorsLength())]
        # A constant that a DEQUANTIZE operator widens is read through to where it is stored.
        self.stored = {
            op.Outputs(0): op.Inputs(0)
            for op in self.ops
            if self._kind(op) == "DEQUANTIZE" and self._has_data(op.Inputs(0))
        }

    def read(self, wanted: tuple[str, ...] | None) -> tuple[Graph, Weights]:
        outputs = self._select_outputs(wanted)
        if self.graph.InputsLength() != 1:
            raise TFLiteError(f"{self.path}: found {self.graph.InputsLength()} inputs, expected one.")
        needed, kept = set(outputs.values()), []
        for index in reversed(range(len(self.ops))):
            op = self.ops[index]
            if op.Outputs(0) in needed and op.Outputs(0) not in self.stored:
                kept.append(index)
                needed.update(int(value) for value in op.InputsAsNumpy() if value >= 0)

        names = self._names()
        built, weights, problems = [], Weights(), []
        for index in reversed(kept):
            kind = self._kind(self.ops[index])
            try:
                if kind not in _BUILDERS:
                    raise _Unsupported("unknown operator")
                op, parameters = _BUILDERS[kind](self, self.ops[index], names[index])
            except _Unsupported as problem:
                problems.append(f"  operator {index} {kind}: {problem}")
                continue
            built.append(op)
            if parameters:
                weights[op.name] = parameters
        if problems:
            raise TFLiteError(
                f"{self.path}: {len(problems)} operator(s) cannot be imported:\n"
                + "\n".join(problems)
                + f"\nSupported: {', '.join(sorted(_BUILDERS))}. Choose outputs that do not need them,"
                " or extend experiments/models/tflite_graph.py and tflite_import.py."
            )
        source = int(self.graph.Inputs(0))
        graph = Graph(ops=tuple(built), input=source, input_shape=self.shape(source), outputs=tuple(outputs.items()))
        return graph, weights

    def _select_outputs(self, wanted: tuple[str, ...] | None) -> dict[str, int]:
        indices = [int(index) for index in self.graph.OutputsAsNumpy()]
        known = {self.graph.Tensors(index).Name().decode(): index for index in indices}
        if wanted is None:
            return known
        for name in wanted:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise TFLiteError(f"{self.path}: no output {name!r}; did you mean {near}? Known: {', '.join(known)}.")
        if not wanted:
            raise TFLiteError(f"{self.path}: no output was asked for. Known: {', '.join(known)}.")
        return {name: known[name] for name in wanted}

    def _names(self) -> list[str]:
        """Kind and running number of every operator of the file; all layers share one sequence."""
        kinds = [_NAMES.get(self._kind(op), self._kind(op).lower()) for op in self.ops]
        sequences = ["layer" if kind in LAYERS else kind for kind in kinds]
        widths = {sequence: max(2, len(str(sequences.count(sequence) - 1))) for sequence in set(sequences)}
        seen: dict[str, int] = {}
        names = []
        for kind, sequence in zip(kinds, sequences, strict=True):
            number = seen.get(sequence, 0)
            seen[sequence] = number + 1
            names.append(f"{kind}_{number:0{widths[sequence]}d}")
        return names

    def _kind(self, op: Any) -> str:
        code = self.model.OperatorCodes(op.OpcodeIndex())
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        return _KINDS.get(number, f"number {number}")

    def _has_data(self, index: int) -> bool:
        return index >= 0 and self.model.Buffers(self.graph.Tensors(index).Buffer()).DataLength() > 0

    def shape(self, index: int) -> tuple[int, ...]:
        tensor = self.graph.Tensors(index)
        return tuple(int(size) for size in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()

    def constant(self, index: int) -> np.ndarray:
        """The stored value of a tensor; floats as float32."""
        index = self.stored.get(index, index)
        if not self._has_data(index):
            raise _Unsupported("weights that are computed or missing, expected a constant")
        tensor = self.graph.Tensors(index)
        kind = _TYPES.get(tensor.Type(), f"number {tensor.Type()}")
        if kind not in _DTYPES:
            raise _Unsupported(f"weights of type {kind}, expected one of {', '.join(_DTYPES)}")
        if tensor.Sparsity() is not None:
            raise _Unsupported("sparse weights")
        data = self.model.Buffers(tensor.Buffer()).DataAsNumpy()
        value = np.frombuffer(data.tobytes(), _DTYPES[kind]).reshape(self.shape(index))
        return value if kind == "INT32" else value.astype(np.float32)

    def values(self, op: Any) -> tuple[int, ...]:
        """The inputs of an operator that reads activations only."""
        inputs = tuple(int(index) for index in op.InputsAsNumpy())
        for index in inputs:
            if index < 0 or index in self.stored or self._has_data(index):
                raise _Unsupported("a constant operand")
        return inputs

    def layer(self, op: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A layer's stored weights, and its bias as a parameter if it has one."""
        bias = int(op.Inputs(2)) if op.InputsLength() > 2 else -1
        return self.constant(int(op.Inputs(1))), {"bias": self.constant(bias)} if bias >= 0 else {}


def _options(op: Any, table: type) -> Any:
    options = table()
    union = op.BuiltinOptions()
    if union is None:
        raise _Unsupported("its options are missing")
    options.Init(union.Bytes, union.Pos)
    return options


def _activation(options: Any) -> str:
    code = options.FusedActivationFunction()
    if code not in _ACTIVATIONS:
        raise _Unsupported(f"fused activation number {code}, expected one of {', '.join(_ACTIVATIONS.values())}")
    return _ACTIVATIONS[code]


def _window(options: Any) -> dict[str, Any]:
    return dict(
        strides=(options.StrideH(), options.StrideW()),
        padding=_PADDINGS[options.Padding()],
        activation=_activation(options),
    )


def _conv(reader: _Reader, op: Any, name: str, *, table: type, kind: str) -> tuple[Op, dict[str, np.ndarray]]:
    options = _options(op, table)
    kernel, parameters = reader.layer(op)
    source = int(op.Inputs(0))
    if kind == "conv":
        kernel = kernel.transpose(1, 2, 3, 0)  # OHWI -> HWIO
        expected = reader.shape(source)[3]
    else:
        kernel = kernel.transpose(1, 2, 0, 3)  # 1HWC -> HW1C
        expected = 1
    if kernel.shape[2] != expected:
        raise _Unsupported(f"weights with {kernel.shape[2]} input channels per group, expected {expected}")
    built = Op(
        kind=kind,
        name=name,
        inputs=(source,),
        output=int(op.Outputs(0)),
        dilation=(options.DilationHFactor(), options.DilationWFactor()),
        window=kernel.shape[:2],
        features=kernel.shape[3],
        use_bias="bias" in parameters,
        **_window(options),
    )
    return built, {"kernel": np.ascontiguousarray(kernel), **parameters}


def _conv_2d(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    return _conv(reader, op, name, table=tflite.Conv2DOptions, kind="conv")


def _depthwise(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    return _conv(reader, op, name, table=tflite.DepthwiseConv2DOptions, kind="depthwise")


def _dense(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    options = _options(op, tflite.FullyConnectedOptions)
    kernel, parameters = reader.layer(op)
    source = int(op.Inputs(0))
    if reader.shape(source) != (1, kernel.shape[1]):
        raise _Unsupported(f"an input of shape {reader.shape(source)}, expected (1, {kernel.shape[1]})")
    built = Op(
        kind="dense",
        name=name,
        inputs=(source,),
        output=int(op.Outputs(0)),
        activation=_activation(options),
        features=kernel.shape[0],
        use_bias="bias" in parameters,
    )
    return built, {"kernel": np.ascontiguousarray(kernel.T), **parameters}


def _prelu(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    slope = reader.constant(int(op.Inputs(1)))
    if slope.size != slope.shape[-1]:
        raise _Unsupported(f"slopes of shape {slope.shape}, expected one per channel")
    built = Op(kind="prelu", name=name, inputs=(int(op.Inputs(0)),), output=int(op.Outputs(0)))
    return built, {"slope": slope.reshape(-1)}


def _pool(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    options = _options(op, tflite.Pool2DOptions)
    built = Op(
        kind=name.rsplit("_", 1)[0],
        name=name,
        inputs=reader.values(op),
        output=int(op.Outputs(0)),
        window=(options.FilterHeight(), options.FilterWidth()),
        **_window(options),
    )
    return built, {}


def _pad(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    pads = tuple((int(low), int(high)) for low, high in reader.constant(int(op.Inputs(1))))
    if pads[0] != (0, 0):
        raise _Unsupported(f"pads {pads[0]} on the leading axis, expected (0, 0)")
    return Op(kind="pad", name=name, inputs=(int(op.Inputs(0)),), output=int(op.Outputs(0)), padding=pads), {}


def _resize(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    options = _options(op, tflite.ResizeBilinearOptions)
    before, after = reader.shape(int(op.Inputs(0))), reader.shape(int(op.Outputs(0)))
    double = (1, 2 * before[1], 2 * before[2], before[3])
    if after != double or options.AlignCorners() or not options.HalfPixelCenters():
        raise _Unsupported(
            f"{before} to {after}, align_corners {options.AlignCorners()}, half_pixel_centers"
            f" {options.HalfPixelCenters()}; expected twice the size with half_pixel_centers"
        )
    return Op(kind="resize", name=name, inputs=(int(op.Inputs(0)),), output=int(op.Outputs(0))), {}


def _reshape(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    source, result = int(op.Inputs(0)), int(op.Outputs(0))
    before, after = reader.shape(source), reader.shape(result)
    if before[:1] != (1,) or after[:1] != (1,) or min(after) < 1:
        raise _Unsupported(f"{before} to {after} mixes the leading axis with others")
    return Op(kind="reshape", name=name, inputs=(source,), output=result, shape=after[1:]), {}


def _concat(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    options = _options(op, tflite.ConcatenationOptions)
    inputs, result = reader.values(op), int(op.Outputs(0))
    axis = options.Axis() % len(reader.shape(result))
    if axis == 0:
        raise _Unsupported("along the leading axis")
    activation = _activation(options)
    return Op(kind="concat", name=name, inputs=inputs, output=result, axis=axis, activation=activation), {}


def _binary(reader: _Reader, op: Any, name: str, *, table: type, kind: str) -> tuple[Op, dict[str, np.ndarray]]:
    inputs = reader.values(op)
    if len({len(reader.shape(index)) for index in inputs}) != 1:
        raise _Unsupported("operands of different rank")
    activation = _activation(_options(op, table))
    return Op(kind=kind, name=name, inputs=inputs, output=int(op.Outputs(0)), activation=activation), {}


def _add(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    return _binary(reader, op, name, table=tflite.AddOptions, kind="add")


def _mul(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    return _binary(reader, op, name, table=tflite.MulOptions, kind="mul")


def _unary(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    kind = name.rsplit("_", 1)[0]
    return Op(kind=kind, name=name, inputs=reader.values(op), output=int(op.Outputs(0))), {}


_NAMES = {
    "CONV_2D": "conv",
    "DEPTHWISE_CONV_2D": "depthwise",
    "FULLY_CONNECTED": "dense",
    "MAX_POOL_2D": "max_pool",
    "AVERAGE_POOL_2D": "avg_pool",
    "RESIZE_BILINEAR": "resize",
    "CONCATENATION": "concat",
    "LOGISTIC": "sigmoid",
}
_BUILDERS: dict[str, Callable[[_Reader, Any, str], tuple[Op, dict[str, np.ndarray]]]] = {
    "CONV_2D": _conv_2d,
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": _dense,
    "PRELU": _prelu,
    "MAX_POOL_2D": _pool,
    "AVERAGE_POOL_2D": _pool,
    "PAD": _pad,
    "RESIZE_BILINEAR": _resize,
    "RESHAPE": _reshape,
    "CONCATENATION": _concat,
    "ADD": _add,
    "MUL": _mul,
    "LOGISTIC": _unary,
    "RELU": _unary,
    "RELU6": _unary,
}
