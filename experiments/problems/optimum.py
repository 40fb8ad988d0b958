"""A smooth function of a few thousand parameters, minimised until its gradient is zero to rounding.

Three stages: Adam on random batches finds a good region, L-BFGS the valley's floor, and damped
Newton steps with the dense Hessian the point itself, whose eigenvalues say whether it is a minimum. Run them in float64.

`loss(vector, *batch) -> scalar` is a mean over the examples of the batch plus what does not depend on them; `data` are all
examples, arrays with an equal leading axis. `advance` reports progress, `sum(progress_steps(…))` times.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lib.progress import Advance

Loss = Callable[..., jax.Array]

_ADAM_PARTS, _LBFGS_PART = 10, 100
_VECTORS, _CHUNK = 16, 16  # Hessian-vector products at once, and examples: larger arrays are slower


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where Newton's steps ended.

    Attributes:
        vector: (P,) parameters.
        eigenvalues: (P,) of the last Hessian, ascending.
        distance: how far from `vector` that Hessian was taken.
        rounds: Hessians that were computed.
    """

    vector: jax.Array
    eigenvalues: np.ndarray
    distance: float
    rounds: int


def progress_steps(lbfgs_steps: int, size: int) -> tuple[int, int, int]:
    """How often `adam`, `lbfgs` and `newton` (its first Hessian, P = `size`) report progress."""
    return _ADAM_PARTS, lbfgs_steps // _LBFGS_PART, -(-size // _VECTORS)


def adam(
    loss: Loss,
    vector: jax.Array,
    data: tuple[jax.Array, ...],
    key: jax.Array,
    *,
    steps: int,
    rate: float,
    batch: int,
    advance: Advance,
) -> jax.Array:
    """Adam on random batches, its rate falling to zero by a cosine; the new (P,) parameters."""
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry: tuple, step_key: jax.Array) -> tuple[tuple, None]:
        w, state = carry
        chosen = jax.random.choice(step_key, len(data[0]), (batch,), replace=False)
        updates, state = optimiser.update(jax.grad(loss)(w, *(array[chosen] for array in data)), state, w)
        return (optax.apply_updates(w, updates), state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    carry = (vector, optimiser.init(vector))
    for part in jax.random.split(key, (_ADAM_PARTS, steps // _ADAM_PARTS)):
        carry = jax.block_until_ready(run(carry, part))
        advance()
    return carry[0]


def lbfgs(
    whole: Callable[[jax.Array], jax.Array], vector: jax.Array, *, steps: int, tolerance: float, advance: Advance
) -> tuple[jax.Array, int]:
    """L-BFGS until the gradient norm is below `tolerance`, looked at every 100 steps; (parameters, steps taken)."""
    optimiser = optax.lbfgs(memory_size=50)
    value_and_gradient = optax.value_and_grad_from_state(whole)
    gradient = jax.jit(jax.grad(whole))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        w, state = carry
        value, slope = value_and_gradient(w, state=state)
        updates, state = optimiser.update(slope, state, w, value=value, grad=slope, value_fn=whole)
        return (optax.apply_updates(w, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=_LBFGS_PART)[0])
    carry = (vector, optimiser.init(vector))
    parts = steps // _LBFGS_PART
    for part in range(parts):
        carry = jax.block_until_ready(run(carry))
        if float(jnp.linalg.norm(gradient(carry[0]))) < tolerance:
            advance(parts - part)
            return carry[0], (part + 1) * _LBFGS_PART
        advance()
    return carry[0], parts * _LBFGS_PART


def newton(
    loss: Loss, vector: jax.Array, data: tuple[jax.Array, ...], *, rounds: int, tolerance: float, advance: Advance
) -> Optimum:
    """Newton steps with one dense Hessian for as long as each halves the gradient, then with another if need be.

    Eigenvalues count by their absolute value, and a step is halved while the loss grows, so saddle points repel
    (Dauphin et al., arXiv 1406.2572). It stops after `rounds` Hessians, or when the gradient norm is below `tolerance`.
    """
    value = jax.jit(lambda w: loss(w, *data))
    gradient = jax.jit(jax.grad(lambda w: loss(w, *data)))
    hessian = _hessian(loss, data)
    for number in range(1, rounds + 1):
        centre = vector
        eigenvalues, vectors = np.linalg.eigh(hessian(vector, advance if number == 1 else lambda steps=1: None))
        scales = np.maximum(np.abs(eigenvalues), 1e-8 * np.abs(eigenvalues).max())
        norm = float(jnp.linalg.norm(gradient(vector)))
        while norm > 0:
            step = jnp.asarray(vectors @ ((vectors.T @ np.asarray(gradient(vector))) / scales))
            while float(value(vector - step)) > float(value(vector)) + 1e-14 and float(jnp.linalg.norm(step)) > 1e-12:
                step = step / 2
            ahead, before = vector - step, norm
            norm = float(jnp.linalg.norm(gradient(ahead)))
            if norm < before or float(value(ahead)) < float(value(vector)) - 1e-14:
                vector = ahead
            if norm > before / 2:
                break
        if float(jnp.linalg.norm(gradient(vector))) < tolerance:
            break
    distance = float(jnp.linalg.norm(vector - centre))
    return Optimum(vector=vector, eigenvalues=eigenvalues, distance=distance, rounds=number)


def _hessian(loss: Loss, data: tuple[jax.Array, ...]) -> Callable[[jax.Array, Advance], np.ndarray]:
    """The dense (P, P) Hessian as a function of the parameters: Hessian-vector products with all basis vectors."""
    count = len(data[0])
    size = max(
        number for number in range(1, _CHUNK + 1) if count % number == 0
    )  # equal chunks: their mean is the whole
    chunks = [tuple(array[i : i + size] for array in data) for i in range(0, count, size)]

    @jax.jit
    def products(w: jax.Array, vectors: jax.Array, *chunk: jax.Array) -> jax.Array:
        return jax.vmap(jax.linearize(jax.grad(lambda vector: loss(vector, *chunk)), w)[1])(vectors)

    def hessian(w: jax.Array, advance: Advance) -> np.ndarray:
        def rows(first: int) -> np.ndarray:
            vectors = jnp.asarray(np.eye(_VECTORS, w.size, first))
            parts = [np.asarray(products(w, vectors, *chunk)) for chunk in chunks]
            advance()
            return np.mean(parts, axis=0)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # one program at a time leaves the other cores idle
            matrix = np.concatenate(list(pool.map(rows, range(0, w.size, _VECTORS))))[: w.size]
        return (matrix + matrix.T) / 2

    return hessian
