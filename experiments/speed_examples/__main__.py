"""What makes a low-precision layer fast or slow on this CPU: small programs, all implementations interleaved.

    python -m experiments.speed_examples [--cores 1]      (less than a minute)

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

Function = Callable[..., jax.Array]
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
class Program:
    """One program of an example: an implementation under compiler options."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=lambda: OFF)


def numbers(*shape: int, dtype: str = "float32") -> jax.Array:
    """Normal random numbers."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32).astype(dtype)


def implemented(name: str, **product: Any) -> Function:
    """A product by that implementation, accumulated and returned in float32."""
    return lambda x, w: kernels.implemented(Product(**product), name).multiply(x, w, accumulate="float32")


def convolution(name: str, strides: tuple[int, int] = (1, 1), groups: int = 1) -> Function:
    """A convolution by that implementation."""
    return implemented(
        name,
        kind="conv",
        function=lax.conv_general_dilated,
        window_strides=strides,
        padding="SAME",
        lhs_dilation=(1, 1),
        rhs_dilation=(1, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def in_one_block(x: jax.Array, w: jax.Array) -> jax.Array:
    """A depthwise convolution without blocks of channels."""
    size, shift._FIRST_LEVEL_CACHE = shift._FIRST_LEVEL_CACHE, 10**12
    shift._shifted_sum.clear_cache()  # type: ignore[attr-defined]
    try:
        return convolution("shift", groups=x.shape[3])(x, w)
    finally:
        shift._FIRST_LEVEL_CACHE = size
        shift._shifted_sum.clear_cache()  # type: ignore[attr-defined]


def products(rows: int, inner: int, columns: int) -> list[Program]:
    """float32 and bfloat16, with and without YNN; as Flax's dtype= computes it, the result is in the operands' dtype."""
    wide = (numbers(rows, inner), numbers(inner, columns))
    low = tuple(x.astype(jnp.bfloat16) for x in wide)
    dot: Function = functools.partial(lax.dot, preferred_element_type=jnp.float32)
    programs = [
        Program("float32", dot, wide),
        Program("float32", dot, wide, ON),
        Program("bfloat16, float32 sums", dot, low),
        Program("bfloat16, float32 sums", dot, low, ON),
        Program("bfloat16, as Flax's dtype=", lax.dot, low, ON),
    ]
    if rows < 4:
        padded = implemented("rows", kind="dot", function=lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))
        programs.append(Program("bfloat16, rows up to four", padded, low, ON))
    return programs


def convolutions(x: tuple[int, ...], w: tuple[int, ...], implementations: str, **options: Any) -> list[Program]:
    """float32, by several implementations."""
    arguments = (numbers(*x), numbers(*w))
    return [Program(name, convolution(name, **options), arguments) for name in implementations.split()]


def examples() -> dict[str, list[Program]]:
    """Name -> programs, the one to compare with first."""
    activations = numbers(1, 64, 64, 144)
    wide = (numbers(1, 16, 16, 528), numbers(5, 5, 1, 528))
    blocks = [
        Program("grouped convolution", convolution("xla", groups=528), wide),
        Program("shifts, all channels at once", in_one_block, wide),
        Program("shifts, in blocks of channels", convolution("shift", groups=528), wide),
        Program("shifts, in blocks of channels", convolution("shift", groups=528), wide, NARROW_VECTORS),
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
            Program("astype", lambda x: x.astype(jnp.bfloat16), (activations,)),
            Program("by the bit pattern", lambda x: formats.narrowed(x, "bfloat16"), (activations,)),
        ],
        "pad 64 x 64 x 144": [
            Program("float32", lambda x: jnp.pad(x, pads), (activations,)),
            Program("bfloat16", lambda x: jnp.pad(x, pads), (low,)),
        ],
        "min(max(2x + 1, 0), 6), 64 x 64 x 144": [
            Program(name, lambda x: jnp.clip(2 * x + 1, 0, 6), (x,))
            for name, x in (("float32", activations), ("bfloat16", low))
        ],
        "resize 128 x 128 x 8 to 256 x 256": [
            Program(name, lambda x, name=name: resize.doubled(x, implementation=name), (image,))
            for name in resize.IMPLEMENTATIONS
        ],
    }


def main(config: Config) -> None:
    """Time all examples."""
    run, rows = Run("speed_examples", config), []
    for name, programs in examples().items():
        calls = {}
        for number, program in enumerate(programs):
            placed = jax.device_put(program.arguments)
            calls[str(number)] = functools.partial(executable.build(program.function, placed, program.options), *placed)
        times = interleaved(calls, rounds=ROUNDS, shortest=timing.SHORTEST)
        medians = [1e3 * times.quartiles(number).median for number in calls]
        rows += [
            Row(
                example=name,
                implementation=program.name,
                options=executable.name(program.options),
                us=median,
                vs_first=median / medians[0],
            )
            for program, median in zip(programs, medians, strict=True)
        ]
    fastest = [min((row for row in rows if row.example == name), key=lambda row: row.us) for name in examples()]
    run.finish(
        "What makes a layer fast or slow",
        results=Table("examples", Row, rows),
        overview=Table("fastest", Row, fastest),
        lead=__doc__,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
