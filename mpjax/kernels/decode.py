"""Products of few rows with weights in int8, float8 or int4, in Pallas for GPUs: each weight is read once, as stored.

int4 weights lie two in a byte, those of the first half of the output channels in the lower bits: a program of the grid computes
as many channels of either half from the same bytes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mpjax.program.product import Array

MOST_ROWS = 4
_CHANNELS = 8  # of a program of the grid
_STEP = 512  # most inputs in a step of its loop


def covers(inputs: int, channels: int, bits: int, group: int) -> bool:
    """Whether `compute` takes weights of this shape, with a scale for each channel (group 0) or group of inputs."""
    halves = 2 if bits == 4 else 1
    step = _step(inputs)
    return channels % (_CHANNELS * halves) == 0 and step >= 64 and (not group or step % group == 0)


def compute(x: Array, numbers: Array, scale: Array | None, *, group: int = 0, interpret: bool = False) -> Array:
    """(R, K) float32 and (N, K) numbers, or (N/2, K) bytes of int4 -> (R, N) float32.

    `scale`: (N,), or (N, K / group); None: there is none.
    """
    rows, inputs = x.shape
    halves = 2 if numbers.dtype == jnp.uint8 else 1
    lines = numbers.shape[0]
    columns = inputs // group if group else 1
    scale = jnp.ones((lines, 1), jnp.float32) if scale is None else scale
    call = pl.pallas_call(
        functools.partial(_kernel, rows=rows, inputs=inputs, halves=halves, group=group),
        out_shape=jax.ShapeDtypeStruct((halves, rows, lines), jnp.float32),
        grid=(lines // _CHANNELS,),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda i: (0, 0)),
            pl.BlockSpec((_CHANNELS, inputs), lambda i: (i, 0)),
            pl.BlockSpec((halves, _CHANNELS, columns), lambda i: (0, i, 0)),
        ],
        out_specs=pl.BlockSpec((halves, rows, _CHANNELS), lambda i: (0, 0, i)),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )
    out = call(x, numbers, scale.reshape(halves, lines, columns))
    return out.transpose(1, 0, 2).reshape(rows, halves * lines)


def _step(inputs: int) -> int:
    """The largest power of two, up to a limit, that divides the number of inputs."""
    return math.gcd(inputs, _STEP)


def _kernel(
    x_ref: Any, w_ref: Any, scale_ref: Any, out_ref: Any, *, rows: int, inputs: int, halves: int, group: int
) -> None:
    step = _step(inputs)

    def scaled(numbers: Array, half: int, start: Any) -> Array:
        """(channels, step) float32, with the scales of groups."""
        numbers = numbers.astype(jnp.float32)
        if not group:
            return numbers
        count = step // group
        scales = scale_ref[half, :, pl.ds(start // group, count)].astype(jnp.float32)
        spread = jax.lax.broadcast_in_dim(scales, (_CHANNELS, count, group), (0, 1))
        return numbers * spread.reshape(_CHANNELS, step)

    def add(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        start = i * step
        stored = w_ref[:, pl.ds(start, step)]
        if halves == 2:
            wide = stored.astype(jnp.int32)
            parts = [(wide << 28) >> 28, (wide << 24) >> 28]
        else:
            parts = [stored]
        new = []
        for half, numbers in enumerate(parts):
            weights = scaled(numbers, half, start)
            for row in range(rows):
                x = x_ref[row, pl.ds(start, step)]
                new.append(sums[half * rows + row] + weights * x[None, :])
        return tuple(new)

    zeros = tuple(jnp.zeros((_CHANNELS, step), jnp.float32) for _ in range(halves * rows))
    sums = jax.lax.fori_loop(0, inputs // step, add, zeros)
    for half in range(halves):
        for row in range(rows):
            out = jnp.sum(sums[half * rows + row], axis=1)
            if not group:
                out = out * scale_ref[half, :, 0].astype(jnp.float32)
            out_ref[half, row, :] = out
