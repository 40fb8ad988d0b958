"""Low precision on a CUDA GPU: MediaPipe's pose model, a transformer encoder, and decoding with 1.2 G weights.

    scripts/bench_gpu                              (an environment of its own; builds nothing after 6 minutes)
    scripts/bench_gpu --cpu --quick                (a dry run without a GPU, under a minute)

| variant | what runs |
| --- | --- |
| `fp32` | float32, jitted, full-precision products: what the errors are to |
| `tf32` | float32, jitted, as jax does by default: products in TensorFloat-32 |
| `flax_bf16`, `jax_bf16` | bfloat16 without mpjax: the encoder with dtype=bfloat16; decoding of bfloat16 weights and inputs |
| `bf16`, `fp16` | `mpjax.apply` with every layer in that format, by the rule; of the pose model, layers hand it on, too |
| `tf32_rule` | `mpjax.apply` with every layer in float32, by the rule: convolutions as matrix products and shifted sums |
| `fp16 cuDNN` | `fp16` with XLA's own convolutions, which are calls of cuDNN |
| `fp16_act` | `fp16`, and layers hand on float16 |
| `bf16_x3` | each product as three of bfloat16 numbers, the rest at full precision |
| `bf16_w`, `int8_w`, `float8_w`, `int4_w` | weights in that format, products in the form that is fastest alone |
| `int8_w reduce`, … | all products in that form (`mpjax.kernels.stored`), or without CUDA graphs |

What mpjax leaves in float32 (the attention's products) runs as jax does by default: in TF32. Weights and inputs (images: random
ones) are on the device before the clock starts, and outputs stay there. Error: the largest difference over the largest number of
an output, worst over outputs. Programs of a model and batch are built one after the other, then timed in turns. One of the pose
model's and one of the encoder's are verified (`mpjax.compile`).

As soon as a model and batch is timed, results/speed_gpu/ has it: summary.json, tables (CSV, LaTeX), the figure (PNG, PDF) and
report.html. A second call goes on with those that are missing or unfinished, and takes the programs that XLA has built and tuned
before from results/speed_gpu/xla.
"""

import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
import tyro
from jax.experimental.compilation_cache import compilation_cache

from experiments.lib.rows import Table
from experiments.lib.run import Computed, Options, Run
from experiments.lib.times import interleaved
from experiments.speed_gpu import figures, models
from experiments.speed_gpu.models import DECODE, ENCODER, PLAIN, POSE, Built, Case, Variant
from experiments.speed_gpu.rows import Row, by_job, joined
from mpjax import compiled, metrics, xla
from mpjax.ledger import Ledger
from mpjax.xla import profile, timing

# The most telling first; the programs in `VERIFIED` are verified at the end.
JOBS = ((POSE, 1), (DECODE, 1), (ENCODER, 1), (DECODE, 32), (POSE, 32), (ENCODER, 32))
VERIFIED = {POSE: "fp16", ENCODER: "bf16"}
LANDMARKS = "Identity"  # of the pose model's outputs; its mask, Identity_2, amplifies rounding most
ROUNDS = 15  # of interleaved timing
NOT_GIVEN = {part.name for parts in models.SINGLE.values() for part in parts}  # programs that nobody is handed
NOISE = 1.02  # what is slower than another by less is not
# (model, batch, variant, column, at most)
TARGETS = (
    (POSE, 1, "fp16", "vs_fp32", 0.62),
    (POSE, 1, "fp16", "vs_tf32", 0.78),
    (DECODE, 1, "int8_w", "vs_bf16", 0.75),
    (DECODE, 1, "int4_w", "vs_bf16", 0.60),
)
# Made up, so that the rule always takes matrix products and shifted sums; measuring takes half a minute.
UNPROFILED = profile.DeviceProfile(
    device="not measured",
    backend="",
    cores=1,
    jax=jax.__version__,
    instructions=(),
    seconds=dict.fromkeys(profile.DTYPES, (1.0,) * len(profile.ROWS)),
    ynn={},
    convolution=dict.fromkeys(profile.CONVOLVED, 1.0),
    grouped=np.inf,
    pointwise=dict.fromkeys(profile.POINTWISE, np.inf),
    start=0.0,
    bandwidth=1.0,
    cast={},
)


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is measured, and for how long."""

    quick: bool = False
    """Small models in their places, in 3 rounds."""
    cpu: bool = False
    """Run without a GPU, too: a dry run, whose times say nothing about GPUs."""
    minutes: float = 6.0
    """After that many, no further program is built: it gets a row without numbers."""


def main(config: Config) -> None:
    """Measure everything."""
    deadline = time.monotonic() + 60 * config.minutes
    check_device(config)
    run = Run("speed_gpu", config)
    run.depends_on(quick=config.quick)
    cache = run.folder.resolve() / "xla"
    cache.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(cache))  # of autotuning, too (jax's default)
    compilation_cache.reset_cache()  # jax looks for the folder once
    bench = Bench(config, run, deadline)
    with profile.assumed(UNPROFILED):
        for job in JOBS:
            bench.measure(*job)
        bench.verify()


def check_device(config: Config) -> None:
    """Refuse to run without a GPU, unless that was asked for."""
    backend = jax.default_backend()
    if backend != "gpu" and not config.cpu:
        raise SystemExit(
            f"No GPU found: jax {jax.__version__} runs on {backend} ({xla.device_name()}). This needs an NVIDIA GPU, its "
            "driver, and jax[cuda12] (scripts/bench_gpu installs it). For a dry run without one: scripts/bench_gpu --cpu --quick."
        )


class Unfinished(Exception):
    """Some variants had no time, or none ran: the rows are shown, and measured anew by the next call."""


class Bench:
    """The rows so far."""

    def __init__(self, config: Config, run: Run, deadline: float) -> None:
        self.config, self.run, self.deadline, self.rows = config, run, deadline, list[Row]()
        self._late = f"left out: the {config.minutes:g} minutes were over"
        self._rounds = 3 if config.quick else ROUNDS

    def measure(self, model: str, batch: int) -> None:
        """Rows of a model at a batch size, from an earlier run or measured now; everything that there is so far is written."""

        def compute() -> Computed:
            parts = models.variants(model, batch)
            try:
                numbers = self._numbers(model, batch, parts)
            except Exception as error:
                numbers = {part.name: {"note": reason(error)} for part in parts}
            rows = [Row(model=model, batch=batch, variant=part.name, **numbers[part.name]) for part in parts]
            if any(row.note == self._late for row in rows) or all(row.ms is None for row in rows):
                raise Unfinished(rows)
            work = Ledger(compilations=len(rows), forward=len(rows) * self._rounds * batch)
            return {}, {"rows": [asdict(row) for row in rows]}, work

        try:
            piece = self.run.piece(f"{model}, batch {batch}", compute, rounds=self._rounds)
            rows = [Row(**fields) for fields in piece.meta["rows"]]
        except Unfinished as unfinished:
            (rows,) = unfinished.args
        self.rows += rows
        for row in rows:
            numbers = "–" if row.ms is None else f"{row.ms:.3f} ms, {row.vs_tf32 or np.nan:.2f} of tf32"
            print(f"    {row.variant}: {numbers}{f' ({row.note})' if row.note else ''}", flush=True)
        leave(self.run, self.rows)

    def verify(self) -> None:
        """Whether programs agree with their definition, into the rows."""
        for i, row in enumerate(self.rows):
            if row.ms is not None and row.batch == 1 and VERIFIED.get(row.model) == row.variant:
                self.rows[i] = self._verified(row)
        leave(self.run, self.rows)

    def _verified(self, row: Row) -> Row:
        def compute() -> Computed:
            if time.monotonic() > self.deadline:
                raise TimeoutError(self._late)
            case = models.load(row.model, row.batch, quick=self.config.quick)
            (part,) = (part for part in models.variants(row.model, row.batch) if part.name == row.variant)
            refused = ""
            try:
                compiled.compile(case.mixed(part), case.batches, weights="small")
            except compiled.MiscompiledError as error:
                refused = reason(error)
            return {}, {"refused": refused}, Ledger(compilations=1)

        try:
            refused = self.run.piece(f"{row.model}: {row.variant} verified", compute).meta["refused"]
        except Exception as error:
            return replace(row, note=joined(row.note, f"not verified: {reason(error)}"))
        return replace(row, verified=not refused, note=joined(row.note, refused and f"refused: {refused}"))

    def _numbers(self, model: str, batch: int, parts: Sequence[Variant]) -> dict[str, dict[str, Any]]:
        """Variant -> its row's numbers, or a note in their place."""
        numbers: dict[str, dict[str, Any]] = {part.name: {"note": self._late} for part in parts}
        if time.monotonic() > self.deadline:
            return numbers
        case = models.load(model, batch, quick=self.config.quick)
        built: dict[str, Built] = {}
        for part in parts:
            if time.monotonic() > self.deadline:
                break
            try:
                built[part.name] = models.build(case, part)
                print(f"    {part.name}: built in {built[part.name].seconds:.1f} s", flush=True)
            except Exception as error:
                numbers[part.name] = {"note": reason(error)}
        return numbers | timed(case, built, [part for part in parts if part.name in built], self._rounds)


def timed(case: Case, built: Mapping[str, Built], parts: Sequence[Variant], rounds: int) -> dict[str, dict[str, Any]]:
    """Variant -> its row's numbers."""
    if not built:
        return {}
    times = interleaved(built, rounds=rounds, shortest=timing.WHOLE)
    truth = built["fp32"]() if "fp32" in built else None
    bf16 = next((name for name in ("jax_bf16", "flax_bf16") if name in built), "")
    references = {"vs_fp32": "fp32", "vs_tf32": "tf32", "vs_bf16": bf16}
    numbers: dict[str, dict[str, Any]] = {}
    for part in parts:
        program = built[part.name]
        row = times.columns(part.name, **{column: name for column, name in references.items() if name in built})
        numbers[part.name] = more = {**row, "build_seconds": program.seconds, "note": program.note}
        if truth is not None:
            outputs = program()
            more["error"] = error_of(outputs, truth)
            if isinstance(truth, Mapping) and LANDMARKS in truth:
                landmarks = f"landmarks ({LANDMARKS}): {error_of(outputs[LANDMARKS], truth[LANDMARKS]):.1e}"
                more["note"] = joined(program.note, landmarks)
            if part.fmt.endswith("_w"):
                more["definition_error"] = error_of(outputs, models.by_definition(case, built["fp32"], part))
    return numbers


def error_of(outputs: Any, truth: Any) -> float:
    """The largest over outputs; NaN where one is."""
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(truth), strict=True)
    return float(np.max([metrics.relative_error(np.asarray(a, np.float32), np.asarray(b)) for a, b in pairs]))


def reason(error: Exception) -> str:
    """An error's text, shortened."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")


def leave(run: Run, rows: Sequence[Row]) -> None:
    """Figure, tables, findings."""
    run.pictures.clear()
    if any(row.ms is not None for row in rows):
        alt = "Bars of milliseconds of each variant, by model and batch; grey is without mpjax"
        run.save(figures.bars(rows), "speed_gpu", alt=alt)
    run.finish(
        "Low precision on a GPU" + ("" if jax.default_backend() == "gpu" else ": a dry run without one"),
        results=Table("speed_gpu", Row, rows),
        overview=Table("overview", Row, overview(rows)),
        findings=findings(rows),
        lead=__doc__ or "",
    )


def overview(rows: Sequence[Row]) -> list[Row]:
    """Of each model and batch, the faster one without mpjax (but for fp32) and mpjax's fastest."""
    shown = []
    for part in by_job(rows):
        for plain in (True, False):
            timed = [row for row in part if (row.variant in PLAIN) == plain and row.variant not in {"fp32", *NOT_GIVEN}]
            shown += sorted((row for row in timed if row.ms is not None), key=lambda row: row.ms or 0.0)[:1]
    return shown


def findings(rows: Sequence[Row]) -> list[str]:
    """The targets, what is slower than TF32, and what was refused."""
    sentences = []
    for model, batch, variant, column, most in TARGETS:
        ratios = [
            getattr(row, column) for row in rows if (row.model, row.batch, row.variant) == (model, batch, variant)
        ]
        result = "was not measured"
        if ratios and ratios[0] is not None:
            result = f"takes {ratios[0]:.2f} of {column.removeprefix('vs_')}'s time"
            result += f": {'met' if ratios[0] <= most else 'not met'}"
        sentences.append(f"{model}, batch {batch} (target: {variant} at most {most:.2f}): it {result}.")
    ours = [(row, row.vs_tf32) for row in rows if row.variant not in PLAIN | NOT_GIVEN and row.vs_tf32 is not None]
    slower = [f"{row.model}, batch {row.batch}, {row.variant} ({ratio:.2f})" for row, ratio in ours if ratio > NOISE]
    if ours:
        sentences.append(f"Slower than TF32: {'; '.join(slower) or 'nothing'} of {len(ours)} programs (target: none).")
    verdicts = [row for row in rows if row.verified is not None]
    if verdicts:
        refused = [f"{row.model}, {row.variant}" for row in verdicts if not row.verified]
        sentences.append(f"Of {len(verdicts)} programs that were verified, refused: {'; '.join(refused) or 'none'}.")
    return sentences


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
