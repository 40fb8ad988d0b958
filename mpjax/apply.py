"""Rewrite a model's parameters and dtypes by an assignment: the mixed-precision model that really executes.

Weights are stored in the assigned dtype and the product is computed on operands of that dtype, accumulated in float32
(`preferred_element_type`), through the override alone: Flax's plain `dtype=` would round the product's result, too. Weights in a
weight-only format are multiplied out to float32 before the model runs, inside the compiled program, but for products that read
them as they are stored (`stored`).
`float16_acc16` has no hardware behind it in XLA: its arithmetic is emulated in float32, its storage is real.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mpjax import lowering as ways
from mpjax import partition, stored
from mpjax.attention import narrow
from mpjax.emulate import Calibration, product_in
from mpjax.formats import FLOAT32, Format, amax_scale, narrowed, parse
from mpjax.models import Array, Layer, Model, Override, Params, Product
from mpjax.quantized import dequantize, dequantize_rows, quantize

MULTIPLIED_OUT = "multiplied_out"  # scope of weight-only weights becoming float32


def apply(
    model: Model,
    assignment: Mapping[str, str],
    *,
    calibration: Calibration | None = None,
    lowering: str | Mapping[str, str] = "own",
    activations: str = "float32",
    attention: str = "float32",
) -> Model:
    """The model with each layer stored and computed in its assigned format; `model` is untouched.

    Args:
        model: a float32 model.
        assignment: layer name -> format name; layers that it does not name stay float32.
        calibration: layer name -> largest activation magnitude, for scaled formats (`emulate.calibrate`).
        lowering: how products are computed: "own", as the model does; "xla", by lax (but where its author set a function);
            "rule", a good way without timing; "auto", the rule until `compiled.compile` times the ways; or layer -> way
            (`lowering.WAYS`; lax where that way does not cover the product).
        activations: dtype in which lowered layers hand on their outputs. "float32" is the definition of every format; a narrower
            one rounds once more, and saves memory traffic on a GPU. The layers after it compute as Flax promotes.
        attention: dtype of the operands of products without weights, "bfloat16" or "float16" for attention's scores and values.

    Returns:
        A Model whose params are {"weights": the params with lowered kernels, "weight_scales", "input_scales"}.

    Raises:
        KeyError: an unknown layer (with the nearest known names).
        ValueError: an unknown format or way, a model that is already mixed, or a missing activation range.
    """
    if model.original is not None:
        raise ValueError("Expected a float32 model, found one made by apply: pass its .original.")
    formats = {name: parse(assignment[name]) for name in assignment}
    unknown = [name for name in formats if name not in model.names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], model.names, n=3, cutoff=0.3)
        raise KeyError(
            f"The assignment names {len(unknown)} layers that the model has not: {', '.join(unknown[:5])}. Nearest "
            f"known to the first: {', '.join(near or model.names[:3])}."
        )
    call = _call(model, formats, lowering, activations, attention)
    kernels: dict[str, Array] = {}
    weight_scales: dict[str, Array] = {}
    input_scales: dict[str, Array] = {}
    for layer in model.layers:
        fmt = formats.get(layer.name, FLOAT32)
        if fmt == FLOAT32:
            continue
        weights = partition.select(model.params, layer.block)[layer.kernel]
        if fmt.weight_only:
            kernels[layer.kernel], scale = quantize(weights, fmt, layer.summed)
            weight_scales |= {} if scale is None else {layer.name: scale}
            continue
        if fmt.scaled:
            if calibration is None or layer.name not in calibration:
                raise ValueError(
                    f"Layer {layer.name!r} in {fmt.name} needs its activation range: pass "
                    "calibration=emulate.calibrate(model, batches)."
                )
            weight_scales[layer.name] = amax_scale(jnp.max(jnp.abs(weights)), fmt)
            input_scales[layer.name] = amax_scale(jnp.float32(calibration[layer.name]), fmt)
            weights = weights / weight_scales[layer.name]
        kernels[layer.kernel] = _cast(weights, fmt.storage, fmt)
    params = {
        "weights": partition.replace(model.params, kernels, reshape=True),  # as `quantized` stores them
        "weight_scales": weight_scales,
        "input_scales": input_scales,
    }

    complete = {name: formats.get(name, FLOAT32).name for name in model.names}
    return replace(
        model,
        params=params,
        call=call,
        original=model,
        assignment=complete,
        lowering=lowering,
        activations=activations,
        attention=attention,
    )


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
    formats = {name: parse(each) for name, each in (model.assignment or {}).items()}
    call = _call(model.original, formats, lowering, activations, model.attention)
    return replace(model, call=call, lowering=lowering, activations=activations)


def _call(
    model: Model,
    formats: Mapping[str, Format],
    lowering: str | Mapping[str, str],
    activations: str,
    attention: str,
) -> Callable[..., Any]:
    """What the mixed model computes, from params as `apply` makes them."""
    if activations not in ("float32", "bfloat16", "float16"):
        raise ValueError(f'activations must be "float32", "bfloat16" or "float16"; found {activations!r}.')
    narrow_kernels = _narrow_kernels(model.layers, formats, attention)
    way = ways.choose(model, lowering, narrow=narrow_kernels)

    def call(mixed_params: Params, *inputs: Array, override: Override | None = None) -> Any:
        if override is not None:
            raise ValueError("A mixed model takes no override: its products are already overridden. Use its .original.")

        def run(mixed_params: Params, *each: Array) -> Any:
            weights = _multiplied_out(model, formats, mixed_params)
            numbers, whole = (kernels(model, tree) for tree in (mixed_params["weights"], weights))

            def execute(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
                fmt = formats.get(layer.name, FLOAT32)
                if product.kind == "lookup":
                    scale = mixed_params["weight_scales"].get(layer.name)
                    return _looked_up(fmt, layer, product, lhs, rhs, numbers[layer.name], scale)
                if narrow_kernels and rhs is whole[layer.name] and stored.readable(fmt, product, lhs, layer.summed):
                    scale = mixed_params["weight_scales"].get(layer.name)
                    out = product.add_bias(stored.multiply(fmt, product, lhs, numbers[layer.name], scale))
                else:
                    scale = mixed_params["input_scales"][layer.name] if fmt.scaled else None
                    both = None if scale is None else scale * mixed_params["weight_scales"][layer.name]
                    lhs = operand(fmt, lhs, scale)
                    out = multiply(fmt, ways.lowered(product, way(layer, product, lhs, rhs)), lhs, rhs, both)
                return out if fmt == FLOAT32 or activations == "float32" else narrowed(out, activations)

            return model.call(weights, *each, override=execute)

        return narrow(run, attention, model.names)(mixed_params, *inputs)

    return call


def _looked_up(
    fmt: Format, layer: Layer, product: Product, ids: Array, table: Array, numbers: Array, scale: Array | None
) -> Array:
    """Rows of a table as stored (`numbers`, `scale`); of a weight-only table only these are multiplied out."""
    if not fmt.weight_only:
        return look_up(fmt, product, ids, table, scale)
    whole = table.shape == layer.kernel_shape  # not a slice, under a scan
    return look_up(fmt, product, ids, (numbers, scale, layer.kernel_shape)) if whole else product(ids, table)


def look_up(fmt: Format, product: Product, ids: Array, table: Any, scale: Array | None = None) -> Array:
    """A lookup as a mixed model executes it.

    Args:
        fmt: the format.
        product: the lookup.
        ids: row numbers.
        table: as stored; in a weight-only format (numbers, scales, shape of the table).
        scale: of the table, in a scaled format.
    """
    if fmt == FLOAT32:
        return product(ids, table)
    if fmt.weight_only:
        numbers, scales, shape = table
        return dequantize_rows(numbers, scales, fmt, shape, ids)
    rows = product.multiply(ids, table, accumulate="float32")
    return rows if scale is None else rows * scale


def _multiplied_out(model: Model, formats: Mapping[str, Format], mixed_params: Params) -> Params:
    """The weights, those in weight-only formats as float32."""
    found: dict[str, Array] = {}
    for layer, numbers in zip(model.layers, kernels(model, mixed_params["weights"]).values(), strict=True):
        fmt = formats.get(layer.name, FLOAT32)
        if not fmt.weight_only:
            continue
        with jax.named_scope(f"{layer.name}/{MULTIPLIED_OUT}"):
            scale = mixed_params["weight_scales"].get(layer.name)
            found[layer.kernel] = dequantize(numbers, scale, fmt, layer.kernel_shape, layer.summed)
    return partition.replace(mixed_params["weights"], found, reshape=True) if found else mixed_params["weights"]


def kernels(model: Model, params: Params) -> dict[str, Any]:
    """Layer -> its kernel's leaf in a tree shaped like the model's params, float32 or mixed."""
    weights = params if model.original is None else params["weights"]
    return {layer.name: partition.select(weights, layer.block)[layer.kernel] for layer in model.layers}


def runs_narrow(model: Model) -> bool:
    """Whether the kernels for narrow operands suit the model (a program has one set): by enough of its FLOPs, or all.

    Without convolutions they suit it in float32, too.
    """
    formats = {name: parse(each) for name, each in (model.assignment or {}).items()}
    return _narrow_kernels(model.layers, formats, model.attention)


_ENOUGH = 0.25  # of the FLOPs; of three models on a CPU, .35 and .35 were faster so, .20 was not (docs/speed.md)


def products_only(layers: Sequence[Layer]) -> bool:
    """Whether no layer is a convolution: the kernels for narrow operands then suit the model in any format."""
    return not any("Conv" in layer.kind for layer in layers)


def _narrow_kernels(layers: Sequence[Layer], formats: Mapping[str, Format], attention: str) -> bool:
    """float16_acc16 is emulated in float32, and not narrow."""
    if products_only(layers):
        return True
    counted = [(layer.flops, formats.get(layer.name, FLOAT32)) for layer in layers]
    narrow = sum(flops for flops, fmt in counted if fmt.operand != "float32" and fmt.accumulate == "float32")
    return attention != "float32" or 0 < narrow >= _ENOUGH * sum(flops for flops, _ in counted)


def operand(fmt: Format, lhs: Array, scale: Array | None = None) -> Array:
    """A layer's float32 input as its product takes it: in the operand dtype, for a scaled format divided by `scale` first.

    Unchanged in float32, and in float16_acc16, whose emulation rounds it.
    """
    if fmt == FLOAT32 or fmt.accumulate == "float16":
        return lhs
    return _cast(lhs if scale is None else lhs / scale, fmt.operand, fmt)


def multiply(fmt: Format, product: Product, lhs: Array, rhs: Array, scale: Array | None = None) -> Array:
    """A layer's product as a mixed model executes it, bias included.

    Args:
        fmt: the format.
        product: the layer's product.
        lhs: what `operand` gave.
        rhs: the weights as stored; in a weight-only format, multiplied out.
        scale: of input and weights together, in a scaled format.
    """
    if fmt == FLOAT32:
        return product(lhs, rhs)
    if fmt.accumulate == "float16":
        return product_in(fmt, product, lhs, rhs.astype(jnp.float32))
    out = product.multiply(lhs, rhs, accumulate=fmt.accumulate)
    return product.add_bias(out if scale is None else out * scale)


def _cast(x: Array, dtype: str, fmt: Format) -> Array:
    """`x` in a dtype; float8 saturates, as `formats` says."""
    if fmt.scaled:
        x = jnp.clip(x, -fmt.max, fmt.max)
    return narrowed(x, dtype)
