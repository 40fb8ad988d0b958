"""Stochastic estimates of an operator's trace, log-determinant, top eigenvalue, diagonal and spectral density.

A factory takes the knobs and returns the function that takes the problem and the key:

    estimate = trace(num_probes=32)(operator, jax.random.key(0))

Every estimate carries its standard error, a residual and what it cost. Probes and integrands are matfree's. A
padded operator (`operator.active`) is estimated as its leading active × active matrix: probes are zero outside it.
Nothing is jitted here: wrap what you call in `jax.jit`; an operator whose `matvec` is a pytree may be an argument,
and one program then serves all values of `active`.

`batch_size` probes are multiplied at a time; None, the default, takes them one by one. With b = batch_size (1 for
None) and n = operator.size, the memory bounds below count vectors of n numbers and come on top of b products.
Where an operator's dtype is narrower than float32, vectors are cast to it for the product only. Every factory
raises ValueError for a knob out of its range, every estimator for an operator that is empty or not real floating.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Float
from matfree import stochtrace

from mpjax.curvature.operators import Operator, dense
from mpjax.ledger import Ledger

Key: TypeAlias = Array  # jax.random.key(...)

# Float32 products in float32: a GPU would take TF32.
_dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@partial(jax.tree_util.register_dataclass, data_fields=["value", "stderr", "residual"], meta_fields=["ledger"])
@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimated number (or an array of them) and what is known about its error.

    Attributes:
        value: the estimate; NaN where the operator is not finite.
        stderr: standard error that the random probes cause, of the shape of `value`; 0 where nothing is random,
            NaN where it cannot be told (one probe).
        residual: indicator of the error that more probes would not remove, of the shape of `value`: the truncation
            of a Krylov space. 0 where there is none: the estimate is unbiased, or the space is exhausted.
        ledger: `operator.matvec_cost` times the number of products.
    """

    value: Float[Array, "..."]
    stderr: Float[Array, "..."]
    residual: Float[Array, "..."]
    ledger: Ledger


@partial(jax.tree_util.register_dataclass, data_fields=["grid", "density", "stderr"], meta_fields=["ledger"])
@dataclass(frozen=True, kw_only=True)
class Density:
    """A smoothed spectral density, as points of a curve.

    Attributes:
        grid: equidistant eigenvalues, in the operator's unit.
        density: at the grid; its integral over the grid is 1.
        stderr: of `density`; NaN with one probe.
        ledger: as in `Estimate`.
    """

    grid: Float[Array, " points"]
    density: Float[Array, " points"]
    stderr: Float[Array, " points"]
    ledger: Ledger


Estimator: TypeAlias = Callable[[Operator, Key], Estimate]


def trace(
    *, num_probes: int, method: Literal["hutchinson", "xtrace"] = "hutchinson", batch_size: int | None = None
) -> Estimator:
    """Trace, unbiased, from `num_probes` products.

    "hutchinson": mean of zᵀAz over sign probes z, one product each (Hutchinson 1989, doi 10.1080/03610919008812866).
    Without variance on a diagonal matrix. Where few eigenvalues make up A, the terms are skewed, and a Student-t 95 %
    interval of 16 probes holds the trace in 92 % of the runs (tests). Memory: 2b vectors.

    "xtrace": num_probes / 2 normal probes, two products each, so num_probes is even. The range of A on all probes but
    one is traced exactly and the rest by the one left out, for each in turn (Epperly, Tropp, Webber 2024, doi
    10.1137/23M1548323, with their normalisation). Exact where the rank is below num_probes / 2, much better than
    Hutchinson where eigenvalues decay fast. Its terms are not independent: `stderr` is an indication, seen
    as low as two thirds of the true spread. Where n <= num_probes the trace is taken exactly, with n products.
    Memory: 3 · num_probes vectors.
    """
    if method not in ("hutchinson", "xtrace"):
        raise ValueError(f"method must be 'hutchinson' or 'xtrace'; got {method!r}")
    hutchinson = _monte_carlo(stochtrace.monte_carlo_trace(), num_probes, batch_size)
    if method == "hutchinson":
        return hutchinson
    if num_probes % 2:
        raise ValueError(f"xtrace takes two products per probe: num_probes must be even; got {num_probes}")

    def xtrace(operator: Operator, key: Key) -> Estimate:
        if operator.size <= num_probes:
            matrix = dense(operator, batch_size=batch_size or 1).astype(_dtype(operator))
            value = jnp.sum(_masked(operator, jnp.diag(matrix)))
            return _estimate(operator, value, jnp.zeros_like(value), operator.size)
        values = _xtrace(operator, key, num_probes // 2, batch_size)
        return _estimate(operator, jnp.mean(values), _stderr(values), num_probes)

    return xtrace


def diagonal(*, num_probes: int, batch_size: int | None = None) -> Estimator:
    """Diagonal, (n,), unbiased: mean of z ⊙ Az over sign probes z, one product each (Bekas, Kokiopoulou, Saad 2007,
    doi 10.1016/j.apnum.2007.01.003). Without variance on a diagonal matrix; 0 in the padding.

    Memory: 2b + 3 vectors, whatever the number of probes.
    """
    return _monte_carlo(stochtrace.monte_carlo_diagonal(), num_probes, batch_size)


def abs_logdet(*, num_probes: int, depth: int, damping: float | Array, batch_size: int | None = None) -> Estimator:
    """Σ log(|λ| + damping) over the eigenvalues, by stochastic Lanczos quadrature. Finite on an indefinite or
    singular operator; not log |det(A + damping · I)|, which is another number where A is indefinite.

    Sign probes z, and Gauss quadrature of zᵀf(A)z from `depth` Lanczos steps (Ubaru, Chen, Saad 2017, doi
    10.1137/16M1104974). `residual` is |value at depth - value at depth // 2| from the same products; a probe whose
    Krylov space is exhausted is exact and adds 0 to it. It tells how far the quadrature has settled and is no bound:
    where |λ| comes near 0, log is not smooth and convergence slow. A damping far below the rounding of A (its norm
    times eps) is not resolved.

    Products: num_probes · min(depth, n). Memory: b (depth + 4) vectors.

    Args:
        num_probes: at least 1.
        depth: Lanczos steps per probe, at least 2; no more than n are taken.
        damping: > 0, in the unit of A; may be traced.
        batch_size: probes at a time.
    """
    return _slq(lambda x, d: jnp.log(jnp.abs(x) + d), num_probes, depth, damping, batch_size)


def logdet_score(*, num_probes: int, depth: int, damping: float | Array, batch_size: int | None = None) -> Estimator:
    """Σ log(1 + |λ| / damping): for a positive semi-definite A log det(A + damping · I) - n log damping, which does
    not grow with the number of zero eigenvalues. All else as in `abs_logdet`."""
    return _slq(lambda x, d: jnp.log1p(jnp.abs(x) / d), num_probes, depth, damping, batch_size)


def top_eigenvalue(*, depth: int, num_starts: int = 1) -> Estimator:
    """Eigenvalue of largest magnitude, with its sign, by Lanczos with full reorthogonalisation (Golub, Van Loan 2013,
    Matrix Computations, chapter 10) from a normal random vector.

    The value θ is a Ritz value: it never exceeds the true one in magnitude. `residual` is ‖Av - θv‖ of its Ritz
    vector v: some eigenvalue lies within it of θ, up to rounding (about eps |θ|). That it is the largest one is
    likely, not proven: start again to see. With num_starts > 1 the value of largest magnitude is taken, and `stderr`
    is the standard deviation of |θ| over the starts: how much one start depends on luck. The error is one-sided, so
    it makes no interval. With one start it is NaN.

    Products: num_starts · min(depth, n). Memory: depth + 4 vectors.
    """
    _check_at_least(1, depth=depth, num_starts=num_starts)

    def estimator(operator: Operator, key: Key) -> Estimate:
        steps = min(depth, operator.size)

        def one(k: Key) -> tuple[Array, Array]:
            alphas, betas, _ = _lanczos(operator, _probes(stochtrace.sampler_normal, 1, operator, k)[0], steps)
            thetas, vectors = _ritz(alphas, betas)
            i = jnp.argmax(jnp.abs(thetas))
            return thetas[i], jnp.abs(betas[-1] * vectors[-1, i])

        thetas, residuals = lax.map(one, jax.random.split(key, num_starts))
        i = jnp.argmax(jnp.abs(thetas))
        spread = jnp.std(jnp.abs(thetas), ddof=1) if num_starts > 1 else jnp.full_like(thetas[0], jnp.nan)
        return _estimate(operator, thetas[i], spread, num_starts * steps, residuals[i])

    return estimator


def spectral_density(
    *, num_probes: int, depth: int, num_points: int = 1000, width: float = 0.01, batch_size: int | None = None
) -> Callable[[Operator, Key], Density]:
    """Density of the eigenvalues for plots: stochastic Lanczos quadrature, each node a Gaussian (Ghorbani, Krishnan,
    Xiao 2019, arXiv 1901.10159).

    The grid spans the Ritz values of all probes and five widths beyond. Outliers stand where they are; the bulk
    follows the eigenvalues only as finely as `depth` and `width` allow. Products and memory as `abs_logdet`, and
    num_probes × num_points numbers.

    Args:
        num_probes, depth, batch_size: as in `abs_logdet`, depth at least 1.
        num_points: of the grid; its spacing is at most one width.
        width: standard deviation of the Gaussians, as a fraction of the range of the Ritz values (where all
            are equal, of their magnitude).
    """
    _check_at_least(1, num_probes=num_probes, depth=depth, batch_size=batch_size)
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be finite and > 0; got {width}")
    _check_at_least(math.ceil(11 + 1 / width), num_points=num_points)  # span / width = 1 / width + 2 · 5

    def estimator(operator: Operator, key: Key) -> Density:
        steps = min(depth, operator.size)

        def one(k: Key) -> tuple[Array, Array]:
            alphas, betas, _ = _lanczos(operator, _signs(operator, k), steps)
            nodes, vectors = _ritz(alphas, betas)
            return nodes, vectors[0] ** 2

        nodes, weights = lax.map(one, jax.random.split(key, num_probes), batch_size=batch_size)
        low, high, largest = jnp.min(nodes), jnp.max(nodes), jnp.max(jnp.abs(nodes))
        span = jnp.where(high - low > 8 * jnp.finfo(nodes.dtype).eps * largest, high - low, largest)
        sigma = width * jnp.where(span == 0, 1, span)
        grid = jnp.linspace(low - 5 * sigma, high + 5 * sigma, num_points)

        def smooth(pair: tuple[Array, Array]) -> Array:
            scaled = (grid[:, None] - pair[0][None, :]) / sigma
            return _dot(jnp.exp(-(scaled**2) / 2), pair[1]) / (sigma * math.sqrt(2 * math.pi))

        curves = lax.map(smooth, (nodes, weights))
        ledger = operator.matvec_cost * (num_probes * steps)
        return Density(grid=grid, density=jnp.mean(curves, axis=0), stderr=_stderr(curves), ledger=ledger)

    return estimator


def _monte_carlo(integrand: Callable, num_probes: int, batch_size: int | None) -> Estimator:
    """Mean of a matfree integrand over sign probes."""
    _check_at_least(1, num_probes=num_probes, batch_size=batch_size)

    def estimator(operator: Operator, key: Key) -> Estimate:
        matvec = _matvec(operator)
        values = partial(_mean_and_stderr, lambda k: integrand(matvec, _signs(operator, k)))
        return _estimate(operator, *values(key, num_probes, batch_size), num_probes)

    return estimator


def _slq(function: Callable, num_probes: int, depth: int, damping: float | Array, batch_size: int | None) -> Estimator:
    """tr f(A) by stochastic Lanczos quadrature; function(eigenvalues, damping), element-wise."""
    _check_at_least(1, num_probes=num_probes, batch_size=batch_size)
    _check_at_least(2, depth=depth)
    if jnp.ndim(damping) != 0:
        raise ValueError(f"damping must be a scalar; got shape {jnp.shape(damping)}")
    if not isinstance(damping, jax.core.Tracer) and not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping must be finite and > 0; got {damping}")

    def estimator(operator: Operator, key: Key) -> Estimate:
        steps = min(depth, operator.size)

        def one(k: Key) -> Array:
            alphas, betas, exhausted = _lanczos(operator, _signs(operator, k), steps)

            def quadrature(size: int) -> Array:
                nodes, vectors = _ritz(alphas[:size], betas[:size])
                return jnp.sum(function(nodes, jnp.asarray(damping, dtype=nodes.dtype)) * vectors[0] ** 2)

            full, half = quadrature(steps), quadrature(max(steps // 2, 1))
            return jnp.asarray(_active(operator), full.dtype) * jnp.stack([full, jnp.where(exhausted, 0, full - half)])

        (value, change), (stderr, _) = _mean_and_stderr(one, key, num_probes, batch_size)
        return _estimate(operator, value, stderr, num_probes * steps, jnp.abs(change))

    return estimator


def _lanczos(operator: Operator, start: Array, steps: int) -> tuple[Array, Array, Array]:
    """Tridiagonal matrix of A in the Krylov space of `start`, with full reorthogonalisation.

    matfree.decomp.tridiag_sym (0.6.3) divides by the norm of the remainder unseen, so that an exhausted Krylov space
    gives NaN (zero, rank one) or another matrix (identity, more steps than active coordinates).

    Returns:
        Diagonal (steps,); off-diagonal (steps,), the last of which is the norm of the remainder; whether the space is
        exhausted, so that quadrature is exact. Past that the diagonal repeats its first element, which lies between
        the Ritz values, and the off-diagonal is 0: nodes without weight.
    """
    matvec, dtype = _matvec(operator), start.dtype

    def step(j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        basis, alphas, betas, q, alive, scale = state
        basis = basis.at[j].set(q)
        w = matvec(q)
        scale = jnp.maximum(scale, jnp.linalg.norm(w))
        alphas = alphas.at[j].set(jnp.where(alive, _dot(q, w), alphas[0]))
        for _ in range(2):  # twice is enough (Giraud, Langou, Rozloznik 2005, doi 10.1016/j.camwa.2005.08.009)
            w = w - _dot(_dot(basis, w), basis)
        beta = jnp.linalg.norm(w)
        # Written so that NaN stays alive and shows. A remainder of rounding size that passes does no harm: it is
        # orthogonal to a basis of fewer than `active` vectors, and the nodes it leads to weigh as little.
        alive = alive & (j + 1 < _active(operator)) & ~(beta <= jnp.finfo(dtype).eps * scale)
        betas = betas.at[j].set(jnp.where(alive, beta, 0))
        return basis, alphas, betas, jnp.where(alive, w / jnp.where(alive, beta, 1), 0), alive, scale

    norm = jnp.linalg.norm(start)
    basis, zeros = jnp.zeros((steps, operator.size), dtype), jnp.zeros(steps, dtype)
    state = (basis, zeros, zeros, start / jnp.where(norm == 0, 1, norm), jnp.array(True), jnp.zeros((), dtype))
    _, alphas, betas, _, alive, _ = lax.fori_loop(0, steps, step, state)
    return alphas, betas, ~alive


@sequential_vmap
def _ritz(alphas: Array, betas: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors (columns) of the tridiagonal matrix; NaN where it is not finite.

    One matrix at a time: two independent batches of eigh in one program can wait for each other for ever on the CPU
    (jaxlib 0.10.2: each blocks a worker of the thread pool that its batch is handed to; seen on 2 cores).
    """
    matrix = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    finite = jnp.isfinite(matrix).all()
    values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0))
    return jnp.where(finite, values, jnp.nan), jnp.where(finite, vectors, jnp.nan)


def _xtrace(operator: Operator, key: Key, m: int, batch_size: int | None) -> Array:
    """(m,) trace estimates, each with another probe left out of the range.

    matfree.stochtrace.leave_one_out_xtrace (0.6.3) multiplies all m probes at once, knows no padding, and takes A for
    low-rank where |R_jj| < eps, whatever the scale of A: a float32 Hessian of entries near 1e-11 gets a fraction
    of its trace, with a standard error of about 0. The tests compare with it where it is right.
    """
    products = partial(lax.map, _matvec(operator), batch_size=batch_size)
    probes = _probes(stochtrace.sampler_normal, m, operator, key)  # (m, n): vectors are rows
    y = products(probes)
    q, r = jnp.linalg.qr(y.T)
    q = jax.vmap(partial(_masked, operator))(q.T)  # where y is short of rank, QR may fill up with padding
    z = products(q)

    # Column i of s, in coordinates of q: the direction that the range loses without probe i. An R that is singular to
    # rounding is filled up; the directions that this gives are those in which A is zero.
    pivots = jnp.abs(jnp.diag(r))
    floor = jnp.finfo(r.dtype).eps * jnp.max(pivots)
    fill = jnp.where(pivots <= floor, jnp.where(floor == 0, 1, floor) - jnp.diag(r), 0)
    s = jax.scipy.linalg.solve_triangular(r + jnp.diag(fill), jnp.eye(m, dtype=r.dtype), trans=1)
    s = s / jnp.linalg.norm(s, axis=0, keepdims=True)

    h, w = _dot(q, z.T), _dot(q, probes.T)
    ranges = jnp.trace(h) - jnp.sum(s * _dot(h, s), axis=0)
    x = (w - s * jnp.sum(s * w, axis=0, keepdims=True)).T
    rest, a_rest = probes - _dot(x, q), y - _dot(x, z)  # a probe outside the range of the others, and A times it
    square = jnp.sum(rest**2, axis=1)
    free = jnp.asarray(jnp.maximum(_active(operator) - (m - 1), 0), r.dtype)
    return ranges + free * jnp.sum(rest * a_rest, axis=1) / jnp.where(square == 0, 1, square)


def _mean_and_stderr(sample: Callable[[Key], Array], key: Key, num: int, batch_size: int | None) -> tuple[Array, Array]:
    """Mean of `num` samples and its standard error, updated batch by batch (Chan, Golub, LeVeque 1983, doi
    10.1080/00031305.1983.10483115), so that samples as long as a probe are not all held either."""
    batch = min(batch_size or 1, num)
    keys = jax.random.split(key, num)
    like = jax.eval_shape(sample, keys[0])
    zeros = jnp.zeros(like.shape, like.dtype)

    def add(state: tuple[Array, Array, Array], some: Array) -> tuple[tuple[Array, Array, Array], None]:
        count, mean, squares = state
        values = jax.vmap(sample)(some) if some.shape[0] > 1 else sample(some[0])[None]
        new, total = jnp.mean(values, axis=0), count + some.shape[0]
        within, between = (
            jnp.sum((values - new[None]) ** 2, axis=0),
            (new - mean) ** 2 * (count * some.shape[0] / total),
        )
        return (total, mean + (new - mean) * (some.shape[0] / total), squares + within + between), None

    whole = num // batch * batch
    state, _ = lax.scan(add, (jnp.zeros((), like.dtype), zeros, zeros), keys[:whole].reshape(-1, batch))
    if whole < num:
        state, _ = add(state, keys[whole:])
    _, mean, squares = state
    return mean, jnp.sqrt(squares / (num - 1) / num) if num > 1 else jnp.full_like(mean, jnp.nan)


def _stderr(values: Array) -> Array:
    """Standard error of the mean over the leading axis, with ddof 1 (matfree's has 0)."""
    m = values.shape[0]
    return jnp.std(values, axis=0, ddof=1) / math.sqrt(m) if m > 1 else jnp.full_like(values[0], jnp.nan)


def _estimate(operator: Operator, value: Array, stderr: Array, products: int, residual: Any = None) -> Estimate:
    residual = jnp.zeros_like(value) if residual is None else residual
    return Estimate(value=value, stderr=stderr, residual=residual, ledger=operator.matvec_cost * products)


def _dtype(operator: Operator) -> Any:
    """In which to compute, at least float32. Refuses an operator that is empty or not real floating-point."""
    if not jnp.issubdtype(operator.dtype, jnp.floating) or operator.size < 1:
        raise ValueError(
            "expected an operator of a real floating-point dtype and a size of at least 1; got "
            f"{jnp.dtype(operator.dtype)} and {operator.size}"
        )
    return operator.dtype if jnp.finfo(operator.dtype).bits >= 32 else jnp.float32


def _matvec(operator: Operator) -> Callable[[Array], Array]:
    dtype = _dtype(operator)
    return lambda x: operator.matvec(x.astype(operator.dtype)).astype(dtype)


def _active(operator: Operator) -> int | Array:
    return operator.size if operator.active is None else operator.active


def _masked(operator: Operator, x: Array) -> Array:
    """(n,) with zeros in the padding."""
    return x if operator.active is None else jnp.where(jnp.arange(operator.size) < operator.active, x, 0)


def _probes(sampler: Callable, num: int, operator: Operator, key: Key) -> Array:
    """(num, n), zero in the padding."""
    like = jnp.zeros(operator.size, _dtype(operator))
    return jax.vmap(partial(_masked, operator))(sampler(like, num=num)(key))


def _signs(operator: Operator, key: Key) -> Array:
    return _probes(stochtrace.sampler_signs, 1, operator, key)[0]


def _check_at_least(minimum: int, **knobs: int | None) -> None:
    for name, value in knobs.items():
        if value is None and name == "batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be an int of at least {minimum}; got {value!r}")
