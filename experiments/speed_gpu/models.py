"""The models with their inputs, their variants, and how a variant's program is built."""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.lib import assets
from experiments.models.encoder import random_encoder
from experiments.models.tflite_import import load_tflite
from experiments.speed_gpu.rows import joined
from mpjax.apply import MixedModel, apply, widened
from mpjax.compiled import building
from mpjax.kernels import stored
from mpjax.program import Batches, Model, from_function, from_linen
from mpjax.xla import executable

POSE, ENCODER, DECODE = "pose_landmark_full", "encoder_12x768", "decode_24x2048"
SEED = 0  # of random weights and inputs


@dataclass(frozen=True)
class Variant:
    """What runs.

    Attributes:
        fmt, activations: of `mpjax.apply`, for all layers; no format: the model without mpjax.
        cast: the model's own bfloat16 call.
        implementation: of products, as in `mpjax.apply`.
        precision: jax's default precision while it is traced.
        form: of all weight-only products; None: the fastest, as the device is asked.
        options: of the compiler, besides mpjax's.
    """

    name: str
    fmt: str = ""
    activations: str = "float32"
    cast: bool = False
    implementation: str = "rule"
    precision: str | None = None
    form: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


FP32, TF32 = Variant("fp32", precision="highest"), Variant("tf32")
# The most telling first, behind the two that others are compared with: the deadline may cut what comes last.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    POSE: (
        FP32,
        TF32,
        Variant("fp16", "float16", "float16"),
        Variant("tf32_rule", "float32"),
        Variant("bf16", "bfloat16", "bfloat16"),
    ),
    ENCODER: (
        FP32,
        TF32,
        Variant("flax_bf16", cast=True),
        Variant("bf16", "bfloat16"),
        Variant("fp16", "float16"),
        Variant("fp16_act", "float16", "float16"),
        Variant("bf16_x3", "bfloat16_x3", precision="highest"),
    ),
    DECODE: (
        FP32,
        TF32,
        Variant("jax_bf16", cast=True),
        Variant("int8_w", "int8_w"),
        Variant("int4_w", "int4_w"),
        Variant("bf16_w", "bfloat16_w"),
        Variant("float8_w", "float8_e4m3fn_w"),
    ),
}
SINGLE: dict[str, tuple[Variant, ...]] = {  # at batch 1, too: what nobody is given
    POSE: (Variant("fp16 cuDNN", "float16", "float16", implementation="xla"),),
    DECODE: (
        Variant("int8_w reduce", "int8_w", form="reduce"),
        Variant("int8_w reduce, no graphs", "int8_w", form="reduce", options={"xla_gpu_enable_command_buffer": ""}),
        Variant("int8_w kernel", "int8_w", form="kernel"),
    ),
}
PLAIN = frozenset(variant.name for part in VARIANTS.values() for variant in part if not variant.fmt)


def variants(name: str, batch: int) -> tuple[Variant, ...]:
    """Of a model at that batch size, fp32 first."""
    return VARIANTS[name] + (SINGLE.get(name, ()) if batch == 1 else ())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with two batches on the device.

    Attributes:
        cast: its bfloat16 call, as one without mpjax has it.
        lowered: (format, activations, implementation) -> the model with all layers in that format, once it was asked for.
    """

    model: Model
    batches: Batches
    cast: Model | None = None
    lowered: dict[tuple[str, str, str], MixedModel] = field(default_factory=dict)

    def mixed(self, variant: Variant) -> MixedModel:
        """The model in a variant's format."""
        key = variant.fmt, variant.activations, variant.implementation
        if key not in self.lowered:
            assignment = dict.fromkeys(self.model.names, variant.fmt)
            self.lowered[key] = apply(
                self.model, assignment, activations=variant.activations, implementation=variant.implementation
            )
        return self.lowered[key]


@dataclass(frozen=True)
class Built:
    """A variant's program on the first batch; `seconds`: of lowering, tracing, compiling and the first run."""

    program: executable.Executable
    arguments: tuple[Any, ...]
    seconds: float
    note: str | None

    def __call__(self) -> Any:
        return self.program(*self.arguments)


def load(name: str, batch: int, *, quick: bool) -> Case:
    """A model with inputs on the device.

    Raises:
        experiments.lib.assets.AssetError: the pose model could not be fetched.
    """
    if name == POSE:
        model, side = (_small_model(), 32) if quick else (_pose_model(), 256)
        images = jax.random.uniform(jax.random.key(SEED), (2, batch, side, side, 3), jnp.float32)
        return Case(model=model, batches=[(images[0],), (images[1],)])
    if name == ENCODER:
        module, variables, model, x = _encoder(quick)
        cast = Model(params=variables, layers=(), call=module.clone(dtype=jnp.bfloat16).apply)
        return Case(model=model, batches=[(x[:batch],), (x[batch : 2 * batch],)], cast=cast)
    blocks, width = (1, 128) if quick else (24, 2048)
    params = _weights(blocks, width)
    x = jax.random.normal(jax.random.key(SEED), (2, batch, width), jnp.float32)
    stack = functools.partial(_stack, blocks)

    def narrow(params: Any, x: jax.Array) -> jax.Array:
        return stack(params, x.astype(jnp.bfloat16))

    low = Model(params={key: w.astype(jnp.bfloat16) for key, w in params.items()}, layers=(), call=narrow)
    return Case(model=from_function(stack, params, x[0]), batches=[(x[0],), (x[1],)], cast=low)


@functools.cache
def _pose_model() -> Model:
    """The pose model with all of its outputs."""
    imported = load_tflite(assets.fetch(POSE), plain=True)
    return from_linen(imported.module, imported.variables, jnp.zeros((1, *imported.input_shape[1:]), jnp.float32))


def _small_model() -> Model:
    """In the pose model's place in a dry run."""
    depthwise = nn.Conv(8, (3, 3), feature_group_count=8)
    module = nn.Sequential([nn.Conv(8, (3, 3), strides=2), nn.relu, depthwise, nn.relu, nn.Conv(4, (1, 1))])
    x = jnp.zeros((1, 32, 32, 3), jnp.float32)
    return from_linen(module, module.init(jax.random.key(SEED), x), x)


@functools.cache
def _encoder(quick: bool) -> tuple[Any, Any, Model, jax.Array]:
    sizes, tokens = ((1, 32, 2), 8) if quick else ((12, 768, 12), 128)
    module, variables, x = random_encoder(*sizes, tokens=tokens, batch=64, seed=SEED)
    return module, variables, from_linen(module, variables, x[:1]), x


@functools.cache
def _weights(blocks: int, width: int) -> dict[str, jax.Array]:
    shapes = dict.fromkeys("qkvo", (width, width)) | {"up": (width, 4 * width), "down": (4 * width, width)}
    names = [(f"{block:02}/{name}", shape) for block in range(blocks) for name, shape in shapes.items()]
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5, static_argnums=1)
    keys = jax.random.split(jax.random.key(SEED), len(names))
    return {name: draw(key, shape) for key, (name, shape) in zip(keys, names, strict=True)}


def _stack(blocks: int, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Blocks of a decoder's six products, without a cache of keys and values: (R, width) -> (R, width)."""
    for block in range(blocks):
        q, k, v, o, up, down = (params[f"{block:02}/{name}"] for name in ("q", "k", "v", "o", "up", "down"))
        x = x + 0.1 * (((x @ q) * jax.nn.sigmoid(x @ k) + x @ v) @ o)
        x = x + 0.1 * (jax.nn.relu(x @ up) @ down)
        x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))
    return x


def build(case: Case, variant: Variant) -> Built:
    """The variant's program for the first batch, which has run once."""
    start = time.perf_counter()
    model = case.mixed(variant) if variant.fmt else case.cast if variant.cast else case.model
    assert model is not None
    function, arguments = building.as_function(model, case.batches[0])

    def traced(*values: Any) -> Any:
        with jax.default_matmul_precision(variant.precision):
            return function(*values)

    placed = jax.device_put(arguments)
    options = {**(executable.EXACT if variant.fmt else {}), **variant.options}
    with of_form(variant.form) as forms:
        program = executable.build(traced, placed, options)
    jax.block_until_ready(program(*placed))
    skipped = ", ".join(name for name in program.skipped if name in variant.options)
    products = ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
    note = joined(products and f"products: {products}", skipped and f"this jaxlib does not know {skipped}")
    return Built(program, placed, time.perf_counter() - start, note)


@contextlib.contextmanager
def of_form(form: str | None) -> Iterator[Counter[str]]:
    """Within the context all weight-only products are traced in one form, or in the device's fastest; yields their counts."""
    choice, counts = stored.choice, Counter[str]()

    def counted(*arguments: Any) -> str:
        picked = form or choice(*arguments)
        counts[picked] += 1
        return picked

    stored.choice = counted  # type: ignore[assignment]
    try:
        yield counts
    finally:
        stored.choice = choice


def by_definition(case: Case, fp32: Built, variant: Variant) -> Any:
    """Outputs of the numbers that a weight-only format's weights stand for: float32's program on them."""
    low = case.mixed(variant)
    _, arguments = building.as_function(widened(low, low.names), case.batches[0])
    return fp32.program(*jax.device_put(arguments))
