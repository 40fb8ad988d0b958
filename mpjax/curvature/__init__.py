"""Curvature of any `loss(params)`: Hessian and Gauss-Newton operators, stochastic estimates, Gram matrices. No Flax."""

from mpjax.curvature import estimates, grams
from mpjax.curvature.operators import LogDet as LogDet
from mpjax.curvature.operators import Operator, block_ggn, block_hessian, hvp, logdet
from mpjax.curvature.operators import dense as dense
from mpjax.curvature.operators import eigenvalues as eigenvalues
from mpjax.curvature.operators import ggn_vp as ggn_vp

__all__ = ["Operator", "block_ggn", "block_hessian", "estimates", "grams", "hvp", "logdet"]
