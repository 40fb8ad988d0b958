"""Blocks of a parameter pytree: which leaves belong together, by slash path.

A path joins the keys of a leaf: `encoder/0/kernel`; the path of a bare array is `.`, and so is the parent of a top-level leaf.
A partition need not cover every leaf: the estimators hold the others fixed.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

__all__ = ["Block", "by_module"]

Params: TypeAlias = Any  # a pytree of arrays


@dataclass(frozen=True, kw_only=True)
class Block:
    """A named group of leaves, e.g. the parameters of one layer.

    Attributes:
        name: unique within its partition.
        paths: slash paths of its leaves, at least one.
        summed: axes of its weights that the layer sums over, for formats with a scale per output channel; None: not known.
        stacked: axes along which its weights are a stack of separate ones, each with scales of its own.
    """

    name: str
    paths: tuple[str, ...]
    summed: tuple[int, ...] | None = None
    stacked: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.paths or len(set(self.paths)) != len(self.paths):
            raise ValueError(f"block {self.name!r} needs distinct paths and at least one; got {self.paths}")


Partition: TypeAlias = tuple[Block, ...]


def paths(params: Params) -> tuple[str, ...]:
    """Slash paths of the leaves, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: no leaves, or two leaves with one path (a key that itself contains a slash).
    """
    return tuple(_known_leaves(params))


def by_module(params: Params) -> Partition:
    """One block per parent path: `dense/kernel` and `dense/bias` form the block `dense`."""
    groups: dict[str, list[str]] = {}
    for path in paths(params):
        groups.setdefault(path.rpartition("/")[0] or ".", []).append(path)
    return tuple(Block(name=name, paths=tuple(members)) for name, members in groups.items())


def select(params: Params, block: Block) -> dict[str, jax.Array]:
    """The leaves of a block by path, in the block's order.

    Raises:
        ValueError: the block names a path that the parameters do not have.
    """
    leaves = _known_leaves(params, block.paths)
    return {path: leaves[path] for path in block.paths}


def select_all(params: Params, blocks: Partition) -> dict[str, jax.Array]:
    """The leaves of several blocks by path, block after block. Errors as in `select`."""
    return {path: leaf for block in blocks for path, leaf in select(params, block).items()}


def only(blocks: Partition, number: jax.Array, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The values of block `number`, which may be traced; zero in all others."""
    return {
        path: jnp.where(number == position, values[path], jnp.zeros_like(values[path]))
        for position, block in enumerate(blocks)
        for path in block.paths
    }


def replace(params: Params, values: Mapping[str, jax.Array], *, reshape: bool = False) -> Params:
    """The parameters with some leaves exchanged, by path. The dtype may change, the shape only with `reshape`.

    Raises:
        ValueError: an unknown path, or a value of another shape.
    """
    leaves = _known_leaves(params, values)
    for path, value in values.items():
        if not reshape and jnp.shape(value) != jnp.shape(leaves[path]):
            raise ValueError(f"{path!r} has shape {jnp.shape(leaves[path])}; got {jnp.shape(value)}")
    return jax.tree.unflatten(jax.tree.structure(params), list({**leaves, **values}.values()))


def named_leaves(params: Params) -> dict[str, Any]:
    """Slash path -> leaf, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: two leaves with one path (a key that itself contains a slash).
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/") or ".": leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError(f"two leaves share one slash path (a key contains '/'?); leaves: {list(named)[:8]}")
    return named


def _known_leaves(params: Params, names: Iterable[str] = ()) -> dict[str, Any]:
    """`named_leaves`, of which there is one at least, and one of each name."""
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError(f"the parameter tree has no leaves: {params!r}")
    for name in names:
        if name not in leaves:
            (near,) = difflib.get_close_matches(name, leaves, n=1, cutoff=0.0)
            raise ValueError(f"unknown path {name!r}; the nearest is {near!r}, of {len(leaves)} leaves")
    return leaves
