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

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mpjax.partition import Block
from mpjax.program import running
from mpjax.program.product import Array as Array
from mpjax.program.product import Layer as Layer
from mpjax.program.product import OtherParameter as OtherParameter
from mpjax.program.product import Override as Override
from mpjax.program.product import Params as Params
from mpjax.program.product import Product as Product
from mpjax.program.steps import WIDE, Multiply, Program, named_leaves, steps_of, values
from mpjax.program.summary import UNUSED, summary
from mpjax.program.tracing import trace

Batches = Sequence[tuple[Array, ...]]

# What takes a vector, a position embedding or a class token, and has no product in it.
_PLAIN = frozenset(
    "add sub mul div max min neg pad concatenate broadcast_in_dim reshape transpose slice squeeze dynamic_slice tanh exp "
    "scan while cond remat2".split()
)
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, bool, int, float, complex)
# What a function raises that cannot be called so.
_USERS = (flax.errors.FlaxError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
_NO_PRODUCT = "not a product's weights"


@dataclass(frozen=True, kw_only=True)
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
        return (*self.layers, *(each for each in self.activation_products if each not in self.layers))

    @property
    def partition(self) -> tuple[Block, ...]:
        """The layers' weights as blocks, in execution order; a product of two activations has none."""
        return tuple(layer.block for layer in self.layers if layer.kernel)

    def layer(self, name: str) -> Layer:
        """The layer of that name.

        Raises:
            KeyError: no layer has that name; the message gives the nearest ones.
        """
        names = [layer.name for layer in self.lowerable]
        if name in names:
            return self.lowerable[names.index(name)]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        raise KeyError(f"Unknown layer {name!r}. Nearest known names: {', '.join(near or names[:3])}.")

    def with_call(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Self:
        """The model with `wrap(call)` in place of its `call`."""
        return replace(self, call=wrap(self.call))

    def summary(self) -> str:
        """The share of the weights that formats can lower, a table of the layers, and what stays as it is, with its share."""
        return summary(self)


ModelT = TypeVar("ModelT", bound=Model)


class ModelError(ValueError):
    """A function or module that cannot be called with the given inputs, or not be taken as a model."""


class Traced:
    """A function of parameters and inputs, and its programs: one for each set of shapes and dtypes of inputs."""

    def __init__(
        self, function: Callable[..., Any], params: Params, *, modules: Mapping[str, str], root: str, count: int
    ) -> None:
        self.function, self.modules, self.root, self.count = function, modules, root, count
        self.specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf)), params)
        self.identities: dict[str, tuple] = {}
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
        if not self._programs:
            return {}
        found: dict[str, str] = {}
        for weight in self.first.weights:
            dtype = str(getattr(params.get(weight.name), "dtype", ""))
            if dtype in map(str, WIDE) and dtype != str(weight.value.dtype):  # narrow: stored so, in a mixed model
                found |= dict.fromkeys(weight.value.sources, dtype)
        return found

    def _trace(self, inputs: Sequence[Any], changed: Mapping[str, str]) -> Program:
        named = iter(named_leaves(self.specs))
        specs = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, changed.get(next(named)[0], leaf.dtype)), self.specs
        )
        again = bool(self.identities) and not changed
        folds = frozenset(self.identities.values()) if again else None
        held = frozenset(each.identity for each in self.first.weights if each.layer) if again else frozenset()
        try:
            program = trace(self.function, specs, inputs, modules=self.modules, root=self.root, folds=folds, held=held)
        except _USERS as error:
            raise ModelError(_explained(error, inputs)) from error
        found = {weight.name: weight.identity for weight in program.weights}
        self.identities = self.identities or found
        other = [name for name, each in found.items() if self.identities.get(name) != each]
        there = {each.identity for each in program.weights if each.layer}
        other += [
            each.name
            for each in (self.first.weights if again else ())
            if each.layer and each.identity not in there and each.value.sources & program.used
        ]
        if other and again:
            shapes = [tuple(each.shape) for each in jax.tree.leaves(inputs)]
            raise ModelError(
                f"For inputs of shapes {shapes} the model computes {', '.join(list(dict.fromkeys(other))[:3])} otherwise from "
                "its parameters than for those that it was made with: make another Model with such inputs as the example (of at "
                "least two examples)."
            )
        return program


def from_function(function: Callable[..., Any], params: Params, *example: Any) -> Model:
    """Any JAX code as a Model.

    Args:
        function: `function(params, *inputs) -> outputs`, pure; outputs may be any pytree.
        params: pytree of arrays. What is multiplied with activations is a layer, named by its path in this tree; what is computed
            from parameters alone is computed once, here.
        *example: inputs, leading axis = example; only shapes and dtypes are used.

    Raises:
        ValueError: no example input, or no layer that a format could lower.
        ModelError: the function cannot be called so; the message gives its own words.
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
    order = [step.layer for step in steps_of(model.traced.first.block) if isinstance(step, Multiply)]
    every = tuple(layers[name] for name in dict.fromkeys(order) if name in layers)

    def call(params: Params, *inputs: Any, **options: Any) -> Any:
        return model.call(params, *inputs, **{"layers": every, **options})

    return replace(model, layers=every, call=call)


def check_batches(batches: Batches) -> Batches:
    """Batches, refused early if empty, ragged or not tuples of arrays.

    Raises:
        ValueError: says which batch and input differ, in what, and what to do.
    """
    if not isinstance(batches, Sequence) or not batches:
        raise ValueError("Expected a non-empty sequence of batches, each a tuple of arrays.")
    shapes = []
    for number, batch in enumerate(batches):
        if not isinstance(batch, tuple) or not batch:
            raise ValueError(f"Batch {number} is a {type(batch).__name__}: expected a tuple of arrays, (x,) for one.")
        for position, each in enumerate(batch):
            where = f"Batch {number}, input {position}"
            if isinstance(each, Mapping | tuple | list) or not hasattr(each, "shape"):
                raise ValueError(
                    f"{where} is a {type(each).__name__}: scores take examples apart along the leading axis of arrays. Pass its "
                    "arrays one by one: models.from_function(lambda params, a, b: …, params, a, b) puts them together."
                )
            if not np.shape(each):
                raise ValueError(
                    f"{where} is a scalar: a leading axis of examples is expected. Broadcast it (jnp.full((N,), value)), or make "
                    "it a constant of the function."
                )
        sizes = {np.shape(each)[:1] for each in batch}
        if len(sizes) != 1 or sizes == {(0,)}:
            found = ", ".join(f"input {position}: {np.shape(each)}" for position, each in enumerate(batch))
            raise ValueError(
                f"Batch {number}: arrays of one equal, non-zero leading axis expected, found {found}. What is one example as a "
                "whole (a graph) takes a leading axis of one."
            )
        shapes.append(tuple(np.shape(each) for each in batch))
        if shapes[-1] != shapes[0]:
            raise ValueError(
                f"Batch {number} has shapes {shapes[-1]}, batch 0 {shapes[0]}: make all batches of equal shape "
                "(drop or pad the last)."
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
    leaves = dict(named_leaves(params))
    if len(leaves) != len(jax.tree.leaves(params)):
        raise ValueError("Two parameters share one slash path (a key contains '/'): rename one of them.")
    if wrong := [path for path, leaf in leaves.items() if not isinstance(leaf, _ARRAYS)]:
        raise TypeError(f"Expected params of arrays, found {type(leaves[wrong[0]]).__name__} at {wrong[0]!r}.")
    dtypes = {_dtype(leaf) for leaf in leaves.values()}
    if not any(jax.dtypes.issubdtype(each, jnp.floating) for each in dtypes):
        found = f"only {', '.join(sorted(map(str, dtypes)))}" if dtypes else "none at all"
        raise ValueError(f"Expected a model with float32 weights, found {found}: there is nothing to lower.")
    traced = Traced(function, params, modules=modules, root=root, count=len(example))
    program = traced.program(example)
    others = _others(program, leaves, modules)
    left = [each for each in others if each.weight]
    if not program.layers:
        why = "".join(f" {each.path}: {each.reason}." for each in left[:5])
        raise ValueError(
            "Found no layer that multiplies its own weights with activations"
            + (f"; modules seen: {sorted(set(modules.values()))}." if modules else ".")
            + f"{why} Nothing here can be lowered."
        )
    if left:
        warnings.warn(
            f"{len(left)} weights stay as they are: "
            f"{'; '.join(f'{each.path} ({each.owner}: {each.reason})' for each in left[:5])}{' …' if len(left) > 5 else ''}.",
            stacklevel=3,
        )
    every = program.layers

    def call(params: Params, *inputs: Any, override: Override | None = None, layers: Sequence[Layer] = every) -> Any:
        found = traced.program(inputs, params)
        return running.run(found, params, inputs[: traced.count], override, {layer.name: layer for layer in layers})

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
    layers = {layer.kernel for layer in program.layers}
    weights = {weight.name: weight for weight in program.weights}
    folds: dict[str, list[str]] = {}
    for weight in program.weights:
        if weight.folded:
            for path in weight.value.sources:
                folds.setdefault(path, []).append(weight.layer or weight.name)
    found = []
    for path, leaf in leaves.items():
        whole = weights.get(path)
        if whole is not None and not whole.folded and path in layers:
            continue
        last, shape = path.rpartition("/")[2], tuple(np.shape(leaf))
        matrix, reason = False, _NO_PRODUCT
        left = [each for each in program.weights if path in each.value.sources and each.reason]
        if left:
            matrix, reason = True, left[0].reason
        elif whole is not None and not whole.folded:
            opaque = sorted(whole.taken_by - _PLAIN)
            matrix = bool(opaque) and sum(size > 1 for size in shape) > 1 and last not in ("scale", "bias")
            reason = f"taken by {', '.join(opaque)}, which is no product" if matrix else reason
            reason = "bias" if reason == _NO_PRODUCT and last in ("bias", "b") else reason
        elif path in folds:
            reason = f"computed into {', '.join(dict.fromkeys(folds[path]))}"
        elif path not in program.used:
            reason = UNUSED
        owner = modules.get(path.rpartition("/")[0], "")
        found.append(
            OtherParameter(
                path=path,
                shape=shape,
                owner=owner,
                reason=reason,
                weight=matrix,
                folded=path in folds and (whole is None or whole.folded),
            )
        )
    for shape in dict.fromkeys(program.constants):
        found.append(
            OtherParameter(path="(constant)", shape=shape, owner="", reason="held constant: it is not among the params")
        )
    return tuple(found)


def _explained(error: Exception, example: Sequence[Any]) -> str:
    """Why a module cannot be called with these inputs, and what to do."""
    said = str(error).strip().splitlines()
    words = said[0] if said else type(error).__name__
    shapes = ", ".join(f"{np.shape(each)} {_dtype(each)}" for each in jax.tree.leaves(tuple(example)))
    hint = "Pass the inputs and keyword arguments with which the model can be called"
    if "rng" in words.lower():
        hint = (
            "It asks for random numbers: turn them off (deterministic=True, train=False), or pass rngs={'dropout': key}"
        )
    elif "mutable" in words.lower() or "modify" in words.lower():
        hint = "It writes to a collection: run it as for inference (train=False, use_running_average=True)"
    return f"The model cannot be called with ({shapes}): {words} {hint}."


def spec(leaf: Any) -> jax.ShapeDtypeStruct:
    """Of an input; a Python number leaves the dtype to what it meets."""
    weak = isinstance(leaf, bool | int | float | complex) or getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf), weak_type=weak)


def _dtype(leaf: Any) -> Any:
    """A leaf's dtype as jax has it."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return dtype if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(dtype)
