"""The trace of each layer's Hessian block, and HAWQ-V2's score from it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import partition
from mpjax.curvature import estimates
from mpjax.curvature.estimates import Estimate
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss
from mpjax.program import Array, Params
from mpjax.sensitivity.hessian import estimate_blocks
from mpjax.sensitivity.output_probes import probe
from mpjax.sensitivity.scores import Key, Scorer, Scores, label
from mpjax.sensitivity.spectra import Spectra, check_given, exact_spectra, per_layer
from mpjax.sensitivity.task import ModelTask, Task, Values, check_choice, check_probes, exactly, scorer_of

Probes = Literal["joint", "per_layer"]
Scale = Literal["noise", "none"]


def trace(
    *,
    num_probes: int = 8,
    method: Literal["hutchinson", "xtrace", "output", "exact"] = "hutchinson",
    probes: Probes = "joint",
    scale: Scale = "noise",
    loss: Loss = OUTPUT,
    batch_size: int = 1,
    max_outputs: int = 1024,
    spectra: Spectra | None = None,
) -> Scorer:
    """Trace of each layer's Hessian block; by default HAWQ-V2's score ½ · (trace / d) · ‖δ‖², d the layer's weights.

    "hutchinson", "xtrace": of the true Hessian, by Hessian-vector products: joint probes cost one per probe whatever the number
    of layers, per-layer probes one per probe and layer. "output": of the Gauss-Newton matrix, E‖Jᵀu‖², one vector-Jacobian
    product per probe and example for all layers, never negative and of far smaller variance. "exact": the same from all rows of
    H^½ J of at most `max_outputs` outputs; examples are taken from the front of the batches.

    Sources: Dong et al. (HAWQ-V2), arXiv 1911.03852; Hutchinson 1990, doi 10.1080/03610919008812866; XTrace: Epperly, Tropp and
    Webber, doi 10.1137/23M1548323.

    Args:
        num_probes: random vectors (per example for "output").
        probes: "joint" or "per_layer"; for "hutchinson" and "xtrace".
        scale: "noise" for the score, "none" for the trace itself (kind "ranking").
        batch_size: products at a time ("hutchinson"); memory grows with it.
        spectra: for "exact", those of `spectra(model, batches)`, if they are there already.
    """
    check_choice("method", method, ("hutchinson", "xtrace", "output", "exact"))
    check_given(spectra, method)
    if method in ("hutchinson", "xtrace"):
        knobs: dict[str, Any] = {"num_probes": num_probes, "method": method, "probes": probes, "scale": scale}
        return scorer_of(hessian_trace(**knobs, batch_size=batch_size), loss)
    check_choice("scale", scale, ("noise", "none"))
    if method == "output":
        check_probes(num_probes, loss, "trace[output]")

    def estimate(task: ModelTask) -> Scores:
        if method == "output":
            traces = probe(task, "squares", num_probes)
        else:
            traces = per_layer(exact_spectra(task, max_outputs, spectra), np.sum)
        name = label("trace", method, "" if scale == "noise" else scale)
        return task.curvature_scores(name, traces, scale=scale, mean=True)

    return scorer_of(estimate, loss)


def hessian_trace(
    *,
    num_probes: int = 8,
    method: Literal["hutchinson", "xtrace"] = "hutchinson",
    probes: Probes = "joint",
    scale: Scale = "noise",
    batch_size: int = 1,
) -> Callable[[Task], Scores]:
    """Trace of each block of the Hessian; by default HAWQ-V2's score ½ · (trace / d) · ‖δ‖², d the block's parameters.

    Joint probes cost one Hessian-vector product per probe whatever the number of blocks, and the cross terms between blocks add
    variance (no bias); per-layer probes cost one per probe and block. Sources as in `sensitivity.trace`.

    Args:
        num_probes: random vectors.
        method: "xtrace" needs per-layer probes, and an even number of them.
        scale: "noise" for the score, "none" for the trace itself (kind "ranking").
        batch_size: products at a time (Hutchinson); memory grows with it.
    """
    if num_probes < 1:
        raise ValueError(f"Expected num_probes ≥ 1, found {num_probes}.")
    check_choice("method", method, ("hutchinson", "xtrace"))
    check_choice("probes", probes, ("joint", "per_layer"))
    check_choice("scale", scale, ("noise", "none"))
    if method == "xtrace" and probes == "joint":
        raise ValueError("XTrace orthogonalises its probes within a block: method='xtrace' needs probes='per_layer'.")
    if method == "xtrace" and num_probes % 2:
        raise ValueError(f"XTrace takes two products per probe: expected an even num_probes, found {num_probes}.")

    def estimate(task: Task) -> Scores:
        if method == "hutchinson":
            traces = _hutchinson(task, num_probes, probes == "joint", batch_size)
        else:
            traces = estimate_blocks(task, estimates.trace(num_probes=num_probes, method="xtrace"))
        name = label("trace", method, probes, "" if scale == "noise" else scale)
        return task.curvature_scores(name, traces, scale=scale, mean=True)

    return estimate


def _hutchinson(task: Task, num_probes: int, joint: bool, batch_size: int) -> Estimate:
    """The trace (L,) of each block of the mean loss's Hessian, unbiased.

    `joint`: one product per probe serves all blocks, vᵢᵀ(Hv)ᵢ; the other blocks' parts of v only add variance. Otherwise each
    block has its own products, num_probes · L in all.
    """
    blocks = task.blocks
    count = num_probes if joint else num_probes * len(blocks)

    def mapped(function: Callable[[Any], Any], xs: Any) -> Any:
        if jax.tree.leaves(xs)[0].shape[0] > 1:
            return jax.vmap(function)(xs)
        return jax.tree.map(lambda out: out[None], function(jax.tree.map(lambda x: x[0], xs)))

    def probe_of(key: Key, values: Values, number: Array) -> Values:
        if joint:
            return _signs(key, number, values)
        return partition.only(blocks, number % len(blocks), _signs(key, number // len(blocks), values))

    def sample(params: Params, batch: tuple[Array, ...], v: Values) -> Array:
        dots = task.block_dots(v, task.hvp(params, batch, v))
        return dots if joint else jnp.sum(dots)

    # Loops on the host, over two programs: XLA:CPU runs the product several times slower inside a loop of its own and from a
    # stored linearisation, and nearly twice as slow in one program with the drawing of its vector.
    draw = task.timed.jit(lambda key, values, numbers: mapped(lambda n: probe_of(key, values, n), numbers))
    run = task.timed.jit(lambda params, vectors, *batch: mapped(lambda v: sample(params, batch, v), vectors))
    leaves, samples = task.leaves(task.params), []
    for start in range(0, count, batch_size):
        vectors = draw(task.key, leaves, jnp.arange(start, min(start + batch_size, count)))
        samples.append(task.sum_batches(run, vectors))
    table = np.concatenate(samples).reshape(num_probes, len(blocks)) / task.examples
    stderr: Any = np.full(len(blocks), np.nan)
    if num_probes > 1:
        stderr = np.std(table, axis=0, ddof=1) / num_probes**0.5
    return replace(exactly(table.mean(axis=0), Ledger(hvp=count * task.examples)), stderr=stderr)


def _signs(key: Key, number: Array, values: Values) -> Values:
    """Random ±1; a leaf's depend on its path and not on its position.

    32 to a random word: `jax.random.rademacher` draws a word each, over 10 times slower.
    """

    def signs(path: str, leaf: Array) -> Array:
        leaf_key = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), number)
        words = jax.random.bits(leaf_key, (-(-leaf.size // 32),), jnp.uint32)
        bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & jnp.uint32(1)
        return (1 - 2 * bits.astype(jnp.int32)).astype(leaf.dtype).ravel()[: leaf.size].reshape(leaf.shape)

    return {path: signs(path, leaf) for path, leaf in values.items()}
