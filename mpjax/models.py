"""A Flax model as a pure function, its layers in execution order, and the one override of a layer's product.

Everything mpjax does to a layer (emulation, local-rounding taps, low-precision execution) is written as

    override(layer, product, lhs, rhs) -> out

called in place of each layer's product: `lhs` the activations, `rhs` the weights, `product` a frozen description that
can be called (`product(lhs, rhs)` is the product as the model computes it, bias included). Only Flax's public hooks are
used: `promote_dtype`, `dot_general` and `conv_general_dilated`. Linen modules are reached through `nn.intercept_methods`,
NNX modules by setting the same hooks on a merged copy; the user's object is never changed.
"""

from __future__ import annotations

import difflib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpjax.partition import Block

Array = jax.Array
Params = Any
Batches = Sequence[tuple[Array, ...]]
Override = Callable[["Layer", "Product", Array, Array], Array]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module that multiplies its own weights with its input.

    `name`: slash path. `kernel`, `bias`: slash paths in the model's params. Shapes are those of the example
    inputs, `flops` are per example (first axis) and over all `calls`, two per multiply-add.
    """

    name: str
    kind: str
    kernel: str
    bias: str | None
    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    groups: int
    calls: int
    flops: int

    @property
    def block(self) -> Block:
        """The parameters that a format lowers."""
        return Block(name=self.name, paths=(self.kernel,))

    @property
    def weights(self) -> int:
        """Number of weights in the kernel."""
        return int(np.prod(self.kernel_shape))


@dataclass(frozen=True, kw_only=True)
class OtherParameter:
    """A parameter that no format lowers, and why."""

    path: str
    shape: tuple[int, ...]
    owner: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """One dot or convolution, and the bias added to it.

    `kind`: "dot" | "conv". For a dot only `dimension_numbers` and `precision` say something. `function` is the
    module's own hook, or the plain lax function; `extra` what else Flax hands to it (`preferred_element_type`, say).
    """

    kind: str
    function: Callable[..., Array]
    dimension_numbers: Any
    precision: Any = None
    window_strides: tuple[int, ...] = ()
    padding: Any = None
    lhs_dilation: tuple[int, ...] = ()
    rhs_dilation: tuple[int, ...] = ()
    feature_group_count: int = 1
    bias: Array | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """The product as the model computes it, bias included."""
        return self.add_bias(self.multiply(lhs, rhs))

    def multiply(self, lhs: Array, rhs: Array, *, accumulate: str | None = None) -> Array:
        """The product without bias.

        `accumulate`: dtype of accumulation and result where the operands are narrower (`preferred_element_type`). A
        hook that has no such argument gets its operands converted up first: the result is the same.
        """
        if accumulate is not None and not _takes_preferred_type(self.function):
            lhs, rhs, accumulate = lhs.astype(accumulate), rhs.astype(accumulate), None
        extra = dict(self.extra) if accumulate is None else {"preferred_element_type": jnp.dtype(accumulate)}
        if self.kind == "dot":
            return self.function(lhs, rhs, self.dimension_numbers, precision=self.precision, **extra)
        return self.function(
            lhs,
            rhs,
            self.window_strides,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            dimension_numbers=self.dimension_numbers,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            **extra,
        )

    def add_bias(self, out: Array) -> Array:
        """`out` plus the bias, added in the dtype of `out`."""
        if self.bias is None:
            return out
        bias = self.bias.astype(out.dtype)
        return out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)


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


def from_linen(module: nn.Module, variables: Mapping[str, Any], *example: Array, **kwargs: Any) -> Model:
    """A linen module as a Model.

    Args:
        module: any linen module; its Dense and Conv submodules become layers, wherever they are.
        variables: as `module.init` returns them; everything beside "params" is held constant.
        *example: inputs, leading axis = example; only shapes and dtypes are used.
        **kwargs: handed to `module.apply` at each call (`train=False`, say).

    Raises:
        ValueError: no "params", no example input, or no layer that a format could lower.
    """
    variables = dict(variables)
    if "params" not in variables:
        raise ValueError(
            f"Expected variables with a 'params' collection, found {sorted(variables)}. Pass what module.init returned."
        )
    params = variables.pop("params")

    def run(run_params: Params, inputs: tuple[Array, ...], session: _Session) -> Any:
        with nn.intercept_methods(_linen_interceptor(session)):
            return module.apply({**variables, "params": run_params}, *inputs, **kwargs)

    return _build(run, params, example)


def from_nnx(module: nnx.Module, *example: Array, **kwargs: Any) -> Model:
    """An NNX module as a Model: its Linear and Conv submodules become layers. `module` itself is not changed.

    Params are the pure dict of its `nnx.Param` state, whose paths agree with linen's; all other state is held constant.

    Raises:
        ValueError: no example input, or no layer that a format could lower.
    """
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    params = nnx.to_pure_dict(state)

    def run(run_params: Params, inputs: tuple[Array, ...], session: _Session) -> Any:
        run_state = jax.tree.map(lambda leaf: leaf, state)  # a copy: replace_by_pure_dict works in place
        nnx.replace_by_pure_dict(run_state, run_params)
        merged = nnx.merge(graphdef, run_state, rest)
        sub: Any
        for path, sub in list(nnx.iter_modules(merged)):
            session.owners["/".join(map(str, path))] = type(sub).__name__
            hooks = _hook_of(sub, _NNX_HOOKS)
            if hooks:
                name = "/".join(map(str, path)) or type(sub).__name__
                kernel, bias = _leaf_paths(path, has_bias=sub.bias is not None)
                call = _Call(session, name, type(sub).__name__, kernel, bias)
                own = getattr(sub, hooks)
                setattr(sub, hooks, call.hook(hooks, own))
                sub.promote_dtype = call.promote_tuple(sub.promote_dtype)
        return merged(*inputs, **kwargs)

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


# --- the machinery behind both adapters -------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Session:
    """What one call of a model gathers while it is traced."""

    override: Override
    dtypes: Mapping[str, Any]  # slash path -> dtype in the model's own params
    layers: Mapping[str, Layer] | None = None  # None: discovery
    found: dict[str, Layer] = field(default_factory=dict)
    reached: Counter[str] = field(default_factory=Counter)
    owners: dict[str, str] = field(default_factory=dict)
    narrow: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    inside: bool = False

    @contextmanager
    def guard(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False


@dataclass(kw_only=False)
class _Call:
    """The hooks of one layer: `promote` takes the bias away, the product hook gives it to the override."""

    session: _Session
    name: str
    kind: str
    kernel: str
    bias_path: str | None
    bias: Array | None = None
    dtype: Any = None

    def promote(self, own: Callable[..., Any], inputs: Any, kernel: Any, bias: Any, **kwargs: Any) -> tuple:
        """As the module promotes; but a kernel that is now stored in another dtype than the model's own keeps it."""
        own_dtype = self.session.dtypes[self.kernel]
        lowered = kernel.dtype != own_dtype
        stand_in = jnp.zeros((), own_dtype) if lowered else kernel
        inputs, promoted, self.bias = own(inputs, stand_in, bias, **kwargs)
        self.dtype = promoted.dtype
        nothing = None if self.bias is None else jnp.zeros_like(self.bias)
        return inputs, kernel if lowered else promoted, nothing

    def promote_tuple(self, own: Callable[..., Any]) -> Callable[..., tuple]:
        """The NNX form: one tuple of arrays."""

        def hook(arrays: tuple, **kwargs: Any) -> tuple:
            return self.promote(lambda *each, **more: own(each, **more), *arrays, **kwargs)

        return hook

    def promote_positional(self, own: Callable[..., Any]) -> Callable[..., tuple]:
        """The linen form: positional arrays."""

        def hook(inputs: Any, kernel: Any, bias: Any, **kwargs: Any) -> tuple:
            return self.promote(own, inputs, kernel, bias, **kwargs)

        return hook

    def hook(self, which: str, own: Callable[..., Array] | None) -> Callable[..., Array]:
        """The product hook; composes with the one that the module already has."""
        return self._dot(own or jax.lax.dot_general) if which == "dot_general" else self._conv(own)

    def _dot(self, own: Callable[..., Array]) -> Callable[..., Array]:
        def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, **more: Any) -> Array:
            product = Product(
                kind="dot",
                function=own,
                dimension_numbers=dimension_numbers,
                precision=precision,
                bias=self.bias,
                extra={name: value for name, value in more.items() if value is not None},
            )
            return self._run(product, lhs, rhs)

        return dot_general

    def _conv(self, own: Callable[..., Array] | None) -> Callable[..., Array]:
        def conv_general_dilated(
            lhs: Array,
            rhs: Array,
            window_strides: Any,
            padding: Any,
            lhs_dilation: Any = None,
            rhs_dilation: Any = None,
            dimension_numbers: Any = None,
            feature_group_count: int = 1,
            precision: Any = None,
            **more: Any,
        ) -> Array:
            spatial = len(window_strides)
            product = Product(
                kind="conv",
                function=own or jax.lax.conv_general_dilated,
                dimension_numbers=dimension_numbers,
                precision=precision,
                window_strides=tuple(window_strides),
                padding=padding if isinstance(padding, str) else tuple(tuple(pair) for pair in padding),
                lhs_dilation=tuple(lhs_dilation or (1,) * spatial),
                rhs_dilation=tuple(rhs_dilation or (1,) * spatial),
                feature_group_count=feature_group_count,
                bias=self.bias,
                extra={name: value for name, value in more.items() if value is not None},
            )
            return self._run(product, lhs, rhs)

        return conv_general_dilated

    def _run(self, product: Product, lhs: Array, rhs: Array) -> Array:
        session = self.session
        session.reached[self.name] += 1
        if session.layers is None:
            out = product(lhs, rhs)
            if {lhs.dtype, rhs.dtype} != {jnp.dtype(jnp.float32)}:
                session.narrow.append(f"{self.name} ({lhs.dtype} x {rhs.dtype})")
            session.found[self.name] = self._describe(product, lhs, rhs, out)
            return out
        with jax.named_scope(self.name):
            out = session.override(session.layers[self.name], product, lhs, rhs)
            return out.astype(product.extra.get("preferred_element_type", self.dtype))

    def _describe(self, product: Product, lhs: Array, rhs: Array, out: Array) -> Layer:
        macs = out.size * rhs.size // rhs.shape[-1]  # per output number: kernel size x input features of its group
        seen = self.session.found.get(self.name)
        examples = max(lhs.shape[0], 1) if lhs.ndim > 1 else 1
        return Layer(
            name=self.name,
            kind=self.kind,
            kernel=self.kernel,
            bias=self.bias_path,
            kernel_shape=tuple(rhs.shape),
            input_shape=tuple(lhs.shape),
            output_shape=tuple(out.shape),
            groups=product.feature_group_count,
            calls=1 + (seen.calls if seen else 0),
            flops=2 * macs // examples + (seen.flops if seen else 0),
        )


_LINEN_HOOKS: dict[type, str] = {nn.Dense: "dot_general", nn.Conv: "conv_general_dilated"}
_NNX_HOOKS: dict[type, str] = {nnx.Linear: "dot_general", nnx.Conv: "conv_general_dilated"}


def _hook_of(module: Any, hooks: Mapping[type, str]) -> str | None:
    return next((hook for kind, hook in hooks.items() if isinstance(module, kind)), None)


def _linen_interceptor(session: _Session) -> Callable[..., Any]:
    def interceptor(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if session.inside or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        session.owners["/".join(module.path)] = type(module).__name__
        which = _hook_of(module, _LINEN_HOOKS)
        if which is None:
            return next_fun(*args, **kwargs)
        variables = dict(module.variables)
        kernel, bias = _leaf_paths(module.path, has_bias=module.use_bias)
        name = "/".join(module.path) or type(module).__name__
        if kernel not in session.dtypes:  # a model inside the model, with weights of its own
            session.foreign.append(name)
            return next_fun(*args, **kwargs)
        call = _Call(session, name, type(module).__name__, kernel, bias)
        factory = getattr(module, which + "_cls")
        own = factory() if factory is not None else getattr(module, which)
        changes = {
            which: call.hook(which, own),
            which + "_cls": None,
            "promote_dtype": call.promote_positional(module.promote_dtype),
        }
        with session.guard():
            return module.clone(parent=None, **changes).apply(variables, *args, **kwargs)

    return interceptor


def _build(
    run: Callable[[Params, tuple[Array, ...], _Session], Any],
    params: Params,
    example: tuple[Array, ...],
) -> Model:
    if not example:
        raise ValueError("Expected at least one example input after the module: layers are found by tracing it.")
    dtypes = {path: leaf.dtype for path, leaf in _named_leaves(params)}
    discovery = _Session(override=_identity, dtypes=dtypes)
    jax.eval_shape(lambda p, *x: run(p, x, discovery), params, *example)
    if not discovery.found:
        raise ValueError(
            "Found no Dense, Linear or Conv layer that the override can reach; modules seen: "
            f"{sorted(set(discovery.owners.values()))}. Nothing here can be lowered."
        )
    if discovery.foreign:
        raise OverrideNotReached(
            f"The weights of {len(discovery.foreign)} layers are not among the model's params: "
            f"{', '.join(discovery.foreign[:5])}. They belong to a module applied inside this one: make it a submodule."
        )
    if discovery.narrow:
        raise ValueError(
            f"Expected float32 layers, found {len(discovery.narrow)} that compute in other dtypes: "
            f"{', '.join(discovery.narrow[:5])}. Build the module with dtype=float32 (or None) and float32 params and inputs; "
            "mpjax.apply then lowers them."
        )
    leaves = dict(_named_leaves(params))
    layers = {name: _stacked(layer, leaves[layer.kernel]) for name, layer in discovery.found.items()}
    again = _Session(override=_identity, dtypes=dtypes, layers=layers)
    jax.eval_shape(lambda p, *x: run(p, x, again), params, *example)  # a cached inner trace is skipped now
    _check_reached(again)

    def call(call_params: Params, *inputs: Array, override: Override | None = None) -> Any:
        session = _Session(override=override or _identity, dtypes=dtypes, layers=layers)
        outputs = run(call_params, inputs, session)
        _check_reached(session)
        return outputs

    others = _others(params, tuple(layers.values()), discovery.owners)
    return Model(params=params, layers=tuple(layers.values()), call=call, others=others)


def _check_reached(session: _Session) -> None:
    layers = session.layers or {}
    missed = [name for name, layer in layers.items() if session.reached[name] < layer.calls]
    if missed:
        raise OverrideNotReached(
            f"The override did not reach the product of {len(missed)} of {len(layers)} layers: "
            f"{', '.join(missed[:5])}{' …' if len(missed) > 5 else ''}. An inner function that was jitted and traced before "
            "does this: take inner jax.jit out of the model, and jit the whole instead."
        )


def _stacked(layer: Layer, kernel: Array) -> Layer:
    """The layer with its whole kernel: under `nn.scan` a product sees one slice of it at a time."""
    slices = int(np.prod(kernel.shape)) // max(layer.weights, 1)
    return replace(layer, kernel_shape=tuple(kernel.shape), flops=layer.flops * slices)


def _others(params: Params, layers: Iterable[Layer], owners: Mapping[str, str]) -> tuple[OtherParameter, ...]:
    kernels = {layer.kernel for layer in layers}
    biases = {layer.bias for layer in layers}
    found = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys)
        if path in kernels:
            continue
        owner = owners.get(path.rpartition("/")[0], "")
        is_weight = path.rpartition("/")[2] in ("kernel", "embedding")
        reason = (
            "bias" if path in biases else ("its product was not reached" if is_weight else "not a product's weights")
        )
        found.append(OtherParameter(path=path, shape=tuple(np.shape(leaf)), owner=owner, reason=reason))
    return tuple(found)


def _named_leaves(params: Params) -> list[tuple[str, Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in leaves]


def _identity(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
    return product(lhs, rhs)


def _leaf_paths(path: Iterable[Any], *, has_bias: bool) -> tuple[str, str | None]:
    prefix = [str(each) for each in path]
    return "/".join([*prefix, "kernel"]), "/".join([*prefix, "bias"]) if has_bias else None


def _takes_preferred_type(function: Callable[..., Any]) -> bool:
    if function in (jax.lax.dot_general, jax.lax.conv_general_dilated):
        return True
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "preferred_element_type" in parameters


def _text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
