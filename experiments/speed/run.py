"""One process of experiments/speed: times one model in all variants, on the cores that it was started on.

python -m experiments.speed.run JOB.json RESULT.json
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import assets
from experiments.models.encoder import ENCODERS, EncoderStack, random_encoder
from experiments.models.tflite_import import load_tflite
from experiments.problems import benchmarks, pose, searches_tasks
from mpjax import compiled, cost, xla
from mpjax.apply import apply
from mpjax.compiled import tuning, verification
from mpjax.files import jsonable, write_json
from mpjax.program import Batches, Model, from_linen
from mpjax.xla import executable, timing

TOKENS = 128
FAILURES = (compiled.MiscompiledError, jax.errors.JaxRuntimeError)
IN_UNITS: Mapping[str, Callable[..., jax.Array]] = {
    "pose_landmark_full": pose.in_torso_units,
    "iris_landmark": benchmarks.iris_in_eye_widths,
    "face_landmark": benchmarks.face_in_eye_distances,
}
LANDMARKS = {"pose_landmark_full": ("Identity",)}
BASES = ("fp32_naive", "fp32_tuned", "litert_fp32", "flax_bf16")  # what times are divided by
_FORCE_FP16 = 4  # XNNPACK's delegate flag
_JUDGED = 48  # held-out examples behind an NME


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does.

    Attributes:
        model, outputs ("all" or "landmarks"), batch: what is timed.
        assignments: variant -> layer -> format, applied to the model; empty: all products in bfloat16, as `bf16_profitable`.
        tune: choose ways and options by timing; otherwise by the rule.
        report: look into the mixed program, layer by layer.
        cache: folder of timings and choices.
        rounds: of timing.
        quick: fewer examples.
        costs: only time the layers, as the search wants them.
    """

    model: str
    outputs: str = "all"
    batch: int = 1
    assignments: Mapping[str, Mapping[str, str]]
    tune: bool
    report: bool = False
    cache: str
    rounds: int
    quick: bool = False
    costs: bool = False


Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model as it is timed: mpjax's, plain jitted Flax, Flax in bfloat16; inputs; the error of a program (None: no metric)."""

    model: Model
    naive: Call
    plain_bfloat16: Call
    batches: Batches
    judge: Callable[[Call, Call], float] | None
    file: Path | None


def main(job: Job) -> dict[str, Any]:
    """Rows and what stands behind them, as plain JSON."""
    if job.costs:
        return layer_costs(job)
    subject = encoder(job) if job.model in ENCODERS else vision(job)
    example = subject.batches[0]
    variants: dict[str, Call] = {"fp32_naive": subject.naive}
    programs, notes, tunings = low_precision(job, subject)
    variants |= {name: programs[name] for name in ("fp32_tuned",) if name in programs}
    variants |= {"flax_bf16": subject.plain_bfloat16} | {n: p for n, p in programs.items() if n != "fp32_tuned"}
    peers: dict[str, Peer] = {}
    if subject.file is not None:
        for name, maker in (("litert_fp32", interpreter), ("litert_fp16", litert_fp16)):
            try:
                peers[name] = maker(subject.file, job.batch)
                peers[name](np.asarray(example[0]))
            except Exception as error:  # a peer that does not run here is a finding, not a failure
                peers.pop(name, None)
                notes.append(f"{name} does not run here: {str(error).splitlines()[0][:200]}")
    device = jax.device_put(example)
    runs: dict[str, Call] = {name: functools.partial(run, *device) for name, run in variants.items()}
    runs |= {name: peer.invoke for name, peer in peers.items()}  # its input is in its place, its outputs are left there
    variants |= peers
    times = in_turns(runs, job.rounds)
    truth = [variants["fp32_naive"](*batch) for batch in subject.batches]
    ratios = {name: base_ratios(times, name) for name in BASES if name in times}
    rows = []
    for name, run in variants.items():
        found = [run(*(np.asarray(each) for each in batch)) for batch in subject.batches]
        rows.append(
            {
                "model": job.model,
                "outputs": job.outputs,
                "batch": job.batch,
                "cores": xla.cores(),
                "variant": name,
                "ms_median": float(np.median(times[name])),
                "ms_min": float(times[name].min()),
                "vs_fp32_naive": ratios["fp32_naive"][name],
                "vs_fp32_tuned": ratios.get("fp32_tuned", {}).get(name),
                "vs_litert": ratios.get("litert_fp32", {}).get(name),
                "nme": None if subject.judge is None else subject.judge(run, variants["fp32_naive"]),
                "max_rel_error": largest_error(found, truth),
            }
        )
    spread = [
        {
            "variant": name,
            **dict(zip(("low", "high"), np.percentile(each, (25, 75)).tolist(), strict=True)),
            "vs_flax_bf16": ratios["flax_bf16"][name],
        }
        for name, each in times.items()
    ]
    shown = programs.get("mixed") or programs.get("bf16_profitable")
    shares = shown.report(*device) if job.report and shown is not None else None
    return {
        "rows": rows,
        "spread": spread,
        "notes": notes,
        "tuning": tunings,
        "report": None if shares is None else {"rows": list(shares.rows), "program": dict(shares.program)},
        "nme_all_low": all_low(subject) if job.report and subject.judge is not None else None,
    }


# --- variants -----------------------------------------------------------------------------------------------------


def low_precision(job: Job, subject: Subject) -> tuple[dict[str, compiled.Compiled], list[str], list[dict[str, Any]]]:
    """The float32 program and the mixed ones; `mixed` is the float32 one where that is not slower."""
    products = (each.name for each in subject.model.lowerable)  # attention's, too, as Flax's dtype= has it
    everything = {"bf16_profitable": dict.fromkeys(products, "bfloat16")}
    wanted = {"fp32_tuned": subject.model} | {
        name: apply(subject.model, assignment, implementation="rule")
        for name, assignment in (job.assignments or everything).items()
    }
    programs: dict[str, compiled.Compiled] = {}
    notes: list[str] = []
    tunings: list[dict[str, Any]] = []
    for name, model in wanted.items():
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
            start = time.perf_counter()
            again = tuning.tune(model, subject.batches, cache=job.cache)
            again_seconds = time.perf_counter() - start
            by_rule = compiled.compile(model, subject.batches, implementation="rule")
            seconds = in_turns(
                {
                    "rule": lambda p=by_rule: p(*subject.batches[0]),
                    "tuned": lambda p=programs[name]: p(*subject.batches[0]),
                },
                job.rounds,
            )
            tunings.append(
                {
                    "variant": name,
                    "layers": len(model.layers),
                    "tune_seconds": choice.seconds,
                    "reused": choice.reused,
                    "again_seconds": again_seconds if again.reused else None,
                    "rule_ms": float(np.median(seconds["rule"])),
                    "tuned_ms": float(np.median(seconds["tuned"])),
                    "rule_vs_tuned": float(np.median(seconds["rule"] / seconds["tuned"])),
                    "chosen": str(min((c for c in choice.candidates if c.verified), key=lambda c: c.seconds)),
                    "candidates": len(choice.candidates),
                    "notes": "; ".join(choice.notes),
                }
            )
    if "mixed" in programs and "fp32_tuned" in programs:
        pair = {name: programs[name] for name in ("fp32_tuned", "mixed")}
        if compiled.fastest(pair, *subject.batches[0], rounds=job.rounds).name == "fp32_tuned":
            notes.append("nothing pays on this machine: mixed is the tuned float32 program")
            programs["mixed"] = programs["fp32_tuned"]
    return programs, notes, tunings


@dataclass(frozen=True, kw_only=True)
class Peer:
    """LiteRT on one file: called it gives all outputs by name; `invoke` alone, on the last input, is what is timed."""

    write: Callable[[np.ndarray], Any]
    invoke: Callable[[], Any]
    read: Callable[[], dict[str, np.ndarray]]

    def __call__(self, x: np.ndarray) -> dict[str, np.ndarray]:
        self.write(x)
        self.invoke()
        return self.read()


def all_low(subject: Subject) -> float:
    """The user's error with every layer in bfloat16: what a tolerance is a share of."""
    assert subject.judge is not None
    low = apply(subject.model, dict.fromkeys(subject.model.names, "bfloat16"), implementation="rule")
    return subject.judge(compiled.compile(low, subject.batches), subject.naive)


def interpreter(file: Path, batch: int) -> Peer:
    """LiteRT with XNNPACK, float32, on all cores of this process."""
    from ai_edge_litert.interpreter import Interpreter

    found = Interpreter(str(file), num_threads=xla.cores())
    inputs = found.get_input_details()[0]
    shape = [batch, *inputs["shape"][1:].tolist()]
    found.resize_tensor_input(inputs["index"], shape)
    found.allocate_tensors()
    outputs = found.get_output_details()
    if any(each["shape"][0] != batch for each in outputs):
        raise ValueError(f"its outputs do not follow a batch of {batch}")
    return Peer(
        write=functools.partial(found.set_tensor, inputs["index"]),
        invoke=found.invoke,
        read=lambda: {each["name"]: found.get_tensor(each["index"]) for each in outputs},
    )


def litert_fp16(file: Path, batch: int) -> Peer:
    """LiteRT's compiled model with XNNPACK told to compute in float16."""
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.options import Options

    if batch != 1:
        raise ValueError("timed for a batch of one only")
    options = Options.create()
    options.cpu_options.num_threads = xla.cores()
    options.cpu_options.xnnpack_flags = _FORCE_FP16
    found = CompiledModel.from_file(str(file), options=options)
    names = found.get_signature_by_index(0)["outputs"]
    inputs, outputs = found.create_input_buffers(0), found.create_output_buffers(0)
    graph = load_tflite(file)
    example = jnp.zeros(graph.input_shape, jnp.float32)
    specs = jax.eval_shape(lambda: graph.module.apply(graph.variables, example))

    def read() -> dict[str, np.ndarray]:
        flat = {name: buffer.read(specs[name].size, np.float32) for name, buffer in zip(names, outputs, strict=True)}
        return {name: np.array(each).reshape(specs[name].shape) for name, each in flat.items()}

    return Peer(
        write=lambda x: inputs[0].write(np.ascontiguousarray(x, np.float32).ravel()),
        invoke=lambda: found.run_by_index(0, inputs, outputs),
        read=read,
    )


# --- models -------------------------------------------------------------------------------------------------------


def vision(job: Job) -> Subject:
    """An imported model on its held-out examples."""
    task = searches_tasks.load(job.model, quick=job.quick)
    images, units = (np.concatenate([np.asarray(batch[i]) for batch in task.heldout]) for i in (0, 1))
    count = min(_JUDGED, len(images)) // job.batch * job.batch
    if count < 2 * job.batch:  # two batches, the second beginning half-way through the examples
        take = np.concatenate([np.arange(job.batch) + shift for shift in (0, len(images) // 2)]) % len(images)
        images, units, count = images[take], units[take], 2 * job.batch
    batches = benchmarks.in_batches((images[:count],), job.batch)
    file, keep = assets.fetch(job.model), LANDMARKS[job.model] if job.outputs == "landmarks" else None
    graph = load_tflite(file, outputs=keep)
    low = load_tflite(file, outputs=keep, dtype=jnp.bfloat16)

    def landmarks(run: Call) -> np.ndarray:
        found = []
        for number, (batch,) in enumerate(batches):
            unit = units[number * job.batch : (number + 1) * job.batch]
            outputs = jax.tree.map(lambda each: jnp.asarray(each, jnp.float32), run(np.asarray(batch)))
            found.append(np.asarray(IN_UNITS[job.model](outputs, jnp.asarray(unit))))
        return np.concatenate(found)

    def judge(run: Call, reference: Call) -> float:
        return float(np.mean(task.benchmark.error(landmarks(run), landmarks(reference))))

    return Subject(
        model=from_linen(graph.module, graph.variables, batches[0][0]),
        naive=_jitted(load_tflite(file, outputs=keep, plain=True).module, graph.variables),
        plain_bfloat16=_jitted(low.module, low.variables),
        batches=batches[:2],
        judge=judge,
        file=file,
    )


def encoder(job: Job) -> Subject:
    """A transformer encoder with random weights on random tokens: this is about time."""
    layers, width, heads = ENCODERS[job.model]
    made = [random_encoder(layers, width, heads, tokens=TOKENS, batch=job.batch, seed=seed) for seed in (0, 1)]
    (module, variables, x), (_, _, other) = made
    plain = EncoderStack(layers=layers, width=width, heads=heads, dtype=jnp.bfloat16)
    return Subject(
        model=from_linen(module, variables, x),
        naive=_jitted(module, variables),
        plain_bfloat16=_jitted(plain, variables),
        batches=[(x,), (other,)],
        judge=None,
        file=None,
    )


def _jitted(module: Any, variables: Any) -> Call:
    """The module as a Flax user runs it: jitted, its float32 variables as arguments."""
    placed = jax.device_put(variables)
    function = jax.jit(module.apply)
    return lambda x: function(placed, x)


def layer_costs(job: Job) -> dict[str, Any]:
    """Seconds of each layer alone in float32 and bfloat16, in its best way."""
    task = searches_tasks.load(job.model, quick=job.quick)
    options = executable.option_sets(narrow=True)[0]
    found = cost.measure(
        task.benchmark.model,
        ("bfloat16",),
        *task.costed,
        implementation="auto",
        rounds=job.rounds,
        options=options,
        cache=job.cache,
    )
    return {
        "layers": list(found.layers),
        "formats": list(found.formats),
        "seconds": found.seconds,
        "ways": found.implementations,
    }


# --- timing -------------------------------------------------------------------------------------------------------


def in_turns(runs: Mapping[str, Call], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of each function in each round, each turn some 20 ms."""
    waited = [lambda each=each: jax.block_until_ready(each()) for each in runs.values()]
    samples = timing.in_turns(waited, rounds, shortest=timing.WHOLE)
    return {name: 1e3 * np.array(each) for name, each in zip(runs, samples, strict=True)}


def base_ratios(times: Mapping[str, np.ndarray], base: str) -> dict[str, float]:
    """Median over rounds of each time over that of `base`."""
    return {name: float(np.median(each / times[base])) for name, each in times.items()}


def largest_error(found: Sequence[Any], truth: Sequence[Any]) -> float | None:
    """Largest difference over the largest number, worst over the outputs that both have."""
    if isinstance(truth[0], Mapping):
        found = [{name: each[name] for name in reference} for each, reference in zip(found, truth, strict=True)]
    worst = verification.errors(jax.tree.map(lambda each: np.asarray(each, np.float32), list(found)), truth)[1]
    return worst if np.isfinite(worst) else None


if __name__ == "__main__":
    wanted = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    write_json(Path(sys.argv[2]), jsonable(main(wanted)))
