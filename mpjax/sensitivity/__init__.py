"""Sensitivity: one score per (layer, format), all in the one Scorer form.

A scorer is made by a factory that takes the knobs; it then takes the problem and the key:

    scores = local_rounding(num_probes=4)(model, batches, ("bfloat16",), jax.random.key(0))

Without a model, `from_loss` has the curvature scores of any `loss(params) -> scalar`.

The default loss is the *output loss* per example, ½ ‖f_low(x) − f(x)‖², f the model's outputs, flattened: its gradient at the
trained weights is exactly 0 and its Hessian exactly JᵀJ, so the second-order expansion ½ δᵀHδ holds without assuming that
training reached an optimum. Others are in `losses`. Where a score predicts a loss ("kind" loss), it is the mean over examples.

Where to look: `rounding_scores` (measured, local_rounding and the baselines), `output_scores` (output probes, exact spectra),
`hessian_scores` (Hessian-vector products), `cross_terms` (interactions), `scores` (what all of them return).
"""

from mpjax.sensitivity import from_loss
from mpjax.sensitivity.cross_terms import Interactions, interactions
from mpjax.sensitivity.estimators import first_order, fisher, gauss_newton, logdet, quadratic, top_eigenvalue, trace
from mpjax.sensitivity.output_scores import Spectra, spectra
from mpjax.sensitivity.rounding_scores import depth, local_rounding, measured, random, rounding_norm
from mpjax.sensitivity.scores import (
    INDEFINITE,
    NOT_FINITE,
    OK,
    OVERFLOW,
    UNCONVERGED,
    ZERO,
    Scorer,
    Scores,
    pack,
    unpack,
)

__all__ = [
    "INDEFINITE",
    "NOT_FINITE",
    "OK",
    "OVERFLOW",
    "UNCONVERGED",
    "ZERO",
    "Interactions",
    "Scorer",
    "Scores",
    "Spectra",
    "depth",
    "first_order",
    "fisher",
    "from_loss",
    "gauss_newton",
    "interactions",
    "local_rounding",
    "logdet",
    "measured",
    "pack",
    "quadratic",
    "random",
    "rounding_norm",
    "spectra",
    "top_eigenvalue",
    "trace",
    "unpack",
]
