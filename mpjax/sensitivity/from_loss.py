"""Curvature scores of any JAX code: nothing but `loss(params) -> scalar` is needed, the data already closed over.

    scores = from_loss.trace(num_probes=16)(loss, params, partition.by_module(params), ("bfloat16",), jax.random.key(0))

Each factory takes the knobs and returns `(loss, params, partition, formats, key) -> Scores`. All leaves of a block are rounded.
The loss hides its data, so the ledger counts one per call, and the Fisher score squares the gradient of the whole loss:
with a model and batches (`sensitivity`) it squares the gradient of each example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import partition
from mpjax.curvature import estimates
from mpjax.curvature import operators as curvature
from mpjax.formats import Format, parse_all
from mpjax.ledger import Ledger
from mpjax.partition import Partition
from mpjax.program.model import Array, Params
from mpjax.sensitivity import hessian_scores
from mpjax.sensitivity.hessian_scores import Objective
from mpjax.sensitivity.scores import Key, Scores, Timed, make_scores, standard_error

LossFunction = Callable[[Params], Array]
LossScorer = Callable[[LossFunction, Params, Partition, Sequence[str | Format], Key], Scores]
Probes = Literal["joint", "per_layer"]
TraceScale = Literal["noise", "none"]
EigenvalueScale = Literal["per_parameter", "noise", "none"]
Form = Literal["score", "raw"]


def quadratic() -> LossScorer:
    """½ δᵀHδ with the block's own Hessian and its real rounding error δ: one Hessian-vector product per block and format.

    Source: LeCun, Denker and Solla, "Optimal brain damage", NIPS 1989; Dong et al. (HAWQ), arXiv 1905.03696.
    """

    def scorer(
        loss: LossFunction, params: Params, blocks: Partition, formats: Sequence[str | Format], key: Key
    ) -> Scores:
        del key
        return hessian_scores.quadratic(_objective(loss, params, blocks), parse_all(formats), "quadratic[hessian]")

    return scorer


def first_order() -> LossScorer:
    """|gᵀδ|, g the gradient of the loss: one gradient for all blocks and formats. Near 0 at an optimum."""

    def scorer(
        loss: LossFunction, params: Params, blocks: Partition, formats: Sequence[str | Format], key: Key
    ) -> Scores:
        del key
        return hessian_scores.first_order(_objective(loss, params, blocks), parse_all(formats), "first_order")

    return scorer


def fisher() -> LossScorer:
    """½ Σ g²δ², g the gradient of the loss as it is given: one gradient for all blocks and formats.

    Of a loss over a single example this is the empirical Fisher (FIT, arXiv 2210.08502); of a mean over many it is only the
    square of the mean gradient, which vanishes at an optimum.
    """

    def scorer(
        loss: LossFunction, params: Params, blocks: Partition, formats: Sequence[str | Format], key: Key
    ) -> Scores:
        del key
        return hessian_scores.squared_gradient(
            _objective(loss, params, blocks), parse_all(formats), "fisher[empirical,elementwise]"
        )

    return scorer


def trace(
    *,
    num_probes: int = 8,
    method: Literal["hutchinson", "xtrace"] = "hutchinson",
    probes: Probes = "joint",
    scale: TraceScale = "noise",
    batch_size: int = 1,
) -> LossScorer:
    """Trace of each block of the Hessian; by default HAWQ-V2's score ½ · (trace / d) · ‖δ‖², d the block's parameters.

    Joint probes cost one Hessian-vector product per probe whatever the number of blocks, and the cross terms between blocks
    add variance (no bias); per-layer probes cost one per probe and block.

    Sources: Dong et al. (HAWQ-V2), arXiv 1911.03852; Hutchinson 1990, doi 10.1080/03610919008812866; XTrace: Epperly, Tropp
    and Webber, doi 10.1137/23M1548323.

    Args:
        num_probes: random vectors.
        method: "xtrace" needs per-layer probes, and an even number of them.
        scale: "noise" for the score, "none" for the trace itself (kind "ranking").
        batch_size: products at a time (Hutchinson); memory grows with it.
    """
    check_trace(num_probes, method, probes, scale)

    def scorer(
        loss: LossFunction, params: Params, blocks: Partition, formats: Sequence[str | Format], key: Key
    ) -> Scores:
        objective = _objective(loss, params, blocks)
        return trace_of(objective, parse_all(formats), key, num_probes, method, probes, scale, batch_size)

    return scorer


def top_eigenvalue(*, depth: int = 20, scale: EigenvalueScale = "per_parameter") -> LossScorer:
    """Eigenvalue of largest magnitude of each block, with its sign, by Lanczos: `depth` products per block.

    Source: Dong et al. (HAWQ), arXiv 1905.03696, which ranks by λ / d, d the block's parameters.

    Args:
        depth: Lanczos steps.
        scale: "per_parameter" λ / d; "noise" ½ λ ‖δ‖², an upper bound of ½ δᵀHδ; "none" λ.
    """
    check_scale(scale, ("per_parameter", "noise", "none"))
    estimator = estimates.top_eigenvalue(depth=depth)

    def scorer(
        loss: LossFunction, params: Params, blocks: Partition, formats: Sequence[str | Format], key: Key
    ) -> Scores:
        objective = _objective(loss, params, blocks)
        return top_eigenvalue_of(objective, parse_all(formats), key, estimator, scale)

    return scorer


def logdet(
    *,
    damping: float,
    method: Literal["exact", "slq"] = "slq",
    form: Form = "score",
    per_parameter: bool = False,
    num_probes: int = 8,
    depth: int = 20,
    max_bytes: int = 2**31,
) -> LossScorer:
    """Log-determinant of each block of the Hessian, over absolute eigenvalues: finite on an indefinite Hessian, too.

    "score" is Σ log(1 + |λ|/ε), "raw" Σ log(|λ| + ε) = score + d log ε: the log-determinant of H + εI where H is positive
    semi-definite. Kind "ranking"; it does not depend on the format.

    Sources: Ubaru, Chen and Saad 2017, doi 10.1137/16M1104974 (stochastic Lanczos quadrature).

    Args:
        damping: ε > 0, in the unit of H.
        method: "exact" by the dense block (d² numbers, at most max_bytes), "slq" by `num_probes` probes of `depth` products.
        per_parameter: divide by d.
    """
    check_logdet(damping, form)
    check_choice("method", method, ("exact", "slq"))

    def scorer(
        loss: LossFunction, params: Params, blocks: Partition, formats: Sequence[str | Format], key: Key
    ) -> Scores:
        objective, low = _objective(loss, params, blocks), parse_all(formats)
        if method == "slq":
            return slq_of(objective, low, key, damping, form, per_parameter, num_probes, depth)
        timed, values = Timed(), []
        for block in blocks:
            size = sum(leaf.size for leaf in partition.select(params, block).values())

            def spectrum(p: Params, block: partition.Block = block) -> Array:
                return curvature.eigenvalues(
                    curvature.dense(curvature.block_hessian(loss, p, block), batch_size=16, max_bytes=max_bytes)
                )

            eigenvalues = np.abs(np.float64(timed.jit(spectrum)(params)))
            value = np.sum(np.log1p(eigenvalues / damping)) + (size * np.log(damping) if form == "raw" else 0.0)
            values.append((value / size if per_parameter else value, size))
        return make_scores(
            logdet_name("exact", form, per_parameter),
            objective.names,
            low,
            np.array([value for value, _ in values]),
            loss=objective.loss,
            ledger=Ledger(hvp=sum(size for _, size in values), vjp=len(values), compilations=timed.compilations),
            timed=timed,
            kind="ranking",
        )

    return scorer


# --- what the scores of a model share with these ----------------------------------------------------------------------


def trace_of(
    objective: Objective,
    formats: Sequence[Format],
    key: Key,
    num_probes: int,
    method: str,
    probes: str,
    scale: str,
    batch_size: int,
) -> Scores:
    """`trace` of an objective."""
    timed = Timed()
    name = f"trace[{method},{probes}{_suffix(scale, 'noise')}]"
    if method == "hutchinson":
        samples, ledger = hessian_scores.trace(
            objective, key, num_probes=num_probes, joint=probes == "joint", batch_size=batch_size, timed=timed
        )
        value, stderr, residual = samples.mean(axis=0), standard_error(samples), None
    else:
        estimator = estimates.trace(num_probes=num_probes, method="xtrace")
        value, stderr, residual, ledger = hessian_scores.per_block(objective, estimator, key, timed=timed)
    return hessian_scores.in_scale(
        objective.params, objective.blocks, formats, name, value, stderr, residual,
        scale=scale, loss=objective.loss, timed=timed, ledger=ledger, mean=True,
    )  # fmt: skip


def top_eigenvalue_of(
    objective: Objective,
    formats: Sequence[Format],
    key: Key,
    estimator: estimates.Estimator,
    scale: str,
) -> Scores:
    """`top_eigenvalue` of an objective."""
    timed = Timed()
    value, stderr, residual, ledger = hessian_scores.per_block(objective, estimator, key, timed=timed)
    return hessian_scores.in_scale(
        objective.params, objective.blocks, formats, f"top_eigenvalue[lanczos{_suffix(scale, 'per_parameter')}]",
        value, stderr, residual,
        scale=scale, loss=objective.loss, timed=timed, ledger=ledger, mean=False,
    )  # fmt: skip


def slq_of(
    objective: Objective,
    formats: Sequence[Format],
    key: Key,
    damping: float,
    form: str,
    per_parameter: bool,
    num_probes: int,
    depth: int,
) -> Scores:
    """`logdet` by stochastic Lanczos quadrature of an objective; `damping` in the unit of its Hessian."""
    timed = Timed()
    estimator = estimates.logdet_score(num_probes=num_probes, depth=depth, damping=damping)
    value, stderr, residual, ledger = hessian_scores.per_block(objective, estimator, key, timed=timed)
    sizes = objective.sizes
    if form == "raw":
        value = value + sizes * np.log(damping)
    divisor = sizes if per_parameter else 1.0
    return make_scores(
        logdet_name("slq", form, per_parameter),
        objective.names,
        formats,
        value / divisor,
        stderr=stderr / divisor,
        residual=residual / divisor,
        loss=objective.loss,
        ledger=ledger,
        timed=timed,
        kind="ranking",
    )


def plus(scores: Scores, other: Scores) -> Scores:
    """The scores, with what the other ones cost added."""
    return replace(
        scores,
        ledger=scores.ledger + other.ledger,
        seconds=scores.seconds + other.seconds,
        compile_seconds=scores.compile_seconds + other.compile_seconds,
        peak_mb=max(scores.peak_mb, other.peak_mb),
    )


def logdet_name(method: str, form: str, per_parameter: bool) -> str:
    """`logdet[exact]`, `logdet[slq,raw]`, `logdet[exact,per_parameter]` …"""
    return f"logdet[{method}{_suffix(form, 'score')}{',per_parameter' if per_parameter else ''}]"


def check_trace(
    num_probes: int, method: str, probes: str, scale: str, methods: Sequence[str] = ("hutchinson", "xtrace")
) -> None:
    """Refuse knobs that make no sense."""
    if num_probes < 1:
        raise ValueError(f"Expected num_probes ≥ 1, found {num_probes}.")
    check_choice("method", method, methods)
    check_choice("probes", probes, ("joint", "per_layer"))
    check_scale(scale, ("noise", "none"))
    if method == "xtrace" and probes == "joint":
        raise ValueError("XTrace orthogonalises its probes within a block: method='xtrace' needs probes='per_layer'.")
    if method == "xtrace" and num_probes % 2:
        raise ValueError(
            f"XTrace takes two products per probe vector: expected an even num_probes, found {num_probes}."
        )


def check_scale(scale: str, known: Sequence[str]) -> None:
    """Refuse an unknown scale."""
    check_choice("scale", scale, known)


def check_logdet(damping: float, form: str) -> None:
    """Refuse a damping that is not positive, and an unknown form."""
    if not (np.isfinite(damping) and damping > 0):
        raise ValueError(f"Expected damping > 0 and finite, found {damping}.")
    check_choice("form", form, ("score", "raw"))


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse what is not among the known values."""
    if value not in known:
        raise ValueError(f"Expected {what} to be one of {', '.join(map(repr, known))}; found {value!r}.")


# --- helpers ----------------------------------------------------------------------------------------------------------


def _suffix(value: str, default: str) -> str:
    return "" if value == default else f",{value}"


def _objective(loss: LossFunction, params: Params, blocks: Partition) -> Objective:
    """A plain loss as an objective.

    Raises:
        ValueError: no blocks, blocks that share a name or a leaf, unknown paths, integer leaves, a loss that is not a scalar.
    """
    names, leaves = [block.name for block in blocks], [path for block in blocks for path in block.paths]
    if not names or len(set(names)) != len(names) or len(set(leaves)) != len(leaves):
        raise ValueError(
            f"Expected at least one block, distinct names, and every leaf in one block only; found blocks {names[:8]} with "
            f"{len(leaves)} leaves, {len(leaves) - len(set(leaves))} of them repeated."
        )
    for block in blocks:
        for path, leaf in partition.select(params, block).items():
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise ValueError(
                    f"Block {block.name!r}: {path!r} is {jnp.result_type(leaf)}; leave it out of the partition."
                )
    shape = jax.eval_shape(loss, params)
    if getattr(shape, "shape", None) != () or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(
            f"Expected loss(params) to return one floating-point scalar, found {shape}: take the mean or sum."
        )
    return Objective(
        total=lambda p: loss(p), params=params, blocks=tuple(blocks), batches=((),), examples=1, loss="user"
    )
