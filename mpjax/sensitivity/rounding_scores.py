"""Sensitivities from the rounding itself: measured layer by layer, carried to the output, or not looked at further.

`measured` is the truth that every other score is judged by. `local_rounding` is its first-order form at a cost that depends
neither on the number of layers nor on the number of formats. `rounding_norm`, `depth` and `random` are baselines.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax import losses
from mpjax.arithmetic import Calibration, emulated, ranges_of
from mpjax.emulation import calibrate, choose
from mpjax.formats import Format
from mpjax.kernels.choice import suited
from mpjax.ledger import Ledger
from mpjax.losses import Loss, flat, inexact, with_inexact
from mpjax.program.model import Array, Batches, Layer, Model, Override, Params, Product
from mpjax.sensitivity.scores import (
    Key,
    Scorer,
    Scores,
    Timed,
    all_finite,
    examples_in,
    for_layers,
    in_range,
    make_scores,
    overflows,
    prepare,
    rounding_of,
)


def local_rounding(
    *, num_probes: int | None = 4, loss: Loss = losses.OUTPUT, calibration: Calibration | None = None
) -> Scorer:
    """Each layer's own rounding error, carried to the output by vector-Jacobian products: all layers and formats at once.

    Let δa be the layer in low precision on its float32 input minus the layer in float32 (weights, inputs and accumulation
    together), H the Hessian of the loss with respect to the outputs, and u random with E[u uᵀ] = H (signs, for the output
    loss); then s = uᵀ (∂f/∂a) δa has E[s²] = (J δa)ᵀ H (J δa), twice the predicted loss. The number of vector-Jacobian
    products is `num_probes` per example, whatever the number of layers or formats; the local errors cost about one more
    forward pass per format. First order in δa, exact in everything else. Memory: the activations of one batch,
    `num_probes` times for the cotangents, and one layer's local errors at a time.

    Source: the Gauss-Newton form of ½ δᵀHδ (Martens, arXiv 1412.1193) with sign probes (Hutchinson 1990,
    doi 10.1080/03610919008812866), taken at the layers' outputs instead of their weights.

    Args:
        num_probes: random vectors per example; None takes all rows of H^½, which makes the score exact.
        loss: one that knows its `cotangents`, unless num_probes is None.
        calibration: activation ranges for scaled formats; measured on the batches where it is needed and None.
    """
    check_probes(num_probes, loss)

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        low, timed = prepare(batches, formats, loss), Timed()
        ranges = ranges_for(model, batches, low, loss, calibration, timed)
        total, variance = np.zeros((len(model.layers), len(low))), np.zeros((len(model.layers), len(low)))
        for samples in tap_samples(model, batches, low, loss, key, num_probes, ranges, timed):
            squares = samples**2 / 2.0  # (N, P, L, F)
            if num_probes is None:
                total += squares.sum(axis=(0, 1))
                continue
            total += squares.mean(axis=1).sum(axis=0)
            variance += squares.var(axis=1, ddof=1).sum(axis=0) / num_probes if num_probes > 1 else np.nan
        examples = examples_in(batches)
        value = total / examples
        return make_scores(
            f"local_rounding[{'exact' if num_probes is None else num_probes}]",
            model.names,
            low,
            value,
            stderr=np.sqrt(variance) / examples,
            loss=loss.name,
            ledger=tap_ledger(model, batches, low, loss, num_probes, timed),
            timed=timed,
            kind="loss",
            overflowed=overflows(value, low, finite=all_finite(model.params, batches)),
        )

    return in_range(scorer, loss)


def measured(*, loss: Loss = losses.OUTPUT, calibration: Calibration | None = None) -> Scorer:
    """Each layer lowered alone, by emulation: the growth of the loss, which the other scores predict.

    Two compilations (the format of each layer is a traced number), then one forward pass per layer, format and example. A
    layer whose own product overflows float16 is reported, also where a later clamp hides it from the outputs.

    Args:
        loss: of any kind; "output" gives ½ ‖f_low − f‖².
        calibration: activation ranges for scaled formats; measured on the batches where it is needed and None.
    """
    losses.check(loss)

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        del key  # nothing here is random
        low, count, timed = prepare(batches, formats, loss), len(model.layers), Timed()
        ranges = ranges_for(model, batches, low, loss, calibration, timed)

        def outputs_of(params: Params, index: Array, *batch: Array) -> losses.Outputs:
            chosen = choose(index, model.names, low, calibration=ranges)

            def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
                out = chosen(layer, product, lhs, rhs)
                lowered = index[model.names.index(layer.name)] > 0
                # NaN everywhere, so that no clamp or pooling after it hides an overflow
                return jnp.where(lowered & ~jnp.isfinite(out).all(), jnp.asarray(jnp.nan, out.dtype), out)

            return model.call(params, *loss.split(batch)[0], override=override)

        def growth(outputs: losses.Outputs, reference: losses.Outputs, *batch: Array) -> Array:
            targets = loss.split(batch)[1]
            return jnp.sum(loss.value(outputs, reference, *targets) - loss.value(reference, reference, *targets))

        run, compare = timed.jit(outputs_of), timed.jit(growth)
        total = np.zeros((count, len(low)))
        for batch in batches:
            truth = run(model.params, jnp.zeros(count, jnp.int32), *batch)
            for layer, fmt in np.ndindex(*total.shape):
                index = np.zeros(count, np.int32)
                index[layer] = 1 + fmt
                total[layer, fmt] += float(compare(run(model.params, jnp.asarray(index), *batch), truth, *batch))
        examples = examples_in(batches)
        value = total / examples
        return make_scores(
            "measured",
            model.names,
            low,
            value,
            loss=loss.name,
            ledger=Ledger(forward=examples * (1 + total.size) + timed.forward, compilations=timed.compilations),
            timed=timed,
            kind="loss",
            overflowed=overflows(value, low, finite=all_finite(model.params, batches)),
        )

    return in_range(scorer, loss)


def rounding_norm() -> Scorer:
    """‖δ‖², the power of the weights' rounding error: no data, no derivative. Baseline; kind "ranking"."""

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        del key
        low = prepare(batches, formats, losses.OUTPUT)
        rounding = rounding_of(model.params, model.partition, low)
        weights = replace(model, layers=tuple(layer for layer in model.layers if layer.kernel))
        found = _baseline("rounding_norm", weights, low, rounding.squares, rounding.unchanged, rounding.overflowed)
        return for_layers(found, model.names)

    return scorer


def depth() -> Scorer:
    """−position: the layers nearest to the input are the most sensitive. Baseline; kind "ranking"."""

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        del key
        low = prepare(batches, formats, losses.OUTPUT)
        return _baseline("depth", model, low, -np.arange(len(model.layers), dtype=np.float64))

    return scorer


def random() -> Scorer:
    """A random number per layer, the same in every format. Baseline; kind "ranking"."""

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        low = prepare(batches, formats, losses.OUTPUT)
        keys = [jax.random.fold_in(key, zlib.crc32(name.encode())) for name in model.names]
        return _baseline("random", model, low, np.array([float(jax.random.uniform(k)) for k in keys]))

    return scorer


# --- what interactions share with local_rounding ----------------------------------------------------------------------


def check_probes(num_probes: int | None, loss: Loss) -> None:
    """Refuse fewer than one probe, and random probes of a loss that cannot draw them."""
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"Expected num_probes ≥ 1, or None for all rows of H^½ (exact); found {num_probes}.")
    if losses.check(loss).cotangents is None and num_probes is not None:
        raise ValueError(
            f"The loss {loss.name!r} has no `cotangents` to draw probes from: give it some, or pass num_probes=None."
        )


def ranges_for(
    model: Model,
    batches: Batches,
    formats: Sequence[Format],
    loss: Loss,
    calibration: Calibration | None,
    timed: Timed,
) -> Calibration | None:
    """The calibration, measured on the batches where a scaled format needs it and none is given."""
    if calibration is None and any(fmt.scaled for fmt in formats):
        timed.forward += examples_in(batches)
        return calibrate(model, [loss.split(batch)[0] for batch in batches], jit=timed.jit)
    return calibration


def tap_samples(
    model: Model,
    batches: Batches,
    formats: Sequence[Format],
    loss: Loss,
    key: Key,
    num_probes: int | None,
    calibration: Calibration | None,
    timed: Timed,
) -> Iterator[np.ndarray]:
    """Per batch (N, P, L, F) float64: s = uᵀ (∂f/∂a) δa of each example, probe, layer and format."""
    shape = (len(model.layers), len(formats))
    dtype = jnp.result_type(*inexact(model.params))

    def of_example(params: Params, probe_key: Key, *example: Array) -> Array:  # -> (P, L, F)
        inputs, targets = loss.split(tuple(each[None] for each in example))

        def tapped(taps: Array) -> tuple[list[Array], losses.Outputs]:
            outputs = model.call(params, *inputs, override=_taps(taps, model.names, formats, calibration))
            return inexact(outputs), outputs

        _, pull, outputs = jax.vjp(tapped, jnp.zeros(shape, dtype), has_aux=True)
        if num_probes is None:
            cotangents = half_hessian(loss, outputs, targets)
        else:
            assert loss.cotangents is not None
            draw = loss.cotangents
            cotangents = jax.vmap(lambda n: draw(jax.random.fold_in(probe_key, n), outputs, *targets))(
                jnp.arange(num_probes)
            )
        return jax.vmap(lambda u: pull(inexact(u))[0])(cotangents)

    def of_batch(params: Params, batch_key: Key, *batch: Array) -> Array:
        keys = jax.random.split(batch_key, batch[0].shape[0])
        return jax.vmap(of_example, in_axes=(None, 0, *(0 for _ in batch)))(params, keys, *batch)

    run = timed.jit(of_batch)
    for number, batch in enumerate(batches):
        yield np.asarray(run(model.params, jax.random.fold_in(key, number), *batch), np.float64)


def tap_ledger(
    model: Model, batches: Batches, formats: Sequence[Format], loss: Loss, num_probes: int | None, timed: Timed
) -> Ledger:
    """What `tap_samples` used: the model itself, each layer's product again in the backward pass, and in each format."""
    examples = examples_in(batches)
    probes = num_probes or output_size(model, batches, loss)
    return Ledger(
        forward=examples * (2 + len(formats)) + timed.forward, vjp=examples * probes, compilations=timed.compilations
    )


def half_hessian(loss: Loss, outputs: losses.Outputs, targets: Sequence[Array]) -> losses.Outputs:
    """Rows u_k of H^½ for one example (leading axis 1), shaped like the outputs behind an axis of K: Σ u_k u_kᵀ = H.

    H is the Hessian of the loss with respect to the outputs at outputs = reference; what is negative in it (a loss that is
    not convex in its outputs) counts as 0. The identity for the output loss. Memory: K × K.
    """
    joined = flat(outputs)[0]
    count, parts = joined.size, inexact(outputs)
    # A vector of K numbers as outputs: the transpose of taking them apart, which is linear.
    transposed = jax.linear_transpose(lambda each: flat(with_inexact(outputs, each))[0], parts)

    def shaped(vector: Array) -> losses.Outputs:
        return with_inexact(outputs, transposed(vector)[0])

    if loss is losses.OUTPUT:
        rows = jnp.eye(count, dtype=joined.dtype)
    else:
        reference = lax.stop_gradient(outputs)
        hessian = jax.hessian(lambda o: jnp.sum(loss.value(conjugated(shaped(o)), reference, *targets)))(joined)
        values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
        rows = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    return jax.vmap(shaped)(rows)


def conjugated(outputs: losses.Outputs) -> losses.Outputs:
    """Complex leaves conjugated: a cotangent of an imaginary part is its conjugate."""
    return jax.tree.map(lambda leaf: leaf.conj() if jnp.iscomplexobj(leaf) else leaf, outputs)


def output_size(model: Model, batches: Batches, loss: Loss) -> int:
    """K, the number of outputs of one example."""
    inputs = [each[:1] for each in loss.split(batches[0])[0]]
    return jax.eval_shape(lambda *each: flat(model.call(model.params, *each)), *inputs).shape[1]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _taps(taps: Array, layers: Sequence[str], formats: Sequence[Format], calibration: Calibration | None) -> Override:
    """The override whose derivative with respect to taps[layer, format] is ⟨cotangent, local rounding error⟩.

    The local errors are computed in the backward pass, one layer at a time, so they are never stored. Derivatives with
    respect to the weights are not provided (zero).
    """
    position = {name: number for number, name in enumerate(layers)}

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        ranges = ranges_of(calibration, layer)

        @jax.custom_vjp
        def tapped(row: Array, x: Array, w: Array, operands: tuple) -> Array:
            whole = replace(product, operands=operands)
            return suited(whole, x, w)(x, w)

        def forward(row: Array, x: Array, w: Array, operands: tuple) -> tuple[Array, tuple]:
            return tapped(row, x, w, operands), (x, w, operands)

        def backward(kept: tuple, cotangent: Array) -> tuple:
            x, w, operands = kept
            whole = replace(product, operands=operands)
            fast = suited(whole, x, w)
            if product.kind == "lookup":  # of row numbers, which have no derivative
                exact, back = fast(x, w), (None, jnp.zeros_like(w))
            elif product.weighted:
                exact, pull = jax.vjp(lambda each: fast(each, w), x)
                back = (*pull(cotangent), jnp.zeros_like(w))
            else:
                exact, pull = jax.vjp(fast, x, w)
                back = pull(cotangent)
            errors = [emulated(fmt, whole, x, w, ranges=ranges).astype(exact.dtype) - exact for fmt in formats]
            row = jnp.stack([jnp.sum(cotangent * error) for error in errors])
            return row, *back, None

        tapped.defvjp(forward, backward)
        return tapped(taps[position[layer.name]], lhs, rhs, product.operands)

    return override


def _baseline(
    name: str,
    model: Model,
    formats: Sequence[Format],
    value: np.ndarray,
    unchanged: np.ndarray | None = None,
    overflowed: np.ndarray | None = None,
) -> Scores:
    return make_scores(
        name,
        model.names,
        formats,
        value,
        loss="none",
        ledger=Ledger(),
        timed=Timed(),
        kind="ranking",
        unchanged=unchanged,
        overflowed=overflowed,
    )
