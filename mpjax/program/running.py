"""Run a traced program again, with a function standing in for each product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax
from jax import lax

from mpjax.program.product import Array, Layer, Override
from mpjax.program.steps import Bind, Block, Branch, Constant, Loop, Multiply, Program, Ref, Remat, While, bind

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
            the first axis of its leaves; only an override that expects it may meet it.
        inputs: as the function takes them.
        override: called as `override(layer, product, activations, weights)` in place of each product of the layers; what it gives
            is cast to the dtype that the program has there. None: the products as they are.
        layers: by name.
    """
    state = _State(weights=weights, override=override, layers=layers)
    outputs = state.block(program.block, jax.tree.leaves(inputs), {})
    return jax.tree.unflatten(program.tree, outputs)


class _State:
    def __init__(self, weights: Mapping[str, Any], override: Override | None, layers: Mapping[str, Layer]) -> None:
        self.weights, self.override, self.layers = weights, override, layers

    def inside(self, slices: Mapping[str, Any]) -> _State:
        """The same, in the body of a scan."""
        return _State({**self.weights, **slices}, self.override, self.layers)

    def block(self, block: Block, inputs: Sequence[Any], outer: Mapping[int, Any]) -> list[Any]:
        values = {**outer, **dict(zip(block.inputs, inputs, strict=True))}

        def read(ref: Ref) -> Any:
            if isinstance(ref, int):
                return values[ref]
            return ref.value if isinstance(ref, Constant) else self.weights[ref.name]

        for step in block.steps:
            if isinstance(step, Multiply):
                values[step.output] = self.multiply(step, read)
                continue
            with scope(step.scope):
                if isinstance(step, Bind) or step.whole:
                    found = bind(step.equation, [read(each) for each in step.operands])
                elif isinstance(step, Loop):
                    found = self.loop(step, read, values)
                elif isinstance(step, While):
                    found = self.repeat(step, read, values)
                elif isinstance(step, Branch):
                    found = self.branch(step, read, values)
                else:
                    found = self.remat(step, read, values)
            values.update(zip(step.outputs, found, strict=True))
        return [read(each) for each in block.outputs]

    def multiply(self, step: Multiply, read: _Reads) -> Array:
        layer = self.layers.get(step.layer) if self.override is not None else None
        product = step.product
        if step.operands:
            product = replace(product, operands=tuple(read(each) for each in step.operands))
        lhs, rhs = read(step.lhs), read(step.rhs)
        with scope(step.scope):
            if layer is None or self.override is None:
                with jax.named_scope(step.layer) if step.layer else nullcontext():
                    return product(lhs, rhs).astype(step.out_spec.dtype)
            with jax.named_scope(layer.name):
                return self.override(layer, product, lhs, rhs).astype(step.out_spec.dtype)

    def loop(self, step: Loop, read: _Reads, outer: Mapping[int, Any]) -> list[Any]:
        (block,), operands = step.blocks, [read(each) for each in step.operands]
        carry, xs = operands[: step.carry], operands[step.carry :]
        stacks = {weight.name: self.weights[weight.name] for weight in block.sliced.values()}

        def body(carry: list[Any], each: Any) -> tuple[list[Any], list[Any]]:
            values, slices = each
            found = self.inside(slices).block(block, [*carry, *values], outer)
            return found[: step.carry], found[step.carry :]

        params = step.equation.params
        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        last, stacked = lax.scan(body, carry, (xs, stacks), **options)
        return [*last, *stacked]

    def repeat(self, step: While, read: _Reads, outer: Mapping[int, Any]) -> list[Any]:
        test, body = step.blocks
        return lax.while_loop(
            lambda carry: self.block(test, carry, outer)[0],
            lambda carry: self.block(body, carry, outer),
            [read(each) for each in step.operands],
        )

    def branch(self, step: Branch, read: _Reads, outer: Mapping[int, Any]) -> list[Any]:
        index, *operands = (read(each) for each in step.operands)
        branches = [lambda *each, block=block: self.block(block, each, outer) for block in step.blocks]
        return lax.switch(index, branches, *operands)

    def remat(self, step: Remat, read: _Reads, outer: Mapping[int, Any]) -> list[Any]:
        (block,), params = step.blocks, step.equation.params
        options = {name: params[name] for name in ("prevent_cse", "policy") if name in params}
        return jax.checkpoint(lambda *each: self.block(block, each, outer), **options)(
            *(read(each) for each in step.operands)
        )


def scope(name: str) -> AbstractContextManager[Any]:
    """The scope that a step was traced in, so that a program that it is put into still names it."""
    return jax.named_scope(name) if name else nullcontext()
