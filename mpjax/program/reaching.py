"""Which products' outputs reach which product's operands, through no other product."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.interpreters import partial_eval

from mpjax.program.folding import bind, opened, programs
from mpjax.program.steps import Block, Branch, Loop, Multiply, Nested, Ref, While

Sources = frozenset[Multiply]
_NONE: Sources = frozenset()


def reaching(block: Block) -> dict[Multiply, Sources]:
    """The products that reach an operand of each product, in execution order.

    Loops around products are followed iteration by iteration.
    """
    reached: dict[Multiply, Sources] = defaultdict(frozenset)
    _reach(block, [_NONE] * len(block.inputs), {}, reached)
    return reached


def _reach(
    block: Block, sources: Sequence[Sources], outer: Mapping[int, Sources], reached: dict[Multiply, Sources]
) -> list[Sources]:
    """Sources of the block's outputs, from those of its inputs; adds to `reached`."""
    values: dict[int, Sources] = {**outer, **dict(zip(block.inputs, sources, strict=True))}

    def read(ref: Ref) -> Sources:
        return values[ref] if isinstance(ref, int) else _NONE

    for step in block.steps:
        operands = [read(ref) for ref in step.operands]
        if isinstance(step, Multiply):
            reached[step] |= read(step.lhs) | read(step.rhs)
            results: Sequence[Sources] = [frozenset({step})]
        elif isinstance(step, Nested):
            results = _nested(step, operands, values, reached)
        else:
            results = _through(step.equation, operands)
        values.update(zip(step.outputs, results, strict=True))
    return [read(ref) for ref in block.outputs]


def _through(equation: Any, operands: Sequence[Sources]) -> list[Sources]:
    """Sources of an equation's outputs: of all operands, where JAX does not know which it depends on."""
    count, inner = len(equation.outvars), list(programs(equation))
    if not inner:
        return [_NONE.union(*operands)] * count
    if equation.primitive.name in ("custom_jvp_call", "custom_vjp_call"):  # as a whole, JAX keeps all operands
        jaxpr = opened(inner[0])
    else:
        specs = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in equation.invars]
        jaxpr = jax.make_jaxpr(lambda *values: bind(equation, values))(*specs).jaxpr
    results = []
    for number in range(count):
        _, used = partial_eval.dce_jaxpr(jaxpr, [number == at for at in range(count)])
        results.append(_NONE.union(*itertools.compress(operands, used)))
    return results


def _nested(step: Nested, operands: list[Sources], outer: Mapping[int, Sources], reached: Any) -> list[Sources]:
    if isinstance(step, Loop):
        return _loop(step, operands, outer, reached)
    if isinstance(step, Branch):
        branches = [_reach(block, operands[1:], outer, reached) for block in step.blocks]
        return [operands[0].union(*outputs) for outputs in zip(*branches, strict=True)]
    if isinstance(step, While):
        (test, body), carry = step.blocks, operands
        while True:
            wider = [a | b for a, b in zip(carry, _reach(body, carry, outer, reached), strict=True)]
            if wider == carry:
                (predicate,) = _reach(test, carry, outer, reached)
                return [part | predicate for part in carry]
            carry = wider
    return _reach(step.blocks[0], operands, outer, reached)


def _loop(step: Loop, operands: list[Sources], outer: Mapping[int, Sources], reached: Any) -> list[Sources]:
    """Iteration by iteration, until nothing changes any more."""
    (body,), count = step.blocks, step.carry
    carry, xs = operands[:count], operands[count:]
    stacked = [_NONE] * (len(body.outputs) - count)
    for _ in range(body.length):
        results = _reach(body, [*carry, *xs], outer, reached)
        stacked = [a | b for a, b in zip(stacked, results[count:], strict=True)]
        if results[:count] == carry:
            break
        carry = results[:count]
    return [*carry, *stacked]
