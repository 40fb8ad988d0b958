"""Output probes: the curvature JᵀHJ of all layers at once, reached from the output side.

H is the Hessian of the loss with respect to the outputs of one example and J the Jacobian of those outputs with respect to a
layer's weights; JᵀHJ is the generalised Gauss-Newton matrix, and the true Fisher matrix where the loss is a negative
log-likelihood (Martens, arXiv 1412.1193). With random u, E[u uᵀ] = H, one vector-Jacobian product g = Jᵀu serves every layer and
every format: E[(gᵀδ)²] = δᵀJᵀHJδ, and E[‖g‖²] is the trace. With all rows of H^½ J in place of random ones the same is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax import losses
from mpjax.curvature.estimates import Estimate
from mpjax.ledger import Ledger
from mpjax.losses import Loss, flat, inexact, with_inexact
from mpjax.program import Array, Batches, Model, Params
from mpjax.sensitivity.gradients import scored
from mpjax.sensitivity.scores import Key, Scores
from mpjax.sensitivity.task import ModelTask, Values, exactly, per_block


def probe(
    task: ModelTask,
    reduce: Literal["directional", "elementwise", "squares"],
    num_probes: int | None,
) -> Estimate:
    """Mean over examples and probes of a square of g = Jᵀu, and its standard error; all layers from the same products.

    Args:
        reduce: "directional" (gᵀδ)², "elementwise" Σ g²δ² -> (L, F); "squares" ‖g‖² -> (L,).
        num_probes: random u per example with E[u uᵀ] = H; None takes the one gradient of the loss itself, u = ∂loss/∂f (the
            empirical Fisher), which is not random: its standard error is 0.

    Memory: one example's activations, and `num_probes` gradients of all layers' weights.
    """
    loss, count = task.loss, num_probes or 1
    all_deltas = () if reduce == "squares" else task.rounding.deltas

    def reduced(g: Values, deltas: Sequence[Values]) -> Array:
        if reduce == "squares":
            return per_block(task.blocks, lambda path: jnp.sum(jnp.square(g[path])))
        if reduce == "directional":
            return jnp.stack([jnp.square(task.block_dots(g, delta)) for delta in deltas], axis=1)
        squares = [jax.tree.map(lambda a, b: jnp.sum(jnp.square(a * b)), g, delta) for delta in deltas]
        return jnp.stack([per_block(task.blocks, sums.__getitem__) for sums in squares], axis=1)

    def squares_of_example(params: Params, deltas: Sequence[Values], key: Key, example: Sequence[Array]) -> Array:
        inputs, targets = loss.split(tuple(array[None] for array in example))
        function = task.outputs_of_leaves(params, inputs, scored)
        parts, pull, outputs = jax.vjp(function, task.leaves(params), has_aux=True)

        def square(number: Array) -> Array:
            if num_probes is None:
                u = output_gradient(loss, outputs, targets)(parts)
            else:
                assert loss.cotangents is not None
                u = inexact(loss.cotangents(jax.random.fold_in(key, number), outputs, *targets))
            return reduced(pull(u)[0], deltas)

        return jax.vmap(square)(jnp.arange(count))

    def mean_and_variance(params: Params, deltas: Sequence[Values], key: Key, *batch: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, batch[0].shape[0])
        squares = lax.map(lambda pair: squares_of_example(params, deltas, *pair), (keys, batch))  # (N, P, L, …)
        spread = jnp.var(squares, axis=1, ddof=1) if count > 1 else jnp.full_like(squares[:, 0], jnp.nan)
        return jnp.sum(jnp.mean(squares, axis=1), axis=0), jnp.sum(spread, axis=0) / count

    run = task.timed.jit(mean_and_variance)
    parts = [
        run(task.params, all_deltas, jax.random.fold_in(task.key, number), *batch)
        for number, batch in enumerate(task.batches)
    ]
    total, variance = (np.asarray(sum(np.float64(array) for array in arrays)) for arrays in zip(*parts, strict=True))
    estimate = exactly(total / task.examples, Ledger(forward=task.examples, vjp=task.examples * count))
    return estimate if num_probes is None else replace(estimate, stderr=np.sqrt(variance) / task.examples)


def half_square_scores(
    task: ModelTask, name: str, reduce: Literal["directional", "elementwise"], num_probes: int | None
) -> Scores:
    """½ E of a square of g with δ: a predicted loss."""
    halves = jax.tree.map(lambda array: array / 2, probe(task, reduce, num_probes))
    return task.scores(name, halves, kind="loss", rounded=True)


def output_gradient(loss: Loss, outputs: losses.Outputs, targets: Sequence[Array]) -> losses.Outputs:
    """∂loss/∂outputs at given outputs, as a function of those that have derivatives; the reference are `outputs`."""
    reference = lax.stop_gradient(outputs)
    return jax.grad(lambda parts: jnp.sum(loss.value(with_inexact(outputs, parts), reference, *targets)))


def half_hessian(loss: Loss, outputs: losses.Outputs, targets: Sequence[Array]) -> losses.Outputs:
    """Rows u_k of H^½ for one example (leading axis 1), shaped like the outputs behind an axis of K: Σ u_k u_kᵀ = H.

    H is the Hessian of the loss with respect to the outputs at outputs = reference; negative eigenvalues (of a loss that is not
    convex in its outputs) count as 0. The identity for the output loss. Memory: K × K.
    """
    joined = flat(outputs)[0]
    # A vector of K numbers as outputs: the transpose of taking them apart, which is linear.
    transposed = jax.linear_transpose(lambda parts: flat(with_inexact(outputs, parts))[0], inexact(outputs))

    def shaped(vector: Array) -> losses.Outputs:
        return with_inexact(outputs, transposed(vector)[0])

    def value(vector: Array) -> Array:
        # A cotangent of an imaginary part is its conjugate.
        leaves = jax.tree.map(lambda leaf: leaf.conj() if jnp.iscomplexobj(leaf) else leaf, shaped(vector))
        return jnp.sum(loss.value(leaves, lax.stop_gradient(outputs), *targets))

    if loss is losses.OUTPUT:
        rows = jnp.eye(joined.size, dtype=joined.dtype)
    else:
        hessian = jax.hessian(value)(joined)
        values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
        rows = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    return jax.vmap(shaped)(rows)


def output_size(model: Model, batches: Batches, loss: Loss) -> int:
    """K, the number of outputs of one example."""
    inputs = [array[:1] for array in loss.split(batches[0])[0]]
    return jax.eval_shape(lambda *arrays: flat(model.call(model.params, *arrays)), *inputs).shape[1]
