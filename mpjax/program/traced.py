"""A function of parameters and inputs, traced again for each set of shapes that it is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mpjax.partition import named_leaves
from mpjax.program.product import Params
from mpjax.program.steps import Program
from mpjax.program.tracing import WIDE, trace

# What a function raises that cannot be called so.
_ERRORS = (flax.errors.FlaxError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


class ModelError(ValueError):
    """A function or module that cannot be called with the given inputs, or not be taken as a model."""


class Traced:
    """A function of parameters and inputs, and its programs: one for each set of shapes and dtypes of inputs.

    `count`: how many inputs it takes.
    """

    def __init__(
        self, function: Callable[..., Any], params: Params, *, modules: Mapping[str, str], root: str, count: int
    ) -> None:
        self.function, self.modules, self.root, self.count = function, modules, root, count
        self.specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)), params)
        self._programs: dict[Any, Program] = {}

    def program(self, inputs: Sequence[Any], params: Mapping[str, Any] | None = None) -> Program:
        """The program for inputs of these shapes; traced the first time.

        Args:
            inputs: arrays or specs; more than the function takes are ignored.
            params: of which dtypes, where they are not the function's own (float64, for a test).

        Raises:
            ModelError: for these inputs something is computed otherwise from the parameters.
        """
        specs = jax.tree.map(spec, tuple(inputs[: self.count]))
        changed = self._changed(params or {})
        leaves, structure = jax.tree.flatten(specs)
        shapes = tuple((leaf.shape, str(leaf.dtype), leaf.weak_type) for leaf in leaves)
        precision = jax.config.values["jax_default_matmul_precision"]  # it is part of what is traced
        key = (structure, shapes, tuple(sorted(changed.items())), precision)
        if key not in self._programs:
            self._programs[key] = self._trace(specs, changed)
        return self._programs[key]

    @property
    def first(self) -> Program:
        """The program of the example inputs."""
        return next(iter(self._programs.values()))

    def _changed(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Parameter -> dtype, where weights are given in another one than the function was made with."""
        changed: dict[str, str] = {}
        for weight in self.first.weights if self._programs else ():
            dtype = getattr(params.get(weight.name), "dtype", None)
            if (
                dtype is not None and dtype in WIDE and dtype != weight.value.dtype
            ):  # narrow: stored so, in a mixed model
                changed |= dict.fromkeys(weight.value.sources, str(dtype))
        return changed

    def _trace(self, inputs: Sequence[Any], changed: Mapping[str, str]) -> Program:
        leaves = named_leaves(self.specs)
        specs = jax.tree.unflatten(
            jax.tree.structure(self.specs),
            [jax.ShapeDtypeStruct(leaf.shape, changed.get(path, leaf.dtype)) for path, leaf in leaves.items()],
        )
        again = bool(self._programs) and not changed
        weights = self.first.weights if again else ()
        layers = {weight.identity for weight in weights if weight.layer}
        identities = {weight.name: weight.identity for weight in weights}
        try:
            program = trace(
                self.function,
                specs,
                inputs,
                modules=self.modules,
                root=self.root,
                folds=frozenset(identities.values()) if again else None,
                held=frozenset(layers),
            )
        except _ERRORS as error:
            raise ModelError(_explained(error, inputs)) from error
        there = {weight.identity for weight in program.weights if weight.layer}
        unlike = [weight.name for weight in program.weights if identities.get(weight.name) != weight.identity]
        unlike += [
            weight.name
            for weight in weights
            if weight.identity in layers - there and weight.value.sources & program.used
        ]
        if unlike and again:
            shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(inputs)]
            raise ModelError(
                f"For inputs of shapes {shapes} the model computes {', '.join(list(dict.fromkeys(unlike))[:3])} otherwise "
                "from its parameters than for those that it was made with: make another Model with such inputs as the example "
                "(of at least two examples)."
            )
        return program


def spec(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an input; a Python number leaves the dtype to what it meets."""
    weak = isinstance(leaf, bool | int | float | complex) or getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf), weak_type=weak)


def dtype_of(leaf: Any) -> Any:
    """A leaf's dtype as jax has it."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return dtype if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(dtype)


def _explained(error: Exception, example: Sequence[Any]) -> str:
    """Why a function cannot be called with these inputs, and what to do."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    shapes = ", ".join(f"{np.shape(leaf)} {dtype_of(leaf)}" for leaf in jax.tree.leaves(tuple(example)))
    hint = "Pass the inputs and keyword arguments with which the model can be called"
    if "rng" in reason.lower():
        hint = (
            "It asks for random numbers: turn them off (deterministic=True, train=False), or pass rngs={'dropout': key}"
        )
    elif "mutable" in reason.lower() or "modify" in reason.lower():
        hint = "It writes to a collection: run it as for inference (train=False, use_running_average=True)"
    return f"The model cannot be called with ({shapes}): {reason} {hint}."
