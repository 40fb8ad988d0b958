"""The traced program of a function of parameters and inputs: its products, and the weights that they multiply.

A tree of steps, which `tracing` makes and `running` runs with a function standing in for each product:

| step | what it is |
| --- | --- |
| `Bind` | an equation of the traced program, bound as it is |
| `Multiply` | a product: `dot_general`, `conv_general_dilated`, `ragged_dot_general`, or a `gather` of a weight's rows |
| `Loop`, `While`, `Branch`, `Remat` | `scan`, `while`, `cond` and `remat` around programs with products of their own |

Weights are parameters as they are, or values that depend on parameters and constants alone, computed once (`values`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from mpjax.program.folding import Known, evaluate
from mpjax.program.product import Axes, Layer, Product, flops


@dataclass(eq=False, kw_only=True)
class Weight:
    """A known value that the program takes as an argument: a parameter as it is, or a folded one.

    `name`: slash path, unique. `layer`: name of its layer; "" where `reason` says why it is none. `taken_by`: primitives other
    than products that take it. `products`: with the axes of the weight that each sums over (None: unknown), and those along
    which it has a weight each.
    """

    value: Known
    level: int
    name: str = ""
    layer: str = ""
    reason: str = ""
    taken_by: set[str] = field(default_factory=set)
    products: list[tuple[Multiply, Axes | None, Axes]] = field(default_factory=list)

    @property
    def folded(self) -> bool:
        return self.value.path is None

    @property
    def identity(self) -> tuple:
        """Equal for weights that are computed alike."""
        return (self.value.identity, self.level)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is held."""
        return (*(loop.length for loop in self.value.loops), *self.value.shape)


@dataclass(frozen=True)
class Constant:
    """A constant operand of a step."""

    value: Any


Ref = int | Constant | Weight  # an operand of a step: a slot, a constant, or a weight


@dataclass(eq=False, kw_only=True)
class Block:
    """Steps, with the slots that they start from and the outputs.

    `length`: of the scan whose body it is, else 1. `sliced`: by id, the weights that this scan slices. `emitted`: outputs of
    steps that compute a known value, by its equation, operands and index.
    """

    inputs: tuple[int, ...]
    steps: list[Any] = field(default_factory=list)
    outputs: tuple[Ref, ...] = ()
    parent: Block | None = None
    length: int = 1
    sliced: dict[int, Weight] = field(default_factory=dict)
    emitted: dict[tuple, tuple[Known, int]] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else 1 + self.parent.depth


@dataclass(eq=False, kw_only=True)
class Bind:
    equation: Any
    operands: tuple[Ref, ...]
    outputs: tuple[int, ...]
    scope: str


@dataclass(eq=False, kw_only=True)
class Multiply:
    """A product; `weight` is None where both operands are activations. `rhs_spec` is that of the viewed operand."""

    product: Product
    weight: Weight | None
    lhs: Ref
    rhs: Ref
    operands: tuple[Ref, ...]
    outputs: tuple[int, ...]
    scope: str
    lhs_spec: jax.ShapeDtypeStruct
    rhs_spec: jax.ShapeDtypeStruct
    out_spec: jax.ShapeDtypeStruct
    layer: str = ""


@dataclass(eq=False, kw_only=True)
class Nested(Bind):
    """A step around programs that have products."""

    blocks: tuple[Block, ...]


@dataclass(eq=False, kw_only=True)
class Loop(Nested):
    """`scan`: operands are the carry and xs, the block takes the carry and slices of xs. `carry`: how many are carried."""

    carry: int


class While(Nested):
    """`while`: blocks are the test and the body; operands are the carry."""


class Branch(Nested):
    """`cond`: the first operand picks one of the blocks, which take the others."""


class Remat(Nested):
    """`jax.checkpoint`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A function's program for inputs of one set of shapes.

    Attributes:
        block: the steps; its inputs are the leaves of the function's inputs.
        weights: in the order of their first use.
        layers: those whose products a format may lower, in execution order.
        activation_products: products of two activations, likewise.
        used: parameters that some output depends on.
        tree: structure of the outputs.
        constants: shapes of constant matrices that are multiplied with activations.
    """

    block: Block
    weights: tuple[Weight, ...]
    layers: tuple[Layer, ...]
    activation_products: tuple[Layer, ...]
    used: frozenset[str]
    tree: Any
    constants: tuple[tuple[int, ...], ...]


def values(program: Program, params: Mapping[str, Any]) -> dict[str, Any]:
    """The program's weights, from the parameters by path."""
    folded = evaluate({weight.name: weight.value for weight in program.weights if weight.folded}, params)
    return {
        weight.name: folded[weight.name] if weight.value.path is None else params[weight.value.path]
        for weight in program.weights
    }


def products_of(block: Block, runs: int = 1) -> Iterator[tuple[Multiply, int]]:
    """All products in execution order, with how often each runs: a branch as if taken, a `while` as for one iteration."""
    for step in block.steps:
        if isinstance(step, Multiply):
            yield step, runs
        elif isinstance(step, Nested):
            for inner in step.blocks:
                yield from products_of(inner, runs * inner.length)


def count(block: Block) -> dict[str, np.ndarray]:
    """(2,) for each layer: how often its products run, and their FLOPs, in one run of a block; the most of any branch."""
    total: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2, np.int64))
    for step in block.steps:
        if isinstance(step, Multiply):
            total[step.layer] += (1, flops(step.product, step.lhs_spec, step.rhs_spec, step.out_spec))
        elif isinstance(step, Nested):
            parts = [count(inner) for inner in step.blocks]
            times = step.blocks[0].length
            for name in set[str]().union(*parts):
                numbers = [part[name] for part in parts]
                total[name] += times * (np.max if isinstance(step, Branch) else np.sum)(numbers, axis=0)
    return total
