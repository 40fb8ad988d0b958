"""Sensitivities from output probes and from exact Gram matrices: the curvature JᵀHJ, reached from the output side.

H is the Hessian of the loss with respect to the outputs of one example and J the Jacobian of those outputs with respect to
a layer's weights; JᵀHJ is the generalised Gauss-Newton matrix, and the true Fisher matrix where the loss is a negative
log-likelihood (Martens, arXiv 1412.1193). With random u, E[u uᵀ] = H, one vector-Jacobian product g = Jᵀu says something
about every layer and every format at once: E[(gᵀδ)²] = δᵀJᵀHJδ, and E[‖g‖²] is the trace. With all rows of H^½ J instead of
random ones the same is exact, and so is the spectrum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax import losses, partition
from mpjax.curvature import grams
from mpjax.emulation import in_format
from mpjax.ledger import Ledger
from mpjax.losses import Loss, flat, inexact, with_inexact
from mpjax.program.model import Array, Batches, Model, Params
from mpjax.sensitivity.gradients import scored
from mpjax.sensitivity.rounding_scores import half_hessian, output_size
from mpjax.sensitivity.scores import Key, Rounding, Timed, examples_in

Reduce = Literal["directional", "elementwise", "squares"]


def probe(
    model: Model,
    batches: Batches,
    loss: Loss,
    deltas: Sequence[dict[str, Array]],
    key: Key,
    *,
    num_probes: int | None,
    reduce: Reduce,
    timed: Timed,
) -> tuple[np.ndarray, np.ndarray, Ledger]:
    """Mean over examples and probes of a square of g = Jᵀu, and its standard error; all layers from the same products.

    Args:
        deltas: for each format path -> δ; none for "squares".
        num_probes: random u per example with E[u uᵀ] = H; None takes the one gradient of the loss itself, u = ∂loss/∂f
            (the empirical Fisher), which is not random: its standard error is 0.
        reduce: "directional" (gᵀδ)², "elementwise" Σ g²δ² -> (L, F); "squares" ‖g‖² -> (L,).

    Memory: one example's activations, and `num_probes` gradients of all layers' weights.
    """
    blocks = model.partition
    count = num_probes or 1

    def reduced(g: dict[str, Array], deltas: Sequence[dict[str, Array]]) -> Array:
        if reduce == "squares":
            return jnp.stack([sum(jnp.sum(jnp.square(g[p])) for p in block.paths) for block in blocks])
        rows = []
        for block in blocks:
            if reduce == "directional":
                rows.append(jnp.stack([jnp.square(sum(jnp.vdot(g[p], d[p]) for p in block.paths)) for d in deltas]))
            else:
                rows.append(jnp.stack([sum(jnp.sum(jnp.square(g[p] * d[p])) for p in block.paths) for d in deltas]))
        return jnp.stack(rows)

    def of_example(params: Params, deltas: Sequence[dict[str, Array]], key: Key, example: Sequence[Array]) -> Array:
        inputs, targets = loss.split(tuple(each[None] for each in example))
        values = partition.select_all(params, blocks)

        def differentiated(v: dict[str, Array]) -> tuple[list[Array], losses.Outputs]:
            found = model.call(partition.replace(params, v), *inputs, override=scored)
            return inexact(found), found

        parts, pull, outputs = jax.vjp(differentiated, values, has_aux=True)

        def one(number: Array) -> Array:
            if num_probes is None:
                reference = lax.stop_gradient(outputs)
                u = jax.grad(lambda o: jnp.sum(loss.value(with_inexact(outputs, o), reference, *targets)))(parts)
            else:
                assert loss.cotangents is not None
                u = inexact(loss.cotangents(jax.random.fold_in(key, number), outputs, *targets))
            return reduced(pull(u)[0], deltas)

        return jax.vmap(one)(jnp.arange(count))

    def of_batch(params: Params, deltas: Sequence[dict[str, Array]], key: Key, *batch: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, batch[0].shape[0])
        squares = lax.map(lambda each: of_example(params, deltas, each[0], each[1]), (keys, batch))  # (N, P, L, …)
        spread = jnp.var(squares, axis=1, ddof=1) if count > 1 else jnp.full_like(squares[:, 0], jnp.nan)
        return jnp.sum(jnp.mean(squares, axis=1), axis=0), jnp.sum(spread, axis=0) / count

    run = timed.jit(of_batch)
    parts = [run(model.params, deltas, jax.random.fold_in(key, number), *batch) for number, batch in enumerate(batches)]
    examples = examples_in(batches)
    mean = sum(np.float64(total) for total, _ in parts) / examples
    stderr = np.sqrt(sum(np.float64(variance) for _, variance in parts)) / examples
    if num_probes is None:
        stderr = np.zeros_like(mean)
    ledger = Ledger(forward=examples, vjp=examples * count, compilations=timed.compilations)
    return np.asarray(mean), np.asarray(stderr), ledger


def gauss_newton_products(
    model: Model, batches: Batches, loss: Loss, rounding: Rounding, *, timed: Timed
) -> tuple[np.ndarray, Ledger]:
    """(L, F) exact ½ (Jδ)ᵀH(Jδ), mean over examples: one Jacobian-vector product per layer, format and example.

    No backward pass. Memory: the linearised forward pass of one batch.
    """

    def of_batch(params: Params, delta: dict[str, Array], *batch: Array) -> Array:  # -> (L,)
        inputs, targets = loss.split(batch)
        values = partition.select_all(params, model.partition)

        def differentiated(v: dict[str, Array]) -> tuple[list[Array], losses.Outputs]:
            found = model.call(partition.replace(params, v), *inputs, override=in_format({}))
            return inexact(found), found

        outputs, tangent_of, whole = jax.linearize(differentiated, values, has_aux=True)
        reference = lax.stop_gradient(with_inexact(whole, outputs))
        slope = jax.grad(lambda o: jnp.sum(loss.value(with_inexact(whole, o), reference, *targets)))

        def score(number: Array) -> Array:
            change = tangent_of(partition.only(model.partition, number, delta))
            curved = jax.jvp(slope, (outputs,), (change,))[1]
            return 0.5 * jnp.stack([jnp.sum((a * b).real) for a, b in zip(change, curved, strict=True)]).sum()

        return lax.map(score, jnp.arange(len(model.partition)))

    run = timed.jit(of_batch)
    columns = [sum(np.float64(run(model.params, delta, *batch)) for batch in batches) for delta in rounding.deltas]
    examples = examples_in(batches)
    value = np.stack([np.asarray(column) for column in columns], axis=1) / examples
    ledger = Ledger(forward=examples * value.shape[1], jvp=examples * value.size, compilations=timed.compilations)
    return value, ledger


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Every layer's eigenvalues of JᵀHJ that can differ from 0, mean over the examples; exact.

    Attributes:
        values: layer name -> (min(d, k),) float64, descending; d the layer's weights, k = examples × outputs. NaN where not
            finite; 0 where below 10 roundings of the layer's largest (the Gram matrices are float32).
        loss, examples: what of, and over how many.
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
    loss: Loss = losses.OUTPUT,
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
        inputs, targets = loss.split(tuple(each[None] for each in example))
        outputs = model.call(params, *inputs, override=scored)
        joined = flat(outputs)[0]
        if loss is losses.OUTPUT:
            return joined
        return jnp.matmul(flat(lax.stop_gradient(half_hessian(loss, outputs, targets))), joined)

    matrices = grams.output_grams(
        rows,
        model.params,
        model.partition,
        *data,
        batch_size=batch_size,
        max_bytes=max_bytes,
        jit=timed.jit,
    )
    with timed.clock():
        eigenvalues = grams.spectra(matrices)
    found = {}
    for layer in model.layers:
        values = np.sort(eigenvalues[layer.name])[::-1][: layer.weights] / examples
        rounding = 10 * float(jnp.finfo(matrices[layer.name].dtype).eps) * values[0]
        found[layer.name] = np.where(values < rounding, 0.0, values)  # NaN stays
    finite = [values for values in found.values() if np.isfinite(values).all()]
    total = sum(float(values.sum()) for values in finite)
    groups = timed.compilations  # each repeats the backward passes, down to its own first layer
    return Spectra(
        values=found,
        loss=loss.name,
        examples=examples,
        mean=total / sum(values.size for values in finite) if total > 0 else 1.0,
        ledger=Ledger(forward=examples * groups, vjp=examples * size * groups, compilations=groups),
        timed=timed,
    )
