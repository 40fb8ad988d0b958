"""Exact Gram matrices J Jᵀ of the outputs with respect to blocks of the parameters, and their log-determinants.

J is the k × d Jacobian of k outputs with respect to the d parameters of a block. J Jᵀ (k × k) and JᵀJ (d × d, the Gauss-Newton
matrix) have the same non-zero eigenvalues, and det(εI_d + JᵀJ) = ε^(d-k) det(εI_k + J Jᵀ): the Weinstein-Aronszajn identity
(Harville 1997, theorem 18.1.1, doi 10.1007/b98818). So the spectrum of a block of any size is exact after k backward passes.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from mpjax.curvature.operators import Outputs, check_batch_size, check_damping, check_floating, checked_block, unravel
from mpjax.partition import Params, Partition, replace, select_all

Floats = np.ndarray  # float64


def output_grams(
    function: Callable[..., Outputs],
    params: Params,
    partition: Partition,
    *batch: Array,
    batch_size: int | None = 8,
    max_bytes: int = 2**31,
    jit: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.jit,
) -> dict[str, Float[Array, "k k"]]:
    """Exact JᵢJᵢᵀ of every block, from vector-Jacobian products with the basis vectors of the outputs.

    Without `batch`, `function(params)` gives all k outputs, and each of the k backward passes runs all of them. With a batch of
    N examples, `function(params, *example)` gives the m outputs of one example, and each of the k = N m backward passes runs
    one example only. Rows and columns are then example-major: row n m + j is output j of example n.

    Not to be called inside `jax.jit`: it compiles one program per group of consecutive blocks whose rows of J fit in
    `max_bytes` together, and runs them one after the other. A group's backward passes go back to its first layer only, so a
    partition in execution order is cheapest.

    Memory of a program: rows of J (`max_bytes`, up to `batch_size` rows per example more), the parameters and the batch, the
    k × k results of the group, and one example's activations with `batch_size` backward passes.

    Args:
        function: params and one example -> outputs, a pytree of floating-point arrays of m elements together.
        params: pytree; the partition's leaves are floating-point, the others are held fixed.
        partition: blocks with distinct names.
        *batch: arrays (N, …), equal N.
        batch_size: backward passes of one example together; the activations are shared. None takes all m at once.
        max_bytes: largest k × d set of rows to hold.
        jit: what compiles a program; one of the caller's own may time it, or read its memory analysis.

    Returns:
        Block name -> (k, k), float64 where the block's parameters are, else float32.

    Raises:
        ValueError: one block alone exceeds `max_bytes`, an empty partition or equal names, an unknown path, integer parameters
            or outputs, no outputs, a batch_size that is not positive, arrays without one leading axis N ≥ 1.
    """
    check_batch_size(batch_size)
    names = [block.name for block in partition]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected at least one block, all with distinct names; got {names}")
    shapes = [jnp.shape(array) for array in batch]
    if batch and (len({shape[:1] for shape in shapes}) != 1 or shapes[0][:1] in ((), (0,))):
        raise ValueError(f"expected arrays (N, ...) of one N >= 1; got shapes {shapes}")
    bytes_per_row = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in checked_block(params, block).values()) for block in partition
    ]
    example = [jax.ShapeDtypeStruct(jnp.shape(array)[1:], jnp.result_type(array)) for array in batch]
    outputs = jax.eval_shape(function, params, *example)
    check_floating(outputs, "the outputs")
    m = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(outputs))
    if m == 0:
        raise ValueError(f"the outputs have no elements: {outputs}")
    k = m * (shapes[0][0] if batch else 1)

    grams: dict[str, Array] = {}
    for group in _groups(partition, bytes_per_row, k, max_bytes):
        program = jit(partial(_group_grams, function, group, m, _chunk(m, batch_size)))
        grams |= jax.block_until_ready(program(params, *batch))  # else two programs could hold their rows at once
    return {name: grams[name] for name in names}


def spectra(grams: Mapping[str, Array]) -> dict[str, Floats]:
    """Eigenvalues (k,) of positive semi-definite Gram matrices (k, k), float64, ascending.

    Negative ones, which are rounding, count as 0. A matrix that is not finite gives NaN.
    """

    def eigenvalues(matrix: Floats) -> Floats:
        if not np.isfinite(matrix).all():
            return np.full(len(matrix), np.nan)
        return np.linalg.eigvalsh((matrix + matrix.T) / 2).clip(min=0.0)

    return {name: eigenvalues(np.asarray(gram, np.float64)) for name, gram in grams.items()}


def logdet_score(eigenvalues: Floats, *, damping: float) -> float:
    """Σ log(1 + λ/ε) = log det(εI + A) - n log ε of a positive semi-definite A, without unit; in float64.

    Eigenvalues 0 add nothing, so the score of JᵀJ (d × d) is that of J Jᵀ (k × k), whatever the sizes, and
    log det(εI_d + JᵀJ) is the score + d log ε. Eigenvalues that are negative only by rounding count as 0; a matrix
    that is really indefinite gives NaN.

    Args:
        eigenvalues: (n,) of A, in any order.
        damping: ε > 0, in the unit of A.

    Raises:
        ValueError: eigenvalues that are not a vector of floats, a damping that is not positive and finite.
    """
    check_damping(damping)
    if np.ndim(eigenvalues) != 1 or np.size(eigenvalues) == 0:
        raise ValueError(f"expected eigenvalues (n,) with n > 0; got shape {np.shape(eigenvalues)}")
    check_floating(eigenvalues, "eigenvalues")
    rounding = 10 * np.size(eigenvalues) * float(jnp.finfo(jnp.result_type(eigenvalues)).eps)
    values = np.asarray(eigenvalues, np.float64)
    values = np.where(values < -rounding * np.abs(values).max(), np.nan, np.maximum(values, 0.0))
    return float(np.sum(np.log1p(values / damping)))


def _chunk(m: int, batch_size: int | None) -> int:
    """Backward passes of one example together: a divisor of m near batch_size, else what pads m least."""
    most = m if batch_size is None else min(batch_size, m)
    balanced = -(-m // -(-m // most))
    return next((size for size in range(most, most // 2, -1) if m % size == 0), balanced)


def _groups(partition: Partition, bytes_per_row: list[int], k: int, max_bytes: int) -> list[Partition]:
    """Consecutive blocks whose k rows fit in max_bytes together."""
    groups: list[Partition] = []
    total = 0
    for block, row in zip(partition, bytes_per_row, strict=True):
        if k * row > max_bytes:
            raise ValueError(
                f"block {block.name!r} needs {k * row:,} bytes for its {k} rows of J ({row:,} bytes each), over "
                f"max_bytes={max_bytes:,}; use fewer samples or outputs, split the block, or raise max_bytes"
            )
        total += k * row
        if not groups or total > max_bytes:
            groups.append(())
            total = k * row
        groups[-1] += (block,)
    return groups


def _group_grams(
    function: Callable[..., Outputs], group: Partition, m: int, chunk: int, params: Params, *batch: Array
) -> dict[str, Array]:
    """Block name -> (N m, N m), accumulated in at least float32."""
    rows = _rows(function, group, m, chunk, params, batch)

    def gram(leaves: list[Array]) -> Array:
        dtype = jnp.float64 if any(leaf.dtype.itemsize == 8 for leaf in leaves) else jnp.float32
        product = partial(jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)
        examples, padded = leaves[0].shape[:2]
        matrices = [leaf.reshape(examples * padded, -1) for leaf in leaves]
        total = sum((product(j, j.T) for j in matrices[1:]), start=product(matrices[0], matrices[0].T))
        square = total.reshape(examples, padded, examples, padded)[:, :m, :, :m]
        return square.reshape(examples * m, examples * m)

    return {block.name: gram([rows[path] for path in block.paths]) for block in group}


def _rows(
    function: Callable[..., Outputs], group: Partition, m: int, chunk: int, params: Params, batch: tuple[Array, ...]
) -> dict[str, Array]:
    """Path -> (N, M, *leaf shape) rows of J; M is m rounded up to whole chunks, the rows past m are zero."""
    leaves = {path: jnp.asarray(leaf) for path, leaf in select_all(params, group).items()}
    examples, padded = (batch[0].shape[0] if batch else 1), -(-m // chunk) * chunk

    def add_example(n: Array, rows: dict[str, Array]) -> dict[str, Array]:
        example = [lax.dynamic_index_in_dim(array, n, keepdims=False) for array in batch]
        outputs, vjp = jax.vjp(lambda x: function(replace(params, x), *example), leaves)
        parts, structure = jax.tree.flatten(outputs)
        like = {str(number): part for number, part in enumerate(parts)}

        def row(i: Array) -> dict[str, Array]:
            basis = unravel(jax.nn.one_hot(i, m), like)  # all zero past m
            return vjp(jax.tree.unflatten(structure, list(basis.values())))[0]

        def add_chunk(c: Array, rows: dict[str, Array]) -> dict[str, Array]:
            new = jax.vmap(row)(c * chunk + jnp.arange(chunk))
            # In place, in one buffer per leaf: stacking by lax.map holds the rows of an example twice.
            return {
                path: lax.dynamic_update_slice(whole, new[path][None], (n, c * chunk, *[0] * leaves[path].ndim))
                for path, whole in rows.items()
            }

        return lax.fori_loop(0, padded // chunk, add_chunk, rows)

    rows = {path: jnp.zeros((examples, padded, *leaf.shape), leaf.dtype) for path, leaf in leaves.items()}
    return lax.fori_loop(0, examples, add_example, rows)
