"""The models with their inputs, their variants, and how a variant's program is built."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import assets
from experiments.models.encoder import random_encoder
from experiments.models.tflite_import import load_tflite
from experiments.speed_gpu.building import of_form
from mpjax.apply import MixedModel, apply, widened
from mpjax.compiled import building
from mpjax.formats import parse
from mpjax.program import Batches, Model, from_function, from_linen
from mpjax.xla import executable

POSE, ENCODER, DECODE = "pose_landmark_full", "encoder_12x768", "decode_24x2048"
SIZE = 256  # pixels, side of the pose model's crops


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What runs.

    Attributes:
        fmt, activations: of `mpjax.apply`, for all layers; no format: the model without mpjax.
        cast: the model's own bfloat16 call.
        precision: jax's default precision while it is traced.
        form: of all weight-only products; None: the fastest, as the device is asked.
        options: of the compiler, besides mpjax's.
    """

    name: str
    fmt: str = ""
    activations: str = "float32"
    cast: bool = False
    precision: str | None = None
    form: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


FP32, TF32 = Variant(name="fp32", precision="highest"), Variant(name="tf32")
VARIANTS: dict[str, tuple[Variant, ...]] = {
    POSE: (
        FP32,
        TF32,
        Variant(name="fp16", fmt="float16", activations="float16"),
        Variant(name="bf16", fmt="bfloat16", activations="bfloat16"),
    ),
    ENCODER: (
        FP32,
        TF32,
        Variant(name="flax_bf16", cast=True),
        Variant(name="bf16", fmt="bfloat16"),
        Variant(name="fp16", fmt="float16"),
        Variant(name="fp16_act", fmt="float16", activations="float16"),
        Variant(name="bf16_x3", fmt="bfloat16_x3", precision="highest"),
    ),
    DECODE: (
        FP32,
        TF32,
        Variant(name="jax_bf16", cast=True),
        Variant(name="bf16_w", fmt="bfloat16_w"),
        Variant(name="int8_w", fmt="int8_w"),
        Variant(name="float8_w", fmt="float8_e4m3fn_w"),
        Variant(name="int4_w", fmt="int4_w"),
    ),
}
_GRAPHS: dict[str, dict[str, Any]] = {
    "no graphs": {"xla_gpu_enable_command_buffer": ""},
    "graphs from 1": {"xla_gpu_graph_min_graph_size": 1},
}
ONE_ROW = (
    *(Variant(name=f"int8_w {form}", fmt="int8_w", form=form) for form in ("reduce", "kernel", "parts")),
    *(Variant(name=f"int4_w {form}", fmt="int4_w", form=form) for form in ("reduce", "kernel")),
    *(
        Variant(name=f"int8_w reduce, {name}", fmt="int8_w", form="reduce", options=options)
        for name, options in _GRAPHS.items()
    ),
)
PLAIN = frozenset(variant.name for part in VARIANTS.values() for variant in part if not variant.fmt)


def variants(name: str, batch: int) -> tuple[Variant, ...]:
    """Of a model at that batch size, fp32 first."""
    return VARIANTS[name] + (ONE_ROW if (name, batch) == (DECODE, 1) else ())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with two batches on the device; `cast`: its bfloat16 call, as one without mpjax has it."""

    model: Model
    batches: Batches
    cast: Model | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Built:
    """A variant's program on the first batch.

    `program(*arguments)` runs it. `seconds`: of tracing, compiling and the first run, other builds beside it.
    """

    program: executable.Executable
    arguments: tuple[Any, ...]
    seconds: float
    note: str | None

    def __call__(self) -> Any:
        return self.program(*self.arguments)


def load(name: str, batch: int, *, quick: bool, seed: int) -> Case:
    """A model with inputs on the device.

    Raises:
        experiments.lib.assets.AssetError: the pose model could not be fetched.
    """
    if name == POSE:
        model = _small_model(seed) if quick else _pose_model()
        images, note = _crops(seed, 32 if quick else SIZE)
        take = np.arange(batch) % len(images)
        shifted = [jax.device_put(images[(take + shift) % len(images)]) for shift in (0, len(images) // 2)]
        return Case(model=model, batches=[(x,) for x in shifted], note=note)
    if name == ENCODER:
        module, variables, model, x = _encoder(seed, quick)
        cast = Model(params=variables, layers=(), call=module.clone(dtype=jnp.bfloat16).apply)
        return Case(model=model, batches=[(x[:batch],), (x[batch : 2 * batch],)], cast=cast)
    blocks, width = (1, 128) if quick else (24, 2048)
    params = _weights(blocks, width, seed)
    x = jax.random.normal(jax.random.key(seed), (2, batch, width), jnp.float32)
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


def _small_model(seed: int) -> Model:
    """In the pose model's place in a dry run."""
    depthwise = nn.Conv(8, (3, 3), feature_group_count=8)
    module = nn.Sequential([nn.Conv(8, (3, 3), strides=2), nn.relu, depthwise, nn.relu, nn.Conv(4, (1, 1))])
    x = jnp.zeros((1, 32, 32, 3), jnp.float32)
    return from_linen(module, module.init(jax.random.key(seed), x), x)


@functools.cache
def _crops(seed: int, size: int) -> tuple[np.ndarray, str | None]:
    """(N, size, size, 3) crops of people that an experiment has left in the cache; else random images."""
    files = sorted((assets.cache_dir() / "crops").glob("crops-*.npz"))
    if files and size == SIZE:
        with np.load(files[0], allow_pickle=False) as arrays:
            pixels = [arrays[f"array/{split}_pixels"] for split in ("calibration", "evaluation")]
        return np.concatenate(pixels).astype(np.float32) / np.float32(255), None
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(64, size, size, 3)).astype(np.float32), "inputs are random images"


@functools.cache
def _encoder(seed: int, quick: bool) -> tuple[Any, Any, Model, jax.Array]:
    sizes, tokens = ((1, 32, 2), 8) if quick else ((12, 768, 12), 128)
    module, variables, x = random_encoder(*sizes, tokens=tokens, batch=64, seed=seed)
    return module, variables, from_linen(module, variables, x[:1]), x


@functools.cache
def _weights(blocks: int, width: int, seed: int) -> dict[str, jax.Array]:
    shapes = dict.fromkeys("qkvo", (width, width)) | {"up": (width, 4 * width), "down": (4 * width, width)}
    names = [(f"{block:02}/{name}", shape) for block in range(blocks) for name, shape in shapes.items()]
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5, static_argnums=1)
    keys = jax.random.split(jax.random.key(seed), len(names))
    return {name: draw(key, shape) for key, (name, shape) in zip(keys, names, strict=True)}


def _stack(blocks: int, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Blocks of a decoder's six products, without a cache of keys and values: (R, width) -> (R, width)."""
    for block in range(blocks):
        q, k, v, o, up, down = (params[f"{block:02}/{name}"] for name in ("q", "k", "v", "o", "up", "down"))
        x = x + 0.1 * (((x @ q) * jax.nn.sigmoid(x @ k) + x @ v) @ o)
        x = x + 0.1 * (jax.nn.relu(x @ up) @ down)
        x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))
    return x


def mixed(case: Case, fmt: str, activations: str) -> MixedModel:
    """The model with all layers in a format."""
    return apply(case.model, dict.fromkeys(case.model.names, fmt), activations=activations)


def build(case: Case, variant: Variant, model: Model) -> Built:
    """The variant's program for the first batch, which has run once; `model`: the case's, its cast or mixed one."""
    start = time.perf_counter()
    function, arguments = building.as_function(model, case.batches[0])

    def traced(*values: Any) -> Any:
        with in_precision(variant.precision):
            return function(*values)

    placed = jax.device_put(arguments)
    options = {**(executable.EXACT if variant.fmt else {}), **variant.options}
    with of_form(variant.form) as forms:
        program = executable.build(traced, placed, options)
    jax.block_until_ready(program(*placed))
    skipped = ", ".join(name for name in program.skipped if name in variant.options)
    notes = [
        case.note or "",
        "products: " + ", ".join(f"{count} {form}" for form, count in sorted(forms.items())) if forms else "",
        f"this jaxlib does not know {skipped}" if skipped else "",
    ]
    return Built(
        program=program,
        arguments=placed,
        seconds=time.perf_counter() - start,
        note="; ".join(filter(None, notes)) or None,
    )


def in_precision(precision: str | None) -> contextlib.AbstractContextManager[Any]:
    """jax's default precision of products within the context; None: as it is."""
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)


def ask(fmt: str, shape: tuple[int, ...], rows: int) -> None:
    """Have the fastest form of a product chosen, before the programs that need the answer are traced."""
    x = jnp.zeros((rows, shape[0]), jnp.float32)
    model = from_function(lambda params, x: x @ params["w"], {"w": jnp.zeros(shape, jnp.float32)}, x)
    low = apply(model, dict.fromkeys(model.names, fmt))
    jax.eval_shape(low.call, low.params, x)


def questions(case: Case, parts: tuple[Variant, ...]) -> list[Callable[[], None]]:
    """What the device is asked before the variants are traced: a call for each format and shape of weights."""
    rows = case.batches[0][0].shape[0]
    formats = dict.fromkeys(v.fmt for v in parts if v.fmt and parse(v.fmt).weight_only and v.form is None)
    shapes = dict.fromkeys(layer.kernel_shape for layer in case.model.layers)
    return [functools.partial(ask, fmt, shape, rows) for fmt in formats for shape in shapes]


def by_definition(case: Case, fp32: Built, low: MixedModel) -> Any:
    """Outputs of the numbers that weight-only formats' weights stand for: float32's program on them."""
    _, arguments = building.as_function(widened(low, low.names), case.batches[0])
    return fp32.program(*jax.device_put(arguments))
