"""½ δᵀJᵀHJδ from output probes."""

from mpjax.losses import OUTPUT, Loss
from mpjax.sensitivity.output_probes import half_square_scores
from mpjax.sensitivity.scores import Scorer
from mpjax.sensitivity.task import check_probes, scorer_of


def gauss_newton(*, num_probes: int = 4, loss: Loss = OUTPUT) -> Scorer:
    """½ δᵀJᵀHJδ from output probes: one vector-Jacobian product per probe for all layers and formats.

    The random form of `quadratic(hessian="gauss_newton")`: E[(gᵀδ)²] with g = Jᵀu, u random with E[u uᵀ] = H.

    Source: Martens, arXiv 1412.1193; Hutchinson 1990, doi 10.1080/03610919008812866.
    """
    check_probes(num_probes, loss, "gauss_newton")
    name = f"gauss_newton[{num_probes}]"
    return scorer_of(lambda task: half_square_scores(task, name, "directional", num_probes), loss)
