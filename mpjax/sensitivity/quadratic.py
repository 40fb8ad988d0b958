"""½ δᵀHδ with the real rounding error of the weights, exact."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax import partition
from mpjax.emulation import in_format
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss
from mpjax.program import Array, Params
from mpjax.sensitivity.output_probes import output_gradient
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.task import ModelTask, Task, Values, check_choice, exactly, scorer_of


def quadratic(*, hessian: Literal["gauss_newton", "true"] = "gauss_newton", loss: Loss = OUTPUT) -> Scorer:
    """½ δᵀHδ with the real rounding error δ of the layer's weights, exact.

    "gauss_newton": one Jacobian-vector product per layer, format and example, no backward pass; never negative for a loss that
    is convex in the outputs. "true": one Hessian-vector product each; negative (status "indefinite") away from an optimum.
    Under the output loss the two are the same number. Weight-space scores do not see the rounding of activations: where no
    weight of a layer changes in a format the score is 0 with status "zero_by_construction".

    Source: LeCun, Denker and Solla, "Optimal brain damage", NIPS 1989; Dong et al. (HAWQ), arXiv 1905.03696.
    """
    check_choice("hessian", hessian, ("gauss_newton", "true"))
    return scorer_of(partial(with_hessian, name="quadratic[true]") if hessian == "true" else _gauss_newton, loss)


def with_hessian(task: Task, name: str) -> Scores:
    """½ δᵀHδ of each block and format: one Hessian-vector product each."""
    blocks, deltas = task.blocks, task.rounding.deltas

    def score(params: Params, delta: Values, number: Array, *batch: Array) -> Array:
        alone = partition.only(blocks, number, delta)
        return 0.5 * jnp.sum(task.block_dots(alone, task.hvp(params, batch, alone)))

    run = task.timed.jit(score)  # looped over on the host, for the reason given in `trace`
    rows = [[task.sum_batches(run, delta, jnp.asarray(row)) for delta in deltas] for row in range(len(blocks))]
    value = np.array(rows) / task.examples
    ledger = Ledger(vjp=task.examples * len(deltas), hvp=task.examples * value.size)
    return task.scores(name, exactly(value, ledger), kind="loss", rounded=True)


def _gauss_newton(task: ModelTask) -> Scores:
    """½ (Jδ)ᵀH(Jδ). Memory: the linearised forward pass of one batch."""

    def score_all(params: Params, delta: Values, *batch: Array) -> Array:  # -> (L,)
        inputs, targets = task.loss.split(batch)
        function = task.outputs_of_leaves(params, inputs, in_format({}))
        outputs, tangent_of, whole = jax.linearize(function, task.leaves(params), has_aux=True)
        slope = output_gradient(task.loss, whole, targets)

        def score(number: Array) -> Array:
            change = tangent_of(partition.only(task.blocks, number, delta))
            curved = jax.jvp(slope, (outputs,), (change,))[1]
            return 0.5 * jnp.stack([jnp.sum((a * b).real) for a, b in zip(change, curved, strict=True)]).sum()

        return lax.map(score, jnp.arange(len(task.blocks)))

    run = task.timed.jit(score_all)
    value = np.stack([task.sum_batches(run, delta) for delta in task.rounding.deltas], axis=1) / task.examples
    ledger = Ledger(forward=task.examples * len(task.formats), jvp=task.examples * value.size)
    return task.scores("quadratic[gauss_newton]", exactly(value, ledger), kind="loss", rounded=True)
