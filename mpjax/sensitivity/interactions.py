"""Interactions between layers: the cost of several lowered layers together, beyond the sum of what each costs alone.

Let e_i be the change of the outputs when layer i takes format f (one index i for the pair), to first order in its local rounding
error. Errors of several layers add up before they are squared, so a set S costs ½ ‖Σ e_i‖² = ½ xᵀGx with the Gram matrix
G_ij = ⟨e_i, e_j⟩ and x the indicator of S. The diagonal of ½ G is the score of `local_rounding`; the same vector-Jacobian
products give all the rest. CLADO (arXiv 2307.05657) measures such a table with a forward pass per pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpjax.arithmetic import Calibration
from mpjax.formats import FLOAT32, Format
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss
from mpjax.program import Batches, Model
from mpjax.sensitivity.scores import Key, Status
from mpjax.sensitivity.taps import tap_ledger, tap_samples
from mpjax.sensitivity.task import check_probes, model_task


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """The Gram matrix of the layers' output changes, mean over the examples.

    Attributes:
        gram: (L·F, L·F) float64, symmetric and positive semi-definite by construction; row l · F + f is layer l in format f.
            Rows and columns of what is not finite are 0: see `status`.
        stderr: (L·F, L·F) standard error from the random probes; 0 where it is exact, NaN with one probe.
        layers, formats, loss: names.
        status: (L·F,) "ok", "overflow" or "not_finite".
        num_probes: random probes per example, None where exact.
        ledger, seconds, compile_seconds, peak_mb: as in `Scores`.
    """

    gram: np.ndarray
    stderr: np.ndarray
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    loss: str
    status: np.ndarray
    num_probes: int | None
    ledger: Ledger
    seconds: float
    compile_seconds: float
    peak_mb: float

    def indicator(self, assignment: Mapping[str, str]) -> np.ndarray:
        """(L·F,) x of an assignment layer -> format; layers that are not named stay float32.

        Raises:
            ValueError: an unknown layer or format.
        """
        x = np.zeros(len(self.status))
        for layer, fmt in assignment.items():
            if layer not in self.layers:
                raise ValueError(f"Unknown layer {layer!r}; known are {', '.join(self.layers[:3])} …")
            if fmt == FLOAT32.name:
                continue
            if fmt not in self.formats:
                raise ValueError(f"No interactions for format {fmt!r}; these are for {', '.join(self.formats)}.")
            x[self.layers.index(layer) * len(self.formats) + self.formats.index(fmt)] = 1.0
        return x

    def predict(self, assignment: Mapping[str, str], *, cross_terms: bool = True) -> float:
        """½ xᵀGx, the predicted loss of an assignment; without cross terms the sum of the layers' own scores.

        Infinite where a layer is assigned a format whose row is not finite.
        """
        x = self.indicator(assignment)
        if np.any((x > 0) & (self.status != Status.OK)):
            return float("inf")
        return float(0.5 * (x @ self.gram @ x if cross_terms else x @ np.diag(self.gram)))


def interactions(
    model: Model,
    batches: Batches,
    formats: Sequence[str | Format],
    key: Key,
    *,
    num_probes: int | None = None,
    loss: Loss = OUTPUT,
    calibration: Calibration | None = None,
) -> Interactions:
    """The interactions of all layers and formats, from output probes.

    With u random and E[u uᵀ] = H, s = (uᵀe_1, uᵀe_2, …) has E[s sᵀ] = G. `num_probes=None` takes all rows of H^½ instead: exact,
    for one vector-Jacobian product per output number and example. Rounding is counted once per layer, at its product (its
    operands and its accumulation). First order: the change of layer j's own rounding error because an earlier layer's rounding
    has moved its input is left out.

    Cost: `num_probes` (or K) vector-Jacobian products per example, whatever the number of layers and formats. Memory: the
    samples, N × probes × L·F numbers of 8 bytes per batch on the host, and four (L·F)² matrices.

    Source: the expansion of CLADO (Deng et al., arXiv 2307.05657); the probes are Hutchinson's (doi 10.1080/03610919008812866).

    Raises:
        ValueError: ragged or empty batches, unknown formats, a loss without `cotangents` (with num_probes).
    """
    check_probes(num_probes, loss, "interactions")
    task = model_task(model, batches, formats, key, loss)
    samples = tap_samples(task, num_probes, task.ranges(calibration))
    total, variance, bad = accumulate(samples, exact=num_probes is None)
    undefined = np.where(bad, np.nan, 0.0).reshape(len(task.names), len(task.formats))
    overflowed = task.overflows(undefined).ravel()
    return Interactions(
        gram=(total + total.T) / (2 * task.examples),
        stderr=np.sqrt(variance) / task.examples,
        layers=task.names,
        formats=tuple(fmt.name for fmt in task.formats),
        loss=loss.name,
        status=np.where(bad, np.where(overflowed, Status.OVERFLOW, Status.NOT_FINITE), Status.OK),
        num_probes=num_probes,
        ledger=tap_ledger(task, num_probes) + task.timed.ledger,
        seconds=task.timed.seconds,
        compile_seconds=task.timed.compile_seconds,
        peak_mb=task.timed.peak_mb,
    )


def accumulate(samples: Iterable[np.ndarray], *, exact: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum over examples of the Gram matrix and of its variance, and which rows are not finite (these are 0).

    Args:
        samples: per batch (N, P, L, F), of N examples and P probes (all rows of H^½ if `exact`).

    Returns:
        (L·F, L·F), (L·F, L·F) and (L·F,).
    """
    total, variance, bad = np.zeros(()), np.zeros(()), np.zeros((), bool)
    for batch in samples:
        flat = batch.reshape(*batch.shape[:2], -1)
        bad = bad | ~np.isfinite(flat).all(axis=(0, 1))
        flat = np.where(bad, 0.0, flat)
        probes = flat.shape[1]
        joined = flat.reshape(-1, flat.shape[2])
        total = total + joined.T @ joined / (1 if exact else probes)
        if exact or probes == 1:
            variance = variance + np.full(total.shape, 0.0 if exact else np.nan)
            continue
        for example in flat:
            mean, square = example.T @ example / probes, (example**2).T @ example**2 / probes
            variance = variance + np.maximum(square - mean**2, 0.0) / (probes - 1)
    good = np.outer(~bad, ~bad)
    return np.where(good, total, 0.0), np.where(good, variance, 0.0), bad
