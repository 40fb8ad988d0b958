"""Which layer's output reaches which layer's input, and how often each product runs: read from the traced program.

Execution order is not the graph: residuals skip layers, concatenations have several producers, branches end apart. So
the model is traced (nothing is computed) with an override that names every product's input and output, and the jaxpr is
walked once: each variable carries the set of layers whose outputs reach it without passing through another layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Literal

from mpjax import traced
from mpjax.models import Array, Layer, Model, Product
from mpjax.traced import INPUT, OUTPUT

Edges = tuple[tuple[str, str], ...]
_Sources = frozenset[str]
_NONE: _Sources = frozenset()


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One place in the program where a layer's product stands.

    `product`: without its bias, whose shape and dtype are `bias` (None where there is none). `lhs`, `rhs`, `out`: what
    one run takes and gives. `runs`: how often the program runs it: under a scan its length times, under vmap once per
    mapped element; in a `cond` as if its branch were taken, in a `while_loop` as if it turned once.
    """

    layer: str
    product: Product
    lhs: jax.ShapeDtypeStruct
    rhs: jax.ShapeDtypeStruct
    bias: jax.ShapeDtypeStruct | None
    out: jax.ShapeDtypeStruct
    runs: int


def edges(model: Model, *inputs: Array) -> Edges:
    """The pairs (producer, consumer): a layer's output reaches the consumer's input through no other layer.

    Args:
        model: a model; of a mixed one the original is traced, whose graph is the same.
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
    jaxpr, calls = _trace(model, inputs)
    found: set[tuple[str, str]] = set()
    _walk(jaxpr, [_NONE] * len(jaxpr.invars), [call.layer for call in calls], found)
    order = {name: number for number, name in enumerate(model.names)}
    return tuple(sorted(found, key=lambda pair: (order[pair[1]], order[pair[0]])))


def calls(model: Model, *inputs: Array) -> tuple[Call, ...]:
    """Every product of the program for these inputs, in execution order. See `edges` for arguments and errors."""
    jaxpr, found = _trace(model, inputs)
    runs: Counter[int] = Counter()
    traced.count(jaxpr, 1, [max(math.prod(call.lhs.shape), 1) for call in found], runs)
    # Flax traces a scanned body more than once: what is not in the program never runs.
    return tuple(replace(call, runs=runs[number]) for number, call in enumerate(found) if runs[number])


def _trace(model: Model, inputs: Sequence[Any]) -> tuple[Jaxpr, list[Call]]:
    if not inputs:
        raise ValueError("Expected the model's inputs after the model, found none: pass one batch, *batches[0].")
    model = model.original or model
    found: list[Call] = []

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        number = len(found)
        out = product(checkpoint_name(lhs, f"{INPUT}{number}"), rhs)
        bias = None if product.bias is None else _spec(product.bias)
        found.append(
            Call(
                layer=layer.name,
                product=replace(product, bias=None),
                lhs=_spec(lhs),
                rhs=_spec(rhs),
                bias=bias,
                out=_spec(out),
                runs=0,
            )
        )
        return checkpoint_name(out, f"{OUTPUT}{number}")

    specs = jax.tree.map(_spec, (model.params, *inputs))
    closed = jax.make_jaxpr(lambda params, *each: model.call(params, *each, override=override))(*specs)
    return closed.jaxpr, found


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


# --- the walk over a jaxpr ----------------------------------------------------------------------------------------


def _walk(
    jaxpr: Jaxpr, sources: Sequence[_Sources], layers: Sequence[str], found: set[tuple[str, str]]
) -> list[_Sources]:
    """The nearest producers of the outputs, from those of the inputs; adds the edges inside to `found`."""
    reaching: dict[Any, _Sources] = dict(zip(jaxpr.invars, sources, strict=True))

    def read(atom: Any) -> _Sources:
        return _NONE if isinstance(atom, Literal) else reaching.get(atom, _NONE)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        mark, number = traced.marker(equation)
        if mark == INPUT:
            found.update((producer, layers[number]) for producer in operands[0])
        if mark == OUTPUT:
            results = [frozenset({layers[number]})]
        else:
            results = _through(equation, operands, layers, found)
        reaching.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _through(
    equation: Any, operands: list[_Sources], layers: Sequence[str], found: set[tuple[str, str]]
) -> list[_Sources]:
    """The producers of one equation's outputs."""

    def walk(program: Any, sources: Sequence[_Sources]) -> list[_Sources]:
        return _walk(program, sources, layers, found)

    name, params = equation.primitive.name, equation.params
    programs = list(traced.programs(params))
    count = len(equation.outvars)
    if not programs:
        return [_union(operands)] * count
    if name == "scan" and (sizes := _scan_sizes(params)) is not None:
        consts, carried = operands[: sizes[0]], operands[sizes[0] : sum(sizes)]
        return _scan(programs[0], consts, carried, operands[sum(sizes) :], params["length"], walk)
    if name == "while":
        test, body = traced.program(params["cond_jaxpr"]), traced.program(params["body_jaxpr"])
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = operands[second:]
        while True:
            stepped = walk(body, [*operands[first:second], *carry])
            wider = [a | b for a, b in zip(carry, stepped, strict=True)]
            (predicate,) = walk(test, [*operands[:first], *wider])
            if wider == carry:
                return [each | predicate for each in carry]
            carry = wider
    if name == "cond":
        branches = [walk(branch, operands[1:]) for branch in programs]
        return [_union([operands[0], *each]) for each in zip(*branches, strict=True)]
    if len(programs) == 1 and _same_shapes(equation, programs[0]):  # a call: jit, remat, custom_jvp, custom_vjp
        return walk(programs[0], operands)
    everything = _union(operands)
    while True:
        inside = [_union(walk(program, [everything] * len(program.invars))) for program in programs]
        if _union([everything, *inside]) == everything:
            return [everything] * count
        everything = _union([everything, *inside])


def _scan(
    body: Jaxpr, consts: list[_Sources], carry: list[_Sources], xs: list[_Sources], length: int, walk: Any
) -> list[_Sources]:
    """Turn by turn, as the scan runs; once the carry repeats, whole periods are left out."""
    size = len(carry)
    stacked = [_NONE] * (len(body.outvars) - size)
    seen: dict[tuple[_Sources, ...], int] | None = {}
    turn = 0
    while turn < length:
        if seen is not None and tuple(carry) in seen:
            turn = length - (length - turn) % (turn - seen[tuple(carry)])
            seen = None
            continue
        if seen is not None:
            seen[tuple(carry)] = turn
        results = walk(body, [*consts, *carry, *xs])
        carry = results[:size]
        stacked = [a | b for a, b in zip(stacked, results[size:], strict=True)]
        turn += 1
    return [*carry, *stacked]


def _scan_sizes(params: Mapping[str, Any]) -> list[int] | None:
    """How many operands of a scan are constants and how many are carried; None where this jax does not say it as known."""
    if "num_consts" in params and "num_carry" in params:
        return [params["num_consts"], params["num_carry"]]
    if "ft_in" in params:  # jax 0.12
        return [len(part) for part in params["ft_in"].unpack()][:2]
    return None


def _same_shapes(equation: Any, program: Jaxpr) -> bool:
    outer = ([each.aval for each in atoms] for atoms in (equation.invars, equation.outvars))
    inner = ([each.aval for each in atoms] for atoms in (program.invars, program.outvars))
    shapes = [[[getattr(aval, "shape", None) for aval in avals] for avals in both] for both in (outer, inner)]
    return shapes[0] == shapes[1]


def _union(sources: Iterable[_Sources]) -> _Sources:
    return _NONE.union(*sources)
