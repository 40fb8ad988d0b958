"""Estimators from curvature: the factories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import losses
from mpjax.curvature import estimates, grams
from mpjax.formats import Format
from mpjax.losses import Loss
from mpjax.program.model import Array, Batches, Model, Params
from mpjax.sensitivity import from_loss, hessian_scores, output_scores
from mpjax.sensitivity.from_loss import EigenvalueScale, Form, Probes, TraceScale
from mpjax.sensitivity.gradients import scored
from mpjax.sensitivity.hessian_scores import Objective
from mpjax.sensitivity.output_scores import Spectra, spectra
from mpjax.sensitivity.rounding_scores import output_size
from mpjax.sensitivity.scores import (
    Key,
    Scorer,
    Scores,
    Timed,
    examples_in,
    for_layers,
    in_range,
    make_scores,
    prepare,
    rounding_of,
)


def quadratic(*, hessian: Literal["gauss_newton", "true"] = "gauss_newton", loss: Loss = losses.OUTPUT) -> Scorer:
    """½ δᵀHδ with the real rounding error δ of the layer's weights, exact.

    "gauss_newton": one Jacobian-vector product per layer, format and example, no backward pass; never negative for a loss
    that is convex in the outputs. "true": one Hessian-vector product each; negative (status "indefinite") away from an
    optimum. Under the output loss the two are the same number. Weight-space scores do not see the rounding of activations:
    where no weight of a layer changes in a format the score is 0 with status "zero_by_construction".

    Source: LeCun, Denker and Solla, "Optimal brain damage", NIPS 1989; Dong et al. (HAWQ), arXiv 1905.03696.
    """
    losses.check(loss)
    from_loss.check_choice("hessian", hessian, ("gauss_newton", "true"))

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        del key
        low = prepare(batches, formats, loss)
        if hessian == "true":
            return hessian_scores.quadratic(_objective(model, batches, loss), low, "quadratic[true]")
        timed = Timed()
        rounding = rounding_of(model.params, model.partition, low, timed)
        value, ledger = output_scores.gauss_newton_products(model, batches, loss, rounding, timed=timed)
        return make_scores(
            "quadratic[gauss_newton]", model.names, low, value,
            loss=loss.name, ledger=ledger, timed=timed, kind="loss",
            unchanged=rounding.unchanged, overflowed=rounding.overflowed,
        )  # fmt: skip

    return _of_weights(scorer, loss)


def gauss_newton(*, num_probes: int = 4, loss: Loss = losses.OUTPUT) -> Scorer:
    """½ δᵀJᵀHJδ from output probes: one vector-Jacobian product per probe for all layers and formats.

    The random form of `quadratic(hessian="gauss_newton")`: E[(gᵀδ)²] with g = Jᵀu, u random with E[u uᵀ] = H.

    Source: Martens, arXiv 1412.1193; Hutchinson 1990, doi 10.1080/03610919008812866.
    """
    _check_output_probes(num_probes, loss, "gauss_newton")

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        return _probed(model, batches, formats, key, f"gauss_newton[{num_probes}]", loss, num_probes, "directional")

    return _of_weights(scorer, loss)


def first_order(*, loss: Loss) -> Scorer:
    """|gᵀδ|, g the gradient of the loss over all examples: one gradient for all layers and formats.

    Raises:
        ValueError: a loss whose gradient is zero by construction (the output loss, KL to the model's own output).
    """
    _check_not_stationary(loss, "first_order")

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        del key
        low = prepare(batches, formats, loss)
        return hessian_scores.first_order(_objective(model, batches, loss), low, "first_order")

    return _of_weights(scorer, loss)


def fisher(
    *,
    kind: Literal["true", "empirical"] = "true",
    elementwise: bool = True,
    num_probes: int = 4,
    loss: Loss = losses.OUTPUT,
) -> Scorer:
    """The diagonal Fisher score ½ Σ E[g²] δ², g the gradient of one example: all layers and formats at once.

    "true": g = Jᵀu from `num_probes` output probes with E[u uᵀ] = H (for cross-entropy: labels drawn from the model itself).
    "empirical": g is the gradient on the given label, one per example, so nothing is random. Not `elementwise` is FIT's
    layer-wise form, ½ · mean E[g²] · ‖δ‖².

    Source: FIT (Zandonati et al.), arXiv 2210.08502; on true and empirical: Kunstner, Balles and Hennig, arXiv 1905.12558.

    Raises:
        ValueError: "empirical" under a loss whose gradient is zero by construction.
    """
    from_loss.check_choice("kind", kind, ("true", "empirical"))
    if kind == "empirical":
        _check_not_stationary(loss, "fisher[empirical]")
    else:
        _check_output_probes(num_probes, loss, "fisher[true]")
    name = f"fisher[{kind},{'elementwise' if elementwise else 'mean'}]"

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        probes = num_probes if kind == "true" else None
        if elementwise:
            return _probed(model, batches, formats, key, name, loss, probes, "elementwise")
        return _squares(model, batches, formats, key, name, loss, probes, "noise")

    return _of_weights(scorer, loss)


def trace(
    *,
    num_probes: int = 8,
    method: Literal["hutchinson", "xtrace", "output", "exact"] = "hutchinson",
    probes: Probes = "joint",
    scale: TraceScale = "noise",
    loss: Loss = losses.OUTPUT,
    batch_size: int = 1,
    max_outputs: int = 1024,
    spectra: Spectra | None = None,
) -> Scorer:
    """Trace of each layer's Hessian block; by default HAWQ-V2's score ½ · (trace / d) · ‖δ‖², d the layer's weights.

    "hutchinson", "xtrace": of the true Hessian, by Hessian-vector products: joint probes cost one per probe whatever the
    number of layers, per-layer probes one per probe and layer. "output": of the Gauss-Newton matrix, E‖Jᵀu‖², one
    vector-Jacobian product per probe and example for all layers, never negative and of far smaller variance. "exact": the
    same from all rows of H^½ J of at most `max_outputs` outputs; examples are taken from the front of the batches.

    Sources: Dong et al. (HAWQ-V2), arXiv 1911.03852; Hutchinson 1990, doi 10.1080/03610919008812866; XTrace: Epperly, Tropp
    and Webber, doi 10.1137/23M1548323.

    Args:
        num_probes: random vectors (per example for "output").
        probes: "joint" or "per_layer"; for "hutchinson" and "xtrace".
        scale: "noise" for the score, "none" for the trace itself (kind "ranking").
        batch_size: products at a time; memory grows with it.
        spectra: for "exact", those of `spectra(model, batches)`, if they are there already.
    """
    from_loss.check_trace(num_probes, method, probes, scale, ("hutchinson", "xtrace", "output", "exact"))
    losses.check(loss)
    _check_given(spectra, method)
    if method == "output":
        _check_output_probes(num_probes, loss, "trace[output]")

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        low = prepare(batches, formats, loss)
        if method in ("hutchinson", "xtrace"):
            objective = _objective(model, batches, loss)
            return from_loss.trace_of(objective, low, key, num_probes, method, probes, scale, batch_size)
        name = f"trace[{method}{'' if scale == 'noise' else ',none'}]"
        if method == "output":
            return _squares(model, batches, formats, key, name, loss, num_probes, scale)
        exact = _spectra(model, batches, loss, max_outputs, spectra)
        value = np.array([np.sum(exact.values[each]) for each in model.names])
        return hessian_scores.in_scale(
            model.params, model.partition, low, name, value, None, None,
            scale=scale, loss=exact.loss, timed=exact.timed, ledger=exact.ledger, mean=True,
        )  # fmt: skip

    return _of_weights(scorer, loss)


def top_eigenvalue(
    *,
    method: Literal["exact", "lanczos"] = "exact",
    depth: int = 20,
    scale: EigenvalueScale = "per_parameter",
    loss: Loss = losses.OUTPUT,
    max_outputs: int = 1024,
    spectra: Spectra | None = None,
) -> Scorer:
    """Largest eigenvalue (in magnitude, with its sign) of each layer's Hessian block.

    "exact": of the Gauss-Newton block, from the k rows of H^½ J of at most `max_outputs` outputs: k vector-Jacobian products
    for all layers. "lanczos": of the true Hessian's block, `depth` Hessian-vector products per layer; the residual says how
    far the value is from an eigenvalue.

    Source: Dong et al. (HAWQ), arXiv 1905.03696, which ranks by λ / d, d the layer's weights.

    Args:
        scale: "per_parameter" λ / d; "noise" ½ λ ‖δ‖², an upper bound of ½ δᵀHδ; "none" λ.
        spectra: for "exact", those of `spectra(model, batches)`, if they are there already.
    """
    from_loss.check_choice("method", method, ("exact", "lanczos"))
    from_loss.check_scale(scale, ("per_parameter", "noise", "none"))
    losses.check(loss)
    _check_given(spectra, method)
    estimator = estimates.top_eigenvalue(depth=depth)

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        low = prepare(batches, formats, loss)
        if method == "lanczos":
            objective = _objective(model, batches, loss)
            return from_loss.top_eigenvalue_of(objective, low, key, estimator, scale)
        exact = _spectra(model, batches, loss, max_outputs, spectra)
        value = np.array([np.max(exact.values[each]) for each in model.names])
        name = f"top_eigenvalue[exact{'' if scale == 'per_parameter' else ',' + scale}]"
        return hessian_scores.in_scale(
            model.params, model.partition, low, name, value, None, None,
            scale=scale, loss=exact.loss, timed=exact.timed, ledger=exact.ledger, mean=False,
        )  # fmt: skip

    return _of_weights(scorer, loss)


def logdet(
    *,
    damping: float = 1e-2,
    method: Literal["exact", "slq"] = "exact",
    form: Form = "score",
    per_parameter: bool = False,
    loss: Loss = losses.OUTPUT,
    max_outputs: int = 1024,
    num_probes: int = 8,
    depth: int = 20,
    spectra: Spectra | None = None,
) -> Scorer:
    """The post's score: the log-determinant of a layer's Hessian block, as Σ log(1 + λ/ε).

    "exact": of the Gauss-Newton block JᵀHJ, mean over the examples; its non-zero eigenvalues are those of a small k × k
    matrix (the Weinstein-Aronszajn identity), so blocks of any size are exact from k = examples × outputs vector-Jacobian
    products. "slq": of the true Hessian's block, by stochastic Lanczos quadrature, `num_probes` × `depth` Hessian-vector
    products per layer, with a standard error and a depth-doubling residual.

    Subtracting d log ε from log det(H + εI) leaves Σ log(1 + λ/ε), which does not depend on the number of weights d; "raw"
    adds it back. No form depends on the number format: the score says how much the output moves, not how large the
    rounding is. Kind "ranking".

    Args:
        damping: ε, relative to the mean eigenvalue that can differ from 0, Σ trace / Σ min(d, k) over all layers ("slq": the
            traces from output probes).
        per_parameter: divide by d.
        max_outputs: k at most ("exact"); examples are taken from the front of the batches, as many as fit.
        spectra: for "exact", those of `spectra(model, batches)`, if they are there already.
    """
    from_loss.check_logdet(damping, form)
    from_loss.check_choice("method", method, ("exact", "slq"))
    losses.check(loss)
    _check_given(spectra, method)
    if method == "slq":
        _check_output_probes(num_probes, loss, "logdet[slq]")

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        low = prepare(batches, formats, loss)
        if method == "slq":
            traces = trace(method="output", num_probes=num_probes, scale="none", loss=loss)
            found = traces(model, batches, low, jax.random.fold_in(key, 1))
            count = examples_in(batches) * output_size(model, batches, loss)
            ranks = np.array([min(layer.weights, count) for layer in model.layers])
            finite = np.isfinite(found.value[:, 0])
            epsilon = damping * float(found.value[finite, 0].sum()) / max(1, int(ranks[finite].sum()))
            objective = _objective(model, batches, loss)
            scores = from_loss.slq_of(objective, low, key, epsilon or 1.0, form, per_parameter, num_probes, depth)
            return from_loss.plus(scores, found)
        exact = _spectra(model, batches, loss, max_outputs, spectra)
        epsilon = damping * exact.mean
        sizes = np.array([layer.weights for layer in model.layers])
        each = [exact.values[name] for name in model.names]
        if form == "raw":
            pairs = zip(each, sizes, strict=True)
            value = np.array([grams.raw_logdet(values, damping=epsilon, size=int(size)) for values, size in pairs])
        else:
            value = np.array([grams.logdet_score(values, damping=epsilon) for values in each])
        return make_scores(
            from_loss.logdet_name("exact", form, per_parameter),
            model.names, low, value / sizes if per_parameter else value,
            loss=exact.loss, ledger=exact.ledger, timed=exact.timed, kind="ranking",
        )  # fmt: skip

    return _of_weights(scorer, loss)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _of_weights(scorer: Scorer, loss: Loss) -> Scorer:
    """A scorer that looks at weights: products without them have none to score."""
    scorer = in_range(scorer, loss)

    def of_weights(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        layers = tuple(layer for layer in model.layers if layer.kernel)
        if len(layers) == len(model.layers):
            return scorer(model, batches, formats, key)
        return for_layers(scorer(replace(model, layers=layers), batches, formats, key), model.names)

    return of_weights


def _objective(model: Model, batches: Batches, loss: Loss) -> Objective:
    def total(params: Params, *batch: Array) -> Array:
        inputs, targets = loss.split(batch)
        outputs = model.call(params, *inputs, override=scored)
        # The reference is the model itself, here: at the trained weights the two have the same value.
        return jnp.sum(loss.value(outputs, jax.lax.stop_gradient(outputs), *targets))

    return Objective(
        total=total,
        params=model.params,
        blocks=model.partition,
        batches=batches,
        examples=examples_in(batches),
        loss=loss.name,
    )


def _spectra(model: Model, batches: Batches, loss: Loss, max_outputs: int, given: Spectra | None) -> Spectra:
    """Those given, if they are of this problem; else computed."""
    if given is None:
        return spectra(model, batches, loss=loss, max_outputs=max_outputs)
    if tuple(given.values) != model.names or given.loss != loss.name:
        raise ValueError(
            f"spectra= holds the loss {given.loss!r} of {len(given.values)} layers; expected the loss {loss.name!r} of this "
            f"model's {len(model.names)} layers: compute them with sensitivity.spectra(model, batches, loss=…)."
        )
    return given


def _probed(
    model: Model,
    batches: Batches,
    formats: Sequence[str | Format],
    key: Key,
    name: str,
    loss: Loss,
    num_probes: int | None,
    reduce: output_scores.Reduce,
) -> Scores:
    """½ E of a square with δ."""
    low, timed = prepare(batches, formats, loss), Timed()
    rounding = rounding_of(model.params, model.partition, low, timed)
    value, stderr, ledger = output_scores.probe(
        model, batches, loss, rounding.deltas, key, num_probes=num_probes, reduce=reduce, timed=timed
    )
    return make_scores(
        name, model.names, low, value / 2, stderr=stderr / 2,
        loss=loss.name, ledger=ledger, timed=timed, kind="loss",
        unchanged=rounding.unchanged, overflowed=rounding.overflowed,
    )  # fmt: skip


def _squares(
    model: Model,
    batches: Batches,
    formats: Sequence[str | Format],
    key: Key,
    name: str,
    loss: Loss,
    num_probes: int | None,
    scale: str,
) -> Scores:
    """E‖g‖², scaled as a trace."""
    low, timed = prepare(batches, formats, loss), Timed()
    value, stderr, ledger = output_scores.probe(
        model, batches, loss, (), key, num_probes=num_probes, reduce="squares", timed=timed
    )
    return hessian_scores.in_scale(
        model.params, model.partition, low, name, value, stderr, None,
        scale=scale, loss=loss.name, timed=timed, ledger=ledger, mean=True,
    )  # fmt: skip


def _check_given(spectra: Spectra | None, method: str) -> None:
    if spectra is not None and method != "exact":
        raise ValueError(f"spectra= is for method='exact'; found method={method!r}, which would not look at them.")


def _check_output_probes(num_probes: int, loss: Loss, what: str) -> None:
    if num_probes < 1:
        raise ValueError(f"{what}: expected num_probes ≥ 1, found {num_probes}.")
    if losses.check(loss).cotangents is None:
        raise ValueError(
            f"{what}: the loss {loss.name!r} has no `cotangents` to draw output probes from; give it some."
        )


def _check_not_stationary(loss: Loss, what: str) -> None:
    if losses.check(loss).stationary:
        raise ValueError(
            f"{what}: under the loss {loss.name!r} the gradient at the trained weights is zero by construction, so every score "
            "would be 0. Use a loss with labels (losses.CROSS_ENTROPY, losses.MSE), or a score of second order."
        )
