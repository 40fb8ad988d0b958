"""FIT: traces of the Fisher matrices of weights and activations times their rounding noise."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from mpjax.arithmetic import Calibration, rounded_activations
from mpjax.formats import Format
from mpjax.losses import OUTPUT, Loss
from mpjax.sensitivity.fisher import probes_of
from mpjax.sensitivity.output_probes import probe
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.taps import Tap, mean_over_probes, tap_ledger, tap_samples
from mpjax.sensitivity.task import ModelTask, exactly, scorer_of


def fit(
    *,
    kind: Literal["true", "empirical"] = "true",
    num_probes: int = 4,
    loss: Loss = OUTPUT,
    calibration: Calibration | None = None,
) -> Scorer:
    """½ (tr I(w) · E δw² + tr I(x) · E δx²), I the Fisher matrices of a layer's weights w and of its input activations x.

    tr I = E ‖∂L/∂w‖² and E ‖∂L/∂x‖², of the gradients on the given labels ("empirical", as in the paper) or of `num_probes`
    output probes ("true"); E δ² the mean squared rounding error in the format, measured, where the paper has Δ²/12. Without the
    second term it is `fisher(elementwise=False)`. The two standard errors are taken to be independent.

    Cost: twice `num_probes` (1) vector-Jacobian products per example. Kind "loss".

    Source: Zandonati et al., "FIT: a metric for model sensitivity", arXiv 2210.08502.

    Raises:
        ValueError: "empirical" under a loss whose gradient is zero by construction.
    """
    probes = probes_of(kind, num_probes, loss, "fit")

    def estimate(task: ModelTask) -> Scores:
        weights, ranges = probe(task, "squares", probes), task.ranges(calibration)
        samples = tap_samples(task, probes or 0, ranges, term=_activations, more=2)
        means, errors = mean_over_probes(task, samples, probes)
        halves = 0.5 * np.divide(means[:, 2:], means[:, 1:2], where=means[:, 1:2] > 0, out=np.zeros_like(means[:, 2:]))
        factors = 0.5 * task.rounding.squares / task.sizes[:, None]
        parts: list[Any] = [factors * np.asarray(weights.value)[:, None], halves * means[:, :1]]
        spreads: list[Any] = [factors * np.asarray(weights.stderr)[:, None], halves * errors[:, :1]]
        ledger = weights.ledger + tap_ledger(task, probes or 0)
        both = replace(exactly(sum(parts), ledger), stderr=np.hypot(*spreads))
        return task.scores(f"fit[{kind}]", both, kind="loss", overflowed=task.overflows(np.asarray(both.value)))

    return scorer_of(estimate, loss)


def _activations(tap: Tap, formats: Sequence[Format]) -> list[Any]:
    """‖∂L/∂x‖², the number of activations, and ‖δx‖² in each format; 0 for row numbers."""
    if tap.lhs_cotangent is None:
        return [0.0] * (2 + len(formats))
    errors = [rounded_activations(fmt, tap.product, tap.lhs, tap.ranges) - tap.lhs for fmt in formats]
    squares = [jnp.sum(jnp.square(x)) for x in (tap.lhs_cotangent, *errors)]
    return [squares[0], tap.lhs.size, *squares[1:]]
