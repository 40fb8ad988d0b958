"""The first-order term |gᵀδ|."""

import jax.numpy as jnp
import numpy as np

from mpjax.ledger import Ledger
from mpjax.losses import Loss
from mpjax.program import Array, Params
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.task import Task, Values, check_not_stationary, exactly, scorer_of


def first_order(*, loss: Loss) -> Scorer:
    """|gᵀδ|, g the gradient of the loss over all examples: one gradient for all layers and formats.

    Raises:
        ValueError: a loss whose gradient is zero by construction (the output loss, KL to the model's own output).
    """
    check_not_stationary(loss, "first_order")
    return scorer_of(gradient_products, loss)


def gradient_products(task: Task) -> Scores:
    """|gᵀδ| of each block and format, g the gradient of the mean loss: one gradient in all."""

    def products(params: Params, deltas: tuple[Values, ...], *batch: Array) -> Array:  # -> (L, F)
        gradient = task.gradient(params, batch)(task.leaves(params))
        return jnp.stack([task.block_dots(gradient, delta) for delta in deltas], axis=1)

    value = np.abs(task.sum_batches(task.timed.jit(products), task.rounding.deltas) / task.examples)
    return task.scores("first_order", exactly(value, Ledger(vjp=task.examples)), kind="loss", rounded=True)
