"""Low precision on a CUDA GPU: MediaPipe's pose model and two transformer encoders, by mpjax and by Flax alone.

    scripts/bench_gpu                              (an environment of its own; under 8 minutes)
    scripts/bench_gpu --cpu --quick                (a dry run without a GPU, under a minute)

| variant | what runs |
| --- | --- |
| `fp32` | float32, jitted, full-precision products: what the others are compared with |
| `tf32` | float32, jitted, products in TensorFloat-32 |
| `flax_bf16` | the encoder module with dtype=bfloat16, jitted; its weights stay float32 |
| `bf16`, `fp16` | `mpjax.apply` with every layer in that format, compiled and verified (on two examples of a batch) |
| `bf16_activations` | `bf16`, and layers hand on bfloat16 |
| `fp8` | `mpjax.apply` in float8_e4m3fn, calibrated on the timed inputs; compute capability 8.9 or newer |

All products are lax's own, float32 ones too, so that precision alone differs. What mpjax leaves in float32 (the
attention's einsums) runs as jax does by default: on a GPU that is TF32. mpjax compiles without excess precision; the others have
XLA's defaults. Inputs and weights are on the device before the clock starts, and outputs stay there. Error: the largest
difference to `fp32` over the largest number of that output, worst over outputs.

Writes results/speed_gpu/: summary.json, tables (CSV, LaTeX), figures (PNG, PDF) and report.html.
"""

import functools
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lib import assets
from experiments.lib.page import Section
from experiments.lib.progress import progress
from experiments.lib.rows import Table
from experiments.lib.run import Options, Run, check_names
from experiments.lib.times import interleaved
from experiments.models.encoder import ENCODERS, random_encoder
from experiments.models.tflite_import import load_tflite
from experiments.problems import data
from experiments.speed_gpu import figures
from experiments.speed_gpu.figures import VARIANTS
from experiments.speed_gpu.rows import Row
from mpjax import compiled, emulation, metrics, xla
from mpjax.apply import apply
from mpjax.compiled import building
from mpjax.ledger import Ledger
from mpjax.program import Batches, Model, from_linen
from mpjax.xla import executable, timing

Call = Callable[[], Any]

POSE = "pose_landmark_full"
MODELS = (POSE, *ENCODERS)
LANDMARKS = "Identity"  # of the pose model's outputs; its mask, Identity_2, amplifies rounding most
FORMATS = {"bf16": "bfloat16", "fp16": "float16", "bf16_activations": "bfloat16", "fp8": "float8_e4m3fn"}
FP8_SINCE = (8, 9)  # compute capability
# What one program may fail with while the others go on.
REFUSED = (compiled.MiscompiledError, jax.errors.JaxRuntimeError, NotImplementedError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is measured, and for how long."""

    quick: bool = False
    """encoder_6x384 at batch 1 in 3 rounds, whatever else is asked for."""
    cpu: bool = False
    """Run without a GPU, too: a dry run, whose times say nothing about GPUs."""
    models: tuple[str, ...] = MODELS
    """Some of pose_landmark_full, encoder_6x384, encoder_12x768."""
    batches: tuple[int, ...] = (1, 32, 256)
    """Examples in a call."""
    tokens: int = 128
    """Length of the encoders' inputs."""
    rounds: int = 20
    """Rounds of interleaved timing."""
    minutes: float = 6.0
    """After that many, no further program is compiled: it gets a row without numbers."""
    seed: int = 0
    """Seed of the encoders' weights and inputs."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, MODELS)
        if not self.batches or min(self.batches) < 1:
            raise SystemExit(f"--batches: expected sizes of at least 1 such as 1 32, found {self.batches or 'none'}.")
        for name in ("tokens", "rounds"):
            if getattr(self, name) < 1:
                raise SystemExit(f"--{name}: expected at least 1, found {getattr(self, name)}.")
        if not self.minutes > 0:
            raise SystemExit(f"--minutes: expected more than 0, found {self.minutes}.")
        if self.seed < 0:
            raise SystemExit(f"--seed: expected at least 0, found {self.seed}.")

    @property
    def jobs(self) -> tuple[tuple[str, int], ...]:
        """(model, batch), small batches first, so that what time does not suffice for is the large ones."""
        if self.quick:
            return (("encoder_6x384", 1),)
        return tuple((name, batch) for batch in sorted(set(self.batches)) for name in dict.fromkeys(self.models))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with two batches on the device (timed on the first); `plain_bf16` is Flax's own call with dtype=bfloat16."""

    model: Model
    batches: Batches
    plain_bf16: Model | None = None


def main(config: Config) -> None:
    """Measure, and write everything."""
    check_device(config)
    run, backend = Run("speed_gpu", config), jax.default_backend()
    rows, ledger = measured(config, run.environment["device"], deadline=time.monotonic() + 60 * config.minutes)
    run.ledger += ledger
    by_model = {name: [row for row in rows if row.model == name] for name in dict.fromkeys(row.model for row in rows)}
    pictures = [
        run.save(figures.bars(name, part), f"speed_gpu_{name}", alt=f"Bars of time relative to fp32 by batch: {name}")
        for name, part in by_model.items()
        if any(row.vs_fp32 is not None for row in part)
    ]
    run.finish(
        "Low precision on a GPU" + ("" if backend == "gpu" else ": a dry run without one"),
        results=Table("speed_gpu", Row, rows),
        findings=findings(rows),
        sections=[Section("Time relative to fp32", *pictures)],
        facts={"backend": backend},
    )


def check_device(config: Config) -> None:
    """Refuse to run without a GPU, unless that was asked for.

    Raises:
        SystemExit: with what jax found.
    """
    backend = jax.default_backend()
    if backend != "gpu" and not config.cpu:
        raise SystemExit(
            f"No GPU found: jax {jax.__version__} runs on {backend} ({xla.device_name()}). This needs an NVIDIA GPU, its "
            "driver, and jax[cuda12] (scripts/bench_gpu installs it). For a dry run without one: scripts/bench_gpu --cpu --quick."
        )


# --- measuring --------------------------------------------------------------------------------------------------


def measured(config: Config, device: str, *, deadline: float) -> tuple[list[Row], Ledger]:
    """One row for each model, batch and variant; and the work it took."""
    rounds, rows, ledger = 3 if config.quick else config.rounds, list[Row](), Ledger()
    with progress("programs", sum(len(names_for(name)) for name, _ in config.jobs)) as advance:
        for name, batch in config.jobs:
            runs, notes = prepared(config, name, batch, deadline, advance)
            numbers, more = timed(runs, rounds)
            notes |= more
            case: dict[str, Any] = {"model": name, "outputs": "all", "batch": batch, "device": device}
            rows += [
                Row(**case, variant=variant, note=notes.get(variant), **numbers.get(variant, {}))
                for variant in names_for(name)
            ]
            ledger += Ledger(compilations=len(runs), forward=len(numbers) * (rounds + 2) * batch)
            del runs  # their memory, before the next model is loaded
    return rows, ledger


def names_for(name: str) -> tuple[str, ...]:
    """The variants of a model on this backend: the imported pose model takes no dtype, a CPU has no float8 products."""
    left_out = {"flax_bf16"} if name == POSE else set()
    if jax.default_backend() == "cpu":
        left_out.add("fp8")
    return tuple(variant for variant in VARIANTS if variant not in left_out)


def prepared(
    config: Config, name: str, batch: int, deadline: float, advance: Callable[[], None]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Variant -> a run of its compiled program; and why others have none."""
    runs: dict[str, Call] = {}
    notes: dict[str, str] = {}
    case: Case | None = None
    for variant in names_for(name):
        if time.monotonic() > deadline:
            notes[variant] = f"left out: the {config.minutes:g} minutes were over"
        elif case is None and notes:
            notes[variant] = next(iter(notes.values()))  # the model could not be loaded
        else:
            try:
                case = case or load(config, name, batch)
                runs[variant] = build(case, variant)
            except (*REFUSED, assets.AssetError, data.DataError) as error:
                notes[variant] = reason(error)
        advance()
    return runs, notes


def timed(runs: Mapping[str, Call], rounds: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Variant -> its row's numbers; and why others have none."""
    errors, notes = output_errors(runs)
    usable = {variant: run for variant, run in runs.items() if variant not in notes}
    if not usable:
        return {}, notes
    try:
        times = interleaved(usable, rounds=rounds, shortest=timing.WHOLE)
    except REFUSED as error:
        return {}, notes | dict.fromkeys(usable, reason(error))
    numbers: dict[str, dict[str, Any]] = {}
    for variant in usable:
        values = errors.get(variant)
        numbers[variant] = {
            "ms_median": times.quartiles(variant).median,
            "ms_min": times.fastest(variant),
            "vs_fp32": times.ratio(variant, "fp32").median if "fp32" in usable else None,
            "max_rel_error": float(np.max(list(values.values()))) if values else None,
        }
        if values and (note := where(values)):
            notes[variant] = note
    return numbers, notes


def output_errors(runs: Mapping[str, Call]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Variant -> output -> error to `fp32`, where that runs; and why others do not run."""
    truth: dict[str, np.ndarray] | None = None
    errors: dict[str, dict[str, float]] = {}
    notes: dict[str, str] = {}
    for variant, run in runs.items():  # fp32 is the first
        try:
            outputs = named(run())
        except REFUSED as error:
            notes[variant] = reason(error)
            continue
        truth = outputs if variant == "fp32" else truth
        if truth is not None:
            errors[variant] = {name: metrics.relative_error(outputs[name], truth[name]) for name in truth}
    return errors, notes


def named(outputs: Any) -> dict[str, np.ndarray]:
    """Outputs by name; a single one is called "output"."""
    by_name = outputs if isinstance(outputs, Mapping) else {"output": outputs}
    return {name: np.asarray(value, np.float32) for name, value in by_name.items()}


def where(errors: Mapping[str, float]) -> str | None:
    """What the worst error does not say: whether a number is finite, which output it is of, and that of the landmarks."""
    if not np.isfinite(list(errors.values())).all():
        return "an output is not finite"
    if LANDMARKS not in errors or not max(errors.values()):
        return None
    return f"largest in {max(errors, key=lambda name: errors[name])}; landmarks ({LANDMARKS}) {errors[LANDMARKS]:.1e}"


def reason(error: Exception) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 200, placeholder=" …")


# --- models and programs ----------------------------------------------------------------------------------------


def load(config: Config, name: str, batch: int) -> Case:
    """A model with inputs on the device."""
    if name == POSE:
        images = pose_images()
        take = np.arange(batch) % len(images)
        # The second batch starts elsewhere in the crops: programs are verified on two different inputs.
        batches = [(jax.device_put(images[(take + shift) % len(images)]),) for shift in (0, len(images) // 2)]
        return Case(model=pose_model(), batches=batches)
    module, variables, x = random_encoder(*ENCODERS[name], tokens=config.tokens, batch=2 * batch, seed=config.seed)
    return Case(
        model=from_linen(module, variables, x[:1]),
        batches=[(x[:batch],), (x[batch:],)],
        plain_bf16=Model(params=variables, layers=(), call=module.clone(dtype=jnp.bfloat16).apply),
    )


@functools.cache
def pose_model() -> Model:
    """The pose model with all of its outputs."""
    imported = load_tflite(assets.fetch(POSE), plain=True)
    return from_linen(imported.module, imported.variables, jnp.zeros((1, *imported.input_shape[1:]), jnp.float32))


@functools.cache
def pose_images() -> np.ndarray:
    """(N, 256, 256, 3) person crops."""
    crops = data.pose_crops()
    return np.concatenate([crops.calibration.images, crops.evaluation.images])


def build(case: Case, variant: str) -> Call:
    """A run of the variant's program on the first batch.

    Raises:
        MiscompiledError, JaxRuntimeError, NotImplementedError: it does not compile, or wrongly, or not on this device.
    """
    if variant == "fp32":
        return jitted(case.model, case.batches, "highest")
    if variant == "tf32":
        return jitted(case.model, case.batches, "tensorfloat32")
    if variant == "flax_bf16":
        assert case.plain_bf16 is not None
        return jitted(case.plain_bf16, case.batches, "default")
    return by_mpjax(case, variant)


def jitted(model: Model, batches: Batches, precision: str) -> Call:
    """A plain jitted run; the precision of its products is fixed while it is traced."""
    function, arguments = building.as_function(model, batches[0])

    def traced(*values: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*values)

    run = functools.partial(jax.jit(traced), *jax.device_put(arguments))
    jax.block_until_ready(run())
    return run


def by_mpjax(case: Case, variant: str) -> Call:
    """A run of the program that mpjax makes, without its check of the inputs' shapes.

    It is verified on the first two examples of each batch: its definition, compiled without optimisation, is slow.
    """
    calibration = None
    if variant == "fp8":
        require_fp8()
        calibration = emulation.calibrate(case.model, case.batches)
    assignment = dict.fromkeys(case.model.names, FORMATS[variant])
    activations = "bfloat16" if variant == "bf16_activations" else "float32"
    mixed = apply(case.model, assignment, calibration=calibration, activations=activations)
    program = compiled.compile(mixed, [tuple(x[:2] for x in batch) for batch in case.batches])
    function, (weights, *inputs) = building.as_function(mixed, case.batches[0])
    weights = jax.device_put(weights)
    whole = executable.build(function, (weights, *inputs), program.options)
    return functools.partial(whole, weights, *inputs)


def require_fp8() -> None:
    """Raises NotImplementedError on a chip without float8 products."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    try:
        known = tuple(int(part) for part in capability.split("."))
    except ValueError:
        known = ()
    if known < FP8_SINCE:
        raise NotImplementedError(f"needs compute capability 8.9 or newer; this device has {capability}")


def findings(rows: Sequence[Row]) -> list[str]:
    """What was fastest, for each model and batch."""
    sentences = []
    for name, batch in dict.fromkeys((row.model, row.batch) for row in rows):
        ratios = {r.vs_fp32: r.variant for r in rows if (r.model, r.batch) == (name, batch) and r.vs_fp32 is not None}
        best = f"{ratios[min(ratios)]} is fastest, {min(ratios):.2f} of fp32's time" if ratios else "not timed"
        sentences.append(f"{name}, batch {batch}: {best}.")
    return sentences


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
