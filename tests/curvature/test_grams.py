"""Gram matrices against jax.jacrev, log-determinants against the dense d × d computation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from refusals import refused
from toys import network, whole

from mpjax import partition
from mpjax.curvature import grams
from mpjax.partition import Block

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
LARGEST = 16 * 10 * 8  # bytes of the rows of `network`'s first block: 16 weights, k = 10 outputs


def dense_grams(function, params, blocks):
    """Block -> J Jᵀ, from jax.jacrev of (params -> outputs)."""
    jacobian = jax.jit(jax.jacrev(lambda p: ravel_pytree(function(p))[0]))(params)
    leaves = zip(partition.paths(params), jax.tree.leaves(jacobian), strict=True)
    rows = {path: np.asarray(leaf).reshape(leaf.shape[0], -1) for path, leaf in leaves}
    return {block.name: sum(rows[path] @ rows[path].T for path in block.paths) for block in blocks}


def recorded(records, property_of):
    """A `jit` that appends a property of every compiled program to the records."""

    def jit(program):
        def run(*args):
            compiled = jax.jit(program).lower(*args).compile()
            records.append(property_of(compiled))
            return compiled(*args)

        return run

    return jit


@pytest.mark.parametrize(("batch_size", "max_bytes"), [(None, 2**31), (1, LARGEST), (3, 2 * LARGEST), (99, LARGEST)])
def test_grams_are_exact_whatever_the_batches_and_groups(batch_size: int | None, max_bytes: int) -> None:
    params, function, x = network(batch_size or 0)
    blocks, knobs = partition.by_module(params), {"batch_size": batch_size, "max_bytes": max_bytes}
    expected = dense_grams(whole(function, x), params, blocks)
    for result in (
        grams.output_grams(whole(function, x), params, blocks, **knobs),
        grams.output_grams(function, params, blocks, x, **knobs),
    ):
        assert list(result) == list(expected)
        chex.assert_trees_all_close(result, expected, **TIGHT)


def test_several_arrays_of_one_example_and_a_tree_of_outputs() -> None:
    params, function, x = network(0)
    blocks = partition.by_module(params)
    scale = jnp.arange(1.0, 6.0)

    def tree(p, x, scale):
        outputs = function(p, x)
        return {"b": (outputs[:1], outputs[0] * outputs[1]), "a": scale * outputs}

    expected = dense_grams(lambda p: [tree(p, a, b) for a, b in zip(x, scale, strict=True)], params, blocks)
    chex.assert_trees_all_close(grams.output_grams(tree, params, blocks, x, scale, batch_size=3), expected, **TIGHT)


def test_one_example_at_a_time_and_one_program_per_group() -> None:
    """The programs are given one example, and the blocks of their group only."""
    params, function, x = network(0)
    shapes, programs = [], []

    def watched(p, example):
        shapes.append(example.shape)
        return function(p, example)

    jit = recorded(programs, lambda compiled: list(compiled.out_info))
    grams.output_grams(watched, params, partition.by_module(params), x, max_bytes=LARGEST, jit=jit)
    assert set(shapes) == {(3,)} and programs == [["first"], ["last"]]


def test_memory_is_bounded() -> None:
    n, layers = 64, 6
    params = {f"layer{i}": jnp.eye(n, dtype=jnp.float32) for i in range(layers)}
    rows = 2 * n * n * n * 4  # of one layer, two examples

    def function(p, x):
        for kernel in p.values():
            x = jnp.tanh(x @ kernel)
        return x

    def temporary_bytes(max_bytes: int) -> list[int]:
        records = []
        jit = recorded(records, lambda compiled: compiled.memory_analysis().temp_size_in_bytes)
        x = jnp.ones((2, n), jnp.float32)
        blocks = tuple(Block(name=name, paths=(name,)) for name in params)
        grams.output_grams(function, params, blocks, x, batch_size=4, max_bytes=max_bytes, jit=jit)
        return records

    (all_at_once,) = temporary_bytes(2**31)
    assert all_at_once > layers * rows
    groups = temporary_bytes(2 * rows)
    assert len(groups) == 3 and max(groups) < 2.5 * rows


def test_a_block_of_mixed_dtypes() -> None:
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3, jnp.float32), "unused": jnp.arange(3)}
    result = grams.output_grams(lambda p: (p["a"] * 2, p["b"]), params, (Block(name="ab", paths=("a", "b")),))
    np.testing.assert_allclose(result["ab"], np.diag([4, 4, 1, 1, 1]))
    assert result["ab"].dtype == jnp.float32


@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e3])
def test_log_determinants_are_those_of_the_dense_matrix(damping: float) -> None:
    """J (6, d): d below, at and above k, of full rank, of rank two, and zero."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        jacobians = {f"d={d}": rng.normal(size=(6, d)) for d in (1, 4, 6, 15)}
        jacobians["rank 2"] = rng.normal(size=(6, 2)) @ rng.normal(size=(2, 9))
        jacobians |= {"zero, d < k": np.zeros((6, 3)), "zero, d > k": np.zeros((6, 9))}
        spectra = grams.spectra({name: jnp.asarray(j @ j.T) for name, j in jacobians.items()})
        for name, jacobian in jacobians.items():
            d = jacobian.shape[1]
            _, logabsdet = np.linalg.slogdet(jacobian.T @ jacobian + damping * np.eye(d))
            for values in (spectra[name], np.linalg.eigvalsh(jacobian.T @ jacobian)):
                score = grams.logdet_score(values, damping=damping)
                assert score + d * np.log(damping) == pytest.approx(logabsdet, rel=1e-8, abs=1e-8), name


def test_spectra_are_float64_clipped_and_nan_where_not_finite() -> None:
    gram = jnp.array([[2.0, 2.0], [2.0, 2.0]])
    spectra = grams.spectra(
        {
            "good": gram.astype(jnp.float32),
            "rounding": gram - 1e-12 * jnp.eye(2),
            "bad": gram.at[0, 1].set(jnp.nan),
        }
    )
    assert all(values.dtype == np.float64 and values.shape == (2,) for values in spectra.values())
    np.testing.assert_allclose(spectra["good"], [0, 4], atol=1e-6)
    assert spectra["rounding"][0] == 0
    assert np.isnan(spectra["bad"]).all() and np.isnan(grams.logdet_score(spectra["bad"], damping=1.0))


def test_scores_forgive_rounding_and_not_indefiniteness() -> None:
    assert grams.logdet_score(np.array([-1e-15, 1.0]), damping=1e-15) == pytest.approx(np.log1p(1e15))
    assert grams.logdet_score(jnp.array([-1e-7, 1.0], jnp.float32), damping=1.0) == pytest.approx(np.log(2))
    assert np.isnan(grams.logdet_score(np.array([-1e-3, 1.0]), damping=1.0))
    assert grams.logdet_score(np.zeros(3), damping=1.0) == 0


def test_wrong_arguments_are_refused() -> None:
    params, function, x = network(0)
    blocks = partition.by_module(params)

    def call(function=function, blocks=blocks, batch=(x,), **knobs):
        return lambda: grams.output_grams(function, params, blocks, *batch, **knobs)

    score = lambda eigenvalues, damping=1.0: grams.logdet_score(eigenvalues, damping=damping)  # noqa: E731
    refused(
        (f"'first' needs {LARGEST:,} bytes for its 10 rows", call(max_bytes=LARGEST - 1)),
        *(("distinct names", call(blocks=wrong)) for wrong in ((), (blocks[0], blocks[0]))),
        ("batch_size must be at least 1", call(batch_size=0)),
        *((r"arrays \(N, ...\) of one N >= 1", call(batch=b)) for b in ((x, x[:2]), (x[:0],), (jnp.ones(()),))),
        ("the outputs: .*'label' is int64", call(lambda p, x: {"label": jnp.argmax(function(p, x))})),
        ("outputs have no elements", call(lambda p, x: function(p, x)[:0])),
        *(("damping must be a finite scalar > 0", score, np.ones(2), bad) for bad in (0.0, -1.0, np.nan, np.inf)),
        *((r"eigenvalues \(n,\)", score, wrong) for wrong in (np.eye(2), np.ones(0))),
        ("eigenvalues: .*int64", score, np.ones(2, int)),
    )
