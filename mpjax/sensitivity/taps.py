"""What happens at the layers' products, and cotangents of the outputs carried there: what several scores share.

Let δa be a layer's product in low precision on its float32 input minus the product in float32, and u a vector of the outputs'
shape: one vector-Jacobian product gives s = uᵀ (∂f/∂a) δa of all layers and formats. Other scores take another `Term` of a `Tap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import losses
from mpjax.arithmetic import Calibration, Ranges, emulated, ranges_of
from mpjax.formats import Format
from mpjax.kernels import suited
from mpjax.ledger import Ledger
from mpjax.losses import inexact
from mpjax.program import Array, Layer, Override, Params, Product
from mpjax.sensitivity.output_probes import half_hessian, output_gradient, output_size
from mpjax.sensitivity.scores import Key
from mpjax.sensitivity.task import ModelTask


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One product of a layer on one example: its operands, its output, and the cotangents of output and activations.

    `lhs_cotangent` is None where the activations have no derivative (row numbers of a lookup).
    """

    product: Product
    lhs: Array
    rhs: Array
    output: Array
    cotangent: Array
    lhs_cotangent: Array | None
    ranges: Ranges

    def error(self, fmt: Format) -> Array:
        """The local rounding error: the product in low precision on its float32 input minus that in float32."""
        low = emulated(fmt, self.product, self.lhs, self.rhs, ranges=self.ranges)
        return low.astype(self.output.dtype) - self.output


Term: TypeAlias = Callable[[Tap, Sequence[Format]], list[Any]]  # C numbers, which are added up over a layer's calls


def carried(tap: Tap, formats: Sequence[Format]) -> list[Array]:
    """uᵀ (∂f/∂a) δa in each format."""
    return [jnp.sum(tap.cotangent * tap.error(fmt)) for fmt in formats]


def tap_samples(
    task: ModelTask,
    num_probes: int | None,
    calibration: Calibration | None,
    *,
    term: Term = carried,
    more: int = 0,
) -> Iterator[np.ndarray]:
    """Per batch (N, P, L, C) float64: the term (s = uᵀ (∂f/∂a) δa, C = F) of each example, probe, layer and format.

    With num_probes, u is random with E[u uᵀ] = H; None takes all rows of H^½; 0 the one gradient of the loss itself. `more`:
    numbers that the term gives beside one for each format.
    """
    loss, shape = task.loss, (len(task.names), len(task.formats) + more)
    dtype = jnp.result_type(*inexact(task.params))

    def samples_of_example(params: Params, key: Key, *example: Array) -> Array:  # -> (P, L, F)
        inputs, targets = loss.split(tuple(array[None] for array in example))

        def tapped(taps: Array) -> tuple[list[Array], losses.Outputs]:
            override = _override(taps, task.names, task.formats, calibration, term)
            outputs = task.model.call(params, *inputs, override=override)
            return inexact(outputs), outputs

        parts, pull, outputs = jax.vjp(tapped, jnp.zeros(shape, dtype), has_aux=True)
        if num_probes == 0:
            return pull(output_gradient(loss, outputs, targets)(parts))[0][None]
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


def mean_over_probes(task: ModelTask, samples: Iterable[np.ndarray], num_probes: int | None) -> tuple[Any, Any]:
    """(L, C) mean over all examples of the mean over probes (their sum where the probes are all rows of H^½), and its
    standard error."""
    total: Any = 0.0
    variance: Any = 0.0
    for batch in samples:  # (N, P, L, C)
        if not num_probes:
            total = total + batch.sum(axis=(0, 1))
            continue
        total = total + batch.mean(axis=1).sum(axis=0)
        with np.errstate(invalid="ignore"):  # inf - inf, where a layer overflows
            spread = batch.var(axis=1, ddof=1).sum(axis=0) if num_probes > 1 else np.nan
        variance = variance + spread / num_probes
    return total / task.examples, np.broadcast_to(variance, total.shape) ** 0.5 / task.examples


def tap_ledger(task: ModelTask, num_probes: int | None) -> Ledger:
    """Passes of `tap_samples`: the model itself, each layer's product again in the backward pass, and in each format."""
    probes = output_size(task.model, task.batches, task.loss) if num_probes is None else max(num_probes, 1)
    return Ledger(forward=task.examples * (2 + len(task.formats)), vjp=task.examples * probes)


def _override(
    taps: Array, layers: Sequence[str], formats: Sequence[Format], calibration: Calibration | None, term: Term
) -> Override:
    """The override whose "derivative" with respect to taps[layer] is the term of each product: ⟨cotangent, local error⟩.

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
            tap = Tap(
                product=whole,
                lhs=x,
                rhs=w,
                output=exact,
                cotangent=cotangent,
                lhs_cotangent=back[0],
                ranges=ranges,
            )
            return jnp.stack([jnp.asarray(number, taps.dtype) for number in term(tap, formats)]), *back, None

        tapped.defvjp(forward, backward)
        return tapped(taps[position[layer.name]], lhs, rhs, product.operands)

    return override
