"""Curvature scores of any JAX code: only `loss(params) -> scalar` is needed, the data closed over.

    scores = from_loss.trace(num_probes=16)(loss, params, partition.by_module(params), ("bfloat16",), jax.random.key(0))

Each factory takes the knobs and returns `(loss, params, partition, formats, key) -> Scores`. All leaves of a block are rounded.
The loss hides its data, so the ledger counts one per call, and the Fisher score squares the gradient of the whole loss: with a
model and batches (`sensitivity`) it squares the gradient of each example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeAlias

import jax
import jax.numpy as jnp

from mpjax import partition
from mpjax.formats import Format, parse_all
from mpjax.partition import Partition
from mpjax.program import Array, Params
from mpjax.sensitivity.first_order import gradient_products
from mpjax.sensitivity.fisher import squared_gradient
from mpjax.sensitivity.logdet import hessian_logdet
from mpjax.sensitivity.quadratic import with_hessian
from mpjax.sensitivity.scores import Key, Scores
from mpjax.sensitivity.task import Task
from mpjax.sensitivity.top_eigenvalue import lanczos
from mpjax.sensitivity.trace import Probes as Probes
from mpjax.sensitivity.trace import hessian_trace

LossFunction: TypeAlias = Callable[[Params], Array]
LossScorer: TypeAlias = Callable[[LossFunction, Params, Partition, Sequence[str | Format], Key], Scores]
Knobs = ParamSpec("Knobs")


@dataclass(frozen=True, kw_only=True)
class LossTask(Task):
    """A loss that is closed over its data."""

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
            LossTask(
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


def _lifted(factory: Callable[Knobs, Callable[[Task], Scores]]) -> Callable[Knobs, LossScorer]:
    """A factory of estimators as one of scorers of plain losses."""

    @functools.wraps(factory)
    def make(*args: Knobs.args, **knobs: Knobs.kwargs) -> LossScorer:
        return _scorer_of(factory(*args, **knobs))

    return make


def quadratic() -> LossScorer:
    """½ δᵀHδ with the block's Hessian and its real rounding error δ: one Hessian-vector product per block and format.

    Source: LeCun, Denker and Solla, "Optimal brain damage", NIPS 1989; Dong et al. (HAWQ), arXiv 1905.03696.
    """
    return _scorer_of(functools.partial(with_hessian, name="quadratic[hessian]"))


def first_order() -> LossScorer:
    """|gᵀδ|, g the gradient of the loss: one gradient for all blocks and formats. Near 0 at an optimum."""
    return _scorer_of(gradient_products)


def fisher() -> LossScorer:
    """½ Σ g²δ², g the gradient of the loss as it is given: one gradient for all blocks and formats.

    Of a loss over a single example this is the empirical Fisher (FIT, arXiv 2210.08502); of a mean over many it is only the
    square of the mean gradient, which vanishes at an optimum.
    """
    return _scorer_of(squared_gradient)


trace = _lifted(hessian_trace)
top_eigenvalue = _lifted(lanczos)
logdet = _lifted(hessian_logdet)
