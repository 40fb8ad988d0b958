"""The diagonal Fisher score ½ Σ E[g²] δ²."""

from typing import Literal

import numpy as np

from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss
from mpjax.program import Array, Params
from mpjax.sensitivity.output_probes import half_square_scores, probe
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.task import (
    ModelTask,
    Task,
    Values,
    check_choice,
    check_not_stationary,
    check_probes,
    exactly,
    scorer_of,
)


def fisher(
    *,
    kind: Literal["true", "empirical"] = "true",
    elementwise: bool = True,
    num_probes: int = 4,
    loss: Loss = OUTPUT,
) -> Scorer:
    """The diagonal Fisher score ½ Σ E[g²] δ², g the gradient of one example: all layers and formats at once.

    "true": g = Jᵀu from `num_probes` output probes with E[u uᵀ] = H (for cross-entropy: labels drawn from the model itself).
    "empirical": g is the gradient on the given label, one per example, so nothing is random. Not `elementwise` is FIT's
    layer-wise form, ½ · mean E[g²] · ‖δ‖².

    Source: FIT (Zandonati et al.), arXiv 2210.08502; on true and empirical: Kunstner, Balles and Hennig, arXiv 1905.12558.

    Raises:
        ValueError: "empirical" under a loss whose gradient is zero by construction.
    """
    probes = probes_of(kind, num_probes, loss, "fisher")
    name = f"fisher[{kind},{'elementwise' if elementwise else 'mean'}]"

    def estimate(task: ModelTask) -> Scores:
        if elementwise:
            return half_square_scores(task, name, "elementwise", probes)
        return task.curvature_scores(name, probe(task, "squares", probes), scale="noise", mean=True)

    return scorer_of(estimate, loss)


def probes_of(kind: str, num_probes: int, loss: Loss, estimator: str) -> int | None:
    """The number of output probes; None for the one gradient on the given label.

    Raises:
        ValueError: an unknown kind, fewer than one probe, a loss that has none, or whose gradient is zero by construction.
    """
    check_choice("kind", kind, ("true", "empirical"))
    if kind == "empirical":
        check_not_stationary(loss, f"{estimator}[empirical]")
        return None
    check_probes(num_probes, loss, f"{estimator}[true]")
    return num_probes


def squared_gradient(task: Task) -> Scores:
    """½ Σ g²δ² of each block and format, g the gradient of the mean loss (not of single examples)."""

    def gradient(params: Params, *batch: Array) -> Values:
        return task.gradient(params, batch)(task.leaves(params))

    run, deltas = task.timed.jit(gradient), task.rounding.deltas
    parts = [run(task.params, *batch) for batch in task.batches]
    mean = {path: sum(np.float64(part[path]) for part in parts) / task.examples for path in parts[0]}
    value = [
        [0.5 * sum(np.sum((mean[p] * np.float64(delta[p])) ** 2) for p in block.paths) for delta in deltas]
        for block in task.blocks
    ]
    estimate = exactly(np.array(value), Ledger(vjp=task.examples))
    return task.scores("fisher[empirical,elementwise]", estimate, kind="loss", rounded=True)
