"""What makes a low-precision layer fast or slow on this CPU: small programs, all implementations interleaved.

    python -m experiments.speed_examples [--cores 1]      (about two minutes)

Products, convolutions and casts for `docs/speed.md`. Microseconds include the start of a program, about 10.
"""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

if "--cores" in sys.argv:  # before jax counts them
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[sys.argv.index("--cores") + 1])]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from jax import lax  # noqa: E402

from experiments.lib.rows import Table, column  # noqa: E402
from experiments.lib.run import Options, Run  # noqa: E402
from experiments.lib.times import interleaved  # noqa: E402
from experiments.models import resize
from mpjax import formats, kernels
from mpjax.kernels import shift
from mpjax.program import Product
from mpjax.xla import executable, timing

NHWC = ("NHWC", "HWIO", "NHWC")
ON, OFF = executable.EXACT | executable.WIDE, executable.EXACT | executable.WIDE | executable.NO_YNN
NARROW_VECTORS = executable.EXACT | executable.NO_YNN
ROUNDS = 15


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """How the experiment runs."""

    cores: int | None = None
    """Number of cores; None: all that this process may use."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An implementation of an example, and its time over that of the first one."""

    example: str = column("example")
    implementation: str = column("implementation")
    options: str = column("options")
    us: float = column("µs", ".1f")
    vs_first: float = column("/ first", ".2f")


@dataclass(frozen=True)
class Way:
    """One implementation of an example."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=lambda: OFF)


def numbers(*shape: int, dtype: str = "float32") -> jax.Array:
    """Normal random numbers."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32).astype(dtype)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of matrices, accumulated and returned in float32."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of matrices as Flax's dtype= computes it: the result in the operands' dtype."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())))


def convolution(implementation: str, strides: tuple[int, int] = (1, 1), groups: int = 1) -> Callable[..., jax.Array]:
    """A convolution by that implementation."""

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        product = Product(
            kind="conv",
            function=lax.conv_general_dilated,
            window_strides=strides,
            padding="SAME",
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            dimension_numbers=NHWC,
            feature_group_count=groups,
        )
        return kernels.implemented(product, implementation).multiply(x, w, accumulate="float32")

    return function


def in_one_block(x: jax.Array, w: jax.Array) -> jax.Array:
    """A depthwise convolution without blocks of channels."""
    size, shift._FIRST_LEVEL_CACHE = shift._FIRST_LEVEL_CACHE, 10**12
    shift._shifted_sum.clear_cache()  # type: ignore[attr-defined]
    try:
        return convolution("shift", groups=x.shape[3])(x, w)
    finally:
        shift._FIRST_LEVEL_CACHE = size
        shift._shifted_sum.clear_cache()  # type: ignore[attr-defined]


def products(rows: int, inner: int, columns: int) -> list[Way]:
    """float32 and bfloat16, with and without YNN."""
    wide = (numbers(rows, inner), numbers(inner, columns))
    low = tuple(x.astype(jnp.bfloat16) for x in wide)
    implementations = [
        Way("float32", dot, wide),
        Way("float32", dot, wide, ON),
        Way("bfloat16, float32 sums", dot, low),
        Way("bfloat16, float32 sums", dot, low, ON),
        Way("bfloat16, as Flax's dtype=", plain, low, ON),
    ]
    if rows < 4:

        def padded(x: jax.Array, w: jax.Array) -> jax.Array:
            product = Product(kind="dot", function=lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))
            return kernels.implemented(product, "rows").multiply(x, w, accumulate="float32")

        implementations.append(Way("bfloat16, rows up to four", padded, low, ON))
    return implementations


def convolutions(x: tuple[int, ...], w: tuple[int, ...], ways: str, **options: Any) -> list[Way]:
    """float32, by several implementations."""
    arguments = (numbers(*x), numbers(*w))
    return [Way(way, convolution(way, **options), arguments) for way in ways.split()]


def examples() -> dict[str, list[Way]]:
    """Name -> implementations, the one to compare with first."""
    activations = numbers(1, 64, 64, 144)
    wide = (numbers(1, 16, 16, 528), numbers(5, 5, 1, 528))
    blocks = [
        Way("grouped convolution", convolution("xla", groups=528), wide),
        Way("shifts, all channels at once", in_one_block, wide),
        Way("shifts, in blocks of channels", convolution("shift", groups=528), wide),
        Way("shifts, in blocks of channels", convolution("shift", groups=528), wide, NARROW_VECTORS),
    ]
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    low = activations.astype(jnp.bfloat16)
    image = numbers(1, 128, 128, 8)
    return {
        "product 1024 x 1024 x 1024": products(1024, 1024, 1024),
        "product 256 x 528 x 88 (a 1x1 convolution)": products(256, 528, 88),
        "product 64 x 864 x 144 (a 1x1 convolution)": products(64, 864, 144),
        "product 1 x 1024 x 1024 (one token)": products(1, 1024, 1024),
        "depthwise 5x5, 16 x 16 x 528": blocks,
        "stem 3x3, stride 2, 256 x 256 x 3 to 24": convolutions(
            (1, 256, 256, 3), (3, 3, 3, 24), "xla im2col terms", strides=(2, 2)
        ),
        "head 3x3, 256 x 256 x 8 to 1": convolutions((1, 256, 256, 8), (3, 3, 8, 1), "xla im2col taps"),
        "cast 64 x 64 x 144 to bfloat16": [
            Way("astype", lambda x: x.astype(jnp.bfloat16), (activations,)),
            Way("by the bit pattern", lambda x: formats.narrowed(x, "bfloat16"), (activations,)),
        ],
        "pad 64 x 64 x 144": [
            Way("float32", lambda x: jnp.pad(x, pads), (activations,)),
            Way("bfloat16", lambda x: jnp.pad(x, pads), (low,)),
        ],
        "min(max(2x + 1, 0), 6), 64 x 64 x 144": [
            Way(name, lambda x: jnp.clip(2 * x + 1, 0, 6), (x,))
            for name, x in (("float32", activations), ("bfloat16", low))
        ],
        "resize 128 x 128 x 8 to 256 x 256": [
            Way(way, lambda x, way=way: resize.doubled(x, implementation=way), (image,))
            for way in resize.IMPLEMENTATIONS
        ],
    }


def main(config: Config) -> None:
    """Time all examples."""
    run, rows = Run("speed_examples", config), []
    for name, ways in examples().items():
        calls = {}
        for number, way in enumerate(ways):
            placed = jax.device_put(way.arguments)
            calls[str(number)] = functools.partial(executable.build(way.function, placed, way.options), *placed)
        times = interleaved(calls, rounds=ROUNDS, shortest=timing.SHORTEST)
        medians = [1e3 * times.quartiles(number).median for number in calls]
        rows += [
            Row(
                example=name,
                implementation=way.name,
                options=executable.name(way.options),
                us=median,
                vs_first=median / medians[0],
            )
            for way, median in zip(ways, medians, strict=True)
        ]
    run.finish("What makes a layer fast or slow", results=Table("examples", Row, rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
