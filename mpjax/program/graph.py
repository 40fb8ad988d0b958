"""Which layer's output reaches which layer's input, and how often each product runs: read from the traced program.

Execution order is not the graph: residuals skip layers, concatenations have several producers, branches end apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mpjax.program.model import Array, Model, Product
from mpjax.program.steps import Block, Loop, Multiply, Nested, Program, reaching

Edges = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One place in the program where a layer's product stands.

    `lhs`, `rhs`, `out`: what one run takes and gives; `rhs` is the weight as the product multiplies it, and `product` the product
    of these. `runs`: how often the program runs it: under a scan its length times; in a `cond` as if its branch were taken, in a
    `while_loop` as if it turned once.
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

    The walk follows whole arrays: what is written to one part of an array counts as in all of it, and a predicate counts as
    reaching what it selects. What is not known of a primitive with a program inside it is assumed to depend on all of its inputs.

    Raises:
        ValueError: no inputs.
    """
    program = _program(model, inputs)
    order = {name: number for number, name in enumerate(model.names)}
    direct: dict[Multiply, set[Multiply]] = {}

    def seen(step: Multiply, lhs: frozenset[Multiply], rhs: frozenset[Multiply]) -> None:
        direct.setdefault(step, set()).update(lhs | rhs)

    reaching(program.block, seen)

    def producers(step: Multiply, met: set[Multiply]) -> Iterator[str]:
        """Names of the nearest layers; through products that are none."""
        for each in direct.get(step, ()):
            if each.layer in order:
                yield each.layer
            elif each not in met:
                met.add(each)
                yield from producers(each, met)

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
        for step, runs in _runs(_program(model, inputs).block, 1)
        if step.layer in names
    )


def _runs(block: Block, times: int) -> Iterator[tuple[Multiply, int]]:
    for step in block.steps:
        if isinstance(step, Multiply):
            yield step, times
        elif isinstance(step, Nested):
            for inner in step.blocks:
                yield from _runs(inner, times * (step.equation.params["length"] if isinstance(step, Loop) else 1))


def _program(model: Model, inputs: Sequence[Any]) -> Program:
    if not inputs:
        raise ValueError("Expected the model's inputs after the model, found none: pass one batch, *batches[0].")
    if model.traced is None:
        raise ValueError("Expected a model from from_function, from_linen or from_nnx.")
    return model.traced.program(inputs)
