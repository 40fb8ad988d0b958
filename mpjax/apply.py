"""Rewrite a model's parameters and dtypes by an assignment: the mixed-precision model that really executes.

Weights are stored in the assigned format and products computed on operands of its dtype, accumulated in float32
(`arithmetic.executed`), through the override alone. Weights in a weight-only format are multiplied out to float32 where their
product is, inside the compiled program, but for products that read them as they are stored (`stored`).
`float16_acc16` has no hardware behind it in XLA: its arithmetic is emulated in float32, its storage is real.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from mpjax import arithmetic, kernels
from mpjax.arithmetic import Calibration, ranges_of
from mpjax.formats import FLOAT32, Format, narrowed, parse
from mpjax.formats.storage import store
from mpjax.program.model import Array, Layer, Model, Override, Params, Product

ACTIVATION_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
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
    implementation: str | Mapping[str, str] = "xla"
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
    implementation: str | Mapping[str, str] = "xla",
    activations: str = "float32",
) -> MixedModel:
    """The model with each layer stored and computed in its assigned format; `model` is untouched.

    Args:
        model: a float32 model.
        assignment: layer name -> format name; layers that it does not name stay float32. It may name products of two
            activations (`model.activation_products`), which weight-only formats leave as they are.
        calibration: layer name -> largest activation magnitude, for scaled formats (`emulate.calibrate`).
        implementation: how products are computed: "xla", as the program does; "rule", a good choice without timing; "auto", the
            rule until `compile` times the implementations; or layer -> implementation (`kernels.IMPLEMENTATIONS`; "xla" where that
            one does not cover the product).
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
    formats = {name: parse(assignment[name]) for name in assignment}
    layers = {layer.name: layer for layer in model.lowerable}
    unknown = [name for name in formats if name not in layers]
    if unknown:
        near = difflib.get_close_matches(unknown[0], layers, n=3, cutoff=0.3)
        raise KeyError(
            f"The assignment names {len(unknown)} layers that the model has not: {', '.join(unknown[:5])}. Nearest "
            f"known to the first: {', '.join(near or list(layers)[:3])}."
        )
    for name, fmt in formats.items():
        if fmt.scaled and None in ranges_of(calibration, layers[name])[: 1 if layers[name].kernel else 2]:
            what = "" if layers[name].kernel else " of both operands (calibrate models.with_activation_products(model))"
            raise ValueError(
                f"Layer {name!r} in {fmt.name} needs its activation range{what}: pass "
                "calibration=emulate.calibrate(model, batches)."
            )
    params = dict(model.params)
    for name, fmt in formats.items():
        if fmt != FLOAT32 and layers[name].kernel:
            params[layers[name].kernel] = store(params[layers[name].kernel], fmt, layers[name])
    complete = {name: formats.get(name, FLOAT32).name for name in dict.fromkeys([*model.names, *formats])}
    return _mixed(model, params, complete, calibration, implementation, activations)


def with_implementation(
    model: Model, implementation: str | Mapping[str, str], *, activations: str | None = None
) -> MixedModel:
    """The model with its products computed by other implementations: the same weights, the same formats.

    Args:
        model: float32 or made by `apply`.
        implementation, activations: as in `apply`; None keeps the model's.

    Raises:
        KeyError, ValueError: as in `apply`.
    """
    mixed = as_mixed(model)
    return _mixed(
        mixed.original,
        mixed.params,
        mixed.assignment,
        mixed.calibration,
        implementation,
        activations or mixed.activations,
    )


def _mixed(
    model: Model,
    params: Params,
    assignment: Mapping[str, str],
    calibration: Calibration | None,
    implementation: str | Mapping[str, str],
    activations: str,
) -> MixedModel:
    if activations not in ACTIVATION_DTYPES:
        raise ValueError(f'activations must be "float32", "bfloat16" or "float16"; found {activations!r}.')
    formats = {name: parse(fmt) for name, fmt in assignment.items()}
    assigned = tuple(layer for layer in model.lowerable if layer.name in assignment)
    narrow_kernels = _narrow_kernels(assigned, formats)
    choose = chooser(model, implementation, narrow=narrow_kernels)

    def execute(layer: Layer, product: Product, lhs: Array, rhs: Any) -> Array:
        fmt = formats.get(layer.name, FLOAT32)
        shape = layer.kernel_shape[layer.levels :]
        out = arithmetic.executed(
            fmt,
            product,
            lhs,
            rhs,
            shape=shape,
            ranges=ranges_of(calibration, layer),
            implementation=_chosen(choose, layer, product, fmt, lhs, shape or rhs.shape),
            as_stored=narrow_kernels,
        )
        return out if fmt == FLOAT32 or activations == "float32" else narrowed(out.astype(jnp.float32), activations)

    def call(params: Params, *inputs: Array, override: Override | None = None) -> Any:
        if override is not None:
            raise ValueError("A mixed model takes no override: its products are already overridden. Use its .original.")
        return model.call(params, *inputs, override=execute, layers=assigned)

    return MixedModel(
        params=params,
        layers=model.layers,
        call=call,
        others=model.others,
        activation_products=model.activation_products,
        traced=model.traced,
        original=model,
        assignment=assignment,
        calibration=calibration,
        implementation=implementation,
        activations=activations,
    )


Chooser = Callable[[Layer, Product, Any, Any], str]


def _chosen(choose: Chooser, layer: Layer, product: Product, fmt: Format, lhs: Array, shape: Sequence[int]) -> str:
    """The implementation of a product whose operands are of the format's dtype."""
    if product.kind not in ("dot", "conv"):
        return "xla"
    dtype = jnp.dtype(fmt.operand)
    viewed = jax.eval_shape(product.viewed, jax.ShapeDtypeStruct(tuple(shape), dtype))
    return choose(layer, product, jax.ShapeDtypeStruct(lhs.shape, dtype), viewed)


def chooser(model: Model, implementation: str | Mapping[str, str], *, narrow: bool = True) -> Chooser:
    """The function that gives the implementation of a layer's product.

    Args:
        implementation: as in `apply`.
        narrow: as in `kernels.rule`.

    Raises:
        ValueError: another word, an unknown implementation.
        KeyError: an unknown layer.
    """
    if isinstance(implementation, str):
        if implementation not in kernels.CHOICES:
            raise ValueError(
                f'implementation must be "xla", "rule", "auto" or layer -> implementation; found {implementation!r}.'
            )
        if implementation == "xla":
            return lambda layer, product, lhs, rhs: "xla"
        return lambda layer, product, lhs, rhs: kernels.rule(product, lhs, rhs, narrow=narrow)
    for name, chosen in implementation.items():
        model.layer(name)
        if chosen not in kernels.IMPLEMENTATIONS:
            raise ValueError(
                f"Layer {name!r}: unknown implementation {chosen!r}. Known: {', '.join(kernels.IMPLEMENTATIONS)}."
            )
    return lambda layer, product, lhs, rhs: implementation.get(layer.name, "xla")


def runs_narrow(model: MixedModel) -> bool:
    """Whether the kernels for narrow operands suit the model (a program has one set): by enough of its FLOPs, or all.

    Without convolutions they suit it in float32, too.
    """
    return _narrow_kernels(model.assigned, model.formats)


_ENOUGH = 0.25  # of the FLOPs; of three models on a CPU, .35 and .35 were faster so, .20 was not (docs/speed.md)


def products_only(layers: Sequence[Layer]) -> bool:
    """Whether no layer is a convolution: the kernels for narrow operands then suit the model in any format."""
    return not any(layer.kind == "conv" for layer in layers)


def _narrow_kernels(layers: Sequence[Layer], formats: Mapping[str, Format]) -> bool:
    """float16_acc16 is emulated in float32, and not narrow."""
    if products_only(layers):
        return True
    counted = [(layer.flops, formats.get(layer.name, FLOAT32)) for layer in layers]
    narrow = sum(flops for flops, fmt in counted if fmt.operand != "float32" and fmt.accumulate == "float32")
    return 0 < narrow >= _ENOUGH * sum(flops for flops, _ in counted)
