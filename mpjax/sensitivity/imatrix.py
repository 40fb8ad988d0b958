"""The weights' rounding error, weighted by the power of the inputs that they multiply."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax.formats import Format
from mpjax.formats.storage import round_weights
from mpjax.kernels import suited
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.taps import Tap, mean_over_probes, tap_ledger, tap_samples
from mpjax.sensitivity.task import ModelTask, exactly, scorer_of


def imatrix() -> Scorer:
    """Σ_ij E[x_j²] δw_ij²: llama.cpp's error of a tensor, weighted by its importance matrix E[x_j²].

    x_j is the j-th input of a row (a token, a position of a convolution), E the mean over all rows: the error of the layer's
    output, if inputs were uncorrelated. It knows nothing of what follows the layer, so it is of kind "ranking",
    though llama.cpp's `--target-bpw` adds it up over tensors.

    Cost: a forward and a backward pass per example, a product per layer and format.

    Source: llama.cpp, tools/imatrix and pull request 15550 (https://github.com/ggml-org/llama.cpp/pull/15550).
    """

    def estimate(task: ModelTask) -> Scores:
        samples = tap_samples(task, 0, task.ranges(None), term=_weighted_squares, more=1)
        sums, _ = mean_over_probes(task, samples, None)
        rows = np.where(sums[:, :1] > 0, sums[:, :1], 1)
        return task.scores("imatrix", exactly(sums[:, 1:] / rows, tap_ledger(task, 0)), kind="ranking", rounded=True)

    return scorer_of(estimate, None)


def _weighted_squares(tap: Tap, formats: Sequence[Format]) -> list[Any]:
    """The number of rows, and Σ over rows, i, j of x_j² δw_ij² in each format: the product of the squares."""
    product, multiply = tap.product, suited(tap.product)
    lhs = tap.lhs if product.kind == "lookup" else jnp.square(tap.lhs)
    deltas = [round_weights(tap.rhs, fmt, product.summed, product.stacked) - tap.rhs for fmt in formats]
    if product.kind in ("lookup", "ragged"):
        rows = tap.output.size / tap.output.shape[-1]
    else:
        rows = tap.output.size * math.prod(tap.rhs.shape[axis] for axis in product.summed or ()) / tap.rhs.size
    return [rows, *(jnp.sum(multiply(lhs, jnp.square(delta))) for delta in deltas)]
