"""A smooth function of a few thousand parameters, minimised until its gradient is zero to rounding.

Three stages: Adam on random batches finds a good region, L-BFGS the valley's floor, and damped
Newton steps with the dense Hessian the point itself, whose eigenvalues say whether it is a minimum. Run them in float64.

`loss(vector, *batch) -> scalar` is a mean over the examples of the batch plus what does not depend on them; `data` are all
examples, arrays with an equal leading axis.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

Loss = Callable[..., jax.Array]

_LBFGS_PART = 100  # steps between two looks at the gradient
_CHUNK = 16  # examples, and Hessian-vector products, at once: larger arrays are slower


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


def adam(
    loss: Loss,
    vector: jax.Array,
    data: tuple[jax.Array, ...],
    key: jax.Array,
    *,
    steps: int,
    rate: float,
    batch: int,
) -> jax.Array:
    """Adam on random batches, its rate falling to zero by a cosine; the new (P,) parameters."""
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry: tuple, step_key: jax.Array) -> tuple[tuple, None]:
        w, state = carry
        chosen = jax.random.choice(step_key, len(data[0]), (batch,), replace=False)
        updates, state = optimiser.update(jax.grad(loss)(w, *(array[chosen] for array in data)), state, w)
        return (optax.apply_updates(w, updates), state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    return run((vector, optimiser.init(vector)), jax.random.split(key, steps))[0]


def lbfgs(
    whole: Callable[[jax.Array], jax.Array], vector: jax.Array, *, steps: int, tolerance: float
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
    taken, norm = 0, np.inf
    while taken < steps and norm >= tolerance:
        carry = run(carry)
        norm, taken = float(jnp.linalg.norm(gradient(carry[0]))), taken + _LBFGS_PART
    return carry[0], taken


def newton(loss: Loss, vector: jax.Array, data: tuple[jax.Array, ...], *, rounds: int, tolerance: float) -> Optimum:
    """Newton steps with one dense Hessian for as long as each halves the gradient, then with another if need be.

    Eigenvalues count by their absolute value, and a step is halved while the loss grows, so saddle points repel
    (Dauphin et al., arXiv 1406.2572). It stops after `rounds` Hessians, or when the gradient norm is below `tolerance`.
    """
    value = jax.jit(lambda w: loss(w, *data))
    gradient = jax.jit(jax.grad(lambda w: loss(w, *data)))
    hessian = _hessian(loss, data)
    number, norm = 0, np.inf
    while number < rounds and norm >= tolerance:
        centre, number = vector, number + 1
        eigenvalues, vectors = np.linalg.eigh(hessian(vector))
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
        norm = float(jnp.linalg.norm(gradient(vector)))
    distance = float(jnp.linalg.norm(vector - centre))
    return Optimum(vector=vector, eigenvalues=eigenvalues, distance=distance, rounds=number)


def _hessian(loss: Loss, data: tuple[jax.Array, ...]) -> Callable[[jax.Array], np.ndarray]:
    """The dense (P, P) Hessian as a function of the parameters: Hessian-vector products with all basis vectors."""
    count = len(data[0])
    size = max(n for n in range(1, _CHUNK + 1) if count % n == 0)  # of equal chunks the mean is the whole
    chunks = tuple(array.reshape(-1, size, *array.shape[1:]) for array in data)

    @jax.jit
    def hessian(w: jax.Array) -> jax.Array:
        def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            product = jax.linearize(jax.grad(lambda vector: loss(vector, *chunk)), w)[1]
            return total + jax.lax.map(product, jnp.eye(w.size), batch_size=_CHUNK), None

        return jax.lax.scan(add, jnp.zeros((w.size, w.size)), chunks)[0] * (size / count)

    def symmetric(w: jax.Array) -> np.ndarray:
        matrix = np.asarray(hessian(w))
        return (matrix + matrix.T) / 2

    return symmetric
