"""Operators and tensors of a .tflite file, read with the ``tflite`` package; no jax, no Flax."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tflite

_IDENTIFIER = b"TFL3"


def _names(enum: type) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


_KINDS, _TYPES, _OPTIONS = (_names(enum) for enum in (tflite.BuiltinOperator, tflite.TensorType, tflite.BuiltinOptions))
_INDEX_TABLES = _names(tflite.SparseIndexVector)
_DTYPES = {"FLOAT32": np.float32, "FLOAT16": np.float16, "INT32": np.int32}


class TFLiteError(ValueError):
    """The file cannot be imported; the message says what it has, what was expected, what to do."""


class Unsupported(Exception):
    """An operator that cannot be imported. They are collected, so that all are reported at once."""


class File:
    """A model with one subgraph and one input.

    A constant behind DEQUANTIZE (fp16) or DENSIFY (stored without its zeros) operators is read where it is stored, as a whole
    float32 array, and those operators are left out.
    """

    def __init__(self, path: Path | str) -> None:
        data = Path(path).read_bytes()
        if data[4:8] != _IDENTIFIER:
            raise TFLiteError(
                f"{path}: not a .tflite file: {data[4:8]!r} at bytes 4-8, expected {_IDENTIFIER!r}."
                " Give the path of a TensorFlow Lite model."
            )
        self.model = tflite.Model.GetRootAsModel(data, 0)
        if self.model.SubgraphsLength() != 1:
            raise TFLiteError(f"{path}: {self.model.SubgraphsLength()} subgraphs, expected one.")
        self.graph = self.model.Subgraphs(0)
        if self.graph.InputsLength() != 1:
            raise TFLiteError(f"{path}: {self.graph.InputsLength()} inputs, expected one.")
        self.input = int(self.graph.Inputs(0))
        self.outputs = {self.name(int(index)): int(index) for index in self.graph.OutputsAsNumpy()}
        self.nodes = [Node(self, self.graph.Operators(index)) for index in range(self.graph.OperatorsLength())]
        self.widened: dict[int, int] = {}
        for node in self.nodes:
            if node.kind in ("DEQUANTIZE", "DENSIFY") and self.is_constant(node.inputs[0]):
                self.widened[node.outputs[0]] = self.widened.get(node.inputs[0], node.inputs[0])

    def computed(self) -> dict[str, int]:
        """Every value that an operator computes, by name, except values that share a name."""
        indices = [index for node in self.nodes for index in node.outputs if index not in self.widened]
        names = [self.name(index) for index in indices]
        return {name: index for name, index in zip(names, indices, strict=True) if name and names.count(name) == 1}

    def name(self, index: int) -> str:
        return (self.graph.Tensors(index).Name() or b"").decode()

    def type(self, index: int) -> str:
        number = self.graph.Tensors(index).Type()
        return _TYPES.get(number, f"number {number}")

    def shape(self, index: int) -> tuple[int, ...]:
        tensor = self.graph.Tensors(index)
        return tuple(int(size) for size in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()

    def is_constant(self, index: int) -> bool:
        return index < 0 or index in self.widened or self._buffer(index).DataLength() > 0

    def constant(self, index: int) -> np.ndarray:
        """The stored value of a tensor, floats as float32."""
        index = self.widened.get(index, index)
        if index < 0 or not self._buffer(index).DataLength():
            raise Unsupported("weights that are computed or missing, expected a constant")
        tensor, kind, shape = self.graph.Tensors(index), self.type(index), self.shape(index)
        if kind not in _DTYPES:
            raise Unsupported(f"weights of type {kind}, expected one of {', '.join(_DTYPES)}")
        values = np.frombuffer(self._buffer(index).DataAsNumpy().tobytes(), _DTYPES[kind])
        values = values.reshape(shape) if tensor.Sparsity() is None else _dense(values, tensor.Sparsity(), shape)
        return values if kind == "INT32" else values.astype(np.float32)

    def _buffer(self, index: int) -> Any:
        return self.model.Buffers(self.graph.Tensors(index).Buffer())


@dataclass(frozen=True)
class Node:
    """One operator."""

    file: File
    op: Any

    @cached_property
    def kind(self) -> str:
        """As the schema has it (CONV_2D), or a custom operator's name."""
        code = self.file.model.OperatorCodes(self.op.OpcodeIndex())
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if number == tflite.BuiltinOperator.CUSTOM:
            return f"{(code.CustomCode() or b'without a name').decode()} (custom)"
        return _KINDS.get(number, f"number {number}")

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        return tuple(map(int, self.op.InputsAsNumpy())) if self.op.InputsLength() else ()

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        return tuple(map(int, self.op.OutputsAsNumpy())) if self.op.OutputsLength() else ()

    @property
    def source(self) -> tuple[int, ...]:
        """Shape of the first input."""
        return self.file.shape(self.inputs[0])

    @property
    def result(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.file.shape(self.outputs[0])

    @property
    def has_options(self) -> bool:
        return self.op.BuiltinOptions() is not None

    @property
    def options(self) -> Any:
        """The operator's own table of the schema."""
        if not self.has_options:
            raise Unsupported("its options are missing")
        return _table(_OPTIONS[self.op.BuiltinOptionsType()], self.op.BuiltinOptions())

    def constant(self, place: int) -> np.ndarray:
        """The stored value of an operand."""
        return self.file.constant(self.inputs[place])

    def integers(self, place: int) -> list[int]:
        """Axes, sizes or places that an operand holds."""
        return self.constant(place).reshape(-1).tolist()


def _table(name: str, union: Any) -> Any:
    table = getattr(tflite, name)()
    table.Init(union.Bytes, union.Pos)
    return table


def _dense(values: np.ndarray, sparsity: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that is stored without its zeros, as a tree with one level for each axis."""
    if sparsity.BlockMapLength():
        raise Unsupported("sparse weights in blocks")
    nodes = np.zeros((1, len(shape)), np.int64)  # positions; those of the last level hold a value
    for number, axis in enumerate(sparsity.TraversalOrderAsNumpy()):
        level = sparsity.DimMetadata(number)
        if level.Format() == tflite.DimensionType.DENSE:
            size = level.DenseSize()
            counts, places = np.full(len(nodes), size), np.tile(np.arange(size), len(nodes))
        else:
            counts = np.diff(_indices(level.ArraySegmentsType(), level.ArraySegments()))
            places = _indices(level.ArrayIndicesType(), level.ArrayIndices())
        nodes = np.repeat(nodes, counts, axis=0)
        nodes[:, axis] = places
    dense = np.zeros(shape, values.dtype)
    dense[tuple(nodes.T)] = values
    return dense


def _indices(kind: int, union: Any) -> np.ndarray:
    return _table(_INDEX_TABLES[kind], union).ValuesAsNumpy().astype(np.int64)
