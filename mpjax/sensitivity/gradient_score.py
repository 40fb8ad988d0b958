"""The squared gradient at the layers' outputs times the squared local rounding error."""

from dataclasses import replace
from typing import Literal

import jax.numpy as jnp

from mpjax.arithmetic import Calibration
from mpjax.losses import OUTPUT, Loss
from mpjax.sensitivity.fisher import probes_of
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.taps import mean_over_probes, tap_ledger, tap_samples
from mpjax.sensitivity.task import ModelTask, exactly, scorer_of


def gradient_score(
    *,
    kind: Literal["true", "empirical"] = "true",
    num_probes: int = 4,
    loss: Loss = OUTPUT,
    calibration: Calibration | None = None,
) -> Scorer:
    """½ E Σ_j (∂L/∂a_j · δa_j)² over the elements j of the layer's output: the score of ModelOpt's `auto_quantize`.

    It is the diagonal of `local_rounding`, ½ E (Σ_j ∂L/∂a_j · δa_j)², at the same cost: rounding errors of different elements
    are taken to be uncorrelated. "empirical": ∂L/∂a is the gradient on the given label, one per example, as in ModelOpt (which
    takes twice the sum over the examples); "true": of `num_probes` output probes u with E[u uᵀ] = H.

    Cost: `num_probes` (1) vector-Jacobian products per example, about one forward pass per format. Kind "loss".

    Source: NVIDIA ModelOpt 0.47, modelopt/torch/quantization/algorithms.py (https://github.com/NVIDIA/Model-Optimizer).

    Raises:
        ValueError: "empirical" under a loss whose gradient is zero by construction.
    """
    probes = probes_of(kind, num_probes, loss, "gradient_score")

    def estimate(task: ModelTask) -> Scores:
        samples = tap_samples(
            task,
            probes or 0,
            task.ranges(calibration),
            term=lambda tap, formats: [jnp.sum((tap.cotangent * tap.error(fmt)) ** 2) / 2 for fmt in formats],
        )
        value, stderr = mean_over_probes(task, samples, probes)
        estimate = replace(exactly(value, tap_ledger(task, probes or 0)), stderr=stderr)
        return task.scores(f"gradient_score[{kind}]", estimate, kind="loss", overflowed=task.overflows(value))

    return scorer_of(estimate, loss, weights_only=False)
