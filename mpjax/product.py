"""A layer's product, as an override sees it: what is multiplied, by which function, and what belongs to it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.partition import Block

Array = jax.Array
Params = Any
Override = Callable[["Layer", "Product", Array, Array], Array]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module that multiplies its own weights with its input.

    `name`: slash path. `kernel`, `bias`: slash paths in the model's params. Shapes are those of the example
    inputs, `flops` are per example (first axis) and over all `calls` (runs of the product), two per multiply-add. `summed`: axes
    of the kernel that the product sums over, which share a scale; None: not known, one scale for all.
    """

    name: str
    kind: str
    kernel: str
    bias: str | None
    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    groups: int
    calls: int
    flops: int
    summed: tuple[int, ...] | None = None

    @property
    def block(self) -> Block:
        """The parameters that a format lowers."""
        return Block(name=self.name, paths=(self.kernel,), summed=self.summed)

    @property
    def weights(self) -> int:
        """Number of weights in the kernel."""
        return int(np.prod(self.kernel_shape))


@dataclass(frozen=True, kw_only=True)
class OtherParameter:
    """A parameter that no format lowers, and why."""

    path: str
    shape: tuple[int, ...]
    owner: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """One dot, convolution or lookup, and the bias added to it.

    `kind`: "dot" | "conv" | "lookup". For a dot only `dimension_numbers` and `precision` say something; for a lookup, whose
    `lhs` are row numbers and whose `rhs` is the table, nothing does. `function` is the module's own hook, or the plain lax
    function; `extra` what else Flax hands to it (`preferred_element_type`, say).
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
    bias: Array | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    channels: bool = True  # whether the weights keep their axes, so that each output channel can have a scale

    @property
    def summed(self) -> tuple[int, ...] | None:
        """Axes of the weights that the product sums over; None where they are not known."""
        return summed_axes(self) if self.channels else None

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """The product as the model computes it, bias included."""
        return self.add_bias(self.multiply(lhs, rhs))

    def multiply(self, lhs: Array, rhs: Array, *, accumulate: str | None = None) -> Array:
        """The product without bias.

        `accumulate`: dtype of accumulation and result where the operands are narrower (`preferred_element_type`). A
        hook that has no such argument gets its operands converted up first: the result is the same.
        """
        if self.kind == "lookup":
            rows = self.function(lhs, rhs)
            return rows if accumulate is None else rows.astype(accumulate)
        if accumulate is not None and not _takes_preferred_type(self.function):
            lhs, rhs, accumulate = lhs.astype(accumulate), rhs.astype(accumulate), None
        extra = dict(self.extra) if accumulate is None else {"preferred_element_type": jnp.dtype(accumulate)}
        if self.kind == "dot":
            return self.function(lhs, rhs, self.dimension_numbers, precision=self.precision, **extra)
        return self.function(
            lhs,
            rhs,
            self.window_strides,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            dimension_numbers=self.dimension_numbers,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            **extra,
        )

    def add_bias(self, out: Array) -> Array:
        """`out` plus the bias, added in the dtype of `out`."""
        if self.bias is None:
            return out
        bias = self.bias.astype(out.dtype)
        return out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)


def flops(product: Product, lhs: Any, rhs: Any, out: Any) -> int:
    """Two per multiply-add, for operands of these shapes; zeros that a transposed convolution puts in between count."""
    if product.kind == "lookup":
        return 0
    if product.kind == "dot":
        (contract, _), _ = product.dimension_numbers
        return 2 * math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contract)
    return 2 * math.prod(out.shape) * math.prod(rhs.shape[axis] for axis in summed_axes(product))


def row_count(lhs: Any, contract: Sequence[int]) -> int:
    """Of the matrix that a dot without batch axes makes of its left side."""
    return math.prod(size for axis, size in enumerate(lhs.shape) if axis not in contract)


def summed_axes(product: Product) -> tuple[int, ...]:
    """Axes of `rhs` that the product sums over; of a table, the axis along a row."""
    if product.kind == "lookup":
        return (1,)
    if product.kind == "dot":
        (_, contract), _ = product.dimension_numbers
        return tuple(contract)
    numbers, rank = product.dimension_numbers, len(product.window_strides) + 2
    features = numbers.rhs_spec[0] if isinstance(numbers, jax.lax.ConvDimensionNumbers) else numbers[1].index("O")
    return tuple(axis for axis in range(rank) if axis != features)


def _takes_preferred_type(function: Callable[..., Any]) -> bool:
    if function in (jax.lax.dot_general, jax.lax.conv_general_dilated):
        return True
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "preferred_element_type" in parameters
