"""Local rounding errors carried to the outputs: what `local_rounding` and `interactions` share.

Let δa be a layer's product in low precision on its float32 input minus the product in float32, and u a vector of the outputs'
shape: one vector-Jacobian product gives s = uᵀ (∂f/∂a) δa of all layers and formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import losses
from mpjax.arithmetic import Calibration, emulated, ranges_of
from mpjax.formats import Format
from mpjax.kernels import suited
from mpjax.ledger import Ledger
from mpjax.losses import inexact
from mpjax.program import Array, Layer, Override, Params, Product
from mpjax.sensitivity.output_probes import half_hessian, output_size
from mpjax.sensitivity.scores import Key
from mpjax.sensitivity.task import ModelTask


def tap_samples(task: ModelTask, num_probes: int | None, calibration: Calibration | None) -> Iterator[np.ndarray]:
    """Per batch (N, P, L, F) float64: s = uᵀ (∂f/∂a) δa of each example, probe, layer and format.

    With num_probes, u is random with E[u uᵀ] = H; None takes all rows of H^½.
    """
    loss, shape = task.loss, (len(task.names), len(task.formats))
    dtype = jnp.result_type(*inexact(task.params))

    def samples_of_example(params: Params, key: Key, *example: Array) -> Array:  # -> (P, L, F)
        inputs, targets = loss.split(tuple(array[None] for array in example))

        def tapped(taps: Array) -> tuple[list[Array], losses.Outputs]:
            override = _override(taps, task.names, task.formats, calibration)
            outputs = task.model.call(params, *inputs, override=override)
            return inexact(outputs), outputs

        _, pull, outputs = jax.vjp(tapped, jnp.zeros(shape, dtype), has_aux=True)
        if num_probes is None:
            cotangents = half_hessian(loss, outputs, targets)
        else:
            assert loss.cotangents is not None
            draw = loss.cotangents
            numbers = jnp.arange(num_probes)
            cotangents = jax.vmap(lambda n: draw(jax.random.fold_in(key, n), outputs, *targets))(numbers)
        return jax.vmap(lambda u: pull(inexact(u))[0])(cotangents)

    def samples_of_batch(params: Params, key: Key, *batch: Array) -> Array:
        keys = jax.random.split(key, batch[0].shape[0])
        return jax.vmap(samples_of_example, in_axes=(None, 0, *(0 for _ in batch)))(params, keys, *batch)

    run = task.timed.jit(samples_of_batch)
    for number, batch in enumerate(task.batches):
        yield np.asarray(run(task.params, jax.random.fold_in(task.key, number), *batch), np.float64)


def tap_ledger(task: ModelTask, num_probes: int | None) -> Ledger:
    """Passes of `tap_samples`: the model itself, each layer's product again in the backward pass, and in each format."""
    probes = num_probes or output_size(task.model, task.batches, task.loss)
    return Ledger(forward=task.examples * (2 + len(task.formats)), vjp=task.examples * probes)


def _override(
    taps: Array, layers: Sequence[str], formats: Sequence[Format], calibration: Calibration | None
) -> Override:
    """The override whose derivative with respect to taps[layer, format] is ⟨cotangent, local rounding error⟩.

    The local errors are computed in the backward pass, one layer at a time, so they are never stored. Derivatives with respect
    to the weights are not provided (zero).
    """
    position = {name: number for number, name in enumerate(layers)}

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        ranges = ranges_of(calibration, layer)

        @jax.custom_vjp
        def tapped(row: Array, x: Array, w: Array, operands: tuple) -> Array:
            return suited(replace(product, operands=operands))(x, w)

        def forward(row: Array, x: Array, w: Array, operands: tuple) -> tuple[Array, tuple]:
            return tapped(row, x, w, operands), (x, w, operands)

        def backward(saved: tuple, cotangent: Array) -> tuple:
            x, w, operands = saved
            whole = replace(product, operands=operands)
            fast = suited(whole)
            if product.kind == "lookup":  # of row numbers, which have no derivative
                exact, back = fast(x, w), (None, jnp.zeros_like(w))
            elif product.weighted:
                exact, pull = jax.vjp(lambda activations: fast(activations, w), x)
                back = (*pull(cotangent), jnp.zeros_like(w))
            else:
                exact, pull = jax.vjp(fast, x, w)
                back = pull(cotangent)
            errors = [emulated(fmt, whole, x, w, ranges=ranges).astype(exact.dtype) - exact for fmt in formats]
            return jnp.stack([jnp.sum(cotangent * error) for error in errors]), *back, None

        tapped.defvjp(forward, backward)
        return tapped(taps[position[layer.name]], lhs, rhs, product.operands)

    return override
