"""What compiled programs are built from: a model as a function of flat weights, and the implementations in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.apply import MixedModel, as_mixed, implemented_calls, widened
from mpjax.formats import FLOAT32
from mpjax.program import Array, Model, spec
from mpjax.program.packing import as_function as as_function
from mpjax.xla.executable import Executable


@dataclass(frozen=True, kw_only=True, repr=False)
class Program:
    """An executable with its weights; `program(*inputs) -> outputs`.

    `weights`: its first argument, see `as_function`. `input_specs`: shapes and dtypes that it was compiled for. `assignment`:
    layer -> requested format; `implementation`: layer -> implementation.
    """

    weights: tuple[Array, ...]
    executable: Executable
    input_specs: tuple[Any, ...]
    assignment: Mapping[str, str]
    implementation: Mapping[str, str]

    @property
    def lowered(self) -> int:
        """Number of layers below float32."""
        return sum(fmt != FLOAT32.name for fmt in self.assignment.values())

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in jax.tree.leaves(self.input_specs))
        return f"{type(self).__name__}(inputs {shapes}; {self.lowered} of {len(self.assignment)} layers lowered)"

    def __call__(self, *inputs: Array) -> Any:
        """Run the program on inputs of the shapes and dtypes that it was compiled for."""
        _check_inputs(inputs, self.input_specs)
        return self.executable(self.weights, *inputs)


def _check_inputs(inputs: Sequence[Any], specs: Sequence[jax.ShapeDtypeStruct]) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
        raise TypeError(
            "A compiled program takes arrays: it cannot be called under jit, vmap or grad, which would compile another program. "
            "Transform the model's `call` instead."
        )
    if len(inputs) == len(specs) and all(
        isinstance(x, jax.Array | np.ndarray)
        and x.shape == getattr(expected, "shape", None)
        and x.dtype == expected.dtype
        for x, expected in zip(inputs, specs, strict=True)
    ):
        return  # a microsecond; what follows takes ten
    given, expected = specs_of(inputs), tuple(specs)
    if given != expected:
        star = " Pass a batch as program(*batch)." if len(inputs) == 1 and isinstance(inputs[0], tuple | list) else ""
        raise ValueError(
            f"Expected inputs {expected}, found {given}: a program is compiled for fixed shapes and dtypes; compile the model "
            f"again for others.{star}"
        )


def specs_of(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Shapes and dtypes of inputs, as jax takes them: with 64-bit types off, int64 is int32."""
    return jax.tree.map(spec, tuple(inputs))


def widening(
    small: MixedModel, layers: Sequence[str], wide: MixedModel, needed: Sequence[bool]
) -> tuple[tuple[Array, ...], Callable[[tuple[Array, ...]], tuple[Array, ...]]]:
    """Weights as stored, and the function of them that gives `as_function`'s weights of `wide`: `widened(small, layers)`.

    `needed`: which of its leaves.
    """
    of_leaf = jax.tree.unflatten(jax.tree.structure(wide.params), needed)
    used = {path for path, leaves in of_leaf.items() if any(jax.tree.leaves(leaves))}
    stored, tree = jax.tree.flatten({path: leaves for path, leaves in small.params.items() if path in used})
    names = [name for name in layers if small.layer(name).kernel in used]

    def restore(stored: tuple[Array, ...]) -> tuple[Array, ...]:
        rest = jax.tree.map(lambda leaf: jnp.zeros(0), wide.params)  # as many leaves as there
        model = replace(small, params=rest | jax.tree.unflatten(tree, stored))
        _, (weights, *_) = as_function(widened(model, names), (), needed=needed)
        return weights

    return tuple(stored), restore


def implementations_of(model: Model, *inputs: Array) -> dict[str, str]:
    """Layer -> implementation in `model` for these inputs; of a layer that runs several times, the first run's."""
    products = implemented_calls(as_mixed(model), *inputs)
    implementations: dict[str, str] = {}
    for call, name in sorted(products, key=lambda pair: pair[0].product.kind == "lookup"):  # lookups have only one
        implementations.setdefault(call.layer, name)
    return implementations


def failure(error: Exception) -> str:
    """Why a program is not used that XLA refuses; XLA:CPU compiles some products that it then cannot run."""
    return f"does not compile or run ({str(error).splitlines()[0][:200]})"
