"""What makes a low-precision layer fast or slow on this CPU: small programs, each way timed in turns.

    python -m experiments.speed_examples [--cores 1]      (about two minutes; writes docs/speed_examples/examples.json)

Products and casts as `docs/speed.md` tells them. Microseconds include the start of a program, about 10.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if "--cores" in sys.argv:  # before jax counts them
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[sys.argv.index("--cores") + 1])]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from experiments.lib import common, report  # noqa: E402
from experiments.lib.pages import Column  # noqa: E402
from mpjax import formats, kernels, xla
from mpjax.files import jsonable, write_json
from mpjax.kernels import resize, shift
from mpjax.program import Product
from mpjax.xla import executable, timing

DOCS = common.ROOT / "docs/speed_examples"
NHWC = ("NHWC", "HWIO", "NHWC")
ON, OFF = executable.EXACT | executable.WIDE, executable.EXACT | executable.WIDE | executable.NO_YNN
NARROW_VECTORS = executable.EXACT | executable.NO_YNN
ROUNDS = 15
COLUMNS = (
    Column(key="example", title="example"),
    Column(key="implementation", title="implementation"),
    Column(key="options", title="options"),
    Column(key="us", title="µs", format=".1f"),
    Column(key="vs_first", title="/ first", format=".2f"),
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to compute an example."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def numbers(*shape: int, dtype: str = "float32") -> jax.Array:
    """Normal random numbers."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32).astype(dtype)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of matrices, accumulated and returned in float32."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of matrices as Flax's dtype= computes it: the result in the operands' dtype."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())))


def convolution(way: str, strides: tuple[int, int] = (1, 1), groups: int = 1) -> Callable[..., jax.Array]:
    """A convolution in a way."""

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
        return kernels.implemented(product, way).multiply(x, w, accumulate="float32")

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
    low = tuple(each.astype(jnp.bfloat16) for each in wide)
    found = [
        Way(name="float32", function=dot, arguments=wide, options=OFF),
        Way(name="float32", function=dot, arguments=wide, options=ON),
        Way(name="bfloat16, float32 sums", function=dot, arguments=low, options=OFF),
        Way(name="bfloat16, float32 sums", function=dot, arguments=low, options=ON),
        Way(name="bfloat16, as Flax's dtype=", function=plain, arguments=low, options=ON),
    ]
    if rows < 4:

        def padded(x: jax.Array, w: jax.Array) -> jax.Array:
            product = Product(kind="dot", function=lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))
            return kernels.implemented(product, "rows").multiply(x, w, accumulate="float32")

        found.append(Way(name="bfloat16, rows up to four", function=padded, arguments=low, options=ON))
    return found


def convolutions(x: tuple[int, ...], w: tuple[int, ...], ways: str, **options: Any) -> list[Way]:
    """float32, each way."""
    arguments = (numbers(*x), numbers(*w))
    return [
        Way(name=way, function=convolution(way, **options), arguments=arguments, options=OFF) for way in ways.split()
    ]


def examples() -> dict[str, list[Way]]:
    """Name -> ways, the one to compare with first."""
    activations = numbers(1, 64, 64, 144)
    wide = (numbers(1, 16, 16, 528), numbers(5, 5, 1, 528))
    blocks = [
        Way(name="grouped convolution", function=convolution("xla", groups=528), arguments=wide, options=OFF),
        Way(name="shifts, all channels at once", function=in_one_block, arguments=wide, options=OFF),
        Way(
            name="shifts, in blocks of channels", function=convolution("shift", groups=528), arguments=wide, options=OFF
        ),
        Way(
            name="shifts, in blocks of channels",
            function=convolution("shift", groups=528),
            arguments=wide,
            options=NARROW_VECTORS,
        ),
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
            Way(name="astype", function=lambda x: x.astype(jnp.bfloat16), arguments=(activations,), options=OFF),
            Way(
                name="by the bit pattern",
                function=lambda x: formats.narrowed(x, "bfloat16"),
                arguments=(activations,),
                options=OFF,
            ),
        ],
        "pad 64 x 64 x 144": [
            Way(name="float32", function=lambda x: jnp.pad(x, pads), arguments=(activations,), options=OFF),
            Way(name="bfloat16", function=lambda x: jnp.pad(x, pads), arguments=(low,), options=OFF),
        ],
        "min(max(2x + 1, 0), 6), 64 x 64 x 144": [
            Way(name=name, function=lambda x: jnp.clip(2 * x + 1, 0, 6), arguments=(each,), options=OFF)
            for name, each in (("float32", activations), ("bfloat16", low))
        ],
        "resize 128 x 128 x 8 to 256 x 256": [
            Way(
                name=way,
                function=lambda x, way=way: resize.doubled(x, implementation=way),
                arguments=(image,),
                options=OFF,
            )
            for way in resize.IMPLEMENTATIONS
        ],
    }


def main() -> None:
    """Time, print, and write the table."""
    rows = []
    for name, ways in examples().items():
        runs = []
        for way in ways:
            placed = jax.device_put(way.arguments)
            program = executable.build(way.function, placed, way.options)
            runs.append(lambda program=program, placed=placed: jax.block_until_ready(program(*placed)))
        medians = [1e6 * float(np.median(each)) for each in timing.in_turns(runs, ROUNDS)]
        rows += [
            {
                "example": name,
                "implementation": way.name,
                "options": executable.name(way.options),
                "us": median,
                "vs_first": median / medians[0],
            }
            for way, median in zip(ways, medians, strict=True)
        ]
    report.print_table(rows, COLUMNS)
    where = xla.environment()
    DOCS.mkdir(parents=True, exist_ok=True)
    write_json(DOCS / "examples.json", {"environment": jsonable(where), "commit": common.commit(), "rows": rows})
    print(f"{where['device']}, {where['cores']} cores, jax {where['jax']}, {where['date'][:10]}")


if __name__ == "__main__":
    main()
