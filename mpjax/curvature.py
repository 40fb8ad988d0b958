"""Exact second-order products and log-determinants of a loss with respect to blocks of its parameters.

Everything takes a plain `loss(params) -> scalar`, or `function(params) -> outputs`, with the data already
closed over. A Hessian is reached by forward-over-reverse products (Pearlmutter 1994, doi
10.1162/neco.1994.6.1.147), a Gauss-Newton matrix JᵀHJ by J and its transpose (Schraudolph 2002, doi
10.1162/08997660260028683). Nothing is jitted here: wrap what you call in `jax.jit`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial
from jaxtyping import Float, Int

from mpjax.partition import Block, Params, Partition, paths, replace, select

Loss: TypeAlias = Callable[[Params], Array]
Outputs: TypeAlias = Any  # a pytree of floating-point arrays
LossHessianVp: TypeAlias = Callable[[Outputs, Outputs], Outputs]  # (outputs, tangent) -> H · tangent
Unravel: TypeAlias = Callable[[Array], dict[str, Array]]


@partial(jax.tree_util.register_dataclass, data_fields=["matvec"], meta_fields=["size", "dtype"])
@dataclass(frozen=True, kw_only=True)
class Operator:
    """A symmetric n × n matrix, known only by its product with a vector.

    A pytree when `matvec` is one (`jax.tree_util.Partial`; the operators made here are), so that it can be an
    argument of a jitted function instead of a constant of it.

    Attributes:
        matvec: (n,) -> (n,), of `dtype`.
        size: n.
        dtype: of the vectors.
    """

    matvec: Callable[[Float[Array, " n"]], Float[Array, " n"]]
    size: int
    dtype: Any


@partial(jax.tree_util.register_dataclass, data_fields=["sign", "logabsdet", "num_negative"], meta_fields=["size"])
@dataclass(frozen=True, kw_only=True)
class LogDet:
    """log |det A| of a symmetric n × n matrix A, natural logarithm.

    Attributes:
        sign: of the determinant, -1, 0 or 1; NaN where A is not finite.
        logabsdet: log |det A|; -inf where A is singular, NaN where A is not finite.
        num_negative: number of negative eigenvalues; -1 where A is not finite.
        size: n.
    """

    sign: Float[Array, ""]
    logabsdet: Float[Array, ""]
    num_negative: Int[Array, ""]
    size: int


def hvp(loss: Loss, params: Params, vector: Params) -> Params:
    """Hessian of `loss` times `vector`, forward over reverse; about two gradients of work.

    Args:
        loss: params -> scalar.
        params: pytree of floating-point arrays.
        vector: pytree with the structure, shapes and dtypes of `params`.

    Raises:
        ValueError: a non-scalar loss, an empty or integer tree, a vector that does not match the parameters.
    """
    _check_floating(params, "params")
    _check_matches(vector, params)
    return jax.jvp(jax.grad(_scalar(loss)), (params,), (vector,))[1]


def ggn_vp(
    function: Callable[[Params], Outputs],
    params: Params,
    vector: Params,
    *,
    loss_hessian_vp: LossHessianVp | None = None,
) -> Params:
    """Gauss-Newton product JᵀHJ · vector; J is the Jacobian of `function` at `params`.

    Args:
        function: params -> outputs, a pytree of floating-point arrays.
        params: pytree of floating-point arrays.
        vector: pytree with the structure, shapes and dtypes of `params`.
        loss_hessian_vp: (outputs, tangent) -> H · tangent, H the Hessian of the loss with respect to the
            outputs. None is ½‖·‖², whose H is the identity: JᵀJ, the Hessian of the output loss.

    Raises:
        ValueError: an empty or integer tree (parameters or outputs), a vector that does not match.
    """
    _check_floating(params, "params")
    _check_matches(vector, params)
    outputs, jvp = jax.linearize(_floating(function), params)
    return _gauss_newton(loss_hessian_vp, jvp, outputs, vector)


def block_hessian(loss: Loss, params: Params, block: Block) -> Operator:
    """Hessian of `loss` with respect to one block, all other parameters held fixed; linearised once.

    A vector is the block's leaves in the order of `block.paths`, each flattened in row-major order.

    Raises:
        ValueError: a non-scalar loss, an unknown path, a block that is integer or has no elements.
    """
    flat, unravel = _flat_block(params, block)

    def restricted(x: Array) -> Array:
        return loss(replace(params, unravel(x)))

    _, matvec = jax.linearize(jax.grad(_scalar(restricted)), flat)
    return Operator(matvec=matvec, size=flat.size, dtype=flat.dtype)


def block_ggn(
    function: Callable[[Params], Outputs],
    params: Params,
    block: Block,
    *,
    loss_hessian_vp: LossHessianVp | None = None,
) -> Operator:
    """Gauss-Newton matrix JᵀHJ of one block, all other parameters held fixed; linearised once.

    Arguments as in `ggn_vp`, vectors and errors as in `block_hessian`.
    """
    flat, unravel = _flat_block(params, block)

    def restricted(x: Array) -> Outputs:
        return function(replace(params, unravel(x)))

    outputs, jvp = jax.linearize(_floating(restricted), flat)
    matvec = Partial(partial(_gauss_newton, loss_hessian_vp), jvp, outputs)
    return Operator(matvec=matvec, size=flat.size, dtype=flat.dtype)


def dense(operator: Operator, *, batch_size: int | None = None, max_bytes: int = 2**31) -> Float[Array, "n n"]:
    """The operator as a matrix, from n products with identity columns. Returned as is, not symmetrised.

    Args:
        operator: of size n.
        batch_size: columns at a time; memory grows with it. None takes all n at once.
        max_bytes: largest matrix to build.

    Raises:
        ValueError: the matrix exceeds `max_bytes`, or batch_size is not positive.
    """
    n, item = operator.size, jnp.dtype(operator.dtype).itemsize
    _check_batch_size(batch_size)
    if n * n * item > max_bytes:
        raise ValueError(
            f"a dense {n} x {n} matrix of {jnp.dtype(operator.dtype)} takes {n * n * item:,} bytes, over "
            f"max_bytes={max_bytes:,}; take a smaller block, output_grams, or a stochastic estimate"
        )

    def column(i: Array) -> Array:
        return operator.matvec(jax.nn.one_hot(i, n, dtype=operator.dtype))

    return lax.map(column, jnp.arange(n), batch_size=n if batch_size is None else min(batch_size, n)).T


def eigenvalues(matrix: Float[Array, "n n"]) -> Float[Array, " n"]:
    """Eigenvalues of a symmetric matrix in ascending order (of its symmetric part, `eigh`).

    A matrix that is not finite gives NaN. So does one that is not symmetric, where it is traced and cannot be
    refused; symmetric means max |A - Aᵀ| ≤ 10 √eps max |A| (0.35 % in float32, 1.5e-7 in float64).

    Raises:
        ValueError: not square, empty, not floating, or not symmetric (outside a trace).
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"expected a square matrix (n, n) with n > 0; got shape {matrix.shape}")
    _check_floating(matrix, "matrix")
    if jnp.finfo(matrix.dtype).bits < 32:
        matrix = matrix.astype(jnp.float32)
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


def logdet(matrix: Float[Array, "n n"], *, damping: float | Array) -> LogDet:
    """Exact log |det(H + damping · I)| of a symmetric, possibly indefinite matrix, by its eigenvalues.

    Not to be confused with Σ log(|λ| + damping), which is another number where H is indefinite.

    Args:
        matrix: H, (n, n). A matrix that is not finite gives NaN.
        damping: ≥ 0, in the unit of H.

    Raises:
        ValueError: as `eigenvalues`, or a damping that is negative or not finite.
    """
    _check_damping(damping, positive=False)
    values = eigenvalues(matrix)
    values = values + jnp.asarray(damping, values.dtype)
    return LogDet(
        sign=jnp.prod(jnp.sign(values)),
        logabsdet=jnp.sum(jnp.log(jnp.abs(values))),
        num_negative=jnp.where(jnp.isnan(values).any(), -1, jnp.sum(values < 0)),
        size=matrix.shape[0],
    )


def logdet_score(eigenvalues: Float[Array, " n"], *, damping: float | Array) -> Float[Array, ""]:
    """Σ log(1 + λ/ε) = log det(εI + A) - n log ε of a positive semi-definite A, without unit.

    Eigenvalues 0 add nothing, so the score of JᵀJ (d × d) is that of JJᵀ (k × k), whatever the sizes: the
    Weinstein-Aronszajn identity. Eigenvalues that are negative only by rounding count as 0; a matrix that is
    really indefinite gives NaN (`logdet` is for those).

    Args:
        eigenvalues: (n,) of A, in any order.
        damping: ε > 0, in the unit of A.

    Raises:
        ValueError: eigenvalues that are not a vector of floats, a damping that is not positive and finite.
    """
    _check_damping(damping, positive=True)
    if eigenvalues.ndim != 1 or eigenvalues.size == 0:
        raise ValueError(f"expected eigenvalues (n,) with n > 0; got shape {eigenvalues.shape}")
    _check_floating(eigenvalues, "eigenvalues")
    rounding = 10 * eigenvalues.size * jnp.finfo(eigenvalues.dtype).eps * jnp.abs(eigenvalues).max()
    clipped = jnp.where(eigenvalues < -rounding, jnp.nan, jnp.maximum(eigenvalues, 0))
    return jnp.sum(jnp.log1p(clipped / jnp.asarray(damping, eigenvalues.dtype)))


def output_grams(
    function: Callable[[Params], Outputs],
    params: Params,
    partition: Partition,
    *,
    batch_size: int | None = None,
    max_bytes: int = 2**31,
) -> dict[str, Float[Array, "k k"]]:
    """Exact JᵢJᵢᵀ of every block, from vector-Jacobian products with the k basis vectors of the outputs.

    Jᵢ is (k, dᵢ): k all outputs (samples × outputs per sample), dᵢ the block's parameters. JᵢJᵢᵀ and JᵢᵀJᵢ
    have the same non-zero eigenvalues, and det(εI_d + JᵢᵀJᵢ) = ε^(d-k) det(εI_k + JᵢJᵢᵀ) (Weinstein-Aronszajn
    identity; Harville 1997, theorem 18.1.1, doi 10.1007/b98818): a block of any size for k backward passes.

    Memory: rows of J are held for as many blocks as fit in `max_bytes`; where not all fit, the blocks are
    taken in groups in their order, and each group repeats the k backward passes and is compiled by itself.
    Beside the rows there are the k × k results and `batch_size` backward passes at a time. The bound holds
    under `jax.jit` too.

    Args:
        function: params -> outputs, a pytree of floating-point arrays of k elements together.
        params: pytree; the partition's leaves are floating-point, the others are held fixed.
        partition: blocks with distinct names.
        batch_size: backward passes at a time. None takes all k at once.
        max_bytes: largest k × d set of rows to hold.

    Returns:
        Block name -> (k, k), float64 where the block's parameters are, else float32.

    Raises:
        ValueError: one block alone exceeds `max_bytes`, an empty partition or equal names, an unknown path,
            integer parameters or outputs, a batch_size that is not positive.
    """
    _check_batch_size(batch_size)
    names = [block.name for block in partition]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected at least one block, all with distinct names; got {names}")
    values = {block.name: _checked_block(params, block) for block in partition}

    shapes = jax.eval_shape(_floating(function), params)
    k = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    groups = _groups(values, k, max_bytes)

    def add_group(group: list[str], grams: dict[str, Array]) -> dict[str, Array]:
        leaves = {path: leaf for name in group for path, leaf in values[name].items()}
        rows = _jacobian_rows(function, params, leaves, k, batch_size)
        return grams | {name: _gram([rows[path] for path in values[name]])[:k, :k] for name in group}

    # A scan, because XLA computes the rows of all groups before the first product where nothing forbids it
    # (seen on the CPU, and an optimisation barrier does not forbid it there).
    branches = [partial(add_group, group) for group in groups]
    empty = {name: jnp.zeros((k, k), _gram_dtype(list(leaves.values()))) for name, leaves in values.items()}
    grams, _ = lax.scan(lambda g, i: (lax.switch(i, branches, g), None), empty, jnp.arange(len(groups)))
    return grams


def _groups(values: dict[str, dict[str, Array]], k: int, max_bytes: int) -> list[list[str]]:
    """Consecutive blocks whose rows fit in max_bytes together."""
    groups: list[list[str]] = []
    held = 0
    for name, leaves in values.items():
        need = k * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
        if need > max_bytes:
            raise ValueError(
                f"block {name!r} needs {need:,} bytes for its {k} rows of J ({need // k:,} bytes each), over "
                f"max_bytes={max_bytes:,}; use fewer samples or outputs, split the block, or raise max_bytes"
            )
        if not groups or held + need > max_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += need
    return groups


def _jacobian_rows(
    function: Callable[[Params], Outputs],
    params: Params,
    leaves: dict[str, Array],
    k: int,
    batch_size: int | None,
) -> dict[str, Array]:
    """Path -> (K, *leaf shape) rows of J; K is k rounded up to whole batches, the rows past k are zero."""
    outputs, vjp = jax.vjp(lambda x: function(replace(params, x)), leaves)
    batch = k if batch_size is None else min(batch_size, k)

    def row(i: Array) -> dict[str, Array]:
        cotangents, start = [], 0
        for leaf in jax.tree.leaves(outputs):
            # All zero where i - start lies outside the leaf: in another leaf, or past k.
            cotangents.append(jax.nn.one_hot(i - start, leaf.size, dtype=leaf.dtype).reshape(leaf.shape))
            start += leaf.size
        return vjp(jax.tree.unflatten(jax.tree.structure(outputs), cotangents))[0]

    return lax.map(row, jnp.arange(-(-k // batch) * batch), batch_size=batch)


def _gram(rows: list[Array]) -> Array:
    """Leaves (K, *shape) of one block -> (K, K), accumulated in at least float32."""
    matrices = [leaf.reshape(leaf.shape[0], -1) for leaf in rows]
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=_gram_dtype(rows))
    return jnp.sum(jnp.stack([product(m, m.T) for m in matrices]), axis=0)


def _gram_dtype(leaves: list[Array]) -> Any:
    return jnp.float64 if any(leaf.dtype.itemsize == 8 for leaf in leaves) else jnp.float32


def _gauss_newton(loss_hessian_vp: LossHessianVp | None, jvp: Callable, outputs: Outputs, vector: Params) -> Params:
    tangent = jvp(vector)
    if loss_hessian_vp is not None:
        tangent = loss_hessian_vp(outputs, tangent)
    return jax.linear_transpose(jvp, vector)(tangent)[0]


def _flat_block(params: Params, block: Block) -> tuple[Array, Unravel]:
    """A block's leaves as one vector of their widest dtype, and the way back."""
    leaves = _checked_block(params, block)
    dtype = max((leaf.dtype for leaf in leaves.values()), key=lambda d: d.itemsize)
    flat = jnp.concatenate([leaf.ravel().astype(dtype) for leaf in leaves.values()])

    def unravel(x: Array) -> dict[str, Array]:
        parts, start = {}, 0
        for path, leaf in leaves.items():
            parts[path] = x[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype)
            start += leaf.size
        return parts

    return flat, unravel


def _checked_block(params: Params, block: Block) -> dict[str, Array]:
    leaves = select(params, block)
    _check_floating(leaves, f"block {block.name!r}")
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    if sum(leaf.size for leaf in leaves.values()) == 0:
        raise ValueError(f"block {block.name!r} has no elements: {block.paths}")
    return leaves


def _scalar(loss: Loss) -> Loss:
    """The loss, refused as soon as it is traced where it is not a floating-point scalar."""

    def checked(params: Params) -> Array:
        value = loss(params)
        shape = jax.tree.map(jnp.shape, value)
        if shape != ():
            raise ValueError(f"loss must return one scalar, without aux (take the mean or sum); got {shape}")
        _check_floating(value, "the loss")
        return jnp.asarray(value)

    return checked


def _floating(function: Callable[[Params], Outputs]) -> Callable[[Params], Outputs]:
    """The function, refused as soon as it is traced where its outputs are not floating-point arrays."""

    def checked(params: Params) -> Outputs:
        outputs = function(params)
        _check_floating(outputs, "the outputs")
        return outputs

    return checked


def _check_floating(tree: Any, what: str) -> None:
    if not jax.tree.leaves(tree):
        raise ValueError(f"{what}: expected a pytree of floating-point arrays, got one without leaves: {tree!r}")
    for name, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{what}: expected floating-point arrays, but {name!r} is {jnp.result_type(leaf)}; "
                "cast it, or close over it"
            )


def _check_matches(vector: Params, params: Params) -> None:
    got: Any = jax.tree.structure(vector)
    expected: Any = jax.tree.structure(params)
    if got != expected:
        raise ValueError(f"vector must have the structure of params, {expected}; got {got}")
    for name, v, p in zip(paths(params), jax.tree.leaves(vector), jax.tree.leaves(params), strict=True):
        got, expected = (jnp.shape(v), jnp.result_type(v)), (jnp.shape(p), jnp.result_type(p))
        if got != expected:
            raise ValueError(f"vector at {name!r} must have shape and dtype {expected}; got {got}")


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None for all at once; got {batch_size}")


def _check_damping(damping: float | Array, *, positive: bool) -> None:
    if isinstance(damping, jax.core.Tracer):
        return
    if jnp.ndim(damping) != 0 or not math.isfinite(damping) or damping < 0 or (positive and damping == 0):
        raise ValueError(f"damping must be a finite scalar {'> 0' if positive else '>= 0'}; got {damping}")
