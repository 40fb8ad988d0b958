from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from refusals import refused

from mpjax import partition
from mpjax.partition import Block

PARAMS = {
    "encoder": [{"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, {"kernel": jnp.ones((3, 1))}],
    "scale": jnp.ones(()),
}
PATHS = ("encoder/0/bias", "encoder/0/kernel", "encoder/1/kernel", "scale")


@jax.tree_util.register_dataclass
@dataclass
class Dense:
    kernel: jax.Array
    bias: jax.Array


def test_paths_follow_the_order_of_the_leaves_of_any_tree() -> None:
    assert partition.paths(PARAMS) == PATHS
    tree = (Dense(kernel=jnp.ones(2), bias=jnp.ones(1)), {"x": jnp.ones(1)})
    assert partition.paths(tree) == ("0/kernel", "0/bias", "1/x")
    assert partition.paths(jnp.ones(3)) == (".",)
    blocks = {block.name: block.paths for block in partition.by_module(PARAMS)}
    assert blocks == {"encoder/0": PATHS[:2], "encoder/1": PATHS[2:3], ".": ("scale",)}


def test_select_and_replace_are_inverse() -> None:
    for block in partition.by_module(PARAMS):
        values = partition.select(PARAMS, block)
        assert tuple(values) == block.paths
        doubled = partition.replace(PARAMS, {path: 2 * value for path, value in values.items()})
        assert jax.tree.structure(doubled) == jax.tree.structure(PARAMS)
        for path, before, after in zip(PATHS, jax.tree.leaves(PARAMS), jax.tree.leaves(doubled), strict=True):
            assert jnp.array_equal(after, 2 * before if path in values else before)


def test_replace_under_jit_may_change_the_dtype_but_not_the_shape() -> None:
    lowered = jax.jit(lambda params: partition.replace(params, {"scale": params["scale"].astype(jnp.bfloat16)}))(PARAMS)
    assert lowered["scale"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"'scale' has shape \(\); got \(2,\)"):
        partition.replace(PARAMS, {"scale": jnp.ones(2)})


def test_unknown_paths_and_trees_and_blocks_without_a_meaning_are_refused() -> None:
    wrong = Block(name="b", paths=("encoder/0/kernal",))
    nearest = "unknown path 'encoder/0/kernal'; the nearest is 'encoder/0/kernel'"
    refused(
        (nearest, partition.select, PARAMS, wrong),
        ("nearest is 'scale'", partition.replace, PARAMS, {"scales": jnp.ones(())}),
        ("no leaves", partition.by_module, {}),
        ("share one slash path", partition.paths, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}),
        *(("distinct paths", lambda paths=paths: Block(name="b", paths=paths)) for paths in ((), ("scale", "scale"))),
    )
