"""The noise-to-signal ratio of a layer's output."""

import jax.numpy as jnp
import numpy as np

from mpjax.arithmetic import Calibration
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.taps import mean_over_probes, tap_ledger, tap_samples
from mpjax.sensitivity.task import ModelTask, exactly, scorer_of


def sqnr(*, calibration: Calibration | None = None) -> Scorer:
    """E‖δa‖² / E‖a‖² of a layer's output a: the inverse of its signal-to-quantisation-noise ratio; SQNR = −10 log₁₀ of it, in dB.

    The layer runs in low precision on its float32 input (weights, activations and accumulation). Of the *model's* output with one
    layer lowered it is `measured(loss=losses.NOISE_TO_SIGNAL)`. It knows nothing of what follows the layer: kind "ranking".

    Cost: a forward and a backward pass per example, about one forward pass per format.

    Source: Lin, Talathi and Annapureddy, "Fixed point quantization of deep convolutional networks", arXiv 1511.06393.
    """

    def estimate(task: ModelTask) -> Scores:
        samples = tap_samples(
            task,
            0,
            task.ranges(calibration),
            term=lambda tap, formats: [jnp.sum(jnp.square(array)) for array in (tap.output, *map(tap.error, formats))],
            more=1,
        )
        sums, _ = mean_over_probes(task, samples, None)
        value = sums[:, 1:] / np.where(sums[:, :1] > 0, sums[:, :1], 1)
        return task.scores(
            "sqnr", exactly(value, tap_ledger(task, 0)), kind="ranking", overflowed=task.overflows(value)
        )

    return scorer_of(estimate, None, weights_only=False)
