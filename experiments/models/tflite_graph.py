"""A .tflite file read into a plain list of operators and float32 weights: no jax, no Flax.

Format: the TensorFlow Lite flatbuffer schema, file identifier ``TFL3``, read with the ``tflite`` package.
Convolution weights are OHWI in the file and HWIO here, depthwise weights 1HWC and HW1C, dense weights OI and
IO.  Weights stored as fp16 behind a DEQUANTIZE operator, or without their zeros behind a DENSIFY operator, become whole float32
arrays and the operator disappears.
"""

import difflib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    tflite.ActivationFunctionType.RELU_N1_TO_1: "relu_n1_to_1",
}
_INDICES = {
    tflite.SparseIndexVector.Int32Vector: tflite.Int32Vector,
    tflite.SparseIndexVector.Uint16Vector: tflite.Uint16Vector,
    tflite.SparseIndexVector.Uint8Vector: tflite.Uint8Vector,
}
_PADDINGS = {tflite.Padding.SAME: "SAME", tflite.Padding.VALID: "VALID"}

LAYERS = ("conv", "depthwise", "dense")
"""The kinds of operator that multiply their input with weights: they share one running number."""


class TFLiteError(ValueError):
    """The file cannot be imported; the message says what was found, what was expected, what to do."""


_LINES = 20  # of operators in a message
_Cut = tuple[int | None, int | None, int]  # start, stop, step


class _Unsupported(Exception):
    """One operator that cannot be imported; collected, so that all are reported at once."""


class _Computed(_Unsupported):
    """A value that the file should store comes from another operator: no fault of its own where that one is refused."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator.  Sizes and steps are (height, width).

    Attributes:
        kind: conv, depthwise, dense, prelu; add, sub, mul, div, maximum, minimum; mean, sum, reduce_max; concat, pad, max_pool,
            avg_pool, resize, reshape, transpose, slice, depth_to_space, space_to_depth; softmax, leaky_relu, and the functions of
            one number: sigmoid, tanh, relu, relu6, relu_n1_to_1, elu, hard_swish, exp, log, sqrt, rsqrt, square, abs, neg.
        name: unique and stable: kind and running number in the whole file, so that pruning renames nothing.
        inputs: tensor indices of the values read, without weights.
        output: tensor index of the value written.
        activation: fused activation: none, relu, relu6 or relu_n1_to_1.
        strides, dilation, window: of a convolution or pool; ``window`` is the kernel size.
        padding: SAME or VALID of a convolution or pool; (low, high) per axis of a pad.
        features: output channels of a layer.
        use_bias: whether a layer has a bias.
        shape: result of a reshape, reduction or slice, without the leading axis; all of a stored operand's.
        axis: of a concat.
        axes: of a reduction; the order of a transpose.
        stored: which operand, 0 or 1, the file stores: it is a parameter, and not in ``inputs``.
        number: slope of a leaky_relu, factor of a softmax's input.
        block: side of the squares of depth_to_space and space_to_depth.
        places: of a resize: for each row and each column of the result, where in the input it lies. Empty: twice the size, with
            half-pixel centres.
        cuts: of a slice: (start, stop, step) of the axes after the leading one.
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
    axes: tuple[int, ...] = ()
    stored: int | None = None
    number: float = 1.0
    block: int = 1
    places: tuple[tuple[float, ...], ...] = ()
    cuts: tuple[_Cut, ...] = ()


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
        outputs: names of the outputs to keep, in the order wanted, or of any other value that an operator computes; what they
            do not need is dropped.  None keeps all outputs.

    Raises:
        TFLiteError: a foreign or damaged file, an unknown output, or operators that are not supported (all
            kinds listed).
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
        # A constant that DENSIFY and DEQUANTIZE operators widen is read through to where it is stored.
        self.stored: dict[int, int] = {}
        for op in self.ops:
            if self._kind(op) in ("DEQUANTIZE", "DENSIFY") and self.is_constant(op.Inputs(0)):
                self.stored[op.Outputs(0)] = self.stored.get(op.Inputs(0), op.Inputs(0))

    def read(self, wanted: tuple[str, ...] | None) -> tuple[Graph, Weights]:
        if self.graph.InputsLength() != 1:
            raise TFLiteError(f"{self.path}: found {self.graph.InputsLength()} inputs, expected one.")
        outputs = self._select_outputs(wanted)
        source = int(self.graph.Inputs(0))
        kept = self._needed(outputs)
        names = self._names()
        built, weights, problems = [], Weights(), dict[tuple[str, str], list[int]]()
        sound, unsound = {source}, set[int]()  # values that can be computed, and those that cannot
        for index in kept:
            op, results = self.ops[index], _results(self.ops[index])
            depends = any(int(value) in unsound for value in op.InputsAsNumpy())
            try:
                made, parameters = self._build(op, names[index], sound | unsound)
            except _Unsupported as problem:
                if not (depends and isinstance(problem, _Computed)):
                    problems.setdefault((self._kind(op), str(problem)), []).append(index)
                unsound.update(results)
                continue
            (unsound if depends else sound).update(results)
            built.append(made)
            if parameters:
                weights[made.name] = parameters
        if problems:
            free = [name for name, index in outputs.items() if index in sound]
            raise TFLiteError(_refusal(self.path, problems, free or self._last(kept, sound - {source}, unsound)))
        for name, index in outputs.items():
            if index not in sound:
                raise TFLiteError(f"{self.path}: the output {name!r} is not computed from the input. Leave it out.")
        graph = Graph(ops=tuple(built), input=source, input_shape=self.shape(source), outputs=tuple(outputs.items()))
        return graph, weights

    def _needed(self, outputs: dict[str, int]) -> list[int]:
        """The operators that outputs need, in execution order."""
        needed, kept = set(outputs.values()), []
        for index in reversed(range(len(self.ops))):
            op = self.ops[index]
            if needed.intersection(_results(op)) and op.Outputs(0) not in self.stored:
                kept.append(index)
                needed.update(int(value) for value in op.InputsAsNumpy() if value >= 0)
        return kept[::-1]

    def _build(self, op: Any, name: str, known: set[int]) -> tuple[Op, dict[str, np.ndarray]]:
        kind = self._kind(op)
        if kind not in _BUILDERS:
            raise _Unsupported("unknown operator")
        if (found := self.type(op.Outputs(0))) != "FLOAT32":
            raise _Unsupported(f"a result of type {found}, expected FLOAT32")
        made, parameters = _BUILDERS[kind](self, op, name)
        for index in made.inputs:
            if self.is_constant(index):
                raise _Unsupported("a constant operand")
            if index not in known:
                raise _Unsupported("an operand that is not computed from the input")
        return made, parameters

    def _last(self, kept: list[int], sound: set[int], unsound: set[int]) -> list[str]:
        """Names of the last values before those that cannot be computed, as far as an output can be named so."""
        border = set[int]()
        for index in kept:
            if unsound.intersection(_results(self.ops[index])):
                border.update(int(value) for value in self.ops[index].InputsAsNumpy())
        return [name for name, index in self._inner().items() if index in border & sound]

    def _inner(self) -> dict[str, int]:
        """Every value that an operator computes, by its name; without those that share theirs."""
        indices = [index for op in self.ops for index in _results(op) if index not in self.stored]
        names = [self._name(index) for index in indices]
        return {name: index for name, index in zip(names, indices, strict=True) if name and names.count(name) == 1}

    def _name(self, index: int) -> str:
        return (self.graph.Tensors(index).Name() or b"").decode()

    def _select_outputs(self, wanted: tuple[str, ...] | None) -> dict[str, int]:
        outputs = {self._name(int(index)): int(index) for index in self.graph.OutputsAsNumpy()}
        if wanted is None:
            return outputs
        known = self._inner() | outputs
        for name in wanted:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise TFLiteError(
                    f"{self.path}: no output {name!r}; did you mean {near}? Known: {', '.join(outputs)}; and every other value"
                    " that an operator computes."
                )
        if not wanted:
            raise TFLiteError(f"{self.path}: no output was asked for. Known: {', '.join(outputs)}.")
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
        if number == tflite.BuiltinOperator.CUSTOM:
            return f"{(code.CustomCode() or b'without a name').decode()} (custom)"
        return _KINDS.get(number, f"number {number}")

    def _has_data(self, index: int) -> bool:
        return index >= 0 and self.model.Buffers(self.graph.Tensors(index).Buffer()).DataLength() > 0

    def is_constant(self, index: int) -> bool:
        return index < 0 or index in self.stored or self._has_data(index)

    def type(self, index: int) -> str:
        number = self.graph.Tensors(index).Type()
        return _TYPES.get(number, f"number {number}")

    def shape(self, index: int) -> tuple[int, ...]:
        tensor = self.graph.Tensors(index)
        return tuple(int(size) for size in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()

    def constant(self, index: int) -> np.ndarray:
        """The stored value of a tensor; floats as float32."""
        index = self.stored.get(index, index)
        if not self._has_data(index):
            raise _Computed("weights that are computed or missing, expected a constant")
        tensor, kind = self.graph.Tensors(index), self.type(index)
        if kind not in _DTYPES:
            raise _Unsupported(f"weights of type {kind}, expected one of {', '.join(_DTYPES)}")
        data = np.frombuffer(self.model.Buffers(tensor.Buffer()).DataAsNumpy().tobytes(), _DTYPES[kind])
        shape, sparsity = self.shape(index), tensor.Sparsity()
        value = data.reshape(shape) if sparsity is None else _whole(data, sparsity, shape)
        return value if kind == "INT32" else value.astype(np.float32)

    def integers(self, index: int) -> list[int]:
        """The stored axes, sizes or places that an operand holds."""
        return [int(each) for each in self.constant(index).reshape(-1)]

    def layer(self, op: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A layer's stored weights, and its bias as a parameter if it has one."""
        bias = int(op.Inputs(2)) if op.InputsLength() > 2 else -1
        return self.constant(int(op.Inputs(1))), {"bias": self.constant(bias)} if bias >= 0 else {}


def _results(op: Any) -> list[int]:
    return [int(index) for index in op.OutputsAsNumpy()] if op.OutputsLength() else []


def _refusal(path: str, problems: dict[tuple[str, str], list[int]], free: list[str]) -> str:
    """Each kind of operator once for each reason, and what can be had without them."""
    lines = []
    for (kind, reason), indices in problems.items():
        more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
        lines.append(f"  operator {indices[0]} {kind}{more}: {reason}")
    lines[_LINES:] = [f"  and {len(lines) - _LINES} more such lines"] if len(lines) > _LINES else []
    advice = f"What does not need them: outputs={tuple(free[:8])}." if free else "No output can do without them."
    return (
        f"{path}: {sum(map(len, problems.values()))} operator(s) cannot be imported:\n"
        + "\n".join(lines)
        + f"\nSupported: {', '.join(sorted(_BUILDERS))}.\n{advice} Or extend experiments/models/tflite_graph.py and"
        " tflite_import.py."
    )


def _whole(values: np.ndarray, sparsity: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that is stored without its zeros: a tree with one level for each axis."""
    if sparsity.BlockMapLength():
        raise _Unsupported("sparse weights in blocks")
    nodes = np.zeros((1, len(shape)), np.int64)  # where each lies; those of the last level hold a value
    for number, axis in enumerate(sparsity.TraversalOrderAsNumpy()):
        level = sparsity.DimMetadata(number)
        if level.Format() == tflite.DimensionType.DENSE:
            counts, places = np.full(len(nodes), level.DenseSize()), np.tile(np.arange(level.DenseSize()), len(nodes))
        else:
            counts = np.diff(_indices(level.ArraySegments(), level.ArraySegmentsType()))
            places = _indices(level.ArrayIndices(), level.ArrayIndicesType())
        nodes = np.repeat(nodes, counts, axis=0)
        nodes[:, axis] = places
    whole = np.zeros(shape, values.dtype)
    whole[tuple(nodes.T)] = values
    return whole


def _indices(union: Any, kind: int) -> np.ndarray:
    table = _INDICES[kind]()
    table.Init(union.Bytes, union.Pos)
    return table.ValuesAsNumpy().astype(np.int64)


def _options(op: Any, table: type) -> Any:
    options = table()
    union = op.BuiltinOptions()
    if union is None:
        raise _Unsupported("its options are missing")
    options.Init(union.Bytes, union.Pos)
    return options


def _inputs(op: Any) -> tuple[int, ...]:
    return tuple(int(index) for index in op.InputsAsNumpy())


def _kind_of(name: str) -> str:
    return name.rsplit("_", 1)[0]


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
    if options.WeightsFormat() != tflite.FullyConnectedOptionsWeightsFormat.DEFAULT:
        raise _Unsupported("shuffled weights")
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
        kind=_kind_of(name),
        name=name,
        inputs=_inputs(op),
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
    nearest = _kind_of(name) == "nearest"
    options = _options(op, tflite.ResizeNearestNeighborOptions if nearest else tflite.ResizeBilinearOptions)
    source, result = int(op.Inputs(0)), int(op.Outputs(0))
    before, after = reader.shape(source), reader.shape(result)
    corners, half = bool(options.AlignCorners()), bool(options.HalfPixelCenters())
    doubled = after == (before[0], 2 * before[1], 2 * before[2], before[3])
    places = [_places(*sizes, corners, half, nearest) for sizes in zip(before[1:3], after[1:3], strict=True)]
    if doubled and half and not corners and not nearest:
        places = []
    return Op(kind="resize", name=name, inputs=(source,), output=result, places=tuple(places)), {}


def _places(before: int, after: int, corners: bool, half: bool, nearest: bool) -> tuple[float, ...]:
    """Where in an axis of `before` values each of `after` lies, as TensorFlow Lite has it, in float32."""
    aligned = corners and after > 1
    scale = np.float32(before - 1) / np.float32(after - 1) if aligned else np.float32(before) / np.float32(after)
    offset = np.float32(0.5 if half else 0.0)
    places = (np.arange(after, dtype=np.float32) + offset) * scale
    if nearest:
        places = np.floor(places + np.float32(0.5)) if corners else np.floor(places)
    else:
        places = places - offset
    return tuple(float(each) for each in np.clip(places, 0, before - 1))


def _reshape(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    source, result = int(op.Inputs(0)), int(op.Outputs(0))
    before, after = reader.shape(source), reader.shape(result)
    if before[:1] != (1,) or after[:1] != (1,) or min(after) < 1:
        raise _Unsupported(f"{before} to {after} mixes the leading axis with others")
    return Op(kind="reshape", name=name, inputs=(source,), output=result, shape=after[1:]), {}


def _concat(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    options = _options(op, tflite.ConcatenationOptions)
    inputs, result = _inputs(op), int(op.Outputs(0))
    axis = options.Axis() % len(reader.shape(result))
    if axis == 0:
        raise _Unsupported("along the leading axis")
    activation = _activation(options)
    return Op(kind="concat", name=name, inputs=inputs, output=result, axis=axis, activation=activation), {}


def _binary(reader: _Reader, op: Any, name: str, *, table: type | None) -> tuple[Op, dict[str, np.ndarray]]:
    """Two operands, of which the file may store one."""
    inputs, result = list(_inputs(op)), int(op.Outputs(0))
    activation = "none" if table is None else _activation(_options(op, table))
    constants = [place for place, index in enumerate(inputs) if reader.is_constant(index)]
    stored, shape, parameters = None, (), dict[str, np.ndarray]()
    if len(constants) > 1:
        raise _Unsupported("two constant operands")
    if constants:
        stored = constants[0]
        value = reader.constant(inputs.pop(stored))
        value = value.reshape((1,) * (len(reader.shape(result)) - value.ndim) + value.shape)
        if value.shape[:1] != (1,):
            raise _Unsupported(f"a constant of shape {value.shape}, expected 1 along the leading axis")
        shape, parameters = value.shape, {"constant": value}
    if any(len(reader.shape(index)) != len(reader.shape(result)) for index in inputs):
        raise _Unsupported("operands of different rank")
    made = Op(
        kind=_kind_of(name),
        name=name,
        inputs=tuple(inputs),
        output=result,
        activation=activation,
        shape=shape,
        stored=stored,
    )
    return made, parameters


def _reduce(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    source, result = int(op.Inputs(0)), int(op.Outputs(0))
    rank = len(reader.shape(source))
    axes = tuple(sorted({axis % rank for axis in reader.integers(int(op.Inputs(1)))}))
    if 0 in axes:
        raise _Unsupported("over the leading axis")
    shape = reader.shape(result)[1:]
    return Op(kind=_kind_of(name), name=name, inputs=(source,), output=result, axes=axes, shape=shape), {}


def _transpose(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    axes = tuple(reader.integers(int(op.Inputs(1))))
    if axes[0] != 0:
        raise _Unsupported(f"to the axes {axes}, expected the leading one first")
    return Op(kind="transpose", name=name, inputs=(int(op.Inputs(0)),), output=int(op.Outputs(0)), axes=axes), {}


def _slice(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    begins, sizes = (reader.integers(int(op.Inputs(place))) for place in (1, 2))
    cuts: list[_Cut] = [
        (begin, None if size < 0 else begin + size, 1) for begin, size in zip(begins, sizes, strict=True)
    ]
    return _cut(reader, op, name, cuts), {}


def _strided_slice(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    options = _options(op, tflite.StridedSliceOptions)
    if options.EllipsisMask() or options.NewAxisMask() or options.Offset() or options.ShrinkAxisMask() & 1:
        raise _Unsupported("an ellipsis, a new axis, ends as offsets, or without the leading axis")
    cuts: list[_Cut] = []
    bounds = zip(*(reader.integers(int(op.Inputs(place))) for place in (1, 2, 3)), strict=True)
    for axis, (begin, end, step) in enumerate(bounds):
        if options.ShrinkAxisMask() >> axis & 1:
            begin %= reader.shape(int(op.Inputs(0)))[axis]
            cuts.append((begin, begin + 1, 1))
        else:
            start = None if options.BeginMask() >> axis & 1 else begin
            cuts.append((start, None if options.EndMask() >> axis & 1 else end, step))
    return _cut(reader, op, name, cuts), {}


def _cut(reader: _Reader, op: Any, name: str, cuts: list[_Cut]) -> Op:
    source, result = int(op.Inputs(0)), int(op.Outputs(0))
    leading = range(reader.shape(source)[0])
    if leading[slice(*cuts[0])] != leading:
        raise _Unsupported("of the leading axis")
    shape = reader.shape(result)[1:]
    return Op(kind="slice", name=name, inputs=(source,), output=result, cuts=tuple(cuts[1:]), shape=shape)


def _blocks(reader: _Reader, op: Any, name: str, *, table: type) -> tuple[Op, dict[str, np.ndarray]]:
    block = _options(op, table).BlockSize()
    return Op(kind=_kind_of(name), name=name, inputs=_inputs(op), output=int(op.Outputs(0)), block=block), {}


def _softmax(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    number = _options(op, tflite.SoftmaxOptions).Beta()
    if len(reader.shape(int(op.Inputs(0)))) < 2:
        raise _Unsupported("over the leading axis")
    return Op(kind="softmax", name=name, inputs=_inputs(op), output=int(op.Outputs(0)), number=number), {}


def _leaky_relu(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    number = _options(op, tflite.LeakyReluOptions).Alpha()
    return Op(kind="leaky_relu", name=name, inputs=_inputs(op), output=int(op.Outputs(0)), number=number), {}


def _unary(reader: _Reader, op: Any, name: str) -> tuple[Op, dict[str, np.ndarray]]:
    return Op(kind=_kind_of(name), name=name, inputs=_inputs(op), output=int(op.Outputs(0))), {}


_NAMES = {
    "CONV_2D": "conv",
    "DEPTHWISE_CONV_2D": "depthwise",
    "FULLY_CONNECTED": "dense",
    "MAX_POOL_2D": "max_pool",
    "AVERAGE_POOL_2D": "avg_pool",
    "RESIZE_BILINEAR": "resize",
    "RESIZE_NEAREST_NEIGHBOR": "nearest",
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
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "RESHAPE": _reshape,
    "SQUEEZE": _reshape,
    "EXPAND_DIMS": _reshape,
    "TRANSPOSE": _transpose,
    "SLICE": _slice,
    "STRIDED_SLICE": _strided_slice,
    "CONCATENATION": _concat,
    "DEPTH_TO_SPACE": partial(_blocks, table=tflite.DepthToSpaceOptions),
    "SPACE_TO_DEPTH": partial(_blocks, table=tflite.SpaceToDepthOptions),
    "ADD": partial(_binary, table=tflite.AddOptions),
    "SUB": partial(_binary, table=tflite.SubOptions),
    "MUL": partial(_binary, table=tflite.MulOptions),
    "DIV": partial(_binary, table=tflite.DivOptions),
    "MAXIMUM": partial(_binary, table=None),
    "MINIMUM": partial(_binary, table=None),
    "MEAN": _reduce,
    "SUM": _reduce,
    "REDUCE_MAX": _reduce,
    "SOFTMAX": _softmax,
    "LEAKY_RELU": _leaky_relu,
    "LOGISTIC": _unary,
    **dict.fromkeys(("TANH", "RELU", "RELU6", "RELU_N1_TO_1", "ELU", "HARD_SWISH"), _unary),
    **dict.fromkeys(("EXP", "LOG", "SQRT", "RSQRT", "SQUARE", "ABS", "NEG"), _unary),
}
