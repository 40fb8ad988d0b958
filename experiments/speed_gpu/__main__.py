"""Low precision on a CUDA GPU: MediaPipe's pose model, a transformer encoder, and decoding with 1.2 G weights.

    scripts/bench_gpu                              (an environment of its own; under 6 minutes)
    scripts/bench_gpu --cpu --quick                (a dry run without a GPU, under a minute)

| variant | what runs |
| --- | --- |
| `fp32` | float32, jitted, full-precision products: what the errors are to |
| `tf32` | float32, jitted, as jax does by default: products in TensorFloat-32 |
| `flax_bf16`, `jax_bf16` | bfloat16 without mpjax: the encoder with dtype=bfloat16; decoding of bfloat16 weights and inputs |
| `bf16`, `fp16` | `mpjax.apply` with every layer in that format; of the pose model, layers hand it on, too |
| `fp16_act` | `fp16`, and layers hand on float16 |
| `bf16_x3` | each product as three of bfloat16 numbers, the rest at full precision |
| `bf16_w`, `int8_w`, `float8_w`, `int4_w` | `mpjax.apply` with weights in that format, products in the form that is fastest |
| `int8_w reduce`, … | all products in that form (`mpjax.kernels.stored`), or under other options for CUDA graphs |

What mpjax leaves in float32 (the attention's products) runs as jax does by default: in TF32. Inputs and weights are on the device
before the clock starts, and outputs stay there. Error: the largest difference over the largest number of an output, worst over
outputs. Programs of a model and batch are built side by side, then timed in turns while nothing is built. Programs of the pose
model and the encoder are verified at batch 1 (`mpjax.compile`), while later ones are built.

Each model and batch is left in results/speed_gpu/ as soon as it is measured, and a second call goes on from there: summary.json,
tables (CSV, LaTeX), the figure (PNG, PDF) and report.html.
"""

import contextlib
import io
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
import tyro

from experiments.lib.page import Section
from experiments.lib.rows import Table
from experiments.lib.run import Computed, Options, Run
from experiments.lib.times import interleaved
from experiments.speed_gpu import figures, models
from experiments.speed_gpu.building import Builders, OutOfTime
from experiments.speed_gpu.models import DECODE, ENCODER, PLAIN, POSE, Built, Case, Variant
from experiments.speed_gpu.rows import Row
from mpjax import compiled, metrics, xla
from mpjax.compiled import verification
from mpjax.ledger import Ledger
from mpjax.xla import profile, timing

LANDMARKS = "Identity"  # of the pose model's outputs; its mask, Identity_2, amplifies rounding most
NOISE = 1.02  # what is slower than another by less is not
# Products are XLA's own, or in a form that is timed: no rule needs the device's profile, which takes half a minute.
UNPROFILED = profile.DeviceProfile(
    device="not measured",
    backend="",
    cores=1,
    jax=jax.__version__,
    instructions=(),
    seconds=dict.fromkeys(profile.DTYPES, (1.0,) * len(profile.ROWS)),
    ynn={},
    convolution=dict.fromkeys(profile.CONVOLVED, 1.0),
    grouped=1.0,
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
    rounds: int = 15
    """Rounds of interleaved timing."""
    minutes: float = 6.0
    """After that many, no further program is begun: it gets a row without numbers."""
    workers: int = 16
    """Programs that are built at the same time."""
    seed: int = 0
    """Seed of random weights and inputs."""

    def __post_init__(self) -> None:
        for name in ("rounds", "workers"):
            if getattr(self, name) < 1:
                raise SystemExit(f"--{name}: expected at least 1, found {getattr(self, name)}.")
        if not self.minutes > 0:
            raise SystemExit(f"--minutes: expected more than 0, found {self.minutes}.")
        if self.seed < 0:
            raise SystemExit(f"--seed: expected at least 0, found {self.seed}.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model at a batch size; `verifies`: the model whose programs at batch 1 are verified beside its builds."""

    model: str
    batch: int
    verifies: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}, batch {self.batch}"


# The most telling first. Decoding is built in a few seconds: it waits for no verification.
JOBS = (
    Job(model=POSE, batch=1),
    Job(model=DECODE, batch=1),
    Job(model=ENCODER, batch=1, verifies=POSE),
    Job(model=POSE, batch=32, verifies=ENCODER),
    Job(model=DECODE, batch=32),
    Job(model=ENCODER, batch=32),
)


VERIFIED = frozenset(job.verifies for job in JOBS if job.verifies)


class Unfinished(Exception):
    """Some variants had no time, or none ran: the rows are shown, and measured anew by the next call."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__("unfinished")
        self.rows = rows


def main(config: Config) -> None:
    """Measure, and write everything after each job."""
    deadline = time.monotonic() + 60 * config.minutes
    check_device(config)
    run = Run("speed_gpu", config)
    run.depends_on(quick=config.quick, seed=config.seed)
    bench = Bench(config, run, Builders(config.workers, deadline))
    try:
        with bench.builders.asked(), profile.assumed(UNPROFILED):
            for job in JOBS:
                bench.measure(job)
                with contextlib.redirect_stdout(io.StringIO()):
                    bench.leave()
            bench.collect()
        bench.leave()
    finally:
        bench.builders.close()


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


class Bench:
    """The rows so far, and verifications under way."""

    def __init__(self, config: Config, run: Run, builders: Builders) -> None:
        self.config, self.run, self.builders = config, run, builders
        self.rows: dict[Job, list[Row]] = {}
        self.verdicts: dict[tuple[str, str], Future] = {}

    def measure(self, job: Job) -> None:
        """The job's rows, from an earlier run or measured now."""

        def compute() -> Computed:
            rows = self._rows(job)
            if any(row.note == self._late for row in rows) or all(row.ms is None for row in rows):
                raise Unfinished(rows)
            work = Ledger(compilations=len(rows), forward=len(rows) * self.config.rounds * job.batch)
            return {}, {"rows": [asdict(row) for row in rows]}, work

        start = time.monotonic()
        try:
            rows = [Row(**fields) for fields in self.run.piece(job.name, compute, rounds=self._rounds).meta["rows"]]
        except Unfinished as unfinished:
            rows = unfinished.rows
        self.rows[job] = rows
        for row in rows:
            numbers = "–" if row.ms is None else f"{row.ms:.3f} ms, {row.vs_tf32 or np.nan:.2f} of tf32"
            print(f"    {row.variant}: {numbers}{f' ({row.note})' if row.note else ''}", flush=True)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)

    def collect(self) -> None:
        """Whether the verified programs agree with their definition, into the rows."""
        for job in [job for job in self.rows if job.batch == 1]:
            rows = {row.variant: row for row in self.rows[job]}
            for part in models.variants(job.model, 1):
                if part.fmt and job.model in VERIFIED and rows[part.name].ms is not None:
                    rows[part.name] = self._verified(rows[part.name])
            self.rows[job] = list(rows.values())

    def _verified(self, row: Row) -> Row:
        def compute() -> Computed:
            if (row.model, row.variant) not in self.verdicts:
                self._verify(row.model)
            self.builders.finish()
            return {}, {"refused": self.verdicts[row.model, row.variant].result()}, Ledger(compilations=1)

        try:
            refused = self.run.piece(f"{row.model}: {row.variant} verified", compute).meta["refused"]
        except Exception as error:
            return replace(row, note=joined(row.note, f"not verified: {self._why(error)}"))
        return replace(row, verified=not refused, note=joined(row.note, f"refused: {refused}" if refused else None))

    def leave(self) -> None:
        """Write what is known."""
        leave(self.run, [row for rows in self.rows.values() for row in rows])

    @property
    def _rounds(self) -> int:
        return 3 if self.config.quick else self.config.rounds

    @property
    def _late(self) -> str:
        return f"left out: the {self.config.minutes:g} minutes were over"

    def _rows(self, job: Job) -> list[Row]:
        parts = models.variants(job.model, job.batch)
        try:
            numbers = self._numbers(job, parts)
        except Exception as error:
            numbers = {part.name: {"note": self._why(error)} for part in parts}
        return [Row(model=job.model, batch=job.batch, variant=part.name, **numbers[part.name]) for part in parts]

    def _numbers(self, job: Job, parts: tuple[Variant, ...]) -> dict[str, dict[str, Any]]:
        """Variant -> its row's numbers, or a note in their place."""
        if time.monotonic() > self.builders.deadline:
            raise OutOfTime
        case = models.load(job.model, job.batch, quick=self.config.quick, seed=self.config.seed)
        tasks, lows = self._submit(case, parts)
        if job.verifies:
            with contextlib.suppress(Exception):  # `collect` tries again, and makes a note
                self._verify(job.verifies)
        self.builders.finish()
        built: dict[str, Built] = {}
        notes: dict[str, dict[str, Any]] = {}
        for name, task in tasks.items():
            try:
                built[name] = task.result()
            except Exception as error:
                notes[name] = {"note": self._why(error)}
        numbers = timed(built, self._rounds)
        for part in parts:
            if part.name in built and job.model == DECODE and part.fmt and "fp32" in built:
                exact = models.by_definition(case, built["fp32"], lows[part.fmt, part.activations].result())
                numbers[part.name]["definition_error"] = largest(errors(built[part.name](), exact))
        return numbers | notes

    def _submit(
        self, case: Case, parts: tuple[Variant, ...]
    ) -> tuple[dict[str, Future], dict[tuple[str, str], Future]]:
        """Tasks that build the variants, and those that lower the model."""
        for question in models.questions(case, parts):
            self.builders.submit(question)
        lows = {
            key: self.builders.submit(lambda key=key: models.mixed(case, *key))
            for key in dict.fromkeys((part.fmt, part.activations) for part in parts if part.fmt)
        }
        tasks = {}
        for part in parts:
            if part.fmt:
                needs = (lows[part.fmt, part.activations],)
                tasks[part.name] = self.builders.submit(lambda low, part=part: models.build(case, part, low), *needs)
            else:
                model = case.cast if part.cast else case.model
                assert model is not None
                tasks[part.name] = self.builders.submit(lambda part=part, model=model: models.build(case, part, model))
        return tasks, lows

    def _verify(self, name: str) -> None:
        """Tasks that compile the variants of a model at batch 1 as a user does, against float32 outputs computed once."""
        case = models.load(name, 1, quick=self.config.quick, seed=self.config.seed)
        float32 = self.builders.submit(lambda: verification.float32_outputs(case.model, case.batches))
        for part in models.variants(name, 1):
            if part.fmt:

                def compile(truth: verification.Float32Outputs, part: Variant = part) -> str:  # noqa: A001
                    low = models.mixed(case, part.fmt, part.activations)
                    try:
                        with models.in_precision(part.precision):
                            compiled.compile(low, case.batches, weights="small", float32=truth)
                    except compiled.MiscompiledError as error:
                        return reason(error)
                    return ""

                self.verdicts[name, part.name] = self.builders.submit(compile, float32)

    def _why(self, error: Exception) -> str:
        return self._late if isinstance(error, OutOfTime) else reason(error)


def timed(built: Mapping[str, Built], rounds: int) -> dict[str, dict[str, Any]]:
    """Variant -> its row's numbers."""
    if not built:
        return {}
    times = interleaved(built, rounds=rounds, shortest=timing.WHOLE)
    truth = built["fp32"]() if "fp32" in built else None
    bf16 = next((name for name in ("jax_bf16", "flax_bf16") if name in built), None)
    references = {"vs_fp32": "fp32", "vs_tf32": "tf32", "vs_bf16": bf16}
    numbers: dict[str, dict[str, Any]] = {}
    for name, program in built.items():
        by_output = {} if truth is None else errors(program(), truth)
        landmarks = f"landmarks ({LANDMARKS}): {by_output[LANDMARKS]:.1e}" if by_output.get(LANDMARKS) else None
        numbers[name] = {
            **times.columns(name, **{column: other for column, other in references.items() if other in built}),
            "error": largest(by_output),
            "build_seconds": program.seconds,
            "note": joined(program.note, landmarks),
        }
    return numbers


def errors(outputs: Any, truth: Any) -> dict[str, float]:
    """Output -> error; a single one is called "output"."""
    named = [value if isinstance(value, Mapping) else {"output": value} for value in (outputs, truth)]
    wide = [{name: np.asarray(array, np.float32) for name, array in value.items()} for value in named]
    return {name: metrics.relative_error(wide[0][name], array) for name, array in wide[1].items()}


def largest(by_output: Mapping[str, float]) -> float | None:
    """None where there is none; NaN where one is."""
    return float(np.max(list(by_output.values()))) if by_output else None


def joined(*notes: str | None) -> str | None:
    """Those that there are."""
    return "; ".join(filter(None, notes)) or None


def reason(error: Exception) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 200, placeholder=" …")


# --- what is left -----------------------------------------------------------------------------------------------


def leave(run: Run, rows: Sequence[Row]) -> None:
    """Figure, tables, findings."""
    backend = jax.default_backend()
    run.pictures.clear()
    if any(row.ms is not None for row in rows):
        run.save(figures.bars(rows), "speed_gpu", alt="Bars of milliseconds of each variant, by model and batch")
    results = Table("speed_gpu", Row, rows)
    run.finish(
        "Low precision on a GPU" + ("" if backend == "gpu" else ": a dry run without one"),
        results=results,
        overview=Table("overview", Row, overview(rows)),
        findings=findings(rows),
        sections=[
            Section("Milliseconds; grey is without mpjax", *run.pictures),
            Section("All variants", Row.__doc__ or "", results),
            Section("What runs", __doc__ or ""),
        ],
        facts={"backend": backend},
        show=(results,),
    )


def overview(rows: Sequence[Row]) -> list[Row]:
    """Of each model and batch, the faster one without mpjax (but for fp32) and mpjax's fastest."""
    shown = []
    for part in by_job(rows):
        for plain in (True, False):
            timed = [row for row in part if (row.variant in PLAIN) == plain and row.variant != "fp32"]
            shown += sorted((row for row in timed if row.ms is not None), key=lambda row: row.ms or 0.0)[:1]
    return shown


def by_job(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each model and batch."""
    jobs = dict.fromkeys((row.model, row.batch) for row in rows)
    return [[row for row in rows if (row.model, row.batch) == job] for job in jobs]


# (model, batch, variant, column, at most)
TARGETS = (
    (POSE, 1, "fp16", "vs_fp32", 0.62),
    (POSE, 1, "fp16", "vs_tf32", 0.78),
    (DECODE, 1, "int8_w", "vs_bf16", 0.75),
    (DECODE, 1, "int4_w", "vs_bf16", 0.60),
)


def findings(rows: Sequence[Row]) -> list[str]:
    """The targets, what is slower than TF32, what was refused, and the fastest of each model and batch."""
    sentences = []
    for model, batch, variant, column, most in TARGETS:
        values = [
            getattr(row, column) for row in rows if (row.model, row.batch, row.variant) == (model, batch, variant)
        ]
        reference = {"vs_bf16": "jax_bf16"}.get(column, column.removeprefix("vs_"))
        ratio = values[0] if values else None
        result = "was not measured" if ratio is None else f"takes {ratio:.2f} of {reference}'s time"
        met = "" if ratio is None else f": {'met' if ratio <= most else 'not met'}"
        sentences.append(f"{model}, batch {batch}: {variant} {result} (target: at most {most:.2f}){met}.")
    single = {part.name for part in models.ONE_ROW}  # forms on trial, which nobody is given
    ours = [(row, row.vs_tf32) for row in rows if row.variant not in PLAIN | single and row.vs_tf32 is not None]
    slower = [f"{row.model}, batch {row.batch}, {row.variant} ({ratio:.2f})" for row, ratio in ours if ratio > NOISE]
    if ours:
        sentences.append(
            f"Slower than TF32: {'; '.join(slower) or 'nothing'} of {len(ours)} programs of mpjax (target: none)."
        )
    verdicts = [row for row in rows if row.verified is not None]
    if verdicts:
        refused = [f"{row.model}, {row.variant}" for row in verdicts if not row.verified]
        sentences.append(
            f"Of {len(verdicts)} programs that were verified at batch 1, refused: {'; '.join(refused) or 'none'}."
        )
    for part in by_job(rows):
        ranked = sorted((row for row in part if row.ms is not None), key=lambda row: row.ms or 0.0)
        best = f"{ranked[0].variant} is fastest, {ranked[0].ms:.3f} ms" if ranked else "not timed"
        if ranked and ranked[0].vs_tf32 is not None:
            best += f", {ranked[0].vs_tf32:.2f} of TF32's time"
        sentences.append(f"{part[0].model}, batch {part[0].batch}: {best}.")
    return sentences


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
