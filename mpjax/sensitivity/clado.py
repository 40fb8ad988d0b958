"""CLADO: interactions between layers, measured pair by pair."""

import itertools
from collections.abc import Sequence

import numpy as np

from mpjax.arithmetic import Calibration
from mpjax.formats import Format
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss
from mpjax.program import Batches, Model
from mpjax.sensitivity.interactions import Interactions
from mpjax.sensitivity.measured import growth_of
from mpjax.sensitivity.scores import Key, Status
from mpjax.sensitivity.task import model_task


def clado(
    model: Model,
    batches: Batches,
    formats: Sequence[str | Format],
    key: Key,
    *,
    loss: Loss = OUTPUT,
    calibration: Calibration | None = None,
) -> Interactions:
    """The same table as `interactions`, from forward passes: no derivative, and no first order.

    With Ω(S) the measured growth of the loss with the layers S lowered, G_ii = 2 Ω(i) and G_ij = Ω(i, j) − Ω(i) − Ω(j); two
    formats of one layer do not interact. Negative eigenvalues of G, of noise and of higher orders, are set to 0, as in the paper.

    Cost: 1 + L·F + L (L − 1) F² / 2 forward passes per example.

    Source: Deng, Sharify, Liu, Mishra and Orshansky, "Mixed-precision quantization with cross-layer dependencies" (CLADO),
    arXiv 2307.05657.
    """
    task = model_task(model, batches, formats, key, loss)
    growth, pairs = growth_of(task, calibration), list(np.ndindex(len(task.names), len(task.formats)))
    alone = np.array([growth({layer: fmt}) for layer, fmt in pairs])
    bad = ~np.isfinite(alone)
    gram = np.diag(2 * alone)
    measured = len(pairs)
    for i, j in itertools.combinations(range(len(pairs)), 2):
        if pairs[i][0] == pairs[j][0] or bad[i] or bad[j]:
            continue
        gram[i, j] = gram[j, i] = growth(dict((pairs[i], pairs[j]))) - alone[i] - alone[j]
        measured += 1
    gram = np.where(np.outer(~bad, ~bad) & np.isfinite(gram), gram, 0.0)
    values, vectors = np.linalg.eigh(gram)
    overflowed = task.overflows(alone.reshape(len(task.names), -1)).ravel()
    return Interactions(
        gram=(vectors * np.maximum(values, 0)) @ vectors.T,
        stderr=np.zeros_like(gram),
        layers=task.names,
        formats=tuple(fmt.name for fmt in task.formats),
        loss=loss.name,
        status=np.where(bad, np.where(overflowed, Status.OVERFLOW, Status.NOT_FINITE), Status.OK),
        num_probes=None,
        ledger=Ledger(forward=task.examples * (1 + measured)) + task.timed.ledger,
        seconds=task.timed.seconds,
        compile_seconds=task.timed.compile_seconds,
        peak_mb=task.timed.peak_mb,
    )
