"""An estimator of one operator on every block of the Hessian, by one program for all blocks."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax import partition
from mpjax.curvature.estimates import Estimate, Estimator
from mpjax.curvature.operators import Operator, unravel
from mpjax.ledger import Ledger
from mpjax.partition import Block
from mpjax.program import Array, Params
from mpjax.sensitivity.scores import Key
from mpjax.sensitivity.task import Task, Values


def estimate_blocks(task: Task, estimator: Estimator) -> Estimate:
    """The estimates (L,) for every block of the mean loss's Hessian.

    Vectors are padded to the largest block, and the number of the block is traced. Memory: one Hessian-vector product of a
    batch, and the estimator's own vectors, as long as the largest block.
    """
    blocks, sizes = task.blocks, task.sizes
    stacked = tuple(jnp.stack(arrays) for arrays in zip(*task.batches, strict=True))
    dtype = jnp.result_type(*task.leaves(task.params).values())
    largest = int(sizes.max())
    products: list[int] = []

    def raveled(values: Values, block: Block) -> Array:
        flat = jnp.concatenate([values[path].ravel() for path in block.paths])
        return jnp.pad(flat, (0, largest - flat.size))

    def run(params: Params, index: Array, key: Key, *data: Array) -> tuple[Array, Array, Array]:
        leaves = task.leaves(params)
        scale = jnp.asarray(1.0 / task.examples, dtype)

        def product(vector: Values) -> Values:
            if not data:
                return task.hvp(params, (), vector)

            def add(total: Values, batch: tuple[Array, ...]) -> tuple[Values, None]:
                return jax.tree.map(jnp.add, total, task.hvp(params, batch, vector)), None

            return lax.scan(add, jax.tree.map(jnp.zeros_like, leaves), data)[0]

        def matvec(x: Array) -> Array:
            values: Values = {}
            for block in blocks:
                values |= unravel(x, {path: leaves[path] for path in block.paths})
            hv = product(partition.only(blocks, index, values))
            return scale * lax.switch(index, [lambda hv, block=block: raveled(hv, block) for block in blocks], hv)

        operator = Operator(matvec=matvec, size=largest, dtype=dtype, active=jnp.asarray(sizes)[index])
        estimate = estimator(operator, key)
        products.append(estimate.ledger.hvp)  # a count that is known while tracing
        return estimate.value, estimate.stderr, estimate.residual

    compiled = task.timed.jit(run)
    rows = []
    for index, block in enumerate(blocks):
        key = jax.random.fold_in(task.key, zlib.crc32(block.name.encode()))
        rows.append([float(x) for x in compiled(task.params, jnp.asarray(index), key, *stacked)])
    value, stderr, residual = np.array(rows).T
    ledger = Ledger(hvp=products[0] * len(blocks) * task.examples)
    return Estimate(value=value, stderr=stderr, residual=residual, ledger=ledger)
