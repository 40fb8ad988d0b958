"""Krylov spaces of an `Operator`: its vectors, in at least float32 and zero in the padding, and Lanczos' tridiagonal matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from matfree import stochtrace

from mpjax.curvature.operators import Operator, wide

Key: TypeAlias = Array  # jax.random.key(...)

dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)  # float32 products in float32: a GPU would take TF32


def dtype_of(operator: Operator) -> Any:
    """The dtype to compute in, at least float32.

    Raises:
        ValueError: an operator that is empty or not real floating-point.
    """
    if not jnp.issubdtype(operator.dtype, jnp.floating) or operator.size < 1:
        raise ValueError(
            "expected an operator of a real floating-point dtype and a size of at least 1; got "
            f"{jnp.dtype(operator.dtype)} and {operator.size}"
        )
    return wide(operator.dtype)


def matvec_of(operator: Operator) -> Callable[[Array], Array]:
    """The product in `dtype_of`; vectors are cast for the product only."""
    dtype = dtype_of(operator)
    return lambda x: operator.matvec(x.astype(operator.dtype)).astype(dtype)


def active_size(operator: Operator) -> int | Array:
    """Number of coordinates that are not padding."""
    return operator.size if operator.active is None else operator.active


def masked(operator: Operator, x: Array) -> Array:
    """(n,) with zeros in the padding."""
    return x if operator.active is None else jnp.where(jnp.arange(operator.size) < operator.active, x, 0)


def normals(num: int, operator: Operator, key: Key) -> Array:
    """(num, n) normal probes, zero in the padding."""
    return _probes(stochtrace.sampler_normal, num, operator, key)


def signs(operator: Operator, key: Key) -> Array:
    """(n,) one probe of random signs, zero in the padding."""
    return _probes(stochtrace.sampler_signs, 1, operator, key)[0]


def _probes(sampler: Callable, num: int, operator: Operator, key: Key) -> Array:
    like = jnp.zeros(operator.size, dtype_of(operator))
    return jax.vmap(partial(masked, operator))(sampler(like, num=num)(key))


def lanczos(operator: Operator, start: Array, steps: int) -> tuple[Array, Array, Array]:
    """Tridiagonal matrix of A in the Krylov space of `start`, with full reorthogonalisation.

    matfree.decomp.tridiag_sym (0.6.3) divides by the norm of the remainder unseen, so that an exhausted Krylov space gives NaN
    (zero, rank one) or another matrix (identity, more steps than active coordinates).

    Returns:
        Diagonal (steps,); off-diagonal (steps,), the last of which is the norm of the remainder; whether the space is
        exhausted, so that quadrature is exact. Past that the diagonal repeats its first element, which lies between the Ritz
        values, and the off-diagonal is 0: nodes without weight.
    """
    matvec, dtype = matvec_of(operator), start.dtype

    def step(j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        basis, alphas, betas, q, alive, scale = state
        basis = basis.at[j].set(q)
        w = matvec(q)
        scale = jnp.maximum(scale, jnp.linalg.norm(w))
        alphas = alphas.at[j].set(jnp.where(alive, dot(q, w), alphas[0]))
        for _ in range(2):  # twice is enough (Giraud, Langou, Rozloznik 2005, doi 10.1016/j.camwa.2005.08.009)
            w = w - dot(dot(basis, w), basis)
        beta = jnp.linalg.norm(w)
        # `~(<=)` keeps NaN alive, so that it shows. A remainder of rounding size that passes does no harm: it is orthogonal to
        # a basis of fewer than `active` vectors, and the nodes it leads to weigh as little.
        alive = alive & (j + 1 < active_size(operator)) & ~(beta <= jnp.finfo(dtype).eps * scale)
        betas = betas.at[j].set(jnp.where(alive, beta, 0))
        return basis, alphas, betas, jnp.where(alive, w / jnp.where(alive, beta, 1), 0), alive, scale

    norm = jnp.linalg.norm(start)
    basis, zeros = jnp.zeros((steps, operator.size), dtype), jnp.zeros(steps, dtype)
    state = (basis, zeros, zeros, start / jnp.where(norm == 0, 1, norm), jnp.array(True), jnp.zeros((), dtype))
    _, alphas, betas, _, alive, _ = lax.fori_loop(0, steps, step, state)
    return alphas, betas, ~alive


@sequential_vmap
def ritz(alphas: Array, betas: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors (columns) of the tridiagonal matrix; NaN where it is not finite.

    One matrix at a time: two independent batches of eigh in one program can wait for each other for ever on the CPU
    (jaxlib 0.10.2: each blocks a worker of the thread pool that its batch is handed to; seen on 2 cores).
    """
    matrix = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    finite = jnp.isfinite(matrix).all()
    values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0))
    return jnp.where(finite, values, jnp.nan), jnp.where(finite, vectors, jnp.nan)
