"""The largest eigenvalue of each layer's Hessian block."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from mpjax.curvature import estimates
from mpjax.losses import OUTPUT, Loss
from mpjax.sensitivity.hessian import estimate_blocks
from mpjax.sensitivity.scores import Scorer, Scores, label
from mpjax.sensitivity.spectra import Spectra, check_given, exact_spectra, per_layer
from mpjax.sensitivity.task import ModelTask, Task, check_choice, scorer_of

Scale = Literal["per_parameter", "noise", "none"]


def top_eigenvalue(
    *,
    method: Literal["exact", "lanczos"] = "exact",
    depth: int = 20,
    scale: Scale = "per_parameter",
    loss: Loss = OUTPUT,
    max_outputs: int = 1024,
    spectra: Spectra | None = None,
) -> Scorer:
    """Largest eigenvalue (in magnitude, with its sign) of each layer's Hessian block.

    "exact": of the Gauss-Newton block, from the k rows of H^½ J of at most `max_outputs` outputs: k vector-Jacobian products
    for all layers. "lanczos": of the true Hessian's block, `depth` Hessian-vector products per layer; the residual bounds the
    distance to an eigenvalue.

    Source: Dong et al. (HAWQ), arXiv 1905.03696, which ranks by λ / d, d the layer's weights.

    Args:
        scale: "per_parameter" λ / d; "noise" ½ λ ‖δ‖², an upper bound of ½ δᵀHδ; "none" λ.
        spectra: for "exact", those of `spectra(model, batches)`, if they are there already.
    """
    check_choice("method", method, ("exact", "lanczos"))
    check_given(spectra, method)
    by_lanczos = lanczos(depth=depth, scale=scale)

    def exact(task: ModelTask) -> Scores:
        name = label("top_eigenvalue", "exact", "" if scale == "per_parameter" else scale)
        estimate = per_layer(exact_spectra(task, max_outputs, spectra), np.max)
        return task.curvature_scores(name, estimate, scale=scale, mean=False)

    return scorer_of(by_lanczos if method == "lanczos" else exact, loss)


def lanczos(*, depth: int = 20, scale: Scale = "per_parameter") -> Callable[[Task], Scores]:
    """Eigenvalue of largest magnitude of each block of the Hessian, with its sign, by Lanczos: `depth` products per block.

    Source: Dong et al. (HAWQ), arXiv 1905.03696, which ranks by λ / d, d the block's parameters.

    Args:
        depth: Lanczos steps.
        scale: "per_parameter" λ / d; "noise" ½ λ ‖δ‖², an upper bound of ½ δᵀHδ; "none" λ.
    """
    check_choice("scale", scale, ("per_parameter", "noise", "none"))
    estimator = estimates.top_eigenvalue(depth=depth)
    name = label("top_eigenvalue", "lanczos", "" if scale == "per_parameter" else scale)
    return lambda task: task.curvature_scores(name, estimate_blocks(task, estimator), scale=scale, mean=False)
