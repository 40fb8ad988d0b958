"""A model as a pure function, its layers in execution order, and the one override of a layer's product.

Everything mpjax does to a layer (emulation, local-rounding taps, low-precision execution) is written as

    override(layer, product, activations, weights) -> out

called in place of each layer's product: `activations` are its input (row numbers, where a table is looked up), `weights` the
whole weight, `product` a frozen description that can be called: `product(activations, weights)` is the product as the model
computes it. The model is traced and its program run again: `tracing`, `steps`, `running`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.partition import Block, named_leaves
from mpjax.program import running
from mpjax.program.product import Array, Layer, OtherParameter, Override, Params
from mpjax.program.steps import Program, products_of, values
from mpjax.program.summary import UNUSED, summary
from mpjax.program.traced import Traced, dtype_of

Batches = Sequence[tuple[Array, ...]]

# What takes a vector, a position embedding or a class token, and has no product in it.
_PLAIN = frozenset(
    "add sub mul div max min neg pad concatenate broadcast_in_dim reshape transpose slice squeeze dynamic_slice tanh exp "
    "scan while cond remat2".split()
)
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, bool, int, float, complex)


@dataclass(frozen=True, kw_only=True, repr=False)
class Model:
    """A model as a pure function.

    Attributes:
        params: slash path -> array: what the program takes. Parameters as they are, and weights that were computed from
            parameters when the model was made (`Layer.sources` says from which).
        layers: in execution order.
        call: `call(params, *inputs, override=None) -> outputs`.
        others: the user's parameters that no format lowers.
        activation_products: products of two activations, as attention has them. An assignment may name them; to score and search
            them, too: `with_activation_products`.
        traced: the programs, by shapes of the inputs.
    """

    params: Params
    layers: tuple[Layer, ...]
    call: Callable[..., Any]
    others: tuple[OtherParameter, ...] = ()
    activation_products: tuple[Layer, ...] = ()
    traced: Traced | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in execution order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def lowerable(self) -> tuple[Layer, ...]:
        """The layers, and the products of two activations that are not among them."""
        return (*self.layers, *(layer for layer in self.activation_products if layer not in self.layers))

    @property
    def partition(self) -> tuple[Block, ...]:
        """The layers' weights as blocks, in execution order; a product of two activations has none."""
        return tuple(layer.block for layer in self.layers if layer.kernel)

    def layer(self, name: str) -> Layer:
        """The layer of that name.

        Raises:
            KeyError: no layer has that name; the message gives the nearest ones.
        """
        layers = {layer.name: layer for layer in self.lowerable}
        if name in layers:
            return layers[name]
        near = difflib.get_close_matches(name, layers, n=3, cutoff=0.3) or list(layers)[:3]
        raise KeyError(f"Unknown layer {name!r}. Nearest known names: {', '.join(near)}.")

    def with_call(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Self:
        """The model with `wrap(call)` in place of its `call`."""
        return replace(self, call=wrap(self.call))

    def __repr__(self) -> str:
        weights = sum(layer.weights for layer in self.layers)
        return f"{type(self).__name__}({len(self.layers)} layers, {weights:,} weights; see .summary())"

    def summary(self) -> str:
        """The share of the weights that formats can lower, a table of the layers, and what stays as it is, with its share."""
        return summary(self)


ModelT = TypeVar("ModelT", bound=Model)


def from_function(function: Callable[..., Any], params: Params, *example: Any) -> Model:
    """Any JAX code as a Model.

    Args:
        function: `function(params, *inputs) -> outputs`, pure; outputs may be any pytree.
        params: pytree of arrays. What is multiplied with activations is a layer, named by its path in this tree; what is computed
            from parameters alone is computed once, here.
        *example: inputs, leading axis = example; only shapes and dtypes are used.

    Raises:
        ValueError: no example input, or no layer that a format could lower.
        ModelError: the function cannot be called so; the message repeats its own error.
    """
    if not callable(function):
        raise TypeError(f"Expected a function of (params, *inputs), found {type(function).__name__}.")
    return build(function, params, example, {}, "")


def with_output(model: ModelT, function: Callable[..., Any]) -> ModelT:
    """The model followed by `function(outputs, *further)`.

    It turns a model's raw outputs into the numbers whose change matters (landmarks in torso units, the logits of several
    outputs); inputs of a batch beyond those that the model takes reach only `function`.
    """
    count = model.traced.count if model.traced is not None else 1

    def followed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(params: Params, *inputs: Array, **options: Any) -> Any:
            return function(call(params, *inputs[:count], **options), *inputs[count:])

        return run

    return model.with_call(followed)


def with_activation_products(model: Model) -> Model:
    """The model whose layers include its products of two activations, to be scored and searched like the others.

    Raises:
        TypeError: a mixed model: pass its `.original`.
    """
    if type(model) is not Model or model.traced is None:
        raise TypeError("Expected a traced float32 model, found one made by apply: pass its .original.")
    layers = {layer.name: layer for layer in model.lowerable}
    order = dict.fromkeys(step.layer for step, _ in products_of(model.traced.first.block))
    every = tuple(layers[name] for name in order if name in layers)

    def call(params: Params, *inputs: Any, **options: Any) -> Any:
        return model.call(params, *inputs, **{"layers": every, **options})

    return replace(model, layers=every, call=call)


def examples_in(batches: Batches) -> int:
    """Number of examples in all batches."""
    return sum(batch[0].shape[0] for batch in batches)


def check_batches(batches: Batches) -> Batches:
    """Batches, refused early if empty, ragged or not tuples of arrays.

    Raises:
        ValueError: says which batch and input differ, in what, and what to do.
    """
    if not isinstance(batches, Sequence) or not batches:
        raise ValueError("Expected a non-empty sequence of batches, each a tuple of arrays.")
    for number, batch in enumerate(batches):
        if not isinstance(batch, tuple) or not batch:
            raise ValueError(f"Batch {number} is a {type(batch).__name__}: expected a tuple of arrays, (x,) for one.")
        for position, array in enumerate(batch):
            where = f"Batch {number}, input {position} is a"
            if isinstance(array, Mapping | tuple | list) or not hasattr(array, "shape"):
                raise ValueError(
                    f"{where} {type(array).__name__}: scores take examples apart along the leading axis of arrays. Pass its "
                    "arrays one by one: mpjax.from_function(lambda params, a, b: …, params, a, b) puts them together."
                )
            if not np.shape(array):
                raise ValueError(
                    f"{where} scalar: a leading axis of examples is expected. Broadcast it (jnp.full((N,), value)), or make it a "
                    "constant of the function."
                )
        shapes, first = ([np.shape(array) for array in arrays] for arrays in (batch, batches[0]))
        if len({shape[0] for shape in shapes}) != 1 or shapes[0][0] == 0:
            listed = ", ".join(f"input {position}: {shape}" for position, shape in enumerate(shapes))
            raise ValueError(
                f"Batch {number}: arrays of one equal, non-zero leading axis expected, found {listed}. What is one example as a "
                "whole (a graph) takes a leading axis of one."
            )
        if shapes != first:
            raise ValueError(
                f"Batch {number} has shapes {shapes}, batch 0 {first}: make all batches of equal shape (drop or pad the last)."
            )
    return batches


def build(
    function: Callable[..., Any], params: Params, example: Sequence[Any], modules: dict[str, str], root: str
) -> Model:
    """A function as a Model; `modules`: path -> class of the module there, `root` that of the whole model."""
    if not example:
        raise ValueError(
            "Expected at least one example input after the module or params: the program is traced with it."
        )
    leaves = named_leaves(params)
    if wrong := [path for path, leaf in leaves.items() if not isinstance(leaf, _ARRAYS)]:
        raise TypeError(f"Expected params of arrays, found {type(leaves[wrong[0]]).__name__} at {wrong[0]!r}.")
    dtypes = {dtype_of(leaf) for leaf in leaves.values()}
    if not any(jax.dtypes.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        listed = f"only {', '.join(sorted(map(str, dtypes)))}" if dtypes else "none at all"
        raise ValueError(f"Expected a model with float32 weights, found {listed}: there is nothing to lower.")
    traced = Traced(function, params, modules=modules, root=root, count=len(example))
    program = traced.program(example)
    others = _others(program, leaves, modules)
    left = [other for other in others if other.weight]
    if not program.layers:
        seen = f"; modules seen: {sorted(set(modules.values()))}." if modules else "."
        why = "".join(f" {other.path}: {other.reason}." for other in left[:5])
        raise ValueError(
            f"Found no layer that multiplies its own weights with activations{seen}{why} Nothing here can be lowered."
        )
    if left:
        listed = "; ".join(f"{other.path} ({other.owner}: {other.reason})" for other in left[:5])
        warnings.warn(f"{len(left)} weights stay as they are: {listed}{' …' if len(left) > 5 else ''}.", stacklevel=3)
    every = program.layers

    def call(params: Params, *inputs: Any, override: Override | None = None, layers: Sequence[Layer] = every) -> Any:
        by_name = {layer.name: layer for layer in layers}
        return running.run(traced.program(inputs, params), params, inputs[: traced.count], override, by_name)

    return Model(
        params=values(program, leaves),
        layers=program.layers,
        call=call,
        others=others,
        activation_products=program.activation_products,
        traced=traced,
    )


def _others(program: Program, leaves: Mapping[str, Any], modules: Mapping[str, str]) -> tuple[OtherParameter, ...]:
    """The parameters that are no layer's weight, and why."""
    whole = {weight.name: weight for weight in program.weights if not weight.folded}
    refused: dict[str, str] = {}
    folds: dict[str, dict[str, None]] = {}
    for weight in program.weights:
        for path in weight.value.sources:
            if weight.reason:
                refused.setdefault(path, weight.reason)
            if weight.folded:
                folds.setdefault(path, {})[weight.layer or weight.name] = None
    others = []
    for path, leaf in leaves.items():
        taken = whole.get(path)
        if taken is not None and taken.layer:
            continue
        (owner, _, last), shape = path.rpartition("/"), tuple(np.shape(leaf))
        matrix, reason = path in refused, "not a product's weights"
        if matrix:
            reason = refused[path]
        elif taken is not None:
            opaque = sorted(taken.taken_by - _PLAIN)
            matrix = bool(opaque) and sum(size > 1 for size in shape) > 1 and last not in ("scale", "bias")
            if matrix:
                reason = f"taken by {', '.join(opaque)}, which is no product"
            elif last in ("bias", "b"):
                reason = "bias"
        elif path in folds:
            reason = f"computed into {', '.join(folds[path])}"
        elif path not in program.used:
            reason = UNUSED
        others.append(
            OtherParameter(
                path=path,
                shape=shape,
                owner=modules.get(owner, ""),
                reason=reason,
                weight=matrix,
                folded=path in folds and taken is None,
            )
        )
    reason = "held constant: it is not among the params"
    constants = dict.fromkeys(program.constants)
    return (*others, *(OtherParameter(path="(constant)", shape=shape, owner="", reason=reason) for shape in constants))
