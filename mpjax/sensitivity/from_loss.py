"""Curvature scores of any JAX code: only `loss(params) -> scalar` is needed, the data closed over.

    scores = from_loss.trace(num_probes=16)(loss, params, partition.by_module(params), ("bfloat16",), jax.random.key(0))

Each factory takes the knobs and returns `(loss, params, partition, formats, key) -> Scores`. All leaves of a block are rounded.
The loss hides its data, so the ledger counts one per call, and the Fisher score squares the gradient of the whole loss: with a
model and batches (`sensitivity`) it squares the gradient of each example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from mpjax import partition
from mpjax.formats import Format, parse_all
from mpjax.partition import Partition
from mpjax.program import Array, Params
from mpjax.sensitivity.first_order import gradient_products
from mpjax.sensitivity.fisher import squared_gradient
from mpjax.sensitivity.logdet import Form, hessian_logdet
from mpjax.sensitivity.quadratic import with_hessian
from mpjax.sensitivity.scores import Key, Scores
from mpjax.sensitivity.task import Task
from mpjax.sensitivity.top_eigenvalue import Scale as EigenvalueScale
from mpjax.sensitivity.top_eigenvalue import lanczos
from mpjax.sensitivity.trace import Probes, hessian_trace
from mpjax.sensitivity.trace import Scale as TraceScale

LossFunction: TypeAlias = Callable[[Params], Array]
LossScorer: TypeAlias = Callable[[LossFunction, Params, Partition, Sequence[str | Format], Key], Scores]


def quadratic() -> LossScorer:
    """½ δᵀHδ with the block's Hessian and its real rounding error δ: one Hessian-vector product per block and format.

    Source: LeCun, Denker and Solla, "Optimal brain damage", NIPS 1989; Dong et al. (HAWQ), arXiv 1905.03696.
    """
    return _scorer_of(partial(with_hessian, name="quadratic[hessian]"))


def first_order() -> LossScorer:
    """|gᵀδ|, g the gradient of the loss: one gradient for all blocks and formats. Near 0 at an optimum."""
    return _scorer_of(gradient_products)


def fisher() -> LossScorer:
    """½ Σ g²δ², g the gradient of the loss as it is given: one gradient for all blocks and formats.

    Of a loss over a single example this is the empirical Fisher (FIT, arXiv 2210.08502); of a mean over many it is only the
    square of the mean gradient, which vanishes at an optimum.
    """
    return _scorer_of(squared_gradient)


def trace(
    *,
    num_probes: int = 8,
    method: Literal["hutchinson", "xtrace"] = "hutchinson",
    probes: Probes = "joint",
    scale: TraceScale = "noise",
    batch_size: int = 1,
) -> LossScorer:
    """Trace of each block of the Hessian; by default HAWQ-V2's score ½ · (trace / d) · ‖δ‖², d the block's parameters.

    Joint probes cost one Hessian-vector product per probe whatever the number of blocks, and the cross terms between blocks add
    variance (no bias); per-layer probes cost one per probe and block. Sources as in `sensitivity.trace`.

    Args:
        num_probes: random vectors.
        method: "xtrace" needs per-layer probes, and an even number of them.
        scale: "noise" for the score, "none" for the trace itself (kind "ranking").
        batch_size: products at a time (Hutchinson); memory grows with it.
    """
    return _scorer_of(
        hessian_trace(num_probes=num_probes, method=method, probes=probes, scale=scale, batch_size=batch_size)
    )


def top_eigenvalue(*, depth: int = 20, scale: EigenvalueScale = "per_parameter") -> LossScorer:
    """Eigenvalue of largest magnitude of each block, with its sign, by Lanczos: `depth` products per block.

    Source: Dong et al. (HAWQ), arXiv 1905.03696, which ranks by λ / d, d the block's parameters.

    Args:
        depth: Lanczos steps.
        scale: "per_parameter" λ / d; "noise" ½ λ ‖δ‖², an upper bound of ½ δᵀHδ; "none" λ.
    """
    return _scorer_of(lanczos(depth=depth, scale=scale))


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
    return _scorer_of(
        hessian_logdet(
            damping=damping,
            method=method,
            form=form,
            per_parameter=per_parameter,
            num_probes=num_probes,
            depth=depth,
            max_bytes=max_bytes,
        )
    )


@dataclass(frozen=True, kw_only=True)
class _LossTask(Task):
    loss: LossFunction

    def total(self, params: Params, *batch: Array) -> Array:
        return self.loss(params)


def _scorer_of(estimate: Callable[[Task], Scores]) -> LossScorer:
    """An estimator as a scorer of plain losses.

    It raises ValueError: no blocks, blocks that share a name or a leaf, unknown paths, integer leaves, a loss that is not a
    scalar.
    """

    def scorer(
        loss: LossFunction, params: Params, blocks: Partition, formats: Sequence[str | Format], key: Key
    ) -> Scores:
        names, leaves = [block.name for block in blocks], [path for block in blocks for path in block.paths]
        if not names or len(set(names)) != len(names) or len(set(leaves)) != len(leaves):
            raise ValueError(
                f"Expected at least one block, distinct names, and every leaf in one block only; found blocks {names[:8]} with "
                f"{len(leaves)} leaves, {len(leaves) - len(set(leaves))} of them repeated."
            )
        for path, leaf in partition.select_all(params, blocks).items():
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise ValueError(f"{path!r} is {jnp.result_type(leaf)}; leave it out of the partition.")
        shape = jax.eval_shape(loss, params)
        if getattr(shape, "shape", None) != () or not jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(
                f"Expected loss(params) to return one floating-point scalar, found {shape}: take the mean or sum."
            )
        return estimate(
            _LossTask(
                params=params,
                blocks=tuple(blocks),
                batches=((),),
                examples=1,
                formats=parse_all(formats),
                key=key,
                loss_name="user",
                loss=loss,
            )
        )

    return scorer
