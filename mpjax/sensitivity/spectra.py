"""Exact spectra of the layers' Gauss-Newton blocks, which `trace`, `top_eigenvalue` and `logdet` are functions of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.curvature import grams
from mpjax.curvature.estimates import Estimate
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss, flat
from mpjax.program import Array, Batches, Model, Params, examples_in
from mpjax.sensitivity.gradients import scored
from mpjax.sensitivity.output_probes import half_hessian, output_size
from mpjax.sensitivity.task import ModelTask, exactly
from mpjax.sensitivity.timed import Timed


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Every layer's eigenvalues of JᵀHJ that can differ from 0, mean over the examples; exact.

    Attributes:
        values: layer name -> (min(d, k),) float64, descending; d the layer's weights, k = examples × outputs. NaN where not
            finite; 0 where below 10 roundings of the layer's largest (the Gram matrices are float32).
        loss: name of the loss.
        examples: how many.
        mean: Σ λ / Σ min(d, k) over all finite layers, the unit of a relative damping.
        ledger: passes used.
        timed: seconds and memory used.
    """

    values: Mapping[str, np.ndarray]
    loss: str
    examples: int
    mean: float
    ledger: Ledger
    timed: Timed


def spectra(
    model: Model,
    batches: Batches,
    *,
    loss: Loss = OUTPUT,
    max_outputs: int = 1024,
    batch_size: int = 8,
    max_bytes: int = 2**30,
) -> Spectra:
    """The spectrum of every layer's Gauss-Newton block, whatever the layer's size: k vector-Jacobian products for as many
    layers as have their rows of J within `max_bytes` together; each such group repeats them down to its own first layer.

    One call serves `trace`, `top_eigenvalue` and `logdet`, which take it as `spectra=`.

    Args:
        max_outputs: at most so many rows k = examples × outputs, examples taken from the front of the batches.
        batch_size: backward passes of one example at a time.
        max_bytes: of rows of J held together (`grams.output_grams`).

    Raises:
        ValueError: one example has more than max_outputs outputs.
    """
    timed, size = Timed(), output_size(model, batches, loss)
    examples = min(max_outputs // size, examples_in(batches))
    if examples < 1:
        raise ValueError(f"One example has {size} outputs, more than max_outputs = {max_outputs}: raise max_outputs.")
    data = [jnp.concatenate(parts)[:examples] for parts in zip(*batches, strict=True)]

    def rows(params: Params, *example: Array) -> Array:
        inputs, targets = loss.split(tuple(array[None] for array in example))
        outputs = model.call(params, *inputs, override=scored)
        joined = flat(outputs)[0]
        if loss is OUTPUT:
            return joined
        return jnp.matmul(flat(lax.stop_gradient(half_hessian(loss, outputs, targets))), joined)

    matrices = grams.output_grams(
        rows, model.params, model.partition, *data, batch_size=batch_size, max_bytes=max_bytes, jit=timed.jit
    )
    with timed.clock():
        eigenvalues = grams.spectra(matrices)
    values = {}
    for layer in model.layers:
        largest = np.sort(eigenvalues[layer.name])[::-1][: layer.weights] / examples
        rounding = 10 * float(jnp.finfo(matrices[layer.name].dtype).eps) * largest[0]
        values[layer.name] = np.where(largest < rounding, 0.0, largest)  # NaN stays
    finite = [array for array in values.values() if np.isfinite(array).all()]
    total = sum(float(array.sum()) for array in finite)
    groups = timed.compilations  # each repeats the backward passes, down to its own first layer
    return Spectra(
        values=values,
        loss=loss.name,
        examples=examples,
        mean=total / sum(array.size for array in finite) if total > 0 else 1.0,
        ledger=Ledger(forward=examples * groups, vjp=examples * size * groups, compilations=groups),
        timed=timed,
    )


def exact_spectra(task: ModelTask, max_outputs: int, given: Spectra | None) -> Spectra:
    """Those given, if they are of this task; else computed. Their time counts as the task's."""
    exact = given or spectra(task.model, task.batches, loss=task.loss, max_outputs=max_outputs)
    if tuple(exact.values) != task.names or exact.loss != task.loss_name:
        raise ValueError(
            f"spectra= holds the loss {exact.loss!r} of {len(exact.values)} layers; expected the loss {task.loss_name!r} of this "
            f"model's {len(task.names)} layers: compute them with sensitivity.spectra(model, batches, loss=…)."
        )
    task.timed.add(exact.timed)
    return exact


def per_layer(exact: Spectra, function: Callable[[np.ndarray], float]) -> Estimate:
    """(L,) a function of each layer's eigenvalues."""
    return exactly(np.array([function(values) for values in exact.values.values()]), exact.ledger)


def check_given(spectra: Spectra | None, method: str) -> None:
    """Refuse spectra that the method would not use."""
    if spectra is not None and method != "exact":
        raise ValueError(f"spectra= is for method='exact'; found method={method!r}, which does not use them.")
