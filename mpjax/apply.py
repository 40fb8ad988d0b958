"""Rewrite a model's parameters and dtypes by an assignment: the mixed-precision model that really executes.

Weights are stored in the assigned format and products computed on operands of its dtype, accumulated in float32
(`arithmetic.executed`), through the override alone. Weights in a weight-only format are multiplied out to float32 where their
product is, inside the compiled program, but for products that read them as they are stored (`kernels.stored`).
`float16_acc16` has no hardware behind it in XLA: its arithmetic is emulated in float32, its storage is real.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from mpjax import arithmetic, kernels
from mpjax.arithmetic import Calibration, ranges_of
from mpjax.formats import FLOAT32, Format, narrowed, parse
from mpjax.formats.storage import store, wide
from mpjax.program import Array, Call, Layer, Model, Override, Params, Product, calls
from mpjax.program.product import flops
from mpjax.xla import ROWS, device_profile

ACTIVATION_DTYPES = ("float32", "bfloat16", "float16")
Implementation = str | Mapping[str, str]  # one of `kernels.CHOICES`; or layer -> one of `kernels.IMPLEMENTATIONS`
_ENOUGH = 0.25  # of the FLOPs; of three models on a CPU, .35 and .35 were faster so, .20 was not (docs/speed.md)


@dataclass(frozen=True, kw_only=True, repr=False)
class MixedModel(Model):
    """A model whose layers are stored and computed in assigned formats; made by `apply`.

    Attributes:
        original: the float32 model.
        assignment: layer -> format name, complete.
        calibration: layer -> largest activation magnitude, for scaled formats.
        implementation: how products are computed, as in `apply`.
        activations: dtype to which the outputs of lowered layers are rounded.
    """

    original: Model
    assignment: Mapping[str, str]
    calibration: Calibration | None = None
    implementation: Implementation = "xla"
    activations: str = "float32"

    @property
    def formats(self) -> dict[str, Format]:
        """Layer -> format."""
        return {name: parse(fmt) for name, fmt in self.assignment.items()}

    @property
    def assigned(self) -> tuple[Layer, ...]:
        """The layers, and the products of two activations that the assignment names."""
        return tuple(layer for layer in self.lowerable if layer.name in self.assignment)

    def with_call(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Self:
        """The model, and its original, with `wrap(call)` in place of their `call`."""
        return replace(self, call=wrap(self.call), original=self.original.with_call(wrap))


def as_mixed(model: Model) -> MixedModel:
    """The model itself, or a float32 model as a mixed one without a lowered layer."""
    return model if isinstance(model, MixedModel) else apply(model, {})


def apply(
    model: Model,
    assignment: Mapping[str, str],
    *,
    calibration: Calibration | None = None,
    implementation: Implementation = "xla",
    activations: str = "float32",
) -> MixedModel:
    """The model with each layer stored and computed in its assigned format; `model` is untouched.

    Args:
        model: a float32 model.
        assignment: layer name -> format name; layers that it does not name stay float32. It may name products of two
            activations (`model.activation_products`), which weight-only formats leave as they are.
        calibration: layer name -> largest activation magnitude, for scaled formats (`mp.calibrate`).
        implementation: how products are computed: "xla", as the program does; "rule", a good choice without timing; "auto", the
            rule until `compile` times the implementations; or layer -> implementation (`kernels.IMPLEMENTATIONS`; "xla" where
            that one does not cover the product).
        activations: dtype to which the outputs of lowered layers are rounded. "float32" is the definition of every format; a
            narrower one rounds once more, and saves memory traffic on a GPU.

    Returns:
        A MixedModel whose params are the model's, with lowered weights as `formats.storage.store` stores them.

    Raises:
        KeyError: an unknown layer (with the nearest known names).
        ValueError: an unknown format or implementation, a model that is already mixed, or a missing activation range.
    """
    if isinstance(model, MixedModel):
        raise ValueError("Expected a float32 model, found one made by apply: pass its .original.")
    formats = {name: parse(fmt) for name, fmt in assignment.items()}
    layers = {layer.name: layer for layer in model.lowerable}
    if unknown := [name for name in formats if name not in layers]:
        near = difflib.get_close_matches(unknown[0], layers, n=3, cutoff=0.3)
        raise KeyError(
            f"The assignment names {len(unknown)} layers that the model has not: {', '.join(unknown[:5])}. Nearest "
            f"known to the first: {', '.join(near or list(layers)[:3])}."
        )
    arithmetic.check_ranges([(layers[name], fmt) for name, fmt in formats.items()], calibration)
    params = dict(model.params)
    for name, fmt in formats.items():
        if fmt != FLOAT32 and layers[name].kernel:
            params[layers[name].kernel] = store(params[layers[name].kernel], fmt, layers[name])
    complete = {name: formats.get(name, FLOAT32).name for name in dict.fromkeys([*model.names, *formats])}
    mixed = MixedModel(
        **(vars(model) | {"params": params}), original=model, assignment=complete, calibration=calibration
    )
    return with_implementation(mixed, implementation, activations=activations)


def with_implementation(model: Model, implementation: Implementation, *, activations: str | None = None) -> MixedModel:
    """The model with its products computed by other implementations: the same weights, the same formats.

    Args:
        model: float32 or made by `apply`.
        implementation, activations: as in `apply`; None keeps the model's.

    Raises:
        KeyError, ValueError: as in `apply`.
    """
    mixed = as_mixed(model)
    dtype = activations or mixed.activations
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(f'activations must be "float32", "bfloat16" or "float16"; found {dtype!r}.')
    _check_implementation(mixed, implementation)
    formats, narrow = mixed.formats, runs_narrow(mixed)

    def execute(layer: Layer, product: Product, lhs: Array, rhs: Any) -> Array:
        fmt = formats.get(layer.name, FLOAT32)
        shape = layer.kernel_shape[layer.levels :] or rhs.shape
        name = "xla"
        if implementation != "xla" and product.kind in ("dot", "conv"):
            is_wide = product.weighted and arithmetic.kept_wide(fmt, rhs)
            dtype_of = FLOAT32.operand if is_wide else arithmetic.operand_dtype(fmt, product.kind)
            specs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype_of)) for shape in (lhs.shape, shape)]
            specs[1] = jax.eval_shape(product.viewed, specs[1])
            name = picked(implementation, layer, product, *specs, narrow=narrow)
        out = arithmetic.executed(
            fmt,
            product,
            lhs,
            rhs,
            shape=shape,
            ranges=ranges_of(mixed.calibration, layer),
            implementation=name,
            as_stored=reads_stored(narrow),
        )
        return out if fmt == FLOAT32 or dtype == "float32" else narrowed(out.astype(jnp.float32), dtype)

    def call(params: Params, *inputs: Array, override: Override | None = None) -> Any:
        if override is not None:
            raise ValueError("A mixed model takes no override: its products are already overridden. Use its .original.")
        return mixed.original.call(params, *inputs, override=execute, layers=mixed.assigned)

    return replace(mixed, call=call, implementation=implementation, activations=dtype)


def picked(implementation: Implementation, layer: Layer, product: Product, lhs: Any, rhs: Any, *, narrow: bool) -> str:
    """The name of the implementation that computes a layer's product of operands of these shapes and dtypes (`rhs` viewed).

    `implementation`: as in `apply`; `narrow`: as in `kernels.rule`.
    """
    if isinstance(implementation, str):
        return "xla" if implementation == "xla" else kernels.rule(product, lhs, rhs, narrow=narrow)
    name = implementation.get(layer.name, "xla")
    return name if name in kernels.implementations(product, lhs, rhs) else "xla"


def implemented_calls(
    model: MixedModel, *inputs: Array, implementation: Implementation | None = None, narrow: bool | None = None
) -> Iterator[tuple[Call, str]]:
    """Every product of the layers for these inputs, and the name of its implementation.

    `implementation`, `narrow`: other than the model's own.
    """
    formats = model.formats
    narrow = runs_narrow(model) if narrow is None else narrow
    for call in calls(model, *inputs):
        fmt = formats[call.layer]
        narrow_dtype = arithmetic.operand_dtype(fmt, call.product.kind)
        dtype = jnp.dtype(FLOAT32.operand if _kept_wide(model, call, fmt) else narrow_dtype)
        lhs, rhs = (jax.ShapeDtypeStruct(spec.shape, dtype) for spec in (call.lhs, call.rhs))
        layer = model.layer(call.layer)
        yield call, picked(implementation or model.implementation, layer, call.product, lhs, rhs, narrow=narrow)


def _kept_wide(model: MixedModel, call: Call, fmt: Format) -> bool:
    return call.product.weighted and arithmetic.kept_wide(fmt, model.params[model.layer(call.layer).kernel])


def _check_implementation(model: Model, implementation: Implementation) -> None:
    if isinstance(implementation, str):
        if implementation not in kernels.CHOICES:
            raise ValueError(
                f'implementation must be "xla", "rule", "auto" or layer -> implementation; found {implementation!r}.'
            )
        return
    for layer, name in implementation.items():
        model.layer(layer)
        if name not in kernels.IMPLEMENTATIONS:
            known = ", ".join(kernels.IMPLEMENTATIONS)
            raise ValueError(f"Layer {layer!r}: unknown implementation {name!r}. Known: {known}.")


def runs_narrow(model: Model) -> bool:
    """Whether the kernels for narrow operands suit the model (a program has one set): by enough of its FLOPs, or all.

    Without convolutions they suit it in float32, too.
    """
    layers, formats = model.layers, {}
    if isinstance(model, MixedModel):
        layers, formats = model.assigned, model.formats
    if not any(layer.kind == "conv" for layer in layers):
        return True
    narrow = sum(layer.flops for layer in layers if _pays(formats.get(layer.name, FLOAT32)))
    return 0 < narrow >= _ENOUGH * sum(layer.flops for layer in layers)


def reads_stored(narrow: bool) -> bool:
    """Whether weights may be read as they are stored: on a CPU with the kernels for narrow operands alone."""
    return narrow or jax.default_backend() != "cpu"


def _pays(fmt: Format) -> bool:
    """Whether this device multiplies many rows of the format's narrow operands faster than float32's."""
    return arithmetic.is_narrow(fmt) and device_profile().ratio(fmt.operand, ROWS[-1]) < 1


def slower_narrow(model: MixedModel, *inputs: Array) -> tuple[str, ...]:
    """Lowered layers whose products this device computes faster with weights kept wide (`arithmetic.time_ratio`).

    Convolutions with weight-only formats are among them: they would be multiplied out in each call. Lookups are not: they read a
    few rows.
    """
    formats, as_stored = model.formats, reads_stored(runs_narrow(model))
    stored, in_float32 = dict.fromkeys(model.assignment, 0.0), dict.fromkeys(model.assignment, 0.0)
    for call, name in implemented_calls(model, *inputs):
        fmt, product = formats[call.layer], call.product
        if not product.weighted or product.kind == "lookup" or _kept_wide(model, call, fmt):
            continue
        work = call.runs * flops(product, call.lhs, call.rhs, call.out)
        stored[call.layer] += work * arithmetic.time_ratio(
            fmt, product, call.lhs, call.rhs, implementation=name, as_stored=as_stored
        )
        in_float32[call.layer] += work
    return tuple(name for name in stored if stored[name] > in_float32[name])


def widened(model: MixedModel, layers: Iterable[str]) -> MixedModel:
    """The model with these layers' weights kept wide: float32 numbers that stand for the stored ones, for float32 products.

    What it computes is each format's definition, as emulated: activations are rounded, too.
    """
    params = dict(model.params)
    for name in layers:
        layer = model.layer(name)
        params[layer.kernel] = wide(params[layer.kernel], parse(model.assignment[name]), layer)
    return replace(model, params=params)
