"""What low precision pays on this device: models whose layers are all in one format, against float32.

    python -m experiments.what_pays [--quick]      (about 7 minutes on 2 cores; --quick: 1)

The device's profile (`mp.xla.device_profile`) decides how each product is computed, and where weights are stored small and kept
wide. Two float32 programs stand beside: the model as jax jits it, and with the rule's implementations. Every program is verified
against its definition; inputs are random, which changes no time. MiniLM encodes texts of 128 tokens, SmolLM2 continues one: a
token after 127, or the first 128. `encoder` and `decode` have random weights: the second is a stack of gated blocks, two of whose
products are four times as wide, for one and for 32 tokens at a time.

Expected: no program takes more than 1.02 of float32's time. With AMX bfloat16 takes half and less of it in the encoder, with AVX2
alone nothing pays.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lib import assets
from experiments.lib.progress import progress
from experiments.lib.rows import Table
from experiments.lib.run import Computed, Options, Run, check_names
from experiments.lib.times import interleaved
from experiments.models.encoder import ENCODERS, random_encoder
from experiments.models.minilm import load_minilm
from experiments.models.smollm2 import load_smollm2, new_cache
from experiments.models.tflite_import import load_tflite
from experiments.what_pays import figures
from experiments.what_pays.rows import Row, findings, overview
from mpjax import compiled, xla
from mpjax.apply import apply
from mpjax.compiled import verification
from mpjax.ledger import Ledger
from mpjax.program import Batches, Model, from_function, from_linen, from_nnx
from mpjax.xla import timing

VISION = ("bfloat16", "float16", "int8_w")
TEXT = ("bfloat16", "float16", "bfloat16_w", "int8_w", "int4_w")
MODELS: Mapping[str, tuple[str, ...]] = {
    "iris_landmark": VISION,
    "pose_landmark_full": VISION,
    "MiniLM, 1 x 128": TEXT,
    "MiniLM, 8 x 128": TEXT,
    "SmolLM2, 1 token": TEXT,
    "SmolLM2, 128 tokens": TEXT,
    "encoder 6x384, 1 x 128": TEXT,
    "encoder 6x384, 8 x 128": TEXT,
    "decode, 1 token": TEXT,
    "decode, 32 tokens": TEXT,
}
LARGE = ("pose", "MiniLM", "SmolLM2")


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is measured."""

    quick: bool = False
    """Without the pretrained models but iris_landmark, in fewer rounds."""
    models: tuple[str, ...] = tuple(MODELS)
    """Some of them."""
    rounds: int = 21
    """Rounds of interleaved timing."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, tuple(MODELS))
        if self.rounds < 3:
            raise SystemExit(f"--rounds: expected at least 3, found {self.rounds}.")


def main(config: Config) -> None:
    """Measure each model, and write everything."""
    run = Run("what_pays", config)
    profile = xla.device_profile()
    print(profile)
    rounds = 5 if config.quick else config.rounds
    names = [name for name in dict.fromkeys(config.models) if not (config.quick and name.startswith(LARGE))]
    rows: list[Row] = []
    refused: dict[str, str] = {}
    with progress("models", len(names)) as advance:
        for name in names:
            piece = run.piece(name, functools.partial(measured, name, rounds), rounds=rounds)
            rows += [Row(**row) for row in piece.meta["rows"]]
            refused |= {f"{fmt}, {name}": reason for fmt, reason in piece.meta["refused"].items()}
            advance()
    run.save(
        figures.bars(rows), "what_pays", alt="Bars of time over the fastest float32 program's, by model and format"
    )
    run.finish(
        "What low precision pays on this device",
        lead=__doc__,
        results=Table("what_pays", Row, rows),
        overview=overview(rows),
        findings=[*findings(rows), *(f"{what} was refused: {reason}" for what, reason in refused.items())],
        facts={"profile": str(profile).splitlines()},
    )


def measured(name: str, rounds: int) -> Computed:
    """The rows of a model."""
    model, batches = load(name)
    float32 = verification.float32_outputs(model, batches)
    programs: dict[str, Callable[..., Any]] = {"float32, jit": jax.jit(model.call)}
    mixed = {fmt: apply(model, dict.fromkeys(model.names, fmt)) for fmt in MODELS[name]}
    refused: dict[str, str] = {}
    with progress(name, len(mixed) + 1) as advance:
        for fmt, variant in {"float32, rule": model, **mixed}.items():
            try:
                programs[fmt] = compiled.compile(variant, batches, implementation="rule", float32=float32)
            except compiled.MiscompiledError as refusal:
                refused[fmt] = str(refusal)
            advance()
    placed = jax.device_put((model.params, *batches[0]))
    runs = {
        fmt: functools.partial(run, *(placed if fmt == "float32, jit" else placed[1:])) for fmt, run in programs.items()
    }
    times = interleaved(runs, rounds=rounds, shortest=timing.WHOLE)
    fastest = min((fmt for fmt in runs if fmt.startswith("float32")), key=lambda fmt: times.quartiles(fmt).median)
    truth = jax.tree.leaves(float32.outputs[0])
    rows = []
    for fmt, program in programs.items():
        outputs = jax.tree.leaves(runs[fmt]())
        error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(outputs, truth, strict=True))
        ratios = times.columns(fmt, vs_jit="float32, jit", vs_float32=fastest)
        row: dict[str, Any] = {"model": name, "format": fmt, **ratios, "layers": len(model.names), "wide": 0}
        row |= {"error": error if math.isfinite(error) else None}
        memory = stored = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        if isinstance(program, compiled.Compiled):
            memory, stored = program.weight_bytes, program.stored_bytes
            row["wide"] = len(program.wide)
        rows.append(row | {"weights_mb": memory / 1e6, "stored_mb": stored / 1e6})
    return (
        {},
        {"rows": rows, "refused": refused},
        Ledger(compilations=2 * len(programs), forward=len(programs) * (rounds + 4)),
    )


def load(name: str) -> tuple[Model, Batches]:
    """A model and two batches of random inputs."""
    rng = np.random.default_rng(0)
    if name.startswith("encoder"):
        module, variables, x = random_encoder(*ENCODERS["encoder_6x384"], tokens=128, batch=2 * int(name.split()[2]))
        half = len(x) // 2
        return from_linen(module, variables, x[:half]), [(x[:half],), (x[half:],)]
    if name.startswith("decode"):
        function, params, width = decoder()
        tokens = rng.standard_normal((2, int(name.split()[1]), width)).astype(np.float32)
        return from_function(function, params, tokens[0]), [(jnp.asarray(part),) for part in tokens]
    if name.startswith("MiniLM"):
        words = rng.integers(1000, 30_000, (2, int(name.split()[1]), 128), np.int32)
        texts = [(jnp.asarray(ids), jnp.ones_like(ids)) for ids in words]
        return from_nnx(load_minilm(assets.fetch("minilm")), *texts[0]), texts
    if name.startswith("SmolLM2"):
        language, count = load_smollm2(assets.fetch("smollm2")).module, int(name.split()[1])
        cache, start = new_cache(language.shape, 128), jnp.full((1,), 128 - count, jnp.int32)
        ids = rng.integers(0, language.shape.words, (2, 1, count), np.int32)
        inputs = [(jnp.asarray(part), *cache, start) for part in ids]
        return from_nnx(language, *inputs[0]), inputs
    imported = load_tflite(assets.fetch(name), plain=True)
    images = rng.uniform(0, 1, (2, 1, *imported.input_shape[1:])).astype(np.float32)
    return from_linen(imported.module, imported.variables, images[0]), [(jnp.asarray(image),) for image in images]


def decoder(layers: int = 8, width: int = 1024) -> tuple[Callable[..., jax.Array], dict[str, jax.Array], int]:
    """A function of (params, (tokens, width)), its params, and the width: 100 million weights."""
    rng = np.random.default_rng(0)
    wide = {"gate": width, "value": width, "out": width, "up": 4 * width}
    params = {
        f"block_{i}/{name}": jnp.asarray(rng.standard_normal((width, columns)), jnp.float32) * width**-0.5
        for i in range(layers)
        for name, columns in wide.items()
    }
    params |= {
        f"block_{i}/down": jnp.asarray(rng.standard_normal((4 * width, width)), jnp.float32) * (4 * width) ** -0.5
        for i in range(layers)
    }

    def function(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        for i in range(layers):
            gate, value, out, up, down = (params[f"block_{i}/{n}"] for n in ("gate", "value", "out", "up", "down"))
            x = x + (jax.nn.sigmoid(x @ gate) * (x @ value)) @ out
            x = x + jax.nn.relu(x @ up) @ down
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))
        return x

    return function, params, width


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
