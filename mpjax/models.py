"""A Flax model as a pure function, its layers in execution order, and the one override of a layer's product.

Everything mpjax does to a layer (emulation, local-rounding taps, low-precision execution) is written as

    override(layer, product, lhs, rhs) -> out

called in place of each layer's product: `lhs` the activations (row numbers, where an embedding looks up), `rhs` the weights,
`product` a frozen description that can be called (`product(lhs, rhs)` is the product as the model computes it). How it gets
there: `hooks`.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import partial_eval

from mpjax import hooks
from mpjax.hooks import Session
from mpjax.partition import Block
from mpjax.product import Array as Array
from mpjax.product import Layer as Layer
from mpjax.product import OtherParameter as OtherParameter
from mpjax.product import Override as Override
from mpjax.product import Params as Params
from mpjax.product import Product as Product
from mpjax.product import flops as flops_of
from mpjax.traced import INPUT, count

Batches = Sequence[tuple[Array, ...]]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as a pure function.

    `call(params, *inputs, override=None) -> outputs`. `layers`: in execution order. `others`: parameters that stay as they
    are. The others are set by `apply` on the models it makes: see there.
    """

    params: Params
    layers: tuple[Layer, ...]
    call: Callable[..., Any]
    others: tuple[OtherParameter, ...] = ()
    original: Model | None = None
    assignment: Mapping[str, str] | None = None
    lowering: str | Mapping[str, str] = "own"
    activations: str = "float32"
    attention: str = "float32"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in execution order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def partition(self) -> tuple[Block, ...]:
        """The layers' weights as blocks, in execution order."""
        return tuple(layer.block for layer in self.layers)

    def layer(self, name: str) -> Layer:
        """The layer of that name.

        Raises:
            KeyError: no layer has that name; the message gives the nearest ones.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.3)
        raise KeyError(f"Unknown layer {name!r}. Nearest known names: {', '.join(near or self.names[:3])}.")


class OverrideNotReached(RuntimeError):
    """A product ran without passing through the override."""


class ModelError(ValueError):
    """A module that cannot be called with the given inputs."""


def from_linen(module: nn.Module, variables: Mapping[str, Any], *example: Array, **kwargs: Any) -> Model:
    """A linen module as a Model.

    Args:
        module: any linen module. Its Dense, DenseGeneral, Conv, ConvLocal, ConvTranspose, Einsum and Embed submodules become
            layers, wherever they are, and so does each weight that a module of one's own multiplies with its input.
        variables: as `module.init` returns them; everything beside "params" is held constant.
        *example: inputs, leading axis = example; only shapes and dtypes are used.
        **kwargs: handed to `module.apply` at each call (`train=False`, `deterministic=True`, say).

    Raises:
        ValueError: no "params", no example input, or no layer that a format could lower.
        ModelError: the module cannot be called so; the message gives Flax's own words.
    """
    _check_module(module, nn.Module, "a linen module", "from_nnx")
    variables = dict(variables)
    if "params" not in variables:
        raise ValueError(
            f"Expected variables with a 'params' collection, found {sorted(variables)}. Pass what module.init returned."
        )
    params = variables.pop("params")

    def run(run_params: Params, inputs: tuple[Array, ...], session: Session) -> Any:
        with nn.intercept_methods(hooks.linen_interceptor(session)):
            return module.apply({**variables, "params": run_params}, *inputs, **kwargs)

    return _build(run, params, example)


def from_nnx(module: nnx.Module, *example: Array, **kwargs: Any) -> Model:
    """An NNX module as a Model: its Linear, LinearGeneral, Conv, ConvTranspose, Einsum, Embed and own modules are layers.

    Params are the pure dict of its `nnx.Param` state, whose paths agree with linen's; all other state is held constant. `module`
    itself is not changed.

    Raises:
        ValueError: no example input, or no layer that a format could lower.
        ModelError: the module cannot be called so (the message gives Flax's own words), or it runs as for training: its outputs
            depend on random numbers, or its batch norms on the batch.
    """
    _check_module(module, nnx.Module, "an NNX module", "from_linen")
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    rest = hooks.copied(rest)  # as it is now: what the module's variables become later is not this model's
    params = nnx.to_pure_dict(state)
    if example:
        _check_inference(module, example, kwargs)

    def run(run_params: Params, inputs: tuple[Array, ...], session: Session) -> Any:
        copy = hooks.merged(graphdef, state, rest, run_params)
        hooks.hook_nnx(copy, session)
        return copy(*inputs, **kwargs)

    return _build(run, params, example)


def with_output(model: Model, function: Callable[..., Any]) -> Model:
    """The model followed by `function(outputs, *inputs[n:])`, where the model itself takes the first input only.

    It turns a model's raw outputs into the numbers whose change matters (landmarks in torso units, say); further
    inputs of the batch reach only `function`.
    """

    def call(params: Params, *inputs: Array, override: Override | None = None) -> Any:
        return function(model.call(params, inputs[0], override=override), *inputs[1:])

    original = None if model.original is None else with_output(model.original, function)
    return replace(model, call=call, original=original)


def summary(model: Model) -> str:
    """A table of the layers (kind, weights, kernel shape, output shape, FLOPs, bytes) and of what stays float32."""
    header = ("layer", "kind", "kernel", "output", "groups", "calls", "weights", "KiB fp32", "MFLOP")
    rows = [
        (
            layer.name,
            layer.kind,
            "x".join(map(str, layer.kernel_shape)),
            "x".join(map(str, layer.output_shape)),
            str(layer.groups),
            str(layer.calls),
            f"{layer.weights:,}",
            f"{layer.weights * 4 / 1024:.1f}",
            f"{layer.flops / 1e6:.2f}",
        )
        for layer in model.layers
    ]
    weights = sum(layer.weights for layer in model.layers)
    flops = sum(layer.flops for layer in model.layers)
    total = f"{len(rows)} layers, {weights:,} weights, {flops / 1e6:.1f} MFLOP per example"
    lines = [*_text_table(header, rows), total]
    if several := [layer.name for layer in model.layers if layer.calls > 1]:
        names = f"{', '.join(several[:5])}{' …' if len(several) > 5 else ''}"
        lines.append(
            f"{len(several)} of them run more than once (shared, or under a scan), always in one format: {names}."
        )
    biases = sum(each.reason == "bias" for each in model.others)
    others = [(e.path, "x".join(map(str, e.shape)), e.owner, e.reason) for e in model.others if e.reason != "bias"]
    if biases:
        lines.append(f"{biases} biases of these layers stay as they are.")
    if others:
        lines.append(f"{len(others)} other parameters stay as they are:")
        lines += _text_table(("parameter", "shape", "owner", "why"), others)
    return "\n".join(lines)


def check_batches(batches: Batches) -> Batches:
    """Batches, refused early if empty, ragged or not tuples of arrays.

    Raises:
        ValueError: says which batch differs and in what.
    """
    if not isinstance(batches, Sequence) or not batches:
        raise ValueError("Expected a non-empty sequence of batches, each a tuple of arrays.")
    shapes = []
    for number, batch in enumerate(batches):
        if not isinstance(batch, tuple) or not batch:
            raise ValueError(f"Batch {number} is a {type(batch).__name__}: expected a tuple of arrays, (x,) for one.")
        sizes = {np.shape(each)[:1] for each in batch}
        if len(sizes) != 1 or sizes in ({()}, {(0,)}):
            raise ValueError(f"Batch {number}: arrays of one equal, non-zero leading axis expected, found {sizes}.")
        shapes.append(tuple(np.shape(each) for each in batch))
        if shapes[-1] != shapes[0]:
            raise ValueError(
                f"Batch {number} has shapes {shapes[-1]}, batch 0 {shapes[0]}: make all batches of equal shape "
                "(drop or pad the last)."
            )
    return batches


def _check_module(module: Any, kind: type, expected: str, other: str) -> None:
    if not isinstance(module, kind):
        raise TypeError(
            f"Expected {expected}, found {type(module).__name__}. The other kind of Flax module goes through models.{other}; any "
            "other JAX code has scores through sensitivity.from_loss, which needs no Flax."
        )


def _check_inference(module: nnx.Module, example: tuple[Array, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses an NNX module in training mode, which would be called without a word from Flax."""
    graphdef, random, statistics, rest = nnx.split(module, nnx.RngState, nnx.BatchStat, ...)  # type: ignore[misc]
    held = [jax.tree.leaves(random), jax.tree.leaves(statistics)]
    if not any(held):
        return

    def call(both: Any, *inputs: Array) -> Any:
        copy = nnx.merge(graphdef, *hooks.copied((*both, rest)))
        return copy(*inputs, **kwargs), jax.tree.leaves(nnx.state(copy, nnx.BatchStat))

    try:
        closed, (_, after) = jax.make_jaxpr(call, return_shape=True)((random, statistics), *example)
    except Exception:  # the discovery explains it
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


def _build(
    run: Callable[[Params, tuple[Array, ...], Session], Any],
    params: Params,
    example: tuple[Array, ...],
) -> Model:
    if not example:
        raise ValueError("Expected at least one example input after the module: layers are found by tracing it.")
    dtypes = {path: leaf.dtype for path, leaf in _named_leaves(params)}
    if not any(jnp.issubdtype(each, jnp.floating) for each in dtypes.values()):
        found = f"only {', '.join(sorted({str(each) for each in dtypes.values()}))}" if dtypes else "none at all"
        raise ValueError(f"Expected a model with float32 weights, found {found}: there is nothing to lower.")
    discovery = Session(override=_identity, dtypes=dtypes)
    try:
        jax.eval_shape(lambda p, *x: run(p, x, discovery), params, *example)
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        raise ModelError(_explained(error, example)) from error
    if discovery.foreign:
        raise OverrideNotReached(
            f"The weights of {len(discovery.foreign)} layers are not among the model's params: "
            f"{', '.join(discovery.foreign[:5])}. They belong to a module applied inside this one: make it a submodule."
        )
    for name in _tables_used_otherwise(run, params, example, discovery):
        discovery.closed[discovery.found.pop(name).kernel] = hooks.USED_OTHERWISE
    if not discovery.found:
        raise ValueError(
            "Found no layer that multiplies its own weights with its input and that the override can reach; modules seen: "
            f"{sorted(set(discovery.owners.values()))}. Nothing here can be lowered."
        )
    if discovery.narrow:
        raise ValueError(
            f"Expected float32 layers, found {len(discovery.narrow)} that compute in other dtypes: "
            f"{', '.join(discovery.narrow[:5])}. Build the module with dtype=float32 (or None) and float32 params and inputs; "
            "mpjax.apply then lowers them."
        )
    layers, expected = _counted(run, params, example, discovery)

    def call(call_params: Params, *inputs: Array, override: Override | None = None) -> Any:
        session = Session(override=override or _identity, dtypes=dtypes, layers=layers)
        outputs = run(call_params, inputs, session)
        _check_reached(session, expected)
        return outputs

    others = _others(params, tuple(layers.values()), discovery)
    missed = [each for each in others if len(each.shape) >= 2 and each.reason not in _EXPECTED]
    if missed:
        warnings.warn(
            f"{len(missed)} weights stay in float32, because the override does not reach their products: "
            f"{'; '.join(f'{each.path} ({each.owner}: {each.reason})' for each in missed[:5])}{' …' if len(missed) > 5 else ''}.",
            stacklevel=3,
        )
    return Model(params=params, layers=tuple(layers.values()), call=call, others=others)


_EXPECTED = (hooks.NO_PRODUCT, "bias")  # reasons that nobody needs to be warned of


def _tables_used_otherwise(
    run: Callable[[Params, tuple[Array, ...], Session], Any],
    params: Params,
    example: tuple[Array, ...],
    discovery: Session,
) -> list[str]:
    """Embeddings whose tables the model also reads past its `__call__` and `attend`: without these two the outputs need them."""
    tables = [layer for layer in discovery.found.values() if layer.kind == hooks.TABLE]
    if not tables:
        return []

    def nothing(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        if layer not in tables:
            return product(lhs, rhs)
        out = jax.eval_shape(product, lhs, rhs)
        return jnp.zeros(out.shape, out.dtype)

    session = Session(override=nothing, dtypes=discovery.dtypes, layers=discovery.found)
    closed = jax.make_jaxpr(lambda p, *x: run(p, x, session))(params, *example)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    needed = {path for (path, _), each in zip(_named_leaves(params), used, strict=False) if each}
    return [layer.name for layer in tables if layer.kernel in needed]


def _counted(
    run: Callable[[Params, tuple[Array, ...], Session], Any],
    params: Params,
    example: tuple[Array, ...],
    discovery: Session,
) -> tuple[dict[str, Layer], Mapping[str, int]]:
    """The layers with their whole kernels (under a scan a product sees a slice), runs and FLOPs; and how often each is traced."""
    traced: list[tuple[str, int, int]] = []  # layer, size of its input, FLOPs of one run

    def mark(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        out = product(checkpoint_name(lhs, f"{INPUT}{len(traced)}"), rhs)
        traced.append((layer.name, max(lhs.size, 1), flops_of(product, lhs, rhs, out)))
        return out

    session = Session(override=mark, dtypes=discovery.dtypes, layers=discovery.found)
    closed = jax.make_jaxpr(lambda p, *x: run(p, x, session))(params, *example)
    _check_reached(session, {name: 1 for name in discovery.found})  # an inner trace that was cached is skipped now
    runs: Counter[int] = Counter()
    count(closed.jaxpr, 1, [size for _, size, _ in traced], runs)
    calls, flops = Counter[str](), Counter[str]()
    for number, (name, _, each) in enumerate(traced):
        calls[name] += runs[number]
        flops[name] += runs[number] * each
    leaves, examples = dict(_named_leaves(params)), max(np.shape(example[0])[:1] or (1,))
    return {
        name: replace(
            layer,
            kernel_shape=tuple(leaves[layer.kernel].shape),
            summed=_of_stack(layer, leaves[layer.kernel].shape),
            calls=calls[name],
            flops=flops[name] // max(examples, 1),
        )
        for name, layer in discovery.found.items()
    }, session.reached


def _of_stack(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The summed axes in the whole kernel, which a scan slices along its first axes; None where it slices others."""
    before = len(shape) - len(layer.kernel_shape)
    if layer.summed is None or tuple(shape[before:]) != layer.kernel_shape:
        return None
    return tuple(axis + before for axis in layer.summed)


def _explained(error: Exception, example: tuple[Array, ...]) -> str:
    """Why a module cannot be called with these inputs, and what to do."""
    said = str(error).strip().splitlines()
    words = said[0] if said else type(error).__name__
    shapes = ", ".join(f"{np.shape(each)} {jnp.result_type(each)}" for each in example)
    hint = "Pass the inputs and keyword arguments with which module.apply works"
    if "rng" in words.lower():
        hint = (
            "It asks for random numbers: turn them off (deterministic=True, train=False), or pass rngs={'dropout': key}"
        )
    elif "mutable" in words.lower() or "modify" in words.lower():
        hint = "It writes to a collection: run it as for inference (train=False, use_running_average=True)"
    return f"The module cannot be called with ({shapes}): {words} {hint}."


def _check_reached(session: Session, expected: Mapping[str, int]) -> None:
    layers = session.layers or {}
    missed = [name for name in layers if session.reached[name] < expected[name]]
    if missed:
        raise OverrideNotReached(
            f"The override did not reach the product of {len(missed)} of {len(layers)} layers: "
            f"{', '.join(missed[:5])}{' …' if len(missed) > 5 else ''}. An inner function that was jitted and traced before "
            "does this: take inner jax.jit out of the model, and jit the whole instead."
        )


def _others(params: Params, layers: Iterable[Layer], discovery: Session) -> tuple[OtherParameter, ...]:
    kernels = {layer.kernel for layer in layers}
    biases = {layer.bias for layer in layers} | {f"{each.rpartition('/')[0]}/bias" for each in kernels}
    found = []
    for path, leaf in _named_leaves(params):
        if path in kernels:
            continue
        module = path.rpartition("/")[0]
        owner = discovery.owners.get(module, "")
        if path in biases:
            reason = "bias"
        elif path in discovery.closed or module in discovery.closed:
            reason = discovery.closed.get(path) or discovery.closed[module]
        else:
            vector = np.ndim(leaf) < 2 or path.rpartition("/")[2] in ("scale", "bias")  # of a norm, maybe scanned
            reason = hooks.NO_PRODUCT if vector else hooks.NOT_REACHED
        found.append(OtherParameter(path=path, shape=tuple(np.shape(leaf)), owner=owner, reason=reason))
    return tuple(found)


def _named_leaves(params: Params) -> list[tuple[str, Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in leaves]


def _identity(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
    return product(lhs, rhs)


def _text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
