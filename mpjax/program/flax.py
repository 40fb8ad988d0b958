"""Flax modules as models: two adapters of `from_function`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jax.interpreters import partial_eval

from mpjax.program.model import Model, build
from mpjax.program.product import Array, Params
from mpjax.program.traced import ModelError


def from_linen(module: nn.Module, variables: Mapping[str, Any], *example: Any, **kwargs: Any) -> Model:
    """A linen module as a Model.

    Args:
        module: any linen module.
        variables: as `module.init` returns them, boxed or not; everything beside "params" is held constant.
        *example: inputs, leading axis = example; only shapes and dtypes are used.
        **kwargs: passed to `module.apply` at each call (`train=False`, `deterministic=True`, say).

    Raises:
        ValueError: no "params", no example input, a keyword that has the examples' axis, or no layer that a format could lower.
        ModelError: the module cannot be called so; the message repeats Flax's.
    """
    _check_arguments(module, nn.Module, "a linen module", "from_nnx", example, kwargs)
    variables = dict(nn.meta.unbox(variables))
    if "params" not in variables:
        raise ValueError(
            f"Expected variables with a 'params' collection, found {sorted(variables)}. Pass what module.init returned."
        )
    params = variables.pop("params")
    modules: dict[str, str] = {}

    def note(next_function: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        modules.setdefault("/".join(context.module.path), type(context.module).__name__)
        return next_function(*args, **kwargs)

    def function(params: Params, *inputs: Any) -> Any:
        with nn.intercept_methods(note):
            return module.apply({**variables, "params": params}, *inputs, **kwargs)

    return build(function, params, example, modules, type(module).__name__)


def from_nnx(module: nnx.Module, *example: Any, **kwargs: Any) -> Model:
    """An NNX module as a Model.

    Params are those of its `nnx.Param` state, whose paths agree with linen's; all other state is held constant, as it is now, and
    what a call writes to it is lost when the call ends. `module` itself is not changed.

    Raises:
        ValueError: no example input, a keyword that has the examples' axis, or no layer that a format could lower.
        ModelError: the module cannot be called so (the message repeats Flax's), or it runs as for training: its outputs
            depend on random numbers, or its batch norms on the batch.
    """
    _check_arguments(module, nnx.Module, "an NNX module", "from_linen", example, kwargs)
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    rest = _copied(rest)  # as it is now: what the module's variables become later is not this model's
    if example:
        _check_inference(module, example, kwargs)

    def function(params: Params, *inputs: Any) -> Any:
        return merged(graphdef, state, rest, params)(*inputs, **kwargs)

    modules = {"/".join(map(str, path)): type(part).__name__ for path, part in nnx.iter_modules(module)}
    return build(function, nnx.to_pure_dict(state), example, modules, type(module).__name__)


def merged(graphdef: Any, state: Any, rest: Any, params: Params) -> Any:
    """An NNX module of this graph with these params; the arguments are not changed, or shared with it."""
    copy = _copied(state)
    nnx.replace_by_pure_dict(copy, params)
    return nnx.merge(graphdef, copy, _copied(rest))


def _copied(state: Any) -> Any:
    """A state (or several) with variables of its own: one from `nnx.split` holds the module's."""
    return jax.tree.map(lambda leaf: leaf, state)


def _check_arguments(
    module: Any, kind: type, expected: str, other: str, example: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Refuses a wrong module, and keyword arrays that have the examples' axis: taking examples apart would not split them."""
    if not isinstance(module, kind):
        raise TypeError(
            f"Expected {expected}, found {type(module).__name__}. The other kind of Flax module goes through mpjax.{other}; any "
            "other JAX code through mpjax.from_function(function, params, *example)."
        )
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(example) if np.shape(leaf)} - {1}
    for name, value in kwargs.items():
        for leaf in jax.tree.leaves(value) if name != "rngs" else ():
            if hasattr(leaf, "shape") and leaf.shape and leaf.shape[0] in sizes:
                raise ValueError(
                    f"The keyword {name!r} holds an array of the examples' leading axis, {leaf.shape}: pass it as an input, "
                    f"mpjax.from_function(lambda params, x, {name}: module.apply({{'params': params}}, x, {name}={name}), …)."
                )


def _check_inference(module: nnx.Module, example: tuple[Array, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses an NNX module in training mode, which Flax would run without a warning."""
    graphdef, random, statistics, rest = nnx.split(module, nnx.RngState, nnx.BatchStat, ...)  # type: ignore[misc]
    if not jax.tree.leaves((random, statistics)):
        return

    def call(states: Any, *inputs: Array) -> Any:
        copy = nnx.merge(graphdef, *_copied((*states, rest)))
        return copy(*inputs, **kwargs), jax.tree.leaves(nnx.state(copy, nnx.BatchStat))

    try:
        closed, (_, after) = jax.make_jaxpr(call, return_shape=True)((random, statistics), *example)
    except Exception:  # the tracing of the model explains it
        return
    jaxpr, count = closed.jaxpr, len(jax.tree.leaves(random))
    before = jaxpr.invars[count : count + len(jax.tree.leaves(statistics))]
    first = len(jaxpr.outvars) - len(after)  # the others are the statistics
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * first + [False] * len(after))
    if any(used[:count]):
        raise ModelError(
            "The module's outputs depend on random numbers (dropout, say): turn them off with module.eval(), or "
            "deterministic=True."
        )
    written = [old is not new for old, new in zip(before, jaxpr.outvars[first:], strict=True)]
    if any(new and not read for new, read in zip(written, used[count:], strict=False)):
        raise ModelError(
            "The module's batch norms use the statistics of the batch: call module.eval(), or pass use_running_average=True."
        )
