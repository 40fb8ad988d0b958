"""Flax modules as models: two adapters of `from_function`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jax.interpreters import partial_eval

from mpjax.program.model import Model, ModelError, build
from mpjax.program.product import Array, Params


def from_linen(module: nn.Module, variables: Mapping[str, Any], *example: Any, **kwargs: Any) -> Model:
    """A linen module as a Model.

    Args:
        module: any linen module.
        variables: as `module.init` returns them, boxed or not; everything beside "params" is held constant.
        *example: inputs, leading axis = example; only shapes and dtypes are used.
        **kwargs: handed to `module.apply` at each call (`train=False`, `deterministic=True`, say).

    Raises:
        ValueError: no "params", no example input, a keyword that has the examples' axis, or no layer that a format could lower.
        ModelError: the module cannot be called so; the message gives Flax's own words.
    """
    _check_module(module, nn.Module, "a linen module", "from_nnx")
    variables = dict(nn.meta.unbox(variables))
    if "params" not in variables:
        raise ValueError(
            f"Expected variables with a 'params' collection, found {sorted(variables)}. Pass what module.init returned."
        )
    _check_keywords(example, kwargs)
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
        ModelError: the module cannot be called so (the message gives Flax's own words), or it runs as for training: its outputs
            depend on random numbers, or its batch norms on the batch.
    """
    _check_module(module, nnx.Module, "an NNX module", "from_linen")
    _check_keywords(example, kwargs)
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    rest = _copied(rest)  # as it is now: what the module's variables become later is not this model's
    params = nnx.to_pure_dict(state)
    if example:
        _check_inference(module, example, kwargs)

    def function(params: Params, *inputs: Any) -> Any:
        return merged(graphdef, state, rest, params)(*inputs, **kwargs)

    modules = {"/".join(map(str, path)): type(each).__name__ for path, each in nnx.iter_modules(module)}
    return build(function, params, example, modules, type(module).__name__)


def merged(graphdef: Any, state: Any, rest: Any, params: Params) -> Any:
    """An NNX module of this graph with these params; nothing that is given is changed, or shared with it."""
    copy = _copied(state)
    nnx.replace_by_pure_dict(copy, params)
    return nnx.merge(graphdef, copy, _copied(rest))


def _copied(state: Any) -> Any:
    """A state (or several) with variables of its own: one from `nnx.split` holds the module's."""
    return jax.tree.map(lambda leaf: leaf, state)


def _check_module(module: Any, kind: type, expected: str, other: str) -> None:
    if not isinstance(module, kind):
        raise TypeError(
            f"Expected {expected}, found {type(module).__name__}. The other kind of Flax module goes through mpjax.{other}; any "
            "other JAX code through mpjax.from_function(function, params, *example)."
        )


def _check_keywords(example: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses keyword arrays that have the examples' axis: they would stay whole where examples are taken apart."""
    sizes = {np.shape(each)[0] for each in jax.tree.leaves(example) if np.shape(each)} - {1}
    for name, value in kwargs.items():
        shapes = [np.shape(each) for each in jax.tree.leaves(value) if hasattr(each, "shape")]
        if name != "rngs" and any(shape and shape[0] in sizes for shape in shapes):
            raise ValueError(
                f"The keyword {name!r} holds an array of the examples' leading axis, {shapes[0]}: pass it as an input, "
                f"mpjax.from_function(lambda params, x, {name}: module.apply({{'params': params}}, x, {name}={name}), …)."
            )


def _check_inference(module: nnx.Module, example: tuple[Array, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses an NNX module in training mode, which would be called without a word from Flax."""
    graphdef, random, statistics, rest = nnx.split(module, nnx.RngState, nnx.BatchStat, ...)  # type: ignore[misc]
    held = [jax.tree.leaves(random), jax.tree.leaves(statistics)]
    if not any(held):
        return

    def call(both: Any, *inputs: Array) -> Any:
        copy = nnx.merge(graphdef, *_copied((*both, rest)))
        return copy(*inputs, **kwargs), jax.tree.leaves(nnx.state(copy, nnx.BatchStat))

    try:
        closed, (_, after) = jax.make_jaxpr(call, return_shape=True)((random, statistics), *example)
    except Exception:  # the tracing of the model explains it
        return
    outputs, count = closed.jaxpr.outvars, len(held[0])
    given = len(outputs) - len(after)  # by the model; the others are its statistics
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * given + [False] * len(after))
    before = closed.jaxpr.invars[count : count + len(held[1])]
    if any(used[:count]):
        raise ModelError(
            "The module's outputs depend on random numbers (dropout, say): turn them off with module.eval(), or "
            "deterministic=True."
        )
    written = [a is not b for a, b in zip(before, outputs[given:], strict=True)]
    if any(new and not read for new, read in zip(written, used[count:], strict=False)):
        raise ModelError(
            "The module's batch norms use the statistics of the batch: call module.eval(), or pass use_running_average=True."
        )
