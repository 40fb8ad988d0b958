"""A product of the traced program, as an override sees it, and the layer that it belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.partition import Block

Array = jax.Array
Params = Any
Override = Callable[["Layer", "Product", Array, Any], Array]
Axes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight, and the products that multiply it with activations; or one product of two activations.

    Attributes:
        name: slash path of the weight, without a trailing `kernel`, `embedding`, `w` or `weight`.
        kind: of its first product, "dot", "conv", "ragged" or "lookup".
        module: class of the module that owns the weight; "" where it is not known.
        kernel: path of the weight in the model's params; "" for a product of two activations.
        sources: paths of the user's parameters that the weight is computed from.
        folded: the weight is computed from its sources when the model is made, and not a parameter as it is.
        kernel_shape, input_shape, output_shape: of the weight, and of the operands and output of the first product.
        groups: feature groups of a convolution.
        calls: how often its products run: under a scan its length times; in a `cond` the most that a branch runs, in a
            `while_loop` as for one iteration.
        flops: per example (first axis) and over all calls, two per multiply-add.
        summed: axes of the weight that the product sums over, which share a scale; None: unknown, one scale for all.
        stacked: axes along which the weight is a stack of separate weights (scanned, mapped, or taken one by one): in every
            format each has a scale of its own.
        levels: how many leading axes are consumed by scans, so that a product sees a slice.
    """

    name: str
    kind: str
    module: str = ""
    kernel: str = ""
    sources: tuple[str, ...] = ()
    folded: bool = False
    kernel_shape: tuple[int, ...] = ()
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    groups: int = 1
    calls: int = 1
    flops: int = 0
    summed: Axes | None = None
    stacked: Axes = ()
    levels: int = 0

    @property
    def block(self) -> Block:
        """The parameters that a format lowers."""
        return Block(name=self.name, paths=(self.kernel,), summed=self.summed, stacked=self.stacked)

    @property
    def weights(self) -> int:
        """Number of weights in the kernel."""
        return math.prod(self.kernel_shape) if self.kernel else 0


@dataclass(frozen=True, kw_only=True)
class OtherParameter:
    """A parameter that no format lowers, and why.

    `weight`: products take it, but they cannot be lowered. `folded`: it is in the program only through what was computed from it.
    """

    path: str
    shape: tuple[int, ...]
    owner: str
    reason: str
    weight: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Move:
    """A step between a stored weight and the operand of its product, which computes nothing: transpose, slice, reshape, …

    `operands`: how many of the product's run-time `operands` it takes (the position of a dynamic slice).
    """

    primitive: Any
    params: Mapping[str, Any]
    operands: int = 0

    def __repr__(self) -> str:
        return f"{self.primitive.name}({', '.join(f'{k}={v}' for k, v in self.params.items())})"


CONV_PARAMS = tuple("window_strides padding lhs_dilation rhs_dilation feature_group_count batch_group_count".split())


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """One dot, convolution, ragged dot or lookup of the program; bias is no part of it.

    Attributes:
        kind: "dot" | "conv" | "ragged" | "lookup". For a lookup, `lhs` are the indices and `rhs` is the table.
        function: what multiplies, called as lax's own of that kind.
        dimension_numbers: of lax; for a dot with the activations first, whatever the program's order.
        weights_first: the program multiplies weights by activations, and its output has the weights' axes first.
        view: what the program does to the weight before it multiplies it.
        operands: run-time values that belong to the product: positions of dynamic slices in `view`, sizes of ragged groups.
        extra: more arguments of `function`.
        weighted: whether the second operand is a weight, and not a second activation.
        dtype: in which the program has the weight operand; None: as it is.
        shared: (summed, stacked) of the weight, as in `Layer`, without the axes that scans consume; None: the product's own.
    """

    kind: str
    function: Callable[..., Array]
    dimension_numbers: Any = None
    precision: Any = None
    window_strides: tuple[int, ...] = ()
    padding: Any = None
    lhs_dilation: tuple[int, ...] = ()
    rhs_dilation: tuple[int, ...] = ()
    feature_group_count: int = 1
    batch_group_count: int = 1
    weights_first: bool = False
    weighted: bool = True
    dtype: Any = None
    view: tuple[Move, ...] = ()
    operands: tuple[Any, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[Axes | None, Axes] | None = None

    @property
    def summed(self) -> Axes | None:
        """Axes of the weight that the product sums over; None where they are not known."""
        return operand_summed(self) if self.shared is None else self.shared[0]

    @property
    def stacked(self) -> Axes:
        """Axes of the weight along which it is a stack of weights."""
        return operand_stacked(self) if self.shared is None else self.shared[1]

    @property
    def bare(self) -> Product:
        """The product of an operand that `viewed` returned."""
        return replace(self, view=(), operands=self._group_sizes, shared=None)

    @property
    def _group_sizes(self) -> tuple[Any, ...]:
        """The operands that no move takes."""
        return self.operands[sum(move.operands for move in self.view) :]

    def viewed(self, weights: Array) -> Array:
        """The weight as the product takes it: transposed, sliced, reshaped."""
        rest = self.operands
        for move in self.view:
            positions, rest = rest[: move.operands], rest[move.operands :]
            params = move.params
            if move.primitive.name == "gather" and params["fill_value"] is not None:  # of the weight's dtype, as stored
                params = {**params, "fill_value": None}
            weights = move.primitive.bind(weights, *positions, **params)
        return weights

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """The product as the program computes it, from activations and the (whole) weight."""
        return self.multiply(lhs, rhs)

    def multiply(self, lhs: Array, rhs: Array, *, accumulate: str | None = None) -> Array:
        """The same; `accumulate`: dtype of accumulation and result where the operands are narrower."""
        rhs, numbers, extra = self.viewed(rhs), self.dimension_numbers, dict(self.extra)
        if self.kind == "lookup":
            if not jnp.issubdtype(rhs.dtype, jnp.floating):
                extra["fill_value"] = None  # a number of the table's dtype in the program
            rows = self.function(rhs, lhs, numbers, **extra)
            return rows if accumulate is None else rows.astype(accumulate)
        extra["precision"] = self.precision
        if accumulate is not None:
            extra["preferred_element_type"] = jnp.dtype(accumulate)
        elif self.dtype is not None and rhs.dtype.itemsize < self.dtype.itemsize:
            rhs = rhs.astype(self.dtype)  # narrower as it is stored, or as a format rounds it
        if self.kind == "ragged":
            return self.function(lhs, rhs, *self._group_sizes, numbers, **extra)
        if self.kind == "conv":
            extra |= {name: getattr(self, name) for name in CONV_PARAMS}
            return self.function(lhs, rhs, dimension_numbers=numbers, **extra)
        # Narrow operands with the activations first: XLA:CPU (jaxlib 0.10.2) cannot run some of their batched products.
        if self.weights_first and self.function is lax.dot_general and lhs.dtype.itemsize >= 4:
            (contract, over), (batch, batch_rhs) = numbers
            return self.function(rhs, lhs, ((over, contract), (batch_rhs, batch)), **extra)
        return self.in_program_order(self.function(lhs, rhs, numbers, **extra), rhs.ndim)

    def in_program_order(self, out: Array, rank: int) -> Array:
        """The output of a dot with the activations first, as the program has it; `rank`: of the weight operand."""
        if not self.weights_first:
            return out
        (_, over), (batch, _) = self.dimension_numbers
        first = out.ndim - (rank - len(over) - len(batch))
        return out.transpose(*range(len(batch)), *range(first, out.ndim), *range(len(batch), first))


def flops(product: Product, lhs: Any, rhs: Any, out: Any) -> int:
    """Two per multiply-add, for operands of these shapes (`rhs` viewed); zeros that a transposed convolution inserts count."""
    if product.kind == "lookup":
        return 0
    return 2 * math.prod(out.shape) * math.prod(rhs.shape[axis] for axis in operand_summed(product))


def row_count(lhs: Any, contract: Sequence[int]) -> int:
    """Of the matrix that a dot without batch axes makes of its left side."""
    return math.prod(size for axis, size in enumerate(lhs.shape) if axis not in contract)


def operand_summed(product: Product) -> Axes:
    """Axes of the viewed weight that the product sums over; of a table, those along a row."""
    numbers = product.dimension_numbers
    if product.kind == "lookup":
        return tuple(axis for axis, size in enumerate(product.extra["slice_sizes"]) if size > 1)
    if product.kind == "conv":
        rank = len(product.window_strides) + 2
        features = numbers.rhs_spec[0] if isinstance(numbers, lax.ConvDimensionNumbers) else numbers[1].index("O")
        return tuple(axis for axis in range(rank) if axis != features)
    (_, over), _ = numbers if product.kind == "dot" else numbers.dot_dimension_numbers
    return tuple(over)


def operand_stacked(product: Product) -> Axes:
    """Axes of the viewed weight along which the product has one weight each: batch axes, ragged groups."""
    numbers = product.dimension_numbers
    if product.kind == "lookup":
        return tuple(numbers.operand_batching_dims)
    if product.kind == "conv":
        return ()
    _, (_, batch) = numbers if product.kind == "dot" else numbers.dot_dimension_numbers
    return tuple(batch) if product.kind == "dot" else (*numbers.rhs_group_dimensions, *batch)
