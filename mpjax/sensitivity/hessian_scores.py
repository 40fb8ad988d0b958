"""Sensitivities from Hessian-vector products and gradients of a loss: the estimators behind `from_loss` and `sensitivity`.

An `Objective` is a loss as a sum over examples, given as batches; a plain `loss(params)` is one with a single batch that
holds nothing. Layers are blocks of its parameters. One Hessian-vector product is forward over reverse. Where blocks need
their own Krylov spaces they share one program: vectors are padded to the largest block, and which block it is, is a traced
number.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax import partition
from mpjax.curvature.estimates import Estimator
from mpjax.curvature.operators import Operator
from mpjax.formats import Format
from mpjax.ledger import Ledger
from mpjax.partition import Block, Partition
from mpjax.program.model import Array, Batches, Params
from mpjax.sensitivity.scores import Key, Rounding, Scores, Timed, block_sizes, make_scores, rounding_of

Values = dict[str, Array]  # slash path -> leaf


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss of parameters, and the blocks whose sensitivity is asked for.

    Attributes:
        total: (params, *batch) -> scalar, the sum over the batch's examples.
        params: where the derivatives are taken.
        blocks: the layers.
        batches: equal shapes; `((),)` for a loss that is closed over its data.
        examples: what the sum over all batches is divided by.
        loss: its name.
    """

    total: Callable[..., Array]
    params: Params
    blocks: Partition
    batches: Batches
    examples: int
    loss: str

    @property
    def values(self) -> Values:
        """The blocks' leaves."""
        return partition.select_all(self.params, self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(block.name for block in self.blocks)

    @property
    def sizes(self) -> np.ndarray:
        """(L,) parameters of each block."""
        return block_sizes(self.params, self.blocks)

    def gradient(self, params: Params, batch: Sequence[Array]) -> Callable[[Values], Values]:
        """∇ of the batch's loss with respect to the blocks' leaves, everything else held fixed."""
        return jax.grad(lambda values: self.total(partition.replace(params, values), *batch))


def trace(
    objective: Objective, key: Key, *, num_probes: int, joint: bool, batch_size: int, timed: Timed
) -> tuple[np.ndarray, Ledger]:
    """(K, L) Hutchinson samples of the trace of each block of the mean loss's Hessian; unbiased, one row per probe.

    `joint`: one product per probe serves all blocks, vᵢᵀ(Hv)ᵢ; the other blocks' parts of v only add variance.
    Otherwise each block has its own products, K L in all.
    """
    blocks = objective.blocks
    count = num_probes if joint else num_probes * len(blocks)

    def each(function: Callable[[Any], Any], xs: Any) -> Any:
        if jax.tree.leaves(xs)[0].shape[0] > 1:
            return jax.vmap(function)(xs)
        return jax.tree.map(lambda out: out[None], function(jax.tree.map(lambda x: x[0], xs)))

    def probe(key: Key, values: Values, number: Array) -> Values:
        if joint:
            return _signs(key, number, values)
        v = _signs(key, number // len(blocks), values)
        return partition.only(blocks, number % len(blocks), v)

    def of_probe(params: Params, batch: Sequence[Array], v: Values) -> Array:
        values, gradient = partition.select_all(params, blocks), objective.gradient(params, batch)
        dots = _block_dots(blocks, v, jax.jvp(gradient, (values,), (v,))[1])
        return dots if joint else jnp.sum(dots)

    # Loops on the host, over two programs: XLA:CPU runs the product several times slower inside a loop of its own and from a
    # stored linearisation, and nearly twice as slow in one program with the drawing of its vector.
    draw = timed.jit(lambda key, values, numbers: each(partial(probe, key, values), numbers))
    run = timed.jit(lambda params, probes, *batch: each(partial(of_probe, params, batch), probes))
    samples = []
    for start in range(0, count, batch_size):
        probes = draw(key, objective.values, jnp.arange(start, min(start + batch_size, count)))
        samples.append(sum(np.float64(run(objective.params, probes, *batch)) for batch in objective.batches))
    ledger = Ledger(hvp=count * objective.examples, compilations=timed.compilations)
    return np.concatenate(samples).reshape(num_probes, len(blocks)) / objective.examples, ledger


def per_block(
    objective: Objective,
    estimator: Estimator,
    key: Key,
    *,
    timed: Timed,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Ledger]:
    """An estimator of one operator, on every block of the mean loss's Hessian: value, stderr, residual, each (L,).

    One program serves all blocks. Memory: one Hessian-vector product of a batch, and the estimator's own vectors, as long
    as the largest block.
    """
    blocks = objective.blocks
    sizes = objective.sizes
    stacked = tuple(jnp.stack(arrays) for arrays in zip(*objective.batches, strict=True))
    dtype = jnp.result_type(*objective.values.values())
    largest = int(sizes.max())
    products: list[int] = []

    def run(params: Params, index: Array, block_key: Key, *data: Array) -> tuple[Array, Array, Array]:
        values = partition.select_all(params, blocks)
        scale = jnp.asarray(1.0 / objective.examples, dtype)

        def product(vector: Values) -> Values:
            if not data:
                return jax.jvp(objective.gradient(params, ()), (values,), (vector,))[1]

            def add(total: Values, batch: Sequence[Array]) -> tuple[Values, None]:
                part = jax.jvp(objective.gradient(params, batch), (values,), (vector,))[1]
                return jax.tree.map(jnp.add, total, part), None

            return lax.scan(add, jax.tree.map(jnp.zeros_like, values), data)[0]

        def matvec(x: Array) -> Array:
            vector = {
                path: jnp.where(index == position, leaf, jnp.zeros_like(leaf))
                for position, block in enumerate(blocks)
                for path, leaf in _unravel(x, block, values).items()
            }
            return scale * lax.switch(index, [lambda hv, b=b: _ravel(hv, b, largest) for b in blocks], product(vector))

        operator = Operator(matvec=matvec, size=largest, dtype=dtype, active=jnp.asarray(sizes)[index])
        found = estimator(operator, block_key)
        products.append(found.ledger.hvp)  # a count that is known while tracing
        return found.value, found.stderr, found.residual

    compiled = timed.jit(run)
    rows = []
    for index, block in enumerate(blocks):
        block_key = jax.random.fold_in(key, zlib.crc32(block.name.encode()))
        rows.append([float(x) for x in compiled(objective.params, jnp.asarray(index), block_key, *stacked)])
    value, stderr, residual = np.array(rows).T
    ledger = Ledger(hvp=products[0] * len(blocks) * objective.examples, compilations=timed.compilations)
    return value, stderr, residual, ledger


def quadratic(objective: Objective, formats: Sequence[Format], name: str) -> Scores:
    """½ δᵀHδ of each block and format: one Hessian-vector product each."""
    timed = Timed()
    rounding = rounding_of(objective.params, objective.blocks, formats, timed)

    def of_block(params: Params, delta: Values, number: Array, *batch: Array) -> Array:
        values, gradient = partition.select_all(params, objective.blocks), objective.gradient(params, batch)
        only = partition.only(objective.blocks, number, delta)
        return 0.5 * jnp.sum(_block_dots(objective.blocks, only, jax.jvp(gradient, (values,), (only,))[1]))

    run = timed.jit(of_block)  # looped over on the host, for the reason given in `trace`
    value = np.array(
        [
            [
                sum(float(run(objective.params, delta, jnp.asarray(number), *batch)) for batch in objective.batches)
                for delta in rounding.deltas
            ]
            for number in range(len(objective.blocks))
        ]
    )
    value /= objective.examples
    products = objective.examples * value.size
    ledger = Ledger(vjp=objective.examples * len(formats), hvp=products, compilations=timed.compilations)
    return _finish(objective, formats, name, value, rounding, timed, ledger)


def first_order(objective: Objective, formats: Sequence[Format], name: str) -> Scores:
    """|gᵀδ| of each block and format, g the gradient of the mean loss: one gradient in all."""
    timed = Timed()
    rounding = rounding_of(objective.params, objective.blocks, formats, timed)

    def of_batch(params: Params, deltas: Sequence[Values], *batch: Array) -> Array:  # -> (L, F)
        gradient = objective.gradient(params, batch)(partition.select_all(params, objective.blocks))
        return jnp.stack([_block_dots(objective.blocks, gradient, delta) for delta in deltas], axis=1)

    run = timed.jit(of_batch)
    total = sum(np.float64(run(objective.params, rounding.deltas, *batch)) for batch in objective.batches)
    value = np.abs(total / objective.examples)
    ledger = Ledger(vjp=objective.examples, compilations=timed.compilations)
    return _finish(objective, formats, name, value, rounding, timed, ledger)


def squared_gradient(objective: Objective, formats: Sequence[Format], name: str) -> Scores:
    """½ Σ g²δ² of each block and format, g the gradient of the mean loss (not of single examples)."""
    timed = Timed()
    rounding = rounding_of(objective.params, objective.blocks, formats, timed)

    def gradient(params: Params, *batch: Array) -> Values:
        return objective.gradient(params, batch)(partition.select_all(params, objective.blocks))

    run = timed.jit(gradient)
    parts = [run(objective.params, *batch) for batch in objective.batches]
    mean = {path: sum(np.float64(part[path]) for part in parts) / objective.examples for path in parts[0]}
    value = np.array(
        [
            [0.5 * sum(np.sum((mean[p] * np.float64(delta[p])) ** 2) for p in block.paths) for delta in rounding.deltas]
            for block in objective.blocks
        ]
    )
    ledger = Ledger(vjp=objective.examples, compilations=timed.compilations)
    return _finish(objective, formats, name, value, rounding, timed, ledger)


def in_scale(
    params: Params,
    blocks: Partition,
    formats: Sequence[Format],
    name: str,
    value: np.ndarray,
    stderr: np.ndarray | None,
    residual: np.ndarray | None,
    *,
    scale: str,
    loss: str,
    timed: Timed,
    ledger: Ledger,
    mean: bool,
) -> Scores:
    """A curvature (L,) as scores: as it is ("none"), per parameter, or times half the rounding's power ("noise").

    With `mean` the curvature is a trace, and "noise" takes its mean over the block's parameters (HAWQ-V2).
    """
    timed = copy.copy(timed)  # a spectrum's, which other scores add to as well
    sizes = block_sizes(params, blocks)
    factors, unchanged, overflowed = np.ones((len(blocks), len(formats))), None, None
    if scale == "per_parameter":
        factors /= sizes[:, None]
    elif scale == "noise":
        rounding = rounding_of(params, blocks, formats, timed)
        factors = 0.5 * rounding.squares / (sizes[:, None] if mean else 1.0)
        unchanged, overflowed = rounding.unchanged, rounding.overflowed
    none = np.zeros(len(blocks))
    with np.errstate(invalid="ignore"):  # where a weight overflows: 0 · inf
        parts = [
            each[:, None] * factors
            for each in (value, none if stderr is None else stderr, none if residual is None else residual)
        ]
    return make_scores(
        name,
        tuple(block.name for block in blocks),
        formats,
        parts[0],
        stderr=parts[1],
        residual=parts[2],
        loss=loss,
        ledger=ledger,
        timed=timed,
        kind="loss" if scale == "noise" else "ranking",
        unchanged=unchanged,
        overflowed=overflowed,
    )


# --- helpers ----------------------------------------------------------------------------------------------------------


def _finish(
    objective: Objective,
    formats: Sequence[Format],
    name: str,
    value: np.ndarray,
    rounding: Rounding,
    timed: Timed,
    ledger: Ledger,
) -> Scores:
    return make_scores(
        name,
        objective.names,
        formats,
        value,
        loss=objective.loss,
        ledger=ledger,
        timed=timed,
        kind="loss",
        unchanged=rounding.unchanged,
        overflowed=rounding.overflowed,
    )


def _signs(key: Key, number: Array, values: Values) -> Values:
    """Random signs; a leaf's depend on its path and not on its position."""
    keys = {path: jax.random.fold_in(key, zlib.crc32(path.encode())) for path in values}
    return {path: _leaf_signs(jax.random.fold_in(keys[path], number), leaf) for path, leaf in values.items()}


def _leaf_signs(key: Key, leaf: Array) -> Array:
    """±1 in the shape of a leaf, 32 to a random word: `jax.random.rademacher` draws a word each, over 10 times slower."""
    words = jax.random.bits(key, (-(-leaf.size // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & jnp.uint32(1)
    return (1 - 2 * bits.astype(jnp.int32)).astype(leaf.dtype).ravel()[: leaf.size].reshape(leaf.shape)


def _block_dots(blocks: Partition, a: Values, b: Values) -> Array:
    """(L,) inner products of two sets of values, block by block."""
    return jnp.stack([sum((jnp.vdot(a[p], b[p]) for p in block.paths[1:]), jnp.vdot(a[block.paths[0]], b[block.paths[0]]))
                      for block in blocks])  # fmt: skip


def _unravel(x: Array, block: Block, values: Values) -> Values:
    parts, start = {}, 0
    for path in block.paths:
        leaf = values[path]
        parts[path] = x[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype)
        start += leaf.size
    return parts


def _ravel(values: Values, block: Block, size: int) -> Array:
    flat = jnp.concatenate([values[path].ravel() for path in block.paths])
    return jnp.pad(flat, (0, size - flat.size))
