"""The steps of the pose experiment: scores, search, curves, and rows of the emulated and of the compiled models."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import assets, metrics
from experiments.lib.progress import progress
from experiments.lib.rows import fill
from experiments.lib.run import Computed, Run
from experiments.lib.times import interleaved
from experiments.models import litert
from experiments.pose_landmark.rows import EXECUTED, FORMATS, Executed, Program, Row
from experiments.problems import data, pose
from experiments.problems.benchmarks import landmark_error
from experiments.problems.pose import Split
from mpjax import compiled, cost, search, sensitivity
from mpjax.apply import apply
from mpjax.compiled.verification import float32_outputs
from mpjax.evaluation import Evaluation
from mpjax.ledger import Ledger
from mpjax.metrics import relative_error
from mpjax.program import Model

CURVATURE_CROPS = 8  # of the calibration crops, for the two scores whose cost per crop is large
CURVE_POINTS = 10
FLOAT32 = ("fp32", "jit")  # programs


def litert_parity(base: Model, split: Split) -> Computed:
    """Largest difference of `Identity` to LiteRT over the largest output, on four crops."""
    peer = litert.float32(assets.fetch(pose.MODEL), 1)
    errors = []
    for image in split.crops.images[:: len(split.torso) // 4][:4]:
        identity = base.call(base.params, jnp.asarray(image[None]))["Identity"]
        errors.append(relative_error(np.asarray(identity), peer(image[None])["Identity"]))
    return {}, {"parity": max(errors)}, Ledger(forward=len(errors))


def all_scores(run: Run, model: Model, split: Split, *, probes: int, seed: int) -> dict[str, sensitivity.Scores]:
    """Name -> an estimator's scores, the measured truth first."""
    few = CURVATURE_CROPS
    plan = {
        "measured": (sensitivity.measured(), split.batches(), {}),
        "local_rounding": (sensitivity.local_rounding(num_probes=probes), split.batches(1), {"probes": probes}),
        "quadratic": (sensitivity.quadratic(), split.batches(count=few), {}),
        "logdet": (sensitivity.logdet(), split.batches(1, few), {}),
    }
    scores = {}
    with progress("sensitivity", len(plan)) as advance:
        for name, (scorer, batches, more) in plan.items():
            scores[name] = run.scores(
                f"sensitivity: {name}", scorer, model, batches, FORMATS, jax.random.key(seed), **more
            )
            advance()
    return scores


def nme(xy: np.ndarray, split: Split, *, seed: int, confidence: float = 0.95) -> search.Measurement:
    """Mean NME with its block-bootstrap interval."""
    errors = metrics.nme(xy, split.xy, split.torso)
    interval = metrics.bootstrap_interval(errors, split.crops.block, confidence=confidence, seed=seed)
    return search.Measurement(
        value=float(errors.mean()), low=interval.low, high=interval.high, confidence=confidence, per_sample=errors
    )


class Emulator:
    """The emulated model in one format: one compilation, then landmarks for any assignment."""

    def __init__(self, model: Model, fmt: str, split: Split) -> None:
        self.fmt = fmt
        self._evaluation = Evaluation(model, split.batches(), (fmt,), landmark_error(33))

    def landmarks(self, assignment: Mapping[str, str], split: Split) -> np.ndarray:
        """(N, 33, 2) in pixels of the crop."""
        outputs = self._evaluation.over(split.batches()).outputs(assignment)
        return outputs.reshape(-1, 33, 2) * split.torso[:, None, None]


def measured_once(emulator: Emulator, split: Split, *, seed: int, confidence: float = 0.95) -> Any:
    """Assignment -> its NME on the split's crops; a function of `functools.cache`."""

    @functools.cache
    def evaluate(assignment: search.Assignment) -> search.Measurement:
        return nme(emulator.landmarks(assignment, split), split, seed=seed, confidence=confidence)

    return evaluate


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search ended with: the assignment, its NME and the limit, the all-low NME, and (layers low, NME) on the way."""

    assignment: search.Assignment
    nme: float
    limit: float
    nme_all: float
    evaluations: int
    trail: Sequence[tuple[int, float]]


def search_format(
    run: Run, scores: sensitivity.Scores, emulator: Emulator, split: Split, *,
    tolerance: float, confidence: float | None, **key: Any,
) -> Outcome:  # fmt: skip
    """As many layers in the emulator's format as the tolerance allows, measured on the calibration crops."""
    fmt = emulator.fmt

    def compute() -> Computed:
        evaluate = measured_once(emulator, split, seed=key["seed"], confidence=confidence or 0.95)
        everything = evaluate(search.Assignment.uniform(scores.layers, fmt)).value
        problem = search.Problem.from_scores(scores, formats=(fmt,))
        limit = tolerance * everything
        result = search.solve(problem, search.binary(), evaluate=evaluate, tolerance=limit, confidence=confidence)
        evaluations = evaluate.cache_info().currsize
        outcome = Outcome(
            assignment=result.assignment,
            nme=result.measurement.value,
            limit=limit,
            nme_all=everything,
            evaluations=evaluations,
            trail=[(len(s.assignment.lowered), s.measurement.value) for s in result.trail if s.measurement is not None],
        )
        ledger = Ledger(forward=evaluations * len(split.torso), evaluations=evaluations, compilations=1)
        return {}, {**vars(outcome), "assignment": dict(result.assignment)}, ledger

    meta = run.piece(f"search: {fmt}", compute, tolerance=tolerance, confidence=confidence, **key).meta
    return fill(Outcome, {**meta, "assignment": search.Assignment(meta["assignment"])})


def curve(run: Run, scores: sensitivity.Scores, emulator: Emulator, split: Split) -> dict[int, float]:
    """Number of lowered layers -> NME, of prefixes of a ranking."""
    counts = np.unique(np.linspace(0, len(scores.layers), CURVE_POINTS).round().astype(int)).tolist()

    def compute() -> Computed:
        ranking = scores.ranking(emulator.fmt)
        landmarks = [emulator.landmarks(dict.fromkeys(ranking[:count], emulator.fmt), split) for count in counts]
        values = [float(metrics.nme(xy, split.xy, split.torso).mean()) for xy in landmarks]
        return {"nme": values}, {}, Ledger(forward=len(counts) * len(split.torso), evaluations=len(counts))

    piece = run.piece(f"curve: {emulator.fmt}, ranked by {scores.estimator}", compute)
    return dict(zip(counts, piece.arrays["nme"].tolist(), strict=True))


def judged(name: str, xy: np.ndarray, split: Split, outcome: Outcome, *, seed: int, **fields: Any) -> Row:
    """A model judged by its landmarks on the evaluation crops; float32 has no tolerance."""
    error, reference = nme(xy, split, seed=seed), name in FLOAT32
    pck_05, pck_02 = (float(metrics.pck(xy, split.xy, split.torso, threshold=t).mean()) for t in (0.05, 0.02))
    return Row(
        name=name,
        layers=len(outcome.assignment),
        tolerance_value=None if reference else outcome.limit,
        within_tolerance=reference or bool(error.value <= outcome.limit),
        nme=error.value,
        nme_low=error.low,
        nme_high=error.high,
        pck_05=pck_05,
        pck_02=pck_02,
        **fields,
    )


def emulated_rows(
    run: Run, emulator: Emulator, outcome: Outcome, split: Split, **more: Any
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """All-low and mixed rows of the emulated format, and their landmarks."""
    everything = search.Assignment.uniform(outcome.assignment, emulator.fmt)
    rows, drawn = [], {}
    for name, assignment, error in (("all", everything, outcome.nme_all), ("mixed", outcome.assignment, outcome.nme)):

        def compute(assignment: search.Assignment = assignment) -> Computed:
            xy = emulator.landmarks(assignment, split)
            return {"xy": xy}, {}, Ledger(forward=len(xy), evaluations=1)

        piece = run.piece(f"evaluation: {emulator.fmt}, {name}", compute, assignment=dict(assignment))
        xy = drawn[name] = piece.arrays["xy"]
        more |= {"format": emulator.fmt, "executed": "emulated", "nme_calibration": error}
        rows.append(judged(name, xy, split, outcome, layers_low=len(assignment.lowered), **more))
    return rows, drawn


def fastest(
    run: Run, base: Model, scores: sensitivity.Scores, emulator: Emulator, outcome: Outcome, split: Split, *, seed: int
) -> search.Assignment:
    """The assignment of least time on this device within the tolerance, by layers' seconds inside whole programs."""

    def compute() -> Computed:
        example = jnp.asarray(split.crops.images[:1])
        costs = cost.attributed(base, (emulator.fmt,), example)
        column = scores.column(emulator.fmt)[:, None]
        scored = SimpleNamespace(layers=scores.layers, formats=(emulator.fmt,), value=column, kind=scores.kind)

        evaluate = measured_once(emulator, split, seed=seed)
        assignments = [
            search.solve(
                search.Problem.from_scores(scored, cost=table, objective="cost_min"),
                search.ilp(),
                evaluate=evaluate,
                tolerance=outcome.limit,
            ).assignment
            for table in costs.tables
        ]
        best = min(assignments, key=costs.predicted)
        predicted = {"predicted": costs.predicted(best), "float32": costs.predicted({})}
        count = evaluate.cache_info().currsize
        ledger = Ledger(forward=count * len(split.torso), evaluations=count, compilations=costs.programs.size)
        return {}, {"assignment": dict(best), **predicted}, ledger

    piece = run.piece(f"search: least time in {emulator.fmt}", compute, limit=outcome.limit, seed=seed)
    return search.Assignment(piece.meta["assignment"])


def executed_rows(
    run: Run,
    base: Model,
    outcome: Outcome,
    least_time: search.Assignment,
    calibration: Split,
    evaluation: Split,
    *,
    rounds: int,
    **more: Any,
) -> tuple[list[Row], dict[str, compiled.Compiled], list[Program]]:
    """Float32 by the rule and as jax jits it, all-low, mixed, and the mix of least time; on every crop, and timed in turn.

    Programs and latencies are made in every run, never read back: they belong to the process that reports them.
    """
    examples = [(jnp.asarray(evaluation.crops.images[i : i + 1]),) for i in (0, len(evaluation.torso) // 2)]
    everything = dict.fromkeys(base.names, EXECUTED)
    variants = {"fp32": base, "jit": base}
    variants |= {"all": apply(base, everything), "mixed": apply(base, outcome.assignment)}
    variants["least time"] = apply(base, least_time)
    float32, programs = float32_outputs(base, examples), {}
    with progress("compiling and verifying", len(variants)) as advance:
        for name, variant in variants.items():
            implementation = "xla" if name == "jit" else "rule"
            programs[name] = compiled.compile(variant, examples, implementation=implementation, float32=float32)
            advance()
    calls: dict[str, Callable[[], Any]] = {name: functools.partial(p, *examples[0]) for name, p in programs.items()}
    times = interleaved(calls, rounds=rounds)
    rows, checks = [], list[Program]()
    for name, program in programs.items():
        check, ms = program.verification, times.columns(name, vs_fp32="fp32")
        rows.append(
            judged(
                name,
                _landmarks(program, evaluation),
                evaluation,
                outcome,
                format="float32" if name in FLOAT32 else EXECUTED,
                executed="xla",
                layers_low=program.lowered,
                nme_calibration=nme(_landmarks(program, calibration), calibration, seed=0).value,
                latency_ms=ms["ms"],
                vs_fp32=ms["vs_fp32"],
                **more | ({"tolerance": None} if name in FLOAT32 else {}),
            )
        )
        options = " ".join(f"{k}={v!r}" for k, v in program.options.items()) or "default"
        size = {"weights_mb": program.stored_bytes / 1e6, "peak_mb": program.peak_bytes / 1e6}
        checks.append(
            fill(Program, check, ms, size, program=name, options=options, compile_seconds=program.compile_seconds)
        )
    crops = len(calibration.torso) + len(evaluation.torso)
    # To verify: float32 and the same nudged, and the formats emulated for the low ones. Then the program on these examples, on
    # each crop and for the timing.
    run.ledger += Ledger(
        forward=len(examples) * len(programs) + len(programs) * (len(examples) + crops + rounds + 1),
        compilations=2 * len(programs) - 1,
        evaluations=2 * len(programs),
    )
    return rows, programs, checks


def _landmarks(program: compiled.Compiled, split: Split) -> np.ndarray:
    outputs = [np.asarray(program(jnp.asarray(image[None]))["Identity"]) for image in split.crops.images]
    return data.landmarks_xy(np.concatenate(outputs))


def executed_layers(programs: Mapping[str, compiled.Compiled]) -> list[Executed]:
    """What each layer really executes, from the optimised HLO."""
    mixed, everything = programs["mixed"], programs["all"].executed
    return [
        Executed(
            layer=layer,
            requested=mixed.assignment[layer],
            product=product.opcode,
            operands=product.operands,
            result=product.result,
            product_all=everything[layer].opcode,
            operands_all=everything[layer].operands,
        )
        for layer, product in mixed.executed.items()
    ]
