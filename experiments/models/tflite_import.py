"""A .tflite file as a Flax linen module with ordinary layers, and its parameters.

Convolutions and dense layers are ``nn.Conv`` and ``nn.Dense`` submodules, named by kind and running number (``conv_00``,
``depthwise_01`` …), with the same names whatever outputs are kept; each is called once. Slopes, and operands that the file
stores, are parameters, too.
"""

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import DAMAGED
from experiments.models.tflite_file import File, TFLiteError, Unsupported
from experiments.models.tflite_operators import ACTIVATIONS, LAYERS, OPERATORS, Op, Weights, compute, read

_LINES = 20  # of operators in a message


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
        dtype: handed to every layer, Flax's plain way of computing in another dtype; None computes in float32.
        plain: `jax.image.resize` for twice the size, in place of mpjax's, which is faster on a CPU.

    Raises:
        TFLiteError: a foreign or damaged file, an unknown output, or operators that are not supported (all kinds listed).
        FileNotFoundError: no such file.
    """
    size = Path(path).stat().st_size
    try:
        graph, weights = _read(path, outputs)
    except TFLiteError:
        raise
    except DAMAGED as error:
        raise TFLiteError(
            f"{path}: a damaged or truncated .tflite file of {size} bytes ({type(error).__name__}: {error})."
            " Compare its checksum with the source and fetch it again."
        ) from error
    return Imported(
        module=TFLiteModule(graph=graph, dtype=dtype, plain=plain),
        variables={"params": jax.tree.map(jnp.asarray, weights)},
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
        layers = {"CONV_2D": nn.Conv, "DEPTHWISE_CONV_2D": nn.Conv, "FULLY_CONNECTED": nn.Dense}
        values = {self.graph.input: x}
        for op in self.graph.ops:
            inputs = [values[index] for index in op.inputs]
            if op.stored is not None:
                place, shape = op.stored
                inputs.insert(place, Constant(shape, name=op.name)().astype(inputs[0].dtype))
            if op.kind == "PRELU":
                out = PReLU(name=op.name)(*inputs)
            elif op.kind in layers:
                out = layers[op.kind](**dict(op.settings), dtype=self.dtype, name=op.name)(*inputs)
            else:
                out = compute(op, inputs, plain=self.plain)
            values[op.output] = ACTIVATIONS[op.activation](out)
        return {name: values[index] for name, index in self.graph.outputs}


# --- from the file to the graph ---------------------------------------------------------------------------------------


def _read(path: Path | str, wanted: tuple[str, ...] | None) -> tuple[Graph, dict[str, Weights]]:
    file = File(path)
    outputs, names = _outputs(file, str(path), wanted), _names(file)
    ops, weights, refused = [], dict[str, Weights](), dict[tuple[str, str], list[int]]()
    sound, border = {file.input}, set[int]()  # values that can be computed; those of them that refused operators read
    for index in _needed(file, set(outputs.values())):
        node = file.nodes[index]
        if node.kind not in OPERATORS:
            refused.setdefault((node.kind, "unknown operator"), []).append(index)
        elif all(value in sound or file.is_constant(value) for value in node.inputs):
            try:
                op, parameters = read(node, names[index])
                ops.append(op)
                weights |= {op.name: parameters} if parameters else {}
                sound.update(node.outputs)
                continue
            except Unsupported as problem:
                refused.setdefault((node.kind, str(problem)), []).append(index)
        border |= sound.intersection(node.inputs) - {file.input}
    if refused:
        free = [name for name, value in outputs.items() if value in sound]
        free = free or [name for name, value in file.computed().items() if value in border]
        raise TFLiteError(_refusal(path, refused, free))
    for name, value in outputs.items():
        if value not in sound:
            raise TFLiteError(f"{path}: the output {name!r} is not computed from the input. Leave it out.")
    shape = file.shape(file.input)
    return Graph(ops=tuple(ops), input=file.input, input_shape=shape, outputs=tuple(outputs.items())), weights


def _outputs(file: File, path: str, wanted: tuple[str, ...] | None) -> dict[str, int]:
    """Name -> tensor index."""
    known = file.computed() | file.outputs
    if wanted is None:
        return file.outputs
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise TFLiteError(
                f"{path}: no output {name!r}; did you mean {near}? Known: {', '.join(file.outputs)}; and every other value"
                " that an operator computes."
            )
    if not wanted:
        raise TFLiteError(f"{path}: no output was asked for. Known: {', '.join(file.outputs)}.")
    return {name: known[name] for name in wanted}


def _needed(file: File, values: set[int]) -> list[int]:
    """The operators that these values need, in execution order."""
    needed = []
    for index in reversed(range(len(file.nodes))):
        node = file.nodes[index]
        if values.intersection(node.outputs) and node.outputs[0] not in file.widened:
            needed.append(index)
            values |= {*node.inputs}
    return needed[::-1]


def _names(file: File) -> list[str]:
    """Prefix and running number of every operator of the file; all layers share one sequence."""
    prefixes = [getattr(OPERATORS.get(node.kind), "prefix", "") or node.kind.lower() for node in file.nodes]
    sequences = ["layer" if node.kind in LAYERS else prefix for node, prefix in zip(file.nodes, prefixes, strict=True)]
    totals, numbers, names = Counter(sequences), Counter[str](), []
    for prefix, sequence in zip(prefixes, sequences, strict=True):
        width = max(2, len(str(totals[sequence] - 1)))
        names.append(f"{prefix}_{numbers[sequence]:0{width}d}")
        numbers[sequence] += 1
    return names


def _refusal(path: Path | str, refused: dict[tuple[str, str], list[int]], free: list[str]) -> str:
    """Each kind of operator once for each reason, and what can be had without them."""
    lines = []
    for (kind, reason), indices in refused.items():
        more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
        lines.append(f"  operator {indices[0]} {kind}{more}: {reason}")
    lines[_LINES:] = [f"  and {len(lines) - _LINES} more such lines"] if len(lines) > _LINES else []
    advice = f"What does not need them: outputs={tuple(free[:8])}." if free else "No output can do without them."
    return "\n".join(
        [
            f"{path}: {sum(map(len, refused.values()))} operator(s) cannot be imported:",
            *lines,
            f"Supported: {', '.join(sorted(OPERATORS))}.",
            f"{advice} Or extend experiments/models/tflite_operators.py.",
        ]
    )
