"""Sensitivity: one score per (layer, format), all in the one Scorer form.

A scorer is made by a factory that takes the knobs; it then takes the problem and the key:

    scores = local_rounding(num_probes=4)(model, batches, ("bfloat16",), jax.random.key(0))

Every score of kind "loss" here predicts (or, for `measured`, is) the same number: the mean over the examples of
½ ‖f_low(x) − f(x)‖², where only that one layer is in that format and f are the model's outputs, flattened. That is the
*output loss* per example: its gradient at the trained weights is exactly 0 and its Hessian exactly JᵀJ, so the
second-order expansion ½ δᵀHδ holds without assuming that training reached an optimum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import curvature, partition
from mpjax.emulate import Calibration, calibrate, choose, product_in
from mpjax.formats import FLOAT32, Format, parse_all, round_weights
from mpjax.ledger import Ledger
from mpjax.models import Array, Batches, Layer, Model, Override, Params, Product, check_batches

Key = Array
Scorer = Callable[[Model, Batches, Sequence[str | Format], Key], "Scores"]

OK = "ok"
ZERO = "zero_by_construction"
NOT_FINITE = "not_finite"
OVERFLOW = "overflow"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of L layers in F formats.

    `value`, `stderr`: (L, F) float64; a score that is not finite is +inf, so it ranks as most sensitive. `stderr`: standard
    error from the random probes (0 where there are none, NaN where it cannot be told). `kind`: "loss" (predicted output
    loss, may be summed) or "ranking" (only the order means something). `status`: (L, F) strings, "ok" |
    "zero_by_construction" | "not_finite" | "overflow". `seconds` without and `compile_seconds` of compilation.
    """

    estimator: str
    value: np.ndarray
    stderr: np.ndarray
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    kind: Literal["loss", "ranking"]
    status: np.ndarray
    ledger: Ledger
    seconds: float
    compile_seconds: float

    def column(self, fmt: str) -> np.ndarray:
        """(L,) scores of one format."""
        if fmt not in self.formats:
            raise ValueError(f"No scores for format {fmt!r}; these are for {', '.join(self.formats)}.")
        return self.value[:, self.formats.index(fmt)]

    def ranking(self, fmt: str) -> tuple[str, ...]:
        """Layers from least to most sensitive; ties in execution order."""
        return tuple(self.layers[i] for i in np.argsort(self.column(fmt), kind="stable"))


def local_rounding(*, num_probes: int | None = 4, calibration: Calibration | None = None) -> Scorer:
    """Each layer's own rounding error, carried to the output by vector-Jacobian products: all layers and formats at once.

    Let δa be the layer in low precision on its float32 input minus the layer in float32 (weights, inputs and
    accumulation together) and u a random sign vector over the outputs; then s = uᵀ (∂f/∂a) δa has E[s²] = ‖(∂f/∂a) δa‖².
    The number of vector-Jacobian products is `num_probes` per example, whatever the number of layers or formats; the
    local errors cost about one more forward pass per format. First order in δa, exact in everything else. Memory: the
    activations of one batch, `num_probes` times for the cotangents, and one layer's local error at a time.

    Source: the Gauss-Newton form of ½ δᵀHδ (Martens, arXiv 1412.1193) with sign probes (Hutchinson 1990,
    doi 10.1080/03610919008812866), taken at the layers' outputs instead of their weights.

    Args:
        num_probes: random sign vectors per example; None takes every basis vector, which makes the score exact.
        calibration: activation ranges for scaled formats; measured on the batches where it is needed and None.
    """
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"Expected num_probes ≥ 1, or None for all basis vectors; found {num_probes}.")

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        low, ranges = _prepare(model, batches, formats, calibration)
        shape = (len(model.layers), len(low))

        def of_example(params: Params, probe_key: Key, *example: Array) -> Array:  # -> (P, L, F)
            def tapped(taps: Array) -> Array:
                return _outputs(model, params, example, _taps(taps, model.names, low, ranges))

            outputs, pull = jax.vjp(tapped, jnp.zeros(shape, jnp.float32))
            if num_probes is None:
                probes = jnp.eye(outputs.size, dtype=outputs.dtype)
            else:
                probes = jax.random.rademacher(probe_key, (num_probes, outputs.size), outputs.dtype)
            return jax.vmap(lambda u: pull(u)[0])(probes)

        def of_batch(params: Params, batch_key: Key, *batch: Array) -> tuple[Array, Array]:
            keys = jax.random.split(batch_key, batch[0].shape[0])
            over = (None, 0, *(0 for _ in batch))
            squares = jnp.square(jax.vmap(of_example, in_axes=over)(params, keys, *batch)) / 2.0  # (N, P, L, F)
            if num_probes is None:
                return jnp.sum(squares, axis=(0, 1)), jnp.zeros(shape, squares.dtype)
            mean = jnp.mean(squares, axis=1)
            spread = jnp.var(squares, axis=1, ddof=1) if num_probes > 1 else jnp.full_like(mean, jnp.nan)
            return jnp.sum(mean, axis=0), jnp.sum(spread, axis=0) / num_probes

        run = _Timed(of_batch)
        total, variance = np.zeros(shape), np.zeros(shape)
        for number, batch in enumerate(batches):
            mean, spread = run(model.params, jax.random.fold_in(key, number), *batch)
            total, variance = total + np.float64(mean), variance + np.float64(spread)
        examples = _examples(batches)
        probes = num_probes or _output_size(model, batches)
        ledger = Ledger(forward=examples * (1 + len(low)), vjp=examples * probes, compilations=1)
        name = f"local_rounding[{'exact' if num_probes is None else num_probes}]"
        return _scores(
            name,
            model,
            low,
            total / examples,
            np.sqrt(variance) / examples,
            ledger=ledger,
            timed=run,
            data=batches,
        )

    return scorer


def measured(*, calibration: Calibration | None = None) -> Scorer:
    """Each layer lowered alone, by emulation: the truth that the other scores are judged by.

    One compilation (the format of each layer is a traced number), then one forward pass per layer, format and example.

    Args:
        calibration: activation ranges for scaled formats; measured on the batches where it is needed and None.
    """

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        del key  # nothing here is random
        low, ranges = _prepare(model, batches, formats, calibration)
        count = len(model.layers)

        def of_batch(params: Params, index: Array, *batch: Array) -> Array:
            return _flat(model.call(params, *batch, override=choose(index, model.names, low, calibration=ranges)))

        run = _Timed(of_batch)
        total = np.zeros((count, len(low)))
        for batch in batches:
            truth = np.float64(run(model.params, jnp.zeros(count, jnp.int32), *batch))
            for layer, fmt in np.ndindex(*total.shape):
                index = np.zeros(count, np.int32)
                index[layer] = 1 + fmt
                change = np.float64(run(model.params, jnp.asarray(index), *batch)) - truth
                total[layer, fmt] += 0.5 * np.sum(change**2)
        examples = _examples(batches)
        ledger = Ledger(forward=examples * (1 + total.size), compilations=1)
        return _scores(
            "measured",
            model,
            low,
            total / examples,
            np.zeros_like(total),
            ledger=ledger,
            timed=run,
            data=batches,
        )

    return scorer


def quadratic(*, loss: Callable[..., Array] | None = None) -> Scorer:
    """½ δᵀHδ with the real rounding error δ of the layer's weights.

    Under the output loss (`loss=None`) H = JᵀJ, so it is ½ ‖Jδ‖²: one Jacobian-vector product per layer, format and
    example, and no backward pass. With a loss of one's own, `loss(outputs, *inputs) -> scalar` (mean over the batch), H is
    the true Hessian block and it costs one Hessian-vector product each; the value may then be negative, so the kind is
    "ranking". Weight-space scores do not see the rounding of activations. Where no weight of a layer changes in a format
    the score is 0 with status "zero_by_construction".

    Source: LeCun, Denker and Solla, "Optimal brain damage", NIPS 1989; Dong et al. (HAWQ), arXiv 1905.03696.
    """

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        del key
        low = parse_all(formats)
        check_batches(batches)
        kernels = {layer.name: _leaf(model.params, layer) for layer in model.layers}
        round_all = jax.jit(
            lambda ws, fmt: {name: round_weights(w, fmt) - w for name, w in ws.items()}, static_argnums=1
        )
        deltas = [round_all(kernels, fmt) for fmt in low]
        zero = jnp.zeros((), jnp.float32)

        def with_kernels(params: Params, values: dict[str, Array]) -> Params:
            return partition.replace(params, {layer.kernel: values[layer.name] for layer in model.layers})

        def of_batch(params: Params, delta: dict[str, Array], *batch: Array) -> Array:  # -> (L,)
            def outputs(values: dict[str, Array]) -> Array:
                return _flat(model.call(with_kernels(params, values), *batch))

            def objective(values: dict[str, Array]) -> Array:
                assert loss is not None
                return loss(model.call(with_kernels(params, values), *batch), *batch) * batch[0].shape[0]

            current = {layer.name: _leaf(params, layer) for layer in model.layers}
            function = outputs if loss is None else jax.grad(objective)
            _, tangent_of = jax.linearize(function, current)

            def score(number: Array) -> Array:
                only = {
                    name: jnp.where(number == position, delta[name], zero) for position, name in enumerate(model.names)
                }
                change = tangent_of(only)
                if loss is None:
                    return 0.5 * jnp.sum(jnp.square(change))
                return 0.5 * jnp.sum(jnp.stack([jnp.vdot(only[name], change[name]) for name in only]))

            return jax.lax.map(score, jnp.arange(len(model.layers)))

        run = _Timed(of_batch)
        total = np.zeros((len(model.layers), len(low)))
        for batch in batches:
            for column, delta in enumerate(deltas):
                total[:, column] += np.float64(run(model.params, delta, *batch))
        unchanged = np.array([[not bool(jnp.any(delta[name])) for delta in deltas] for name in model.names])
        examples = _examples(batches)
        count = examples * total.size
        ledger = Ledger(forward=examples * len(low), compilations=1)
        ledger += Ledger(jvp=count) if loss is None else Ledger(hvp=count)
        value = total / examples
        kind: Literal["loss", "ranking"] = "loss" if loss is None else "ranking"
        name = f"quadratic[{'output_loss' if loss is None else 'loss'}]"
        scores = _scores(
            name, model, low, value, np.zeros_like(value), ledger=ledger, timed=run, kind=kind, data=batches
        )
        return replace(scores, status=np.where(unchanged, ZERO, scores.status))

    return scorer


def logdet(*, damping: float = 1e-2, max_outputs: int = 256, batch_size: int = 8, max_bytes: int = 2 << 30) -> Scorer:
    """The post's score: the log-determinant of a layer's Hessian block, exact, as Σ log(1 + λ/ε).

    Under the output loss the block is JᵢᵀJᵢ, summed over the examples; its non-zero eigenvalues are those of the small
    matrix JᵢJᵢᵀ (the Weinstein–Aronszajn identity), so blocks of any size are exact from k = examples × outputs
    vector-Jacobian products. Subtracting d log ε from log det(εI + JᵀJ) leaves Σ log(1 + λ/ε), which does not
    depend on the number of parameters d. It does not depend on the format either: it says how much the output
    moves, not how large the rounding is. Kind "ranking".

    Args:
        damping: ε, relative to the mean of all layers' non-zero eigenvalues.
        max_outputs: k at most; the examples are taken from the front of the batches, as many as fit.
        batch_size: vector-Jacobian products computed together.
        max_bytes: bound on the k × d Jacobian; a clear error beyond it.
    """
    if not damping > 0:
        raise ValueError(f"Expected damping > 0, found {damping}.")

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        del key
        low = parse_all(formats)
        check_batches(batches)
        size = _output_size(model, batches)
        examples = min(max_outputs // size, _examples(batches))
        if examples < 1:
            raise ValueError(
                f"One example has {size} outputs, more than max_outputs = {max_outputs}: raise max_outputs."
            )
        inputs = [jnp.concatenate(parts)[:examples] for parts in zip(*batches, strict=True)]

        def grams(params: Params, *batch: Array) -> dict[str, Array]:
            return curvature.output_grams(
                lambda p: _flat(model.call(p, *batch)),
                params,
                model.partition,
                batch_size=batch_size,
                max_bytes=max_bytes,
            )

        run = _Timed(grams)
        matrices = run(model.params, *inputs)
        spectra = [_spectrum(np.asarray(matrices[name], np.float64)) for name in model.names]
        everything = np.concatenate(spectra)
        everything = everything[np.isfinite(everything)]
        nonzero = everything[everything > 1e-7 * everything.max(initial=0.0)]
        epsilon = damping * float(nonzero.mean()) if nonzero.size else 1.0
        column = np.array([np.sum(np.log1p(each / epsilon)) for each in spectra])
        value = np.repeat(column[:, None], len(low), axis=1)
        ledger = Ledger(forward=examples, vjp=examples * size, compilations=1)
        name = f"logdet[exact,damping={damping:g}]"
        return _scores(name, model, low, value, np.zeros_like(value), ledger=ledger, timed=run, kind="ranking")

    return scorer


# --- helpers --------------------------------------------------------------------------------------------------


class _Timed:
    """A jitted function that keeps the seconds of compiling and of running apart."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._jitted = jax.jit(function)
        self._compiled: Any = None
        self.compile_seconds = 0.0
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        if self._compiled is None:
            self._compiled = self._jitted.lower(*args).compile()
            self.compile_seconds = time.perf_counter() - start
            start = time.perf_counter()
        out = jax.block_until_ready(self._compiled(*args))
        self.seconds += time.perf_counter() - start
        return out


def _taps(taps: Array, layers: Sequence[str], formats: Sequence[Format], calibration: Calibration | None) -> Override:
    """The override whose derivative with respect to taps[layer, format] is ⟨cotangent, local rounding error⟩.

    The local errors are computed in the backward pass, one layer at a time, so they are never stored. Derivatives with
    respect to the weights are not provided (zero).
    """
    position = {name: number for number, name in enumerate(layers)}

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        amax = None if calibration is None else calibration[layer.name]

        @jax.custom_vjp
        def tapped(row: Array, x: Array, w: Array, bias: Array | None) -> Array:
            return replace(product, bias=bias)(x, w)

        def forward(row: Array, x: Array, w: Array, bias: Array | None) -> tuple[Array, tuple]:
            return tapped(row, x, w, bias), (x, w, bias)

        def backward(kept: tuple, cotangent: Array) -> tuple:
            x, w, bias = kept
            whole = replace(product, bias=bias)
            exact, pull = jax.vjp(lambda each: whole(each, w), x)
            errors = [product_in(fmt, whole, x, w, amax=amax).astype(exact.dtype) - exact for fmt in formats]
            row = jnp.stack([jnp.sum(cotangent * error) for error in errors])
            return row, pull(cotangent)[0], jnp.zeros_like(w), None if bias is None else jnp.zeros_like(bias)

        tapped.defvjp(forward, backward)
        return tapped(taps[position[layer.name]], lhs, rhs, product.bias)

    return override


def _outputs(model: Model, params: Params, example: Sequence[Array], override: Override) -> Array:
    """All outputs of one example, flat."""
    outputs = model.call(params, *(each[None] for each in example), override=override)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(outputs)])


def _flat(outputs: Any) -> Array:
    """Outputs of a batch as (N, K)."""
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(outputs)], axis=1)


def _leaf(params: Params, layer: Layer) -> Array:
    return partition.select(params, layer.block)[layer.kernel]


def _spectrum(gram: np.ndarray) -> np.ndarray:
    """Eigenvalues of a positive semi-definite matrix; NaN where it is not finite."""
    return np.linalg.eigvalsh(gram).clip(min=0.0) if np.isfinite(gram).all() else np.full(1, np.nan)


def _examples(batches: Batches) -> int:
    return sum(batch[0].shape[0] for batch in batches)


def _output_size(model: Model, batches: Batches) -> int:
    return jax.eval_shape(lambda *each: _flat(model.call(model.params, *each)), *batches[0]).shape[1]


def _prepare(
    model: Model, batches: Batches, formats: Sequence[str | Format], calibration: Calibration | None
) -> tuple[tuple[Format, ...], Calibration | None]:
    low = parse_all(formats)
    check_batches(batches)
    if calibration is None and any(fmt.scaled for fmt in low):
        calibration = calibrate(model, batches)
    return low, calibration


def _scores(
    name: str,
    model: Model,
    formats: Sequence[Format],
    value: np.ndarray,
    stderr: np.ndarray,
    *,
    ledger: Ledger,
    timed: _Timed,
    kind: Literal["loss", "ranking"] = "loss",
    data: Batches = (),
) -> Scores:
    # float16 is the one format here that overflows, unless the inputs were not finite to begin with.
    overflows = np.array([fmt.operand == "float16" and kind == "loss" for fmt in formats])
    overflows &= all(bool(jnp.all(jnp.isfinite(each))) for batch in data for each in batch)
    finite = np.isfinite(value)
    status = np.where(finite, OK, np.where(overflows[None, :], OVERFLOW, NOT_FINITE)).astype("U32")
    if kind == "loss":
        status[:, [fmt == FLOAT32 for fmt in formats]] = ZERO  # float32 itself, asked for beside the others
    return Scores(
        estimator=name,
        value=np.where(finite, value, np.inf),
        stderr=stderr,
        layers=model.names,
        formats=tuple(fmt.name for fmt in formats),
        kind=kind,
        status=status,
        ledger=ledger,
        seconds=timed.seconds,
        compile_seconds=timed.compile_seconds,
    )
