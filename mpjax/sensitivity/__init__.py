"""Sensitivity: one score per (layer, format), all in the one Scorer form; one file per estimator.

A scorer is made by a factory that takes the knobs; it then takes the problem and the key:

    scores = local_rounding(num_probes=4)(model, batches, ("bfloat16",), jax.random.key(0))

Without a model, `from_loss` has the curvature scores of any `loss(params) -> scalar`.

The default loss is the *output loss* per example, ½ ‖f_low(x) − f(x)‖², f the model's outputs, flattened: its gradient at the
trained weights is exactly 0 and its Hessian exactly JᵀJ, so the second-order expansion ½ δᵀHδ holds without assuming that
training reached an optimum. Others are in `losses`. Where a score predicts a loss ("kind" loss), it is the mean over examples.

Every scorer raises ValueError for ragged or empty batches, batches without the loss's targets, unknown or repeated formats.
"""

from mpjax.sensitivity import from_loss
from mpjax.sensitivity.depth import depth
from mpjax.sensitivity.first_order import first_order
from mpjax.sensitivity.fisher import fisher
from mpjax.sensitivity.gauss_newton import gauss_newton
from mpjax.sensitivity.interactions import Interactions as Interactions
from mpjax.sensitivity.interactions import interactions
from mpjax.sensitivity.local_rounding import local_rounding
from mpjax.sensitivity.logdet import logdet
from mpjax.sensitivity.measured import measured
from mpjax.sensitivity.quadratic import quadratic
from mpjax.sensitivity.random import random
from mpjax.sensitivity.rounding_norm import rounding_norm
from mpjax.sensitivity.scores import Scorer as Scorer
from mpjax.sensitivity.scores import Scores as Scores
from mpjax.sensitivity.scores import Status as Status
from mpjax.sensitivity.spectra import Spectra as Spectra
from mpjax.sensitivity.spectra import spectra
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
