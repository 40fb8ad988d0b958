"""The measured truth that every other score is judged by."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax.arithmetic import Calibration
from mpjax.emulation import in_formats
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss, Outputs
from mpjax.program import Array, Layer, Params, Product
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.task import ModelTask, exactly, scorer_of


def measured(*, loss: Loss = OUTPUT, calibration: Calibration | None = None) -> Scorer:
    """Each layer lowered alone, by emulation: the growth of the loss, which the other scores predict.

    Two compilations (the format of each layer is a traced number), then one forward pass per layer, format and example. A layer
    whose own product overflows float16 is reported, also where a later clamp hides it from the outputs.

    Args:
        loss: of any kind; "output" gives ½ ‖f_low − f‖².
        calibration: activation ranges for scaled formats; None: measured on the batches where they are needed.
    """

    def estimate(task: ModelTask) -> Scores:
        growth = growth_of(task, calibration)
        value = np.zeros((len(task.names), len(task.formats)))
        for layer, fmt in np.ndindex(*value.shape):
            value[layer, fmt] = growth({layer: fmt})
        ledger = Ledger(forward=task.examples * (1 + value.size))
        return task.scores("measured", exactly(value, ledger), kind="loss", overflowed=task.overflows(value))

    return scorer_of(estimate, loss, weights_only=False)


def growth_of(task: ModelTask, calibration: Calibration | None) -> Callable[[Mapping[int, int]], float]:
    """Numbers of layers -> numbers of their formats: the growth of the mean loss, all others in float32. The model in float32 is
    run once."""
    ranges, names, loss = task.ranges(calibration), task.names, task.loss

    def outputs_of(params: Params, index: Array, *batch: Array) -> Outputs:
        chosen = in_formats(index, names, task.formats, calibration=ranges)

        def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
            out = chosen(layer, product, lhs, rhs)
            lowered = index[names.index(layer.name)] > 0
            # NaN everywhere, so that no clamp or pooling after it hides an overflow
            return jnp.where(lowered & ~jnp.isfinite(out).all(), jnp.asarray(jnp.nan, out.dtype), out)

        return task.model.call(params, *loss.split(batch)[0], override=override)

    growth = compared(task, outputs_of, jnp.zeros(len(names), jnp.int32))

    def growth_with(formats: Mapping[int, int]) -> float:
        index = np.zeros(len(names), np.int32)
        for layer, fmt in formats.items():
            index[layer] = 1 + fmt
        return growth(jnp.asarray(index))

    return growth_with


def compared(task: ModelTask, outputs_of: Callable[..., Outputs], *unchanged: Any) -> Callable[..., float]:
    """Arguments of outputs_of(params, *arguments, *batch) -> the growth of the mean loss over that with the arguments
    `unchanged`, which is run once."""
    loss = task.loss

    def growth(outputs: Outputs, reference: Outputs, *batch: Array) -> Array:
        targets = loss.split(batch)[1]
        return jnp.sum(loss.value(outputs, reference, *targets) - loss.value(reference, reference, *targets))

    run, compare = task.timed.jit(outputs_of), task.timed.jit(growth)
    truths = [run(task.params, *unchanged, *batch) for batch in task.batches]

    def mean_growth(*arguments: Any) -> float:
        pairs = zip(task.batches, truths, strict=True)
        total = sum(float(compare(run(task.params, *arguments, *batch), truth, *batch)) for batch, truth in pairs)
        return total / task.examples

    return mean_growth
