"""Exact second-order products of a loss with respect to blocks of its parameters.

All functions take a plain `loss(params) -> scalar`, or `function(params) -> outputs`, with the data closed over. Hessians by
forward-over-reverse products (Pearlmutter 1994, doi 10.1162/neco.1994.6.1.147), Gauss-Newton matrices JᵀHJ by J and its
transpose (Schraudolph 2002, doi 10.1162/08997660260028683). Nothing is jitted here: wrap what you call in `jax.jit`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial
from jaxtyping import Float, Int

from mpjax.ledger import Ledger
from mpjax.partition import Block, Params, paths, replace, select

Loss: TypeAlias = Callable[[Params], Array]
Outputs: TypeAlias = Any  # a pytree of floating-point arrays
LossHessianVp: TypeAlias = Callable[[Outputs, Outputs], Outputs]  # (outputs, tangent) -> H · tangent


@partial(
    jax.tree_util.register_dataclass, data_fields=["matvec", "active"], meta_fields=["size", "dtype", "matvec_cost"]
)
@dataclass(frozen=True, kw_only=True)
class Operator:
    """A symmetric n × n matrix, known only by its product with a vector.

    A pytree when `matvec` is one (`jax.tree_util.Partial`; the operators made here are), so that it can be an argument of a
    jitted function instead of a constant of it.

    Attributes:
        matvec: (n,) -> (n,), of `dtype`.
        size: n.
        dtype: of the vectors.
        matvec_cost: passes of one product.
        active: number of leading coordinates that are not padding; None: all. A padded operator (blocks of different sizes
            that share one program) is estimated as its leading `active` × `active` matrix.
    """

    matvec: Callable[[Float[Array, " n"]], Float[Array, " n"]]
    size: int
    dtype: Any
    matvec_cost: Ledger = Ledger(hvp=1)
    active: Int[Array, ""] | None = None


def hvp(loss: Loss, params: Params, vector: Params) -> Params:
    """Hessian of `loss` times `vector`, forward over reverse; about two gradients of work.

    Args:
        loss: params -> scalar.
        params: pytree of floating-point arrays.
        vector: pytree with the structure, shapes and dtypes of `params`.

    Raises:
        ValueError: a non-scalar loss, an empty or integer tree, a vector that does not match the parameters.
    """
    _check_pair(params, vector)
    return jax.jvp(jax.grad(_checked(loss, scalar=True)), (params,), (vector,))[1]


def block_hessian(loss: Loss, params: Params, block: Block) -> Operator:
    """Hessian of `loss` with respect to one block, all other parameters held fixed; linearised once.

    A vector is the block's leaves in the order of `block.paths`, each flattened in row-major order.

    Raises:
        ValueError: a non-scalar loss, an unknown path, a block that is integer or has no elements.
    """
    flat, restricted = _restricted(loss, params, block)
    _, matvec = jax.linearize(jax.grad(_checked(restricted, scalar=True)), flat)
    return Operator(matvec=matvec, size=flat.size, dtype=flat.dtype)


def block_ggn(
    function: Callable[[Params], Outputs],
    params: Params,
    block: Block,
    *,
    loss_hessian_vp: LossHessianVp | None = None,
) -> Operator:
    """Gauss-Newton matrix JᵀHJ of one block, all other parameters held fixed; linearised once.

    Vectors and errors as in `block_hessian`.

    Args:
        function: params -> outputs, a pytree of floating-point arrays; J is its Jacobian.
        loss_hessian_vp: (outputs, tangent) -> H · tangent, H the Hessian of the loss with respect to the outputs. None: the
            identity, for JᵀJ, the Hessian of the output loss ½‖·‖².
    """
    flat, restricted = _restricted(function, params, block)
    outputs, jvp = jax.linearize(_checked(restricted, scalar=False), flat)
    matvec = Partial(partial(_gauss_newton, loss_hessian_vp), jvp, outputs)
    return Operator(matvec=matvec, size=flat.size, dtype=flat.dtype, matvec_cost=Ledger(jvp=1, vjp=1))


def dense(operator: Operator, *, batch_size: int | None = None, max_bytes: int = 2**31) -> Float[Array, "n n"]:
    """The operator as a matrix, from n products with identity columns. Returned as is, not symmetrised.

    Args:
        operator: of size n.
        batch_size: columns at a time; memory grows with it. None takes all n at once.
        max_bytes: largest matrix to build.

    Raises:
        ValueError: the matrix exceeds `max_bytes`, or batch_size is not positive.
    """
    n, dtype = operator.size, jnp.dtype(operator.dtype)
    check_batch_size(batch_size)
    if n * n * dtype.itemsize > max_bytes:
        raise ValueError(
            f"a dense {n} x {n} matrix of {dtype} takes {n * n * dtype.itemsize:,} bytes, over max_bytes={max_bytes:,}; "
            "take a smaller block, grams.output_grams, or a stochastic estimate"
        )

    def column(i: Array) -> Array:
        return operator.matvec(jax.nn.one_hot(i, n, dtype=operator.dtype))

    return lax.map(column, jnp.arange(n), batch_size=min(batch_size or n, n)).T


def eigenvalues(matrix: Float[Array, "n n"]) -> Float[Array, " n"]:
    """Eigenvalues of a symmetric matrix in ascending order (of its symmetric part).

    A matrix that is not finite gives NaN. So does one that is not symmetric, where it is traced and cannot be refused;
    symmetric means max |A - Aᵀ| ≤ 10 √eps max |A| (0.35 % in float32, 1.5e-7 in float64).

    Raises:
        ValueError: not square, empty, not floating, or not symmetric (outside a trace).
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"expected a square matrix (n, n) with n > 0; got shape {matrix.shape}")
    check_floating(matrix, "matrix")
    matrix = matrix.astype(wide(matrix.dtype))
    tolerance = 10 * float(jnp.finfo(matrix.dtype).eps) ** 0.5
    finite = jnp.isfinite(matrix).all()
    asymmetry, scale = jnp.abs(matrix - matrix.T).max(), jnp.abs(matrix).max()
    good = finite & (asymmetry <= tolerance * scale)
    if not isinstance(good, jax.core.Tracer) and finite and not good:
        raise ValueError(
            f"expected a symmetric matrix; max |A - Aᵀ| is {float(asymmetry):.3g} where max |A| is "
            f"{float(scale):.3g} (allowed: {tolerance:.1g} of it)"
        )
    values = jnp.linalg.eigvalsh(jnp.where(good, (matrix + matrix.T) / 2, 0))
    return jnp.where(good, values, jnp.nan)


def _gauss_newton(loss_hessian_vp: LossHessianVp | None, jvp: Callable, outputs: Outputs, vector: Params) -> Params:
    tangent = jvp(vector)
    if loss_hessian_vp is not None:
        tangent = loss_hessian_vp(outputs, tangent)
    return jax.linear_transpose(jvp, vector)(tangent)[0]


def _restricted(
    function: Callable[[Params], Any], params: Params, block: Block
) -> tuple[Array, Callable[[Array], Any]]:
    """A block's leaves as one vector of their widest dtype, and the function of that vector."""
    leaves = checked_block(params, block)
    dtype = max((leaf.dtype for leaf in leaves.values()), key=lambda d: d.itemsize)
    flat = jnp.concatenate([leaf.ravel().astype(dtype) for leaf in leaves.values()])
    return flat, lambda x: function(replace(params, unravel(x, leaves)))


def unravel(x: Array, leaves: Mapping[str, Array]) -> dict[str, Array]:
    """The front of a vector as values of the leaves' shapes and dtypes, by path, in their order."""
    values, start = {}, 0
    for path, leaf in leaves.items():
        values[path] = x[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype)
        start += leaf.size
    return values


def checked_block(params: Params, block: Block) -> dict[str, Array]:
    """The leaves of a block by path, as arrays.

    Raises:
        ValueError: a leaf that is not floating-point, or no elements.
    """
    leaves = select(params, block)
    check_floating(leaves, f"block {block.name!r}")
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    if sum(leaf.size for leaf in leaves.values()) == 0:
        raise ValueError(f"block {block.name!r} has no elements: {block.paths}")
    return leaves


def _checked(function: Callable[[Params], Outputs], *, scalar: bool) -> Callable[[Params], Outputs]:
    """The function, refused when it is traced if its outputs are not floating-point arrays, or one scalar."""

    def checked(params: Params) -> Outputs:
        outputs = function(params)
        shape = jax.tree.map(jnp.shape, outputs)
        if scalar and shape != ():
            raise ValueError(f"loss must return one scalar, without aux (take the mean or sum); got {shape}")
        check_floating(outputs, "the loss" if scalar else "the outputs")
        return outputs

    return checked


def check_floating(tree: Any, subject: str) -> None:
    """Refuse a pytree without leaves, or with a leaf that is not floating-point; `subject` names it in the message."""
    if not jax.tree.leaves(tree):
        raise ValueError(f"{subject}: expected a pytree of floating-point arrays, got one without leaves: {tree!r}")
    for name, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{subject}: expected floating-point arrays, but {name!r} is {jnp.result_type(leaf)}; "
                "cast it, or close over it"
            )


def _check_pair(params: Params, vector: Params) -> None:
    """Refuse parameters that are not floating-point, and a vector that does not match them."""
    check_floating(params, "params")
    got: Any = jax.tree.structure(vector)
    expected: Any = jax.tree.structure(params)
    if got != expected:
        raise ValueError(f"vector must have the structure of params, {expected}; got {got}")
    for name, v, p in zip(paths(params), jax.tree.leaves(vector), jax.tree.leaves(params), strict=True):
        got, expected = (jnp.shape(v), jnp.result_type(v)), (jnp.shape(p), jnp.result_type(p))
        if got != expected:
            raise ValueError(f"vector at {name!r} must have shape and dtype {expected}; got {got}")


def wide(dtype: Any) -> Any:
    """The floating-point dtype, at least float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def check_batch_size(batch_size: int | None) -> None:
    """Refuse a batch size below 1."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None for all at once; got {batch_size}")


def check_damping(damping: float | Array) -> None:
    """Refuse a damping that is no positive finite scalar; one that is traced passes."""
    if jnp.ndim(damping) != 0:
        raise ValueError(f"damping must be a scalar; got shape {jnp.shape(damping)}")
    if isinstance(damping, jax.core.Tracer):
        return
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping must be a finite scalar > 0; got {damping}")
