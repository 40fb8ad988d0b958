"""Curvature of any `loss(params)`: Hessian and Gauss-Newton operators, stochastic estimates, Gram matrices. No Flax."""

from mpjax.curvature import estimates, grams
from mpjax.curvature.operators import (
    LogDet,
    Operator,
    block_ggn,
    block_hessian,
    dense,
    eigenvalues,
    ggn_vp,
    hvp,
    logdet,
)

__all__ = [
    "LogDet",
    "Operator",
    "block_ggn",
    "block_hessian",
    "dense",
    "eigenvalues",
    "estimates",
    "ggn_vp",
    "grams",
    "hvp",
    "logdet",
]
