"""Losses that a sensitivity is measured in: one number per example, from the model's outputs.

Four are ready: `OUTPUT` (drift from the model's own float32 output, the default everywhere), `KL` (the same for a
classifier's probabilities), `CROSS_ENTROPY` and `MSE` (on labels). One of the user's own is a `Loss` like them.

A loss with labels takes them from the end of each batch: with `num_targets=1` a batch (x, y) calls the model with x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

__all__ = ["CROSS_ENTROPY", "KL", "Loss", "MSE", "OUTPUT"]

Outputs = Any  # what the model returns: a pytree of arrays with leading axis N


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss per example.

    Attributes:
        name: as it stands in tables.
        value: (outputs, reference, *targets) -> (N,) floats. `reference` are the float32 model's outputs.
        num_targets: how many arrays at the end of a batch are targets and not the model's inputs.
        stationary: its gradient at outputs = reference is exactly zero, whatever the model.
        cotangents: (key, outputs, *targets) -> random u shaped like the outputs with E[u uᵀ] = Hessian of the loss
            with respect to the outputs at outputs = reference, example by example: the probes of the true Fisher matrix
            (Martens, arXiv 1412.1193, section 9). None: scores that need it raise.
    """

    name: str
    value: Callable[..., Array]
    num_targets: int = 0
    stationary: bool = False
    cotangents: Callable[..., Outputs] | None = None

    def split(self, batch: Sequence[Array]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """A batch as (inputs, targets).

        Raises:
            ValueError: too few arrays.
        """
        count = len(batch) - self.num_targets
        if count < 1:
            raise ValueError(
                f"The loss {self.name!r} takes the last {self.num_targets} array(s) of a batch as targets; found batches of "
                f"{len(batch)} array(s), which leaves the model no input. Pass (x, y) batches."
            )
        return tuple(batch[:count]), tuple(batch[count:])


def flat(outputs: Outputs) -> Array:
    """Outputs of N examples as one (N, K) array of real numbers.

    Complex numbers count as pairs of real ones. What has no derivative (integers, booleans) and scalars, which are of no example,
    are left out.

    Raises:
        ValueError: nothing is left, or floating-point outputs of unlike leading axes.
    """
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.inexact)]
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) != 1:
        shapes = [f"{leaf.dtype} {leaf.shape}" for leaf in jax.tree.leaves(outputs)]
        raise ValueError(
            f"Expected floating-point outputs with one leading axis of examples, found {', '.join(shapes)}. Choose those that "
            "count: mpjax.program.with_output(model, lambda outputs: …)."
        )
    rows = [leaf.reshape(leaf.shape[0], -1) for leaf in leaves]
    parts = [part for row in rows for part in ((row.real, row.imag) if jnp.iscomplexobj(row) else (row,))]
    widest = functools.reduce(jnp.promote_types, [part.dtype for part in parts])
    return jnp.concatenate([part.astype(widest) for part in parts], axis=1)


def inexact(outputs: Outputs) -> list[Array]:
    """The outputs that have derivatives: of floating point, real or complex."""
    return [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def with_inexact(outputs: Outputs, values: Sequence[Array]) -> Outputs:
    """The outputs with those of floating point exchanged."""
    leaves, structure = jax.tree.flatten(outputs)
    given = iter(values)
    exchanged = [next(given) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, exchanged)


def check(loss: Any) -> Loss:
    """The loss itself.

    Raises:
        TypeError: something else was passed.
    """
    if not isinstance(loss, Loss):
        raise TypeError(
            f"Expected a losses.Loss (OUTPUT, KL, CROSS_ENTROPY, MSE, or losses.Loss(name=…, value=…) of your own, where "
            f"value(outputs, reference, *targets) gives one number per example); found {loss!r}."
        )
    return loss


def _half_squares(outputs: Outputs, reference: Outputs) -> Array:
    return 0.5 * jnp.sum(jnp.square(flat(outputs) - flat(reference)), axis=1)


def _signs(key: Array, outputs: Outputs) -> Outputs:
    """Random signs, also of the imaginary parts; zero for what `flat` leaves out."""
    leaves, structure = jax.tree.flatten(outputs)

    def drawn(key: Array, leaf: Array) -> Array:
        if not leaf.ndim or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros_like(leaf)
        if jnp.iscomplexobj(leaf):
            parts = (jax.random.rademacher(part, leaf.shape, leaf.real.dtype) for part in jax.random.split(key))
            return lax.complex(*parts)
        return jax.random.rademacher(key, leaf.shape, leaf.dtype)

    return jax.tree.unflatten(structure, map(drawn, jax.random.split(key, len(leaves)), leaves))


def _mean_squares(outputs: Outputs, reference: Outputs, targets: Array) -> Array:
    del reference
    values = flat(outputs)
    expected = flat(targets)
    if values.shape != expected.shape:
        raise ValueError(f"mse: outputs {values.shape} and targets {expected.shape} must have one shape.")
    return jnp.mean(jnp.square(values - expected.astype(values.dtype)), axis=1)


def _mean_square_cotangents(key: Array, outputs: Outputs, targets: Array) -> Outputs:
    del targets
    scale = (2.0 / flat(outputs).shape[1]) ** 0.5
    return jax.tree.map(lambda u: u * jnp.asarray(scale, u.dtype), _signs(key, outputs))


def _logits(outputs: Outputs, name: str) -> Array:
    leaves = jax.tree.leaves(outputs)
    if len(leaves) != 1 or leaves[0].ndim < 2:
        shapes = [leaf.shape for leaf in leaves]
        raise ValueError(f"{name}: expected one array of logits (N, …, classes), found outputs of shapes {shapes}.")
    return leaves[0]


def _over_positions(values: Array) -> Array:
    """(N, …) -> (N,): the mean over an example's positions."""
    return jnp.mean(values.reshape(values.shape[0], -1), axis=1)


def _cross_entropy(outputs: Outputs, reference: Outputs, labels: Array) -> Array:
    del reference
    logits = _logits(outputs, "cross_entropy")
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"cross_entropy: expected integer labels of shape {logits.shape[:-1]} for logits {logits.shape}, found "
            f"{labels.dtype} {labels.shape}."
        )
    return _over_positions(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _kl(outputs: Outputs, reference: Outputs) -> Array:
    low, truth = jax.nn.log_softmax(_logits(outputs, "kl")), jax.nn.log_softmax(_logits(reference, "kl"))
    return _over_positions(jnp.sum(jnp.exp(truth) * (truth - low), axis=-1))


def _sampled_labels(key: Array, outputs: Outputs, *targets: Array) -> Outputs:
    """∂/∂logits of the cross-entropy for a label drawn from the model's own probabilities."""
    del targets
    logits = _logits(outputs, "sampled labels")
    drawn = jax.random.categorical(key, logits)
    change = jax.nn.softmax(logits) - jax.nn.one_hot(drawn, logits.shape[-1], dtype=logits.dtype)
    positions = max(1, logits.size // (logits.shape[0] * logits.shape[-1]))
    change = change * jnp.asarray(positions**-0.5, logits.dtype)
    return jax.tree.unflatten(jax.tree.structure(outputs), [change])


def _noise_to_signal(outputs: Outputs, reference: Outputs) -> Array:
    return 2 * _half_squares(outputs, reference) / jnp.sum(jnp.square(flat(reference)), axis=1)


def _last_kl(outputs: Outputs, reference: Outputs) -> Array:
    return _kl(*(_logits(logits, "last_kl")[:, -1] for logits in (outputs, reference)))


def _last_sampled_labels(key: Array, outputs: Outputs) -> Outputs:
    logits = _logits(outputs, "last_kl")
    last = _sampled_labels(key, logits[:, -1])
    return jax.tree.unflatten(jax.tree.structure(outputs), [jnp.zeros_like(logits).at[:, -1].set(last)])


OUTPUT = Loss(name="output", value=_half_squares, stationary=True, cotangents=_signs)
"""½ ‖f(x) − f₀(x)‖², summed over all outputs: its Hessian at the trained weights is exactly JᵀJ."""

KL = Loss(name="kl", value=_kl, stationary=True, cotangents=_sampled_labels)
"""Kullback–Leibler divergence from the float32 model's softmax, in nats; mean over an example's positions."""

LAST_KL = Loss(name="last_kl", value=_last_kl, stationary=True, cotangents=_last_sampled_labels)
"""The same at the last position of logits (N, T, classes): the next token of a language model."""

NOISE_TO_SIGNAL = Loss(name="noise_to_signal", value=_noise_to_signal, stationary=True)
"""‖f(x) − f₀(x)‖² / ‖f₀(x)‖²: 10^(−SQNR/10), the SQNR of the model's output in dB (Pandey et al., arXiv 2302.05397)."""

CROSS_ENTROPY = Loss(name="cross_entropy", value=_cross_entropy, num_targets=1, cotangents=_sampled_labels)
"""Cross-entropy with integer labels (N, …), in nats; mean over an example's positions."""

MSE = Loss(name="mse", value=_mean_squares, num_targets=1, cotangents=_mean_square_cotangents)
"""Mean squared difference to targets of the outputs' shape."""
