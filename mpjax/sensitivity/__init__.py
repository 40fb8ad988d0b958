"""Sensitivity: one score per (layer, format), all in the one Scorer form; one file per estimator.

A scorer is made by a factory that takes the knobs; it then takes the problem and the key:

    scores = local_rounding(num_probes=4)(model, batches, ("bfloat16",), jax.random.key(0))

Without a model, `from_loss` has the curvature scores of any `loss(params) -> scalar`.

The default loss is the *output loss* per example, ½ ‖f_low(x) − f(x)‖², f the model's outputs, flattened: its gradient at the
trained weights is exactly 0 and its Hessian exactly JᵀJ, so the second-order expansion ½ δᵀHδ holds without assuming that
training reached an optimum. Others are in `losses`. Where a score predicts a loss ("kind" loss), it is the mean over examples.

Every scorer raises ValueError for ragged or empty batches, batches without the loss's targets, unknown or repeated formats.
"""

from collections.abc import Callable
from typing import Literal

from mpjax.losses import KL, LAST_KL, NOISE_TO_SIGNAL, Loss
from mpjax.sensitivity import from_loss
from mpjax.sensitivity.clado import clado as clado
from mpjax.sensitivity.depth import depth
from mpjax.sensitivity.first_order import first_order
from mpjax.sensitivity.fisher import fisher
from mpjax.sensitivity.fit import fit as fit
from mpjax.sensitivity.gauss_newton import gauss_newton
from mpjax.sensitivity.gradient_score import gradient_score as gradient_score
from mpjax.sensitivity.higgs import higgs as higgs
from mpjax.sensitivity.imatrix import imatrix as imatrix
from mpjax.sensitivity.interactions import Interactions as Interactions
from mpjax.sensitivity.interactions import interactions
from mpjax.sensitivity.local_rounding import local_rounding
from mpjax.sensitivity.logdet import logdet
from mpjax.sensitivity.magnitude import magnitude as magnitude
from mpjax.sensitivity.measured import measured
from mpjax.sensitivity.quadratic import quadratic
from mpjax.sensitivity.random import random
from mpjax.sensitivity.rounding_norm import rounding_norm
from mpjax.sensitivity.scores import Scorer as Scorer
from mpjax.sensitivity.scores import Scores as Scores
from mpjax.sensitivity.scores import Status as Status
from mpjax.sensitivity.spectra import Spectra as Spectra
from mpjax.sensitivity.spectra import spectra
from mpjax.sensitivity.sqnr import sqnr as sqnr
from mpjax.sensitivity.top_eigenvalue import top_eigenvalue
from mpjax.sensitivity.trace import trace

__all__ = [
    "depth",
    "first_order",
    "fisher",
    "from_loss",
    "gauss_newton",
    "interactions",
    "local_rounding",
    "logdet",
    "measured",
    "quadratic",
    "random",
    "rounding_norm",
    "spectra",
    "top_eigenvalue",
    "trace",
]

# Every score by name: loss -> scorer with default knobs. `first_order` and `fisher_empirical` raise ValueError for a loss without
# labels; baselines ignore the loss. One of your own: ESTIMATORS["mine"] = lambda loss: mine().
ESTIMATORS: dict[str, Callable[[Loss], Scorer]] = {
    "measured": lambda loss: measured(loss=loss),
    "measured_kl": lambda _: measured(loss=KL),
    "measured_last_kl": lambda _: measured(loss=LAST_KL),
    "output_sqnr": lambda _: measured(loss=NOISE_TO_SIGNAL),
    "local_rounding": lambda loss: local_rounding(loss=loss),
    "gradient_score": lambda loss: gradient_score(loss=loss, kind=_fisher_kind(loss)),
    "quadratic": lambda loss: quadratic(loss=loss),
    "gauss_newton": lambda loss: gauss_newton(loss=loss),
    "first_order": lambda loss: first_order(loss=loss),
    "fisher_true": lambda loss: fisher(loss=loss),
    "fisher_empirical": lambda loss: fisher(loss=loss, kind="empirical"),
    "fit": lambda loss: fit(loss=loss, kind=_fisher_kind(loss)),
    "higgs": lambda loss: higgs(loss=loss),
    "hawq_v1": lambda loss: top_eigenvalue(loss=loss),
    "hawq_v2": lambda loss: trace(loss=loss),  # and V3, which is this score with an ILP
    "trace_output": lambda loss: trace(loss=loss, method="output"),
    "logdet": lambda loss: logdet(loss=loss),
    "logdet_per_parameter": lambda loss: logdet(loss=loss, per_parameter=True),
    "logdet_raw": lambda loss: logdet(loss=loss, form="raw"),
    "imatrix": lambda _: imatrix(),
    "sqnr": lambda _: sqnr(),
    "magnitude": lambda _: magnitude(),
    "rounding_norm": lambda _: rounding_norm(),
    "depth": lambda _: depth(),
    "random": lambda _: random(),
}


def _fisher_kind(loss: Loss) -> Literal["true", "empirical"]:
    """As published, on labels, where the loss has a gradient; else from output probes."""
    return "true" if loss.stationary else "empirical"
