"""Which layer's output reaches which layer's input, and how often each product runs: read from the traced program.

Execution order is not the graph: residuals skip layers, concatenations have several producers, branches end apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mpjax.program.model import Model
from mpjax.program.product import Array, Product
from mpjax.program.reaching import reaching
from mpjax.program.steps import Multiply, Program, products_of

Edges = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One place in the program where a layer's product stands.

    `lhs`, `rhs`, `out`: shapes and dtypes of one run; `rhs` is the weight as the product multiplies it, and `product` the product
    of these. `runs`: how often the program runs it: under a scan its length times; in a `cond` as if its branch were taken, in a
    `while_loop` as for one iteration.
    """

    layer: str
    product: Product
    lhs: jax.ShapeDtypeStruct
    rhs: jax.ShapeDtypeStruct
    out: jax.ShapeDtypeStruct
    runs: int


def edges(model: Model, *inputs: Array) -> Edges:
    """The pairs (producer, consumer): a layer's output reaches the consumer's input through no other layer.

    Args:
        model: a model; a mixed one has the graph of its original.
        *inputs: as `model.call` takes them; only shapes and dtypes are used.

    Returns:
        Each pair once, in execution order of the consumer, then of the producer. A layer that reads only the model's
        inputs is no pair's consumer. A layer that runs several times (shared, or under a scan) is paired with itself where one
        of its runs reads another one's output.

    Whole arrays are followed: what is written to one part of an array counts as in all of it, and a predicate counts as reaching
    what it selects. A loop without products counts as running any number of times, and a primitive with an unknown program inside
    as depending on all of its inputs.

    Raises:
        ValueError: no inputs.
    """
    order = {name: number for number, name in enumerate(model.names)}
    direct = reaching(_program(model, inputs).block)

    def producers(step: Multiply, met: set[Multiply]) -> Iterator[str]:
        """Names of the nearest layers, through products of no layer."""
        for source in direct[step]:
            if source.layer in order:
                yield source.layer
            elif source not in met:
                met.add(source)
                yield from producers(source, met)

    pairs = {(name, step.layer) for step in direct if step.layer in order for name in producers(step, {step})}
    return tuple(sorted(pairs, key=lambda pair: (order[pair[1]], order[pair[0]])))


def calls(model: Model, *inputs: Array) -> tuple[Call, ...]:
    """Every product of the layers for these inputs, in execution order. See `edges` for arguments and errors."""
    names = set(model.names)
    return tuple(
        Call(
            layer=step.layer,
            product=step.product.bare,
            lhs=step.lhs_spec,
            rhs=step.rhs_spec,
            out=step.out_spec,
            runs=runs,
        )
        for step, runs in products_of(_program(model, inputs).block)
        if step.layer in names
    )


def _program(model: Model, inputs: Sequence[Any]) -> Program:
    if not inputs:
        raise ValueError("Expected the model's inputs after the model, found none: pass one batch, *batches[0].")
    if model.traced is None:
        raise ValueError("Expected a model from from_function, from_linen or from_nnx.")
    return model.traced.program(inputs)
