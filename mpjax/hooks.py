"""How the override reaches a layer's product: Flax's hooks, and `reach` where a module has none.

Used are Flax's public `promote_dtype`, `dot_general` and `conv_general_dilated`; linen modules through `nn.intercept_methods`,
NNX modules by setting the same hooks on a merged copy. Modules without a hook, but with weights of their own, run through their
traced program.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpjax import reach
from mpjax.product import Array, Layer, Override, Params, Product


@dataclass(kw_only=True)
class Session:
    """What one call of a model gathers while it is traced.

    `reached`: how often each layer's product was traced. Of a discovery (`layers` is None) also: `found`, the layers;
    `owners`, the modules by path; `narrow`, products of other dtypes; `foreign`, layers whose weights are not the model's;
    `closed`, modules that could not be traced alone, and why.
    """

    override: Override
    dtypes: Mapping[str, Any]  # slash path -> dtype in the model's own params
    layers: Mapping[str, Layer] | None = None
    found: dict[str, Layer] = field(default_factory=dict)
    reached: Counter[str] = field(default_factory=Counter)
    owners: dict[str, str] = field(default_factory=dict)
    narrow: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    inside: bool = False
    prefix: tuple[str, ...] = ()  # of the module that is traced alone
    entered: tuple[str, ...] | None = None  # that module itself

    @contextmanager
    def guard(self) -> Iterator[None]:
        """No module inside is hooked."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    @contextmanager
    def alone(self, path: tuple[str, ...]) -> Iterator[None]:
        """The module at this path is traced alone; those inside it are hooked."""
        before = self.prefix, self.entered
        self.prefix = self.entered = path
        try:
            yield
        finally:
            self.prefix, self.entered = before


@dataclass(kw_only=False)
class LayerCall:
    """The hooks of one layer: `promote` takes the bias away, the product hook gives it to the override."""

    session: Session
    name: str
    kind: str
    kernel: str
    bias_path: str | None
    bias: Array | None = None
    dtype: Any = None
    kernel_shape: tuple[int, ...] | None = None  # where the product may see its weights moved about
    summed: tuple[int, ...] | None = None  # then: axes of the weights as they are stored

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
                bias=_beside(self.bias, lhs, dimension_numbers),
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

    def look_up(self, own: Callable[[Array, Array], Array], ids: Array, table: Array, dtype: Any) -> Array:
        """Rows of a table; `own(ids, table)` is how the module finds them, `dtype` what it gives."""
        stored = self.session.dtypes[self.kernel]
        self.dtype, self.summed = jnp.result_type(dtype or stored), (1,)

        def function(ids: Array, table: Array) -> Array:
            return own(ids, table) if table.dtype == stored else jnp.take(table, ids, axis=0)

        return self._run(Product(kind="lookup", function=function), ids, table)

    def multiply(
        self,
        kind: str,
        function: Callable[..., Array],
        parameters: Mapping[str, Any],
        lhs: Array,
        rhs: Array,
        axes: tuple[int | None, ...],
    ) -> Array:
        """A product that `reach` found, in lax's parameters."""
        self.dtype = jnp.result_type(lhs.dtype)
        named = {name: value for name, value in parameters.items() if name in _PRODUCT_FIELDS}
        extra = {name: value for name, value in parameters.items() if name not in named and value not in (None, 1)}
        channels = self.kernel_shape is not None and sorted(map(str, axes)) == list(
            map(str, range(len(self.kernel_shape)))
        )
        product = Product(kind=kind, function=function, extra=extra, channels=channels, **named)
        moved = product.summed
        self.summed = (
            None if moved is None else tuple(sorted(each for axis in moved if (each := axes[axis]) is not None))
        )
        return self._run(product, lhs, rhs)

    def _run(self, product: Product, lhs: Array, rhs: Array) -> Array:
        session = self.session
        session.reached[self.name] += 1
        if session.layers is None:
            out = product(lhs, rhs)
            if {lhs.dtype if product.kind != "lookup" else rhs.dtype, rhs.dtype} != {jnp.dtype(jnp.float32)}:
                session.narrow.append(f"{self.name} ({lhs.dtype} x {rhs.dtype})")
            session.found.setdefault(self.name, self._describe(product, lhs, rhs, out))
            return out
        with jax.named_scope(self.name):
            out = session.override(session.layers[self.name], product, lhs, rhs)
            return out.astype(product.extra.get("preferred_element_type", self.dtype))

    def _describe(self, product: Product, lhs: Array, rhs: Array, out: Array) -> Layer:
        return Layer(
            name=self.name,
            kind=self.kind,
            kernel=self.kernel,
            bias=self.bias_path,
            kernel_shape=self.kernel_shape or tuple(rhs.shape),
            input_shape=tuple(lhs.shape),
            output_shape=tuple(out.shape),
            groups=product.feature_group_count,
            calls=0,  # counted in the program
            flops=0,
            summed=self.summed if self.kernel_shape else product.summed,
        )


# Modules whose product has a hook of its own.
_LINEN_HOOKS: dict[type, str] = {
    nn.Dense: "dot_general",
    nn.DenseGeneral: "dot_general",
    nn.Conv: "conv_general_dilated",
}
_NNX_HOOKS: dict[type, str] = {
    nnx.Linear: "dot_general",
    nnx.LinearGeneral: "dot_general",
    nnx.Conv: "conv_general_dilated",
}
TABLE = "Embed"  # kind of an embedding
USED_OTHERWISE, NO_PRODUCT = "used in other ways than in a product", "not a product's weights"
NOT_REACHED = "its product was not reached"
_PRODUCT_FIELDS = frozenset(Product.__dataclass_fields__) - {"kind", "function", "bias", "extra"}


def hook_of(module: Any) -> str | None:
    """The name of the module's product hook; None where it has none."""
    hooks = _NNX_HOOKS if isinstance(module, nnx.Module) else _LINEN_HOOKS
    return next((hook for kind, hook in hooks.items() if isinstance(module, kind)), None)


def linen_interceptor(session: Session) -> Callable[..., Any]:
    """For `nn.intercept_methods`: each layer's product goes through the session."""

    def interceptor(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        path = (*session.prefix, *module.path)
        table = _is_table(module, nn.Embed) and context.method_name in ("__call__", "attend")
        if session.inside or not (table or context.method_name == "__call__") or path == session.entered:
            return next_fun(*args, **kwargs)
        session.owners["/".join(path)] = type(module).__name__
        if table:
            return _linen_table(session, next_fun, module, path, context.method_name, args, kwargs)
        which = hook_of(module)
        if which is None:
            return _without_hook(session, next_fun, module, path, args, kwargs)
        variables = dict(module.variables)
        kernel, bias = leaf_paths(path, has_bias=module.use_bias)
        name = "/".join(path) or type(module).__name__
        if kernel not in session.dtypes:  # a model inside the model, with weights of its own
            session.foreign.append(name)
            return next_fun(*args, **kwargs)
        call = LayerCall(session, name, type(module).__name__, kernel, bias)
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


def _without_hook(
    session: Session, next_fun: Callable[..., Any], module: nn.Module, path: tuple[str, ...], args: tuple, kwargs: dict
) -> Any:
    """A linen module whose products no hook reaches: through its traced program, where it has weights of its own."""
    where = "/".join(path)
    params = dict(module.variables.get("params", {}))
    own = {name: leaf for name, leaf in params.items() if np.ndim(leaf) >= 2 and not isinstance(leaf, Mapping)}
    own = {name: leaf for name, leaf in own.items() if "/".join((*path, name)) in session.dtypes}
    kind = type(module).__name__
    if where in session.closed or not _wanted(session, path, own, kind):
        return next_fun(*args, **kwargs)
    variables, alone = dict(module.variables), module.clone(parent=None)

    def function(weights: Mapping[str, Array]) -> Any:
        return alone.apply({**variables, "params": {**params, **weights}}, *args, **kwargs)

    with session.alone(path):
        return through(session, function, own, path, kind, lambda: next_fun(*args, **kwargs))


def _is_table(module: Any, kind: Any) -> bool:
    """Whether a module is Flax's embedding and no more: what a subclass does beside looking up, only its own call knows."""
    own = all(getattr(type(module), method, None) is getattr(kind, method) for method in ("__call__", "attend"))
    return own and module.num_embeddings > 1  # one row is broadcast, whatever is looked up


def _linen_table(
    session: Session,
    next_fun: Callable[..., Any],
    module: nn.Embed,
    path: tuple[str, ...],
    method: str,
    args: tuple,
    kwargs: dict,
) -> Any:
    """A linen embedding: rows of its table, or (`attend`) its product with the whole of it."""
    if not _wanted(session, path, ("embedding",), TABLE):
        return next_fun(*args, **kwargs)
    variables, alone = dict(module.variables), module.clone(parent=None)
    table = variables.get("params", {}).get("embedding")
    if table is None or np.ndim(table) != 2:
        return next_fun(*args, **kwargs)

    def call(table: Array, *each: Any, **more: Any) -> Any:
        changed = {**variables, "params": {**variables["params"], "embedding": table}}
        with session.guard():
            return alone.apply(changed, *each, **more, method=method)

    return _table(session, call, table, module.dtype, path, method, lambda: next_fun(*args, **kwargs), args, kwargs)


def _table(
    session: Session,
    call: Callable[..., Any],
    table: Array,
    dtype: Any,
    path: tuple[str, ...],
    method: str,
    untouched: Callable[[], Any],
    args: tuple,
    kwargs: dict,
) -> Any:
    """A lookup or an `attend` of an embedding, `call(table, *args, **kwargs)`."""
    leaf = "/".join((*path, "embedding"))
    if session.dtypes.get(leaf) != jnp.float32:
        if leaf in session.dtypes:
            session.closed[leaf] = f"stored in {session.dtypes[leaf]}"
        return untouched()
    if method == "attend":

        def function(weights: Mapping[str, Array]) -> Any:
            return call(weights["embedding"], *args, **kwargs)

        return through(session, function, {"embedding": table}, path, TABLE, untouched)
    given = [each for each in (*args, *kwargs.values()) if each is not None]
    if len(given) > 1:
        session.closed[leaf] = "its rows are sharded on the way"
        return untouched()
    (name,) = _names(path, ("embedding",), TABLE).values()
    (ids,) = given
    layer = LayerCall(session, name, TABLE, leaf, None, kernel_shape=tuple(np.shape(table)))
    return layer.look_up(lambda ids, table: call(table, ids), ids, table, dtype)


def hook_nnx(module: nnx.Module, session: Session) -> None:
    """Each layer's product goes through the session; `module` is changed."""
    for path, sub in list(nnx.iter_modules(module)):
        names = tuple(map(str, path))
        session.owners["/".join(names)] = type(sub).__name__
        hooked: Any = sub
        which = hook_of(sub)
        if which is None:
            params = {name: each for name, each in vars(sub).items() if isinstance(each, nnx.Param)}
            own = tuple(name for name, each in params.items() if np.ndim(each.get_value()) >= 2)
            kind = TABLE if _is_table(sub, nnx.Embed) else type(sub).__name__
            if _wanted(session, names, own, kind):
                through_session = _nnx_table if kind == TABLE else _through_nnx
                object.__setattr__(sub, "__class__", _traced_class(type(sub)))
                hooked.mpjax_through = functools.partial(through_session, session, names, own)
            continue
        kernel, bias = leaf_paths(names, has_bias=hooked.bias is not None)
        name = "/".join(names) or type(sub).__name__
        call = LayerCall(session, name, type(sub).__name__, kernel, bias)
        factory = getattr(hooked, which + "_cls", None)
        setattr(sub, which, call.hook(which, factory() if factory is not None else getattr(hooked, which)))
        if factory is not None:
            setattr(sub, which + "_cls", None)
        hooked.promote_dtype = call.promote_tuple(hooked.promote_dtype)


@functools.cache
def _traced_class(kind: type) -> type:
    """The same class, but a call goes through `mpjax_through`, and so does an embedding's `attend`."""

    def through_session(method: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.mpjax_through(getattr(kind, method), self, args, kwargs)

        return call

    methods = ("__call__", "attend") if kind.__call__ is nnx.Embed.__call__ else ("__call__",)
    return type(kind.__name__, (kind,), {method: through_session(method) for method in methods})


def _through_nnx(
    session: Session,
    path: tuple[str, ...],
    own: tuple[str, ...],
    call: Callable[..., Any],
    module: nnx.Module,
    args: tuple,
    kwargs: dict,
) -> Any:
    """An NNX module whose products no hook reaches, through its traced program."""
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    params = nnx.to_pure_dict(state)

    def function(weights: Mapping[str, Array]) -> Any:
        return call(merged(graphdef, state, rest, {**params, **weights}), *args, **kwargs)

    weights, kind = {name: params[name] for name in own}, type(module).__name__
    return through(session, function, weights, path, kind, lambda: call(module, *args, **kwargs))


def _nnx_table(
    session: Session,
    path: tuple[str, ...],
    own: tuple[str, ...],
    method: Callable[..., Any],
    module: Any,
    args: tuple,
    kwargs: dict,
) -> Any:
    """An NNX embedding: rows of its table, or (`attend`) its product with the whole of it."""
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    params = nnx.to_pure_dict(state)

    def call(table: Array, *each: Any, **more: Any) -> Any:
        return method(merged(graphdef, state, rest, {**params, "embedding": table}), *each, **more)

    def untouched() -> Any:
        return method(module, *args, **kwargs)

    (name,) = own
    return _table(session, call, params[name], module.dtype, path, method.__name__, untouched, args, kwargs)


def merged(graphdef: Any, state: Any, rest: Any, params: Params) -> Any:
    """A module of this graph with these params; nothing that is given is changed, or shared with it."""
    copy = copied(state)
    nnx.replace_by_pure_dict(copy, params)
    return nnx.merge(graphdef, copy, copied(rest))


def copied(state: Any) -> Any:
    """A state (or several) with variables of its own: one from `nnx.split` holds the module's."""
    return jax.tree.map(lambda leaf: leaf, state)


def through(
    session: Session,
    function: Callable[[Mapping[str, Array]], Any],
    weights: Mapping[str, Array],
    path: tuple[str, ...],
    kind: str,
    untouched: Callable[[], Any],
) -> Any:
    """`function(weights)` with its products by the session's override.

    Args:
        weights: a module's own, by name.
        path: of the module.
        kind: its class.
        untouched: the module's call as it is, for one that cannot be traced alone.
    """
    where = "/".join(path)
    specs = {
        name: jax.ShapeDtypeStruct(np.shape(leaf), session.dtypes["/".join((*path, name))])
        for name, leaf in weights.items()
    }
    try:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(specs)
    except Exception as error:  # it needs what only its parent has (an rng, a mutable collection, a sibling)
        if session.layers is not None and any(name in session.layers for name in _names(path, weights, kind).values()):
            raise
        session.closed[where] = f"cannot be traced alone ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        return untouched()
    names = _names(path, weights, kind)
    leaves = {name: "/".join((*path, name)) for name in weights}
    calls = {
        name: LayerCall(session, names[name], kind, leaves[name], None, kernel_shape=tuple(np.shape(leaf)))
        for name, leaf in weights.items()
    }
    order = sorted(weights)  # as jax flattens a dict

    def multiply(weight: str, *product: Any) -> Array:
        if session.layers is not None and names[weight] not in session.layers:  # used otherwise, too: left as it is
            _, function, parameters, lhs, rhs, _ = product
            return function(lhs, rhs, **parameters)
        return calls[weight].multiply(*product)

    arguments = [weights[name] for name in order]
    outputs, uses = reach.run(closed, arguments, dict(enumerate(order)), multiply)
    if session.layers is None:
        for name in uses.otherwise:
            session.found.pop(names[name], None)
            session.reached.pop(names[name], None)
            weight = name in uses.products or "kernel" in name
            session.closed[leaves[name]] = USED_OTHERWISE if weight else NO_PRODUCT
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _wanted(session: Session, path: tuple[str, ...], weights: Iterable[str], kind: str) -> bool:
    """Whether a module is to be traced alone: it has weights, and after the discovery one of them is a layer's."""
    layers = _names(path, weights, kind).values()
    return any(session.layers is None or name in session.layers for name in layers)


def _names(path: tuple[str, ...], weights: Iterable[str], kind: str) -> dict[str, str]:
    """Weight -> layer: the module's path for "kernel" and an embedding's table, else the weight's."""
    alone = "embedding" if kind == TABLE else "kernel"
    return {name: ("/".join(path) or kind) if name == alone else "/".join((*path, name)) for name in weights}


def leaf_paths(path: Iterable[Any], *, has_bias: bool) -> tuple[str, str | None]:
    """Slash paths of a module's kernel and bias."""
    prefix = [str(each) for each in path]
    return "/".join([*prefix, "kernel"]), "/".join([*prefix, "bias"]) if has_bias else None


def _beside(bias: Array | None, lhs: Array, dimension_numbers: Any) -> Array | None:
    """The bias of a dot, shaped to be added to its output: batch axes first, the activations' free axes between."""
    (contract, _), (batch, _) = dimension_numbers
    if bias is None or not len(batch):
        return bias
    free = lhs.ndim - len(batch) - len(contract)
    return bias.reshape(*bias.shape[: len(batch)], *(1,) * free, *bias.shape[len(batch) :])
