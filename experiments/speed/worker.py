"""One process of experiments/speed: times one model in all variants, on the cores that it was started on.

python -m experiments.speed.worker JOB.json RESULT.json
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import assets
from experiments.lib.rows import fill
from experiments.lib.times import Times, interleaved
from experiments.models import litert
from experiments.models.encoder import ENCODERS, EncoderStack, random_encoder
from experiments.models.tflite_import import load_tflite
from experiments.problems import benchmarks, pose, searches_tasks
from experiments.speed.rows import Layer, Program
from mpjax import compiled, cost
from mpjax.apply import apply
from mpjax.compiled import tuning, verification
from mpjax.files import jsonable, write_json
from mpjax.program import Batches, Model, from_linen
from mpjax.xla import timing

TOKENS, TOLERANCE = 128, 0.1  # tolerance: of the error with all layers low
FAILURES = (compiled.MiscompiledError, jax.errors.JaxRuntimeError)
IN_UNITS: Mapping[str, Callable[..., jax.Array]] = {
    "pose_landmark_full": pose.in_torso_units,
    "iris_landmark": benchmarks.iris_in_eye_widths,
    "face_landmark": benchmarks.face_in_eye_distances,
}
LANDMARKS = {"pose_landmark_full": ("Identity",)}
_JUDGED = 48  # held-out examples behind an NME
Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does.

    Attributes:
        model, outputs ("all" or "landmarks"), batch, cores: what is timed.
        assignments: variant -> layer -> format, applied to the model; empty: all products in bfloat16, as `bf16_profitable`.
        tune: choose implementations and options by timing; otherwise by the rule.
        report: look into the mixed program, layer by layer.
        cache: folder of timings and choices.
        rounds: of timing.
        quick: fewer examples.
        costs: only time the layers, for the search.
    """

    model: str
    outputs: str = "all"
    batch: int = 1
    cores: int = 1
    assignments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    tune: bool = False
    report: bool = False
    cache: str
    rounds: int
    quick: bool = False
    costs: bool = False


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model: mpjax's, plain jitted Flax, Flax in bfloat16; inputs; the error of a program (None: no metric); its file."""

    model: Model
    naive: Call
    plain_bfloat16: Call
    batches: Batches
    judge: Callable[[Call, Call], float] | None = None
    file: Path | None = None


def main(job: Job) -> dict[str, Any]:
    """Rows of all tables, notes, and of a job with a report the errors on held-out examples that a search has."""
    if job.costs:
        return layer_costs(job)
    subject = encoder(job) if job.model in ENCODERS else vision(job)
    where = {"model": job.model, "outputs": job.outputs, "batch": job.batch, "cores": job.cores}
    programs, notes, tunings = low_precision(job, subject)
    variants = {"fp32_naive": subject.naive, "fp32_tuned": None, "flax_bf16": subject.plain_bfloat16, **programs}
    calls: dict[str, Call] = {name: call for name, call in variants.items() if call is not None}
    device = jax.device_put(subject.batches[0])
    runs: dict[str, Call] = {name: functools.partial(call, *device) for name, call in calls.items()}
    for name, make in litert.PEERS.items():
        if subject.file is None:
            break
        try:
            peer = make(subject.file, job.batch)
            peer(np.asarray(subject.batches[0][0]))
        except Exception as error:  # a peer that does not run here is a finding, not a failure
            notes.append(f"{name} does not run here: {str(error).splitlines()[0][:200]}")
        else:
            calls[name], runs[name] = peer, peer.invoke  # its input is in place, its outputs stay there
    times = interleaved(runs, rounds=job.rounds, shortest=timing.WHOLE)
    truth = [subject.naive(*batch) for batch in subject.batches]
    shown = programs.get("mixed") or programs.get("bf16_profitable")
    report = shown.report(*device) if job.report and shown is not None else None
    speed = [where | {"variant": name} | numbers(name, call, times, subject, truth) for name, call in calls.items()]
    heldout = {}
    if job.report and subject.judge is not None:
        low = all_low(subject)
        mixed = next((row["nme"] for row in speed if row["variant"] == "mixed"), None)
        heldout = {"nme_all_low": low, "nme_limit": TOLERANCE * low, "nme_mixed": mixed}
    return {
        "speed": speed,
        "tuning": [where | row for row in tunings],
        "layers": [] if report is None else [fill(Layer, row, model=job.model) for row in report.rows],
        "programs": [] if report is None else [fill(Program, report.program, model=job.model)],
        "notes": [f"{job.model}, {job.outputs}, batch {job.batch}, {job.cores} cores: {note}" for note in notes],
        "model": job.model,
        "heldout": heldout,
    }


def numbers(name: str, call: Call, times: Times, subject: Subject, truth: Sequence[Any]) -> dict[str, Any]:
    """A variant's times and errors."""
    bases = {"fp32_naive": "fp32_naive", "fp32_tuned": "fp32_tuned", "flax_bf16": "flax_bf16", "litert": "litert_fp32"}
    measured = {f"vs_{key}": base for key, base in bases.items() if base in times.ms}
    outputs = [call(*map(np.asarray, batch)) for batch in subject.batches]
    return {
        **times.columns(name, **measured),
        "ms_min": times.fastest(name),
        "nme": None if subject.judge is None else subject.judge(call, subject.naive),
        "max_rel_error": largest_error(outputs, truth),
    }


# --- programs -----------------------------------------------------------------------------------------------------


def low_precision(job: Job, subject: Subject) -> tuple[dict[str, compiled.Compiled], list[str], list[dict[str, Any]]]:
    """The float32 program and the mixed ones; `mixed` is the float32 one where that is not slower."""
    products = (layer.name for layer in subject.model.lowerable)  # with attention's, as Flax's dtype= has it
    assignments = job.assignments or {"bf16_profitable": dict.fromkeys(products, "bfloat16")}
    models = {"fp32_tuned": subject.model} | {
        name: apply(subject.model, assignment, implementation="rule") for name, assignment in assignments.items()
    }
    programs: dict[str, compiled.Compiled] = {}
    notes: list[str] = []
    tunings: list[dict[str, Any]] = []
    for name, model in models.items():
        tuned = job.tune and (name in ("fp32_tuned", "mixed") or job.model in ENCODERS)
        choice = None
        try:
            choice = tuning.tune(model, subject.batches, cache=job.cache) if tuned else None
        except FAILURES as error:
            notes.append(f"{name} was not tuned: {error}")
        try:
            programs[name] = compiled.compile(model, subject.batches, implementation=choice or "rule")
        except FAILURES as error:
            notes.append(f"{name}: {error}")
            continue
        if choice is not None:
            tunings.append({"variant": name, **tuning_row(job, subject, model, programs[name], choice)})
    if "mixed" in programs and "fp32_tuned" in programs:
        pair = {name: programs[name] for name in ("fp32_tuned", "mixed")}
        if compiled.fastest(pair, *subject.batches[0], rounds=job.rounds).name == "fp32_tuned":
            notes.append("nothing pays on this machine: mixed is the tuned float32 program")
            programs["mixed"] = programs["fp32_tuned"]
    return programs, notes, tunings


def tuning_row(
    job: Job, subject: Subject, model: Model, tuned: compiled.Compiled, choice: tuning.Tuning
) -> dict[str, Any]:
    """What tuning took, what it takes again, and the rule's program beside the tuned one."""
    start = time.perf_counter()
    again = tuning.tune(model, subject.batches, cache=job.cache)
    again_seconds = time.perf_counter() - start
    programs = {"rule": compiled.compile(model, subject.batches, implementation="rule"), "tuned": tuned}
    runs = {name: functools.partial(program, *subject.batches[0]) for name, program in programs.items()}
    times = interleaved(runs, rounds=job.rounds, shortest=timing.WHOLE)
    return {
        "layers": len(model.layers),
        "tune_seconds": choice.seconds,
        "reused": choice.reused,
        "again_seconds": again_seconds if again.reused else None,
        "candidates": len(choice.candidates),
        "rule_ms": times.quartiles("rule").median,
        "tuned_ms": times.quartiles("tuned").median,
        "rule_vs_tuned": times.ratio("rule", "tuned").median,
        "chosen": str(min((c for c in choice.candidates if c.verified), key=lambda c: c.seconds)),
        "notes": "; ".join(choice.notes),
    }


def all_low(subject: Subject) -> float:
    """The error with every layer in bfloat16, of which the tolerance is a share."""
    assert subject.judge is not None
    low = apply(subject.model, dict.fromkeys(subject.model.names, "bfloat16"), implementation="rule")
    return subject.judge(compiled.compile(low, subject.batches), subject.naive)


def layer_costs(job: Job) -> dict[str, Any]:
    """Seconds of each layer in float32 and bfloat16 inside whole programs, with the kernels for narrow operands."""
    task = searches_tasks.load(job.model, quick=job.quick)
    costs = cost.attributed(task.benchmark.model, ("bfloat16",), *task.costed, rounds=job.rounds)
    return {"layers": list(costs.layers), "seconds": costs.tables[0]}


def largest_error(outputs: Sequence[Any], truth: Sequence[Any]) -> float | None:
    """Largest difference over the largest number, worst over the outputs that both have."""
    if isinstance(truth[0], Mapping):
        outputs = [{name: output[name] for name in expected} for output, expected in zip(outputs, truth, strict=True)]
    worst = verification.errors(jax.tree.map(lambda x: np.asarray(x, np.float32), list(outputs)), truth)[1]
    return worst if np.isfinite(worst) else None


# --- models -------------------------------------------------------------------------------------------------------


def vision(job: Job) -> Subject:
    """An imported model on its held-out examples."""
    task = searches_tasks.load(job.model, quick=job.quick)
    images, units = (np.concatenate([np.asarray(batch[i]) for batch in task.heldout]) for i in (0, 1))
    count = min(_JUDGED, len(images)) // job.batch * job.batch
    if count < 2 * job.batch:  # two batches, the second beginning half-way through the examples
        take = np.concatenate([np.arange(job.batch) + shift for shift in (0, len(images) // 2)]) % len(images)
        images, units, count = images[take], units[take], 2 * job.batch
    batches = benchmarks.in_batches((images[:count], units[:count]), job.batch)
    file, keep = assets.fetch(job.model), LANDMARKS[job.model] if job.outputs == "landmarks" else None
    plain, graph, low = (
        load_tflite(file, outputs=keep, **how) for how in ({"plain": True}, {}, {"dtype": jnp.bfloat16})
    )

    def landmarks(run: Call) -> np.ndarray:
        outputs = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), run(np.asarray(x))) for x, _ in batches]
        pairs = zip(outputs, batches, strict=True)
        return np.concatenate([np.asarray(IN_UNITS[job.model](out, jnp.asarray(unit))) for out, (_, unit) in pairs])

    return Subject(
        model=from_linen(graph.module, graph.variables, batches[0][0]),
        naive=_jitted(plain.module, graph.variables),
        plain_bfloat16=_jitted(low.module, low.variables),
        batches=[batch[:1] for batch in batches[:2]],
        judge=lambda run, reference: float(np.mean(task.benchmark.error(landmarks(run), landmarks(reference)))),
        file=file,
    )


def encoder(job: Job) -> Subject:
    """A transformer encoder with random weights on random tokens."""
    layers, width, heads = ENCODERS[job.model]
    (module, variables, x), (_, _, other) = (
        random_encoder(layers, width, heads, tokens=TOKENS, batch=job.batch, seed=seed) for seed in (0, 1)
    )
    low = EncoderStack(layers=layers, width=width, heads=heads, dtype=jnp.bfloat16)
    return Subject(
        model=from_linen(module, variables, x),
        naive=_jitted(module, variables),
        plain_bfloat16=_jitted(low, variables),
        batches=[(x,), (other,)],
    )


def _jitted(module: Any, variables: Any) -> Call:
    """The module as a Flax user runs it: jitted, its float32 variables as arguments."""
    placed, function = jax.device_put(variables), jax.jit(module.apply)
    return lambda x: function(placed, x)


if __name__ == "__main__":
    result = main(Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    write_json(Path(sys.argv[2]), jsonable(result))
