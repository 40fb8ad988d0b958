"""Run a traced program again, with a function standing in for each product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import lax

from mpjax.program.folding import bind
from mpjax.program.product import Array, Layer, Override
from mpjax.program.steps import Block, Branch, Constant, Loop, Multiply, Nested, Program, Ref, Remat, While

_Reads = Callable[[Ref], Any]


def run(
    program: Program,
    weights: Mapping[str, Any],
    inputs: Sequence[Any],
    override: Override | None,
    layers: Mapping[str, Layer],
) -> Any:
    """The program's outputs.

    Args:
        weights: by name. What is no plain array (a weight as a format stores it) may be any pytree, which a scan slices along
            the first axis of its leaves; the override must expect it.
        inputs: as the function takes them.
        override: called as `override(layer, product, activations, weights)` in place of each product of the layers; its result
            is cast to the dtype that the program has there. None: the products as they are.
        layers: by name.
    """
    outputs = _Run(weights, override, layers).block(program.block, jax.tree.leaves(inputs), {})
    return jax.tree.unflatten(program.tree, outputs)


@dataclass(frozen=True)
class _Run:
    weights: Mapping[str, Any]
    override: Override | None
    layers: Mapping[str, Layer]

    def block(self, block: Block, inputs: Sequence[Any], outer: Mapping[int, Any]) -> list[Any]:
        values = {**outer, **dict(zip(block.inputs, inputs, strict=True))}

        def read(ref: Ref) -> Any:
            if isinstance(ref, int):
                return values[ref]
            return ref.value if isinstance(ref, Constant) else self.weights[ref.name]

        for step in block.steps:
            with _scope(step.scope):
                if isinstance(step, Multiply):
                    results: Sequence[Any] = [self.multiply(step, read)]
                elif isinstance(step, Nested):
                    results = self.nested(step, [read(ref) for ref in step.operands], values)
                else:
                    results = bind(step.equation, map(read, step.operands))
            values.update(zip(step.outputs, results, strict=True))
        return [read(ref) for ref in block.outputs]

    def multiply(self, step: Multiply, read: _Reads) -> Array:
        product, lhs, rhs = step.product, read(step.lhs), read(step.rhs)
        if step.operands:
            product = replace(product, operands=tuple(map(read, step.operands)))
        layer = self.layers.get(step.layer)
        with _scope(step.layer):
            if layer is None or self.override is None:
                out = product(lhs, rhs)
            else:
                out = self.override(layer, product, lhs, rhs)
            return out.astype(step.out_spec.dtype)

    def nested(self, step: Nested, operands: list[Any], outer: Mapping[int, Any]) -> Sequence[Any]:
        if isinstance(step, Loop):
            return self.loop(step, operands, outer)
        functions = [lambda *values, block=block: self.block(block, values, outer) for block in step.blocks]
        if isinstance(step, Branch):
            return lax.switch(operands[0], functions, *operands[1:])
        if isinstance(step, While):
            test, body = functions
            return lax.while_loop(lambda carry: test(*carry)[0], lambda carry: body(*carry), operands)
        assert isinstance(step, Remat)
        params = step.equation.params
        options = {name: params[name] for name in ("prevent_cse", "policy") if name in params}
        return jax.checkpoint(functions[0], **options)(*operands)

    def loop(self, step: Loop, operands: list[Any], outer: Mapping[int, Any]) -> Sequence[Any]:
        (block,), count = step.blocks, step.carry
        stacks = {weight.name: self.weights[weight.name] for weight in block.sliced.values()}

        def body(carry: list[Any], xs: Any) -> tuple[list[Any], list[Any]]:
            values, slices = xs
            inside = replace(self, weights={**self.weights, **slices})
            results = inside.block(block, [*carry, *values], outer)
            return results[:count], results[count:]

        options = {name: step.equation.params[name] for name in ("length", "reverse", "unroll")}
        last, outputs = lax.scan(body, operands[:count], (operands[count:], stacks), **options)
        return [*last, *outputs]


def _scope(name: str) -> AbstractContextManager[Any]:
    """A named scope: of a step as it was traced, so that a program that it is put into still names it."""
    return jax.named_scope(name) if name else nullcontext()
