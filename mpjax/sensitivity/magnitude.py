"""Largest magnitudes against a format's range."""

import jax.numpy as jnp
import numpy as np

from mpjax.emulation import calibrate
from mpjax.ledger import Ledger
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.task import ModelTask, exactly, scorer_of


def magnitude() -> Scorer:
    """max(|w|, |x|) / the format's largest number, over a layer's weights w and inputs x: above 1 it overflows or saturates.

    The limits by which AutoCast keeps ONNX nodes in float32 (weights 65504, activations 512), as a ranking. A layer's output is
    judged as the input of the next one, so what overflows in the last product or in its accumulator is not seen. A format with
    scales has no such limit; there it ranks by range alone.

    Cost: one forward pass per example. Kind "ranking".

    Source: NVIDIA ModelOpt AutoCast, modelopt/onnx/autocast (https://github.com/NVIDIA/Model-Optimizer).
    """

    def estimate(task: ModelTask) -> Scores:
        largest = calibrate(task.model, [task.loss.split(batch)[0] for batch in task.batches], jit=task.timed.jit)
        leaves = task.leaves(task.params)
        weights = [max((float(jnp.max(jnp.abs(leaves[p]))) for p in block.paths), default=0.0) for block in task.blocks]
        ranges = [max(largest[name], largest.get(f"{name}/rhs", 0.0)) for name in task.names]
        value = np.maximum(weights, ranges)[:, None] / np.array([fmt.max for fmt in task.formats])
        return task.scores("magnitude", exactly(value, Ledger(forward=task.examples)), kind="ranking")

    return scorer_of(estimate, None)
