"""HIGGS's linear model: the growth of the loss is α t², t² the relative squared error of the layer's weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import partition
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss, Outputs
from mpjax.program import Array, Params
from mpjax.sensitivity.measured import compared
from mpjax.sensitivity.scores import Key, Scorer, Scores
from mpjax.sensitivity.task import ModelTask, exactly, scorer_of


def higgs(*, levels: Sequence[float] = (0.02, 0.05, 0.1), draws: int = 2, loss: Loss = OUTPUT) -> Scorer:
    """α t² with t² = ‖δ‖² / ‖w‖² of the rounded weights, and α of the layer by measurement.

    Normal noise of relative size t is added to the layer's weights, `draws` times at each of the `levels`, and the growths of the
    loss are fitted by α t² (least squares of growth / t² on a constant, so that all levels count alike). The standard error is
    that of this mean: it holds the noise's variance and what the loss departs from α t². The model takes rounding errors to be
    isotropic, and does not see the rounding of activations.

    Cost: levels · draws forward passes per layer and example, and one, whatever the number of formats. Kind "loss".

    Source: Malinovskii et al., "Pushing the limits of large language model quantization via the linearity theorem",
    arXiv 2411.17525.
    """
    if not levels or min(levels) <= 0 or draws < 1:
        raise ValueError(f"Expected levels > 0 and draws ≥ 1, found {tuple(levels)} and {draws}.")

    def estimate(task: ModelTask) -> Scores:
        def outputs_of(params: Params, number: Array, level: Array, key: Key, *batch: Array) -> Outputs:
            leaves = task.leaves(params)
            keys = dict(zip(leaves, jax.random.split(key, len(leaves)), strict=True))
            noise = {
                path: level * jnp.linalg.norm(w) / w.size**0.5 * jax.random.normal(keys[path], w.shape, w.dtype)
                for path, w in leaves.items()
            }
            alone = partition.only(task.blocks, number, noise)
            noisy = partition.replace(params, jax.tree.map(jnp.add, leaves, alone))
            return task.model.call(noisy, *task.loss.split(batch)[0])

        none, root = jnp.asarray(0.0, jnp.float32), task.key
        growth = compared(task, outputs_of, jnp.asarray(0), none, root)
        trials = [level for level in levels for _ in range(draws)]
        slopes = np.zeros((len(task.blocks), len(trials)))
        for (row, column), _ in np.ndenumerate(slopes):
            level = jnp.asarray(trials[column], jnp.float32)
            key = jax.random.fold_in(jax.random.fold_in(root, row), column)
            slopes[row, column] = growth(jnp.asarray(row), level, key) / trials[column] ** 2
        leaves = task.leaves(task.params)
        power = [sum(float(np.sum(np.square(np.float64(leaves[p])))) for p in block.paths) for block in task.blocks]
        relative = task.rounding.squares / np.where(np.array(power) > 0, power, 1)[:, None]
        spread: Any = (
            slopes.std(axis=1, ddof=1) / len(trials) ** 0.5 if len(trials) > 1 else np.full(len(slopes), np.nan)
        )
        ledger = Ledger(forward=task.examples * (1 + slopes.size))
        value = exactly(slopes.mean(axis=1)[:, None] * relative, ledger)
        return task.scores("higgs", replace(value, stderr=spread[:, None] * relative), kind="loss", rounded=True)

    return scorer_of(estimate, loss)
