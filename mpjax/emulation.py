"""Layers in formats, emulated (`arithmetic`), as an override; and the traced format of each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import arithmetic
from mpjax.arithmetic import Calibration, ranges_of
from mpjax.formats import FLOAT32, Format
from mpjax.program import Array, Batches, Layer, Model, Override, Product, check_batches


def calibrate(
    model: Model, batches: Batches, *, jit: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.jit
) -> dict[str, float]:
    """The largest magnitude at each layer's input over the batches: the static activation scales of float8.

    Returns layer name -> amax; of a product of two activations also name/rhs -> amax of the second. A non-finite activation is
    recorded as it is: `amax_scale` then uses 1. Works through scan, remat and shared layers (the numbers leave the program
    through a host callback). `jit` compiles the program, and may time it.
    """
    largest: dict[str, float] = dict.fromkeys(model.names, 0.0)
    largest |= {f"{layer.name}/rhs": 0.0 for layer in model.layers if not layer.kernel}

    def receive(name: str, value: np.ndarray) -> np.ndarray:
        largest[name] = float(np.maximum(largest[name], value))  # NaN stays
        return np.asarray(value, np.float32)

    def observed(name: str, x: Array) -> Array:
        amax = jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        seen = jax.pure_callback(functools.partial(receive, name), scalar, amax, vmap_method="sequential")
        # Multiplying by one makes the result depend on the callback, which would else be dropped.
        return x * jnp.where(jnp.isnan(seen), jnp.nan, 1.0).astype(x.dtype)

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        if product.kind == "lookup":
            return product(lhs, rhs)
        return product(observed(layer.name, lhs), rhs if layer.kernel else observed(f"{layer.name}/rhs", rhs))

    run = jit(lambda params, *inputs: model.call(params, *inputs, override=override))
    for batch in check_batches(batches):
        jax.block_until_ready(run(model.params, *batch))
    return largest


def in_format(assignment: Mapping[str, Format], *, calibration: Calibration | None = None) -> Override:
    """The override that emulates each layer in its assigned format, and in float32 where none is named."""

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        fmt = assignment.get(layer.name, FLOAT32)
        return arithmetic.emulated(fmt, product, lhs, rhs, ranges=ranges_of(calibration, layer))

    return override


def in_formats(
    numbers: Array, layers: Sequence[str], formats: Sequence[Format], *, calibration: Calibration | None = None
) -> Override:
    """The override that picks each layer's format by a traced number: one compilation for every assignment.

    Args:
        numbers: (L,) int32; 0 is float32, 1 + f is `formats[f]`. Only the branch that is picked is computed, so a layer
            in float32 costs nothing extra (under `jax.vmap` over `numbers` all branches would be computed).
        layers: the L names, in the order of `numbers`.
        formats: the low formats.
        calibration: needed by scaled formats.
    """
    position = {name: number for number, name in enumerate(layers)}

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        ranges = ranges_of(calibration, layer)

        def branch(fmt: Format) -> Callable[[Array, Array], Array]:
            return lambda x, w: arithmetic.emulated(fmt, product, x, w, ranges=ranges).astype(jnp.float32)

        return jax.lax.switch(numbers[position[layer.name]], [branch(fmt) for fmt in (FLOAT32, *formats)], lhs, rhs)

    return override


def format_numbers(assignment: Mapping[str, str], layers: Sequence[str], formats: Sequence[Format]) -> Array:
    """The (L,) int32 that `in_formats` takes, from an assignment layer -> format name.

    Raises:
        ValueError: an unknown layer, or a format that is not among `formats`.
    """
    known = {FLOAT32.name: 0, **{fmt.name: number for number, fmt in enumerate(formats, start=1)}}
    if unknown := [name for name in assignment if name not in layers]:
        raise ValueError(
            f"The assignment names unknown layers: {', '.join(unknown[:5])}. Known: {', '.join(layers[:3])} …"
        )
    if other := sorted(set(assignment.values()) - set(known)):
        raise ValueError(f"The assignment uses {', '.join(other)}; this program was built for {', '.join(known)}.")
    return jnp.asarray([known[assignment.get(name, FLOAT32.name)] for name in layers], jnp.int32)
