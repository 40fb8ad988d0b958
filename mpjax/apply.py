"""Rewrite a model's parameters and dtypes by an assignment: the mixed-precision model that really executes.

Weights are stored in the assigned format and products computed on operands of its dtype, accumulated in float32
(`arithmetic.executed`), through the override alone. Weights in a weight-only format are multiplied out to float32 where their
product is, inside the compiled program, but for products that read them as they are stored (`stored`).
`float16_acc16` has no hardware behind it in XLA: its arithmetic is emulated in float32, its storage is real.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mpjax import arithmetic
from mpjax import lowering as ways
from mpjax.arithmetic import Calibration, ranges_of
from mpjax.formats import FLOAT32, Format, narrowed, parse
from mpjax.models import Array, Layer, Model, Override, Params, Product
from mpjax.quantized import store

NARROW = ("float32", "bfloat16", "float16")  # what activations can be handed on in


def apply(
    model: Model,
    assignment: Mapping[str, str],
    *,
    calibration: Calibration | None = None,
    lowering: str | Mapping[str, str] = "xla",
    activations: str = "float32",
) -> Model:
    """The model with each layer stored and computed in its assigned format; `model` is untouched.

    Args:
        model: a float32 model.
        assignment: layer name -> format name; layers that it does not name stay float32. It may name products of two
            activations (`model.activation_products`), which weight-only formats leave as they are.
        calibration: layer name -> largest activation magnitude, for scaled formats (`emulate.calibrate`).
        lowering: how products are computed: "xla", as the program does; "rule", a good way without timing; "auto", the rule until
            `compiled.compile` times the ways; or layer -> way (`lowering.WAYS`; "xla" where that way does not cover the product).
        activations: dtype to which the outputs of lowered layers are rounded. "float32" is the definition of every format; a
            narrower one rounds once more, and saves memory traffic on a GPU.

    Returns:
        A Model whose params are the model's, with lowered weights as `quantized.store` stores them.

    Raises:
        KeyError: an unknown layer (with the nearest known names).
        ValueError: an unknown format or way, a model that is already mixed, or a missing activation range.
    """
    if model.original is not None:
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
    return _mixed(model, params, complete, calibration, lowering, activations)


def lowered(model: Model, lowering: str | Mapping[str, str], *, activations: str | None = None) -> Model:
    """The model with its products computed in other ways: the same weights, the same formats.

    Args:
        model: float32 or made by `apply`.
        lowering, activations: as in `apply`; None keeps the model's.

    Raises:
        KeyError, ValueError: as in `apply`.
    """
    activations = activations or model.activations
    if model.original is None:
        return apply(model, {}, lowering=lowering, activations=activations)
    return _mixed(model.original, model.params, model.assignment or {}, model.calibration, lowering, activations)


def _mixed(
    model: Model,
    params: Params,
    assignment: Mapping[str, str],
    calibration: Calibration | None,
    lowering: str | Mapping[str, str],
    activations: str,
) -> Model:
    if activations not in NARROW:
        raise ValueError(f'activations must be "float32", "bfloat16" or "float16"; found {activations!r}.')
    formats = {name: parse(each) for name, each in assignment.items()}
    named = [layer for layer in model.lowerable if layer.name in formats or layer in model.layers]
    narrow_kernels = _narrow_kernels(named, formats)
    way = choose(model, lowering, narrow=narrow_kernels)

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
            way=_way_of(way, layer, product, fmt, lhs, shape or rhs.shape),
            as_stored=narrow_kernels,
        )
        return out if fmt == FLOAT32 or activations == "float32" else narrowed(out.astype(jnp.float32), activations)

    def call(params: Params, *inputs: Array, override: Override | None = None) -> Any:
        if override is not None:
            raise ValueError("A mixed model takes no override: its products are already overridden. Use its .original.")
        return model.call(params, *inputs, override=execute, layers=named)

    return replace(
        model,
        params=params,
        call=call,
        original=model,
        assignment=assignment,
        calibration=calibration,
        lowering=lowering,
        activations=activations,
    )


def _way_of(way: Any, layer: Layer, product: Product, fmt: Format, lhs: Array, shape: Sequence[int]) -> str:
    """The way of a product whose operands are of the format's dtype."""
    if product.kind not in ("dot", "conv"):
        return "xla"
    dtype = jnp.dtype(fmt.operand)
    viewed = jax.eval_shape(product.viewed, jax.ShapeDtypeStruct(tuple(shape), dtype))
    return way(layer, product, jax.ShapeDtypeStruct(lhs.shape, dtype), viewed)


def choose(
    model: Model, lowering: str | Mapping[str, str], *, narrow: bool = True
) -> Callable[[Layer, Product, Any, Any], str]:
    """The way in which `apply` computes a layer's product.

    Args:
        lowering: `"xla"` or `"rule"` for all layers; `"auto"`, which is the rule until `compiled.compile` has timed the ways; or
            a way for each layer by name (XLA's for the others).
        narrow: as in `lowering.rule`.

    Raises:
        ValueError: another word, an unknown way.
        KeyError: an unknown layer.
    """
    if isinstance(lowering, str):
        if lowering not in ways.WORDS:
            raise ValueError(f'lowering must be "xla", "rule", "auto" or layer -> way; found {lowering!r}.')
        if lowering == "xla":
            return lambda layer, product, lhs, rhs: "xla"
        return lambda layer, product, lhs, rhs: ways.rule(product, lhs, rhs, narrow=narrow)
    for name, way in lowering.items():
        model.layer(name)
        if way not in ways.WAYS:
            raise ValueError(f"Layer {name!r}: unknown way {way!r}. Known: {', '.join(ways.WAYS)}.")
    return lambda layer, product, lhs, rhs: lowering.get(layer.name, "xla")


def runs_narrow(model: Model) -> bool:
    """Whether the kernels for narrow operands suit the model (a program has one set): by enough of its FLOPs, or all.

    Without convolutions they suit it in float32, too.
    """
    formats = {name: parse(each) for name, each in (model.assignment or {}).items()}
    return _narrow_kernels(
        [layer for layer in model.lowerable if layer.name in formats or layer in model.layers], formats
    )


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
