"""Curvature of any `loss(params)`: Hessian and Gauss-Newton operators, stochastic estimates, Gram matrices. No Flax."""

from mpjax.curvature import estimates, grams
from mpjax.curvature.operators import Operator, block_ggn, block_hessian, hvp
from mpjax.curvature.operators import dense as dense
from mpjax.curvature.operators import eigenvalues as eigenvalues

__all__ = ["Operator", "block_ggn", "block_hessian", "estimates", "grams", "hvp"]
