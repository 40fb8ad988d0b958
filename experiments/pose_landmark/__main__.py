"""The post's case: a pose-landmark model of 72 layers, from sensitivity to a compiled mixed-precision function.

    python -m experiments.pose_landmark            (about 6 minutes on 2 cores; again: about 1)

The model is MediaPipe's pose_landmark_full, the data crops of two people from a public video; both are fetched. Truth is
everywhere the float32 model's own output: NME and PCK say what lower precision changed, not how good the model is.
`float16_acc16` (float16 accumulation: the post's edge hardware) is emulated, so it has an accuracy and no latency; `bfloat16`
is what XLA really runs here. Expected: about 40 % of the layers in float16_acc16 at 10 % of the all-low error.

Writes results/pose_landmark/: summary.json, plan.json, the exported program, tables (CSV, LaTeX), figures (PNG, PDF) and
report.html.
"""

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lib import assets, common, report
from experiments.lib.pages import Column, Picture, Section
from experiments.models.tflite_import import load_tflite
from experiments.pose_landmark import figures as pose_figures
from experiments.problems import data
from mpjax import apply, compiled, emulate, metrics, models, search, sensitivity
from mpjax.formats import parse_all
from mpjax.ledger import Ledger
from mpjax.models import Batches, Model

MODEL = "pose_landmark_full"
EMULATED, EXECUTED = "float16_acc16", "bfloat16"
FORMATS = (EMULATED, EXECUTED)
RANKED_BY = "local_rounding"
BATCH = 4  # crops in one call where many are evaluated
CURVATURE_CROPS = 8  # of the calibration crops, for the two scores whose cost per crop is large
CURVE_POINTS = 10

ROW_FIELDS: dict[str, Any] = {
    "name": str,
    "format": str,
    "executed": str,
    "layers_low": int,
    "layers": int,
    "tolerance": (float, None),
    "tolerance_value": (float, None),
    "within_tolerance": bool,
    "nme": float,
    "nme_low": float,
    "nme_high": float,
    "pck_05": float,
    "pck_02": float,
    "nme_calibration": float,
    "latency_ms": (float, None),
    "vs_fp32": (float, None),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the experiment runs."""

    tolerance: float = 0.1
    """Largest accepted NME, as a fraction of the NME with all layers low (calibration crops)."""
    confidence: float | None = None
    """None accepts by the mean; 0.95, say, by the upper bound of that interval instead."""
    strategy: Literal["binary", "greedy"] = "binary"
    """How layers are chosen: a bisected prefix of the ranking, or one by one."""
    probes: int = 4
    """Random output probes per crop of the local-rounding score."""
    seed: int = 0
    """Seed of the probes and of the bootstrap."""
    rounds: int = 60
    """Rounds of interleaved timing."""
    results: Path = Path("results")
    """Folder of the results."""
    fresh: bool = False
    """Compute every piece anew instead of going on from what an earlier run finished."""

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise SystemExit(f"--tolerance: expected a fraction in (0, 1) such as 0.1, found {self.tolerance}.")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise SystemExit(f"--confidence: expected a level in (0, 1) such as 0.95, found {self.confidence}.")
        if self.probes < 1 or self.rounds < 5:
            raise SystemExit(f"Expected --probes ≥ 1 and --rounds ≥ 5, found {self.probes} and {self.rounds}.")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Crops with the float32 model's landmarks (N, 33, 2) and torso lengths (N,), in pixels of the crop."""

    crops: data.CropSet
    xy: np.ndarray
    torso: np.ndarray

    def batches(self, size: int, count: int | None = None) -> Batches:
        """(images, torso) batches of `size`, of the first `count` crops."""
        total = count or len(self.torso)
        pairs = [(self.crops.images[i : i + size], self.torso[i : i + size]) for i in range(0, total, size)]
        return [(jnp.asarray(images), jnp.asarray(lengths)) for images, lengths in pairs]


def main(config: Config) -> None:
    """Run the experiment, and print where the report is."""
    start = time.perf_counter()
    folder = report.run_folder(config.results, "pose_landmark")
    crops = data.pose_crops()
    path = assets.fetch(MODEL)
    imported = load_tflite(path, outputs=("Identity",))
    base = models.from_linen(imported.module, imported.variables, jnp.zeros((1, data.SIZE, data.SIZE, 3), jnp.float32))
    model = models.with_output(base, in_torso_units)
    run = in_float32(base)
    calibration, evaluation = (split_of(each, base, run) for each in (crops.calibration, crops.evaluation))
    truth_ledger = Ledger(forward=len(calibration.torso) + len(evaluation.torso), compilations=1)
    environment = report.environment(device=common.device_name())
    pixels = crops.calibration.images.astype(np.float64).sum() + crops.evaluation.images.astype(np.float64).sum()
    key = common.piece_key(environment, crops=float(pixels), seed=config.seed)
    pieces = common.Pieces(folder / "pieces", key, fresh=config.fresh)

    parity = float(pieces.get("parity with LiteRT", lambda: litert_parity(path, base, evaluation)).meta["parity"])
    scores = all_scores(config, model, calibration, pieces)
    by_name = {each.estimator.partition("[")[0]: each for each in scores}

    evaluators = {fmt: Evaluator(base, fmt) for fmt in FORMATS}
    found = {
        fmt: search_format(config, by_name[RANKED_BY], fmt, evaluators[fmt], calibration, pieces) for fmt in FORMATS
    }
    curves = {
        fmt: [curve(by_name[name], fmt, evaluators[fmt], calibration, pieces) for name in (RANKED_BY, "logdet")]
        for fmt in FORMATS
    }

    rows, emulated_xy = emulated_rows(config, evaluators[EMULATED], found[EMULATED], evaluation, pieces)
    program_rows, programs, timings, executed_table, check_table, program_ledger = executed_rows(
        config, base, found[EXECUTED], calibration, evaluation
    )
    rows = [program_rows[0], *rows, *program_rows[1:]]

    mixed = programs["mixed"]
    exported = mixed.export(folder / f"{MODEL}_mixed_{EXECUTED}.mpjax")
    usage = (
        f'python -c "from mpjax import compiled; import numpy as np; '
        f"f = compiled.load('{exported}'); print(f(np.zeros((1, 256, 256, 3), np.float32))['Identity'].shape)\""
    )
    plan = {
        "schema": 1,
        "model": {"name": MODEL, "sha256": assets.ASSETS[MODEL].sha256},
        "data": {
            "source": crops.source,
            "sha256": assets.ASSETS["sports2d_demo"].sha256,
            "calibration": len(calibration.torso),
        },
        "versions": {name: environment[name] for name in ("python", "jax", "jaxlib", "flax")},
        "commit": common.commit(),
        "plans": [plan_of(config, fmt, found[fmt], by_name[RANKED_BY]) for fmt in FORMATS],
    }
    report.write_json(folder / "plan.json", plan)

    agreement = agreement_rows(scores, by_name["measured"])
    figures = draw(folder, config, scores, found, curves, evaluation, emulated_xy)
    seconds = time.perf_counter() - start
    parameters = sum(int(leaf.size) for leaf in jax.tree.leaves(base.params))
    summary = {
        "schema": report.SCHEMA,
        "experiment": "pose_landmark",
        "command": "python -m experiments.pose_landmark " + " ".join(sys.argv[1:]),
        "config": report.jsonable(config),
        "environment": environment,
        "seconds": seconds,
        "ledger": (pieces.ledger + program_ledger + truth_ledger).as_dict(),
        "rows": rows,
        "model": {
            "name": MODEL,
            "layers": len(base.layers),
            "parameters": parameters,
        },
        "data": {"calibration": len(calibration.torso), "evaluation": len(evaluation.torso), "source": crops.source},
        "parity_max_rel": parity,
        "commit": common.commit(),
        "reused_pieces": pieces.reused,
        "pieces_seconds": pieces.seconds,
        "peak_rss_mb": common.peak_memory_mb(),
        "agreement": agreement,
        "search_evaluations": {fmt: each.evaluations for fmt, each in found.items()},
        "timing": {name: report.jsonable(each) for name, each in timings.items()},
    }
    summary = report.jsonable(summary)
    report.write_summary(folder, summary, row_fields=ROW_FIELDS)
    write_report(folder, summary, found, figures, agreement, executed_table, check_table, base, by_name, usage)
    print(f"\n{len(base.layers)} layers; {seconds:.0f} s; peak memory {summary['peak_rss_mb'] / 1e3:.1f} GB")
    print(f"The exported mixed program can be loaded and called wherever mpjax runs on this platform:\n  {usage}")
    print(f"Report: {folder / 'report.html'}")


# --- the model's function ---------------------------------------------------------------------------------------


def in_torso_units(outputs: Mapping[str, jax.Array], torso: jax.Array) -> jax.Array:
    """f: the 66 numbers x, y of landmarks 0–32 over the float32 output's torso length, (N, 66)."""
    xy = data.landmarks_xy(outputs["Identity"])
    return xy.reshape(xy.shape[0], 66) / torso[:, None]


def in_float32(base: Model) -> Any:
    """`run(params, images) -> "Identity"`, jitted: in float32 as emulation has it, quicker on a CPU than XLA's convolutions."""
    override = emulate.in_format({})
    return jax.jit(lambda params, images: base.call(params, images, override=override)["Identity"])


def split_of(crops: data.CropSet, base: Model, run: Any) -> Split:
    """A split with the float32 model's own output, which is the truth."""
    parts = [run(base.params, crops.images[i : i + BATCH]) for i in range(0, len(crops.images), BATCH)]
    xy = data.landmarks_xy(np.concatenate([np.asarray(each) for each in parts]))
    return Split(crops=crops, xy=xy, torso=data.torso(xy).astype(np.float32))


def litert_parity(path: Path, base: Model, split: Split) -> tuple[dict, dict, Ledger]:
    """Largest difference of `Identity` to LiteRT over the largest output, on four evaluation crops."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    target = next(each["index"] for each in interpreter.get_output_details() if each["name"] == "Identity")
    worst = 0.0
    images = split.crops.images[:: len(split.torso) // 4][:4]
    for image in images:
        interpreter.set_tensor(source, image[None])
        interpreter.invoke()
        ours = base.call(base.params, jnp.asarray(image[None]))["Identity"]
        worst = max(worst, metrics.relative_error(np.asarray(ours), interpreter.get_tensor(target)))
    return {}, {"parity": worst}, Ledger(forward=len(images))


# --- sensitivity ------------------------------------------------------------------------------------------------


def all_scores(config: Config, model: Model, split: Split, pieces: common.Pieces) -> list[sensitivity.Scores]:
    """Every estimator's scores, the measured truth first."""
    key = jax.random.key(config.seed)
    plan: list[tuple[sensitivity.Scorer, Batches, str, dict[str, Any]]] = [
        (sensitivity.measured(), split.batches(BATCH), "sensitivity: measured, layer by layer", {}),
        (
            sensitivity.local_rounding(num_probes=config.probes),
            split.batches(1),
            "sensitivity: local rounding, all layers at once",
            {"probes": config.probes},
        ),
        (sensitivity.quadratic(), split.batches(BATCH, CURVATURE_CROPS), "sensitivity: quadratic (weights only)", {}),
        (sensitivity.logdet(), split.batches(1, CURVATURE_CROPS), "sensitivity: log-determinant, exact", {}),
    ]
    scores = []
    with report.progress("sensitivity", len(plan)) as advance:
        for scorer, batches, name, extra in plan:

            def compute(scorer: sensitivity.Scorer = scorer, batches: Batches = batches) -> tuple[dict, dict, Ledger]:
                found = scorer(model, batches, FORMATS, key)
                return *sensitivity.pack(found), found.ledger

            piece = pieces.get(name, compute, **extra)
            scores.append(sensitivity.unpack(piece.arrays, piece.meta))
            advance()
    return scores


def agreement_rows(scores: Sequence[sensitivity.Scores], truth: sensitivity.Scores) -> list[dict[str, Any]]:
    """Per estimator: rank agreement with the measured error, and what it cost."""
    rows = []
    for each in scores:
        row: dict[str, Any] = {"estimator": each.estimator}
        for fmt in FORMATS:
            row[f"spearman_{fmt}"] = metrics.spearman(each.column(fmt), truth.column(fmt))
        row |= {
            "seconds": each.seconds,
            "vs_measured": each.seconds / truth.seconds,
            "compile_seconds": each.compile_seconds,
            **{name: count for name, count in each.ledger.as_dict().items() if name in ("forward", "vjp", "jvp")},
        }
        rows.append(row)
    return rows


# --- search -----------------------------------------------------------------------------------------------------


class Evaluator:
    """The emulated model in one format: one compilation, then landmarks for any assignment."""

    def __init__(self, base: Model, fmt: str) -> None:
        self.base, self.fmt = base, fmt
        self._low = parse_all((fmt,))
        emulated = emulate.emulated(base, self._low)
        self._run = jax.jit(lambda params, index, x: emulated(params, index, x)["Identity"])

    def landmarks(self, assignment: Mapping[str, str], images: np.ndarray) -> np.ndarray:
        """(N, 33, 2) in pixels of the crop."""
        index = emulate.choice(assignment, self.base.names, self._low)
        parts = [
            self._run(self.base.params, index, jnp.asarray(images[i : i + BATCH])) for i in range(0, len(images), BATCH)
        ]
        return data.landmarks_xy(np.concatenate([np.asarray(each) for each in parts]))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search gave: the assignment, its measured NME, the limit, and the trail."""

    assignment: search.Assignment
    nme: float
    tolerance_value: float
    all_nme: float
    evaluations: int
    trail: list[dict[str, Any]]

    @property
    def lowered(self) -> tuple[str, ...]:
        """The lowered layers."""
        return self.assignment.lowered


def measure(xy: np.ndarray, split: Split, *, seed: int, confidence: float = 0.95) -> search.Measurement:
    """Mean NME with its block-bootstrap interval."""
    per_sample = metrics.nme(xy, split.xy, split.torso)
    interval = metrics.bootstrap_interval(per_sample, split.crops.block, confidence=confidence, seed=seed)
    return search.Measurement(
        value=float(per_sample.mean()),
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        per_sample=per_sample,
    )


def search_format(
    config: Config, scores: sensitivity.Scores, fmt: str, evaluator: Evaluator, split: Split, pieces: common.Pieces
) -> Found:
    """Lower as many layers as the tolerance allows, in one format, measured on the calibration crops."""

    def compute() -> tuple[dict, dict, Ledger]:
        measured: dict[search.Assignment, search.Measurement] = {}

        def evaluate(assignment: search.Assignment) -> search.Measurement:
            if assignment not in measured:
                xy = evaluator.landmarks(assignment, split.crops.images)
                measured[assignment] = measure(xy, split, seed=config.seed, confidence=config.confidence or 0.95)
            return measured[assignment]

        everything = evaluate(search.Assignment.uniform(scores.layers, fmt))
        limit = config.tolerance * everything.value
        problem = search.Problem(
            layers=scores.layers, formats=(fmt,), penalty=scores.column(fmt)[:, None], kind=scores.kind
        )
        strategy = search.binary() if config.strategy == "binary" else search.greedy()
        result = search.solve(problem, strategy, evaluate=evaluate, tolerance=limit, confidence=config.confidence)
        trail = [
            {
                "layers_low": len(step.assignment.lowered),
                "nme": None if step.measurement is None else step.measurement.value,
                "nme_low": None if step.measurement is None else step.measurement.low,
                "nme_high": None if step.measurement is None else step.measurement.high,
                "accepted": step.accepted,
                "note": step.note,
            }
            for step in result.trail
        ]
        meta = {
            "assignment": dict(result.assignment),
            "nme": result.measurement.value,
            "limit": limit,
            "all": everything.value,
            "evaluations": len(measured),
            "trail": trail,
        }
        ledger = Ledger(forward=len(measured) * len(split.torso), evaluations=len(measured), compilations=1)
        return {}, meta, ledger

    extra = {
        "tolerance": config.tolerance,
        "confidence": config.confidence,
        "strategy": config.strategy,
        "probes": config.probes,
    }
    meta = pieces.get(f"search: {fmt}", compute, **extra).meta
    return Found(
        assignment=search.Assignment(meta["assignment"]),
        nme=meta["nme"],
        tolerance_value=meta["limit"],
        all_nme=meta["all"],
        evaluations=meta["evaluations"],
        trail=list(meta["trail"]),
    )


def curve(
    scores: sensitivity.Scores, fmt: str, evaluator: Evaluator, split: Split, pieces: common.Pieces
) -> pose_figures.Curve:
    """NME of prefixes of a ranking, for the figure."""
    counts = np.unique(np.linspace(0, len(scores.layers), CURVE_POINTS).round().astype(int))

    def compute() -> tuple[dict, dict, Ledger]:
        ranking, values = scores.ranking(fmt), []
        for count in counts:
            xy = evaluator.landmarks(dict.fromkeys(ranking[:count], fmt), split.crops.images)
            values.append(float(metrics.nme(xy, split.xy, split.torso).mean()))
        return {"nme": np.array(values)}, {}, Ledger(forward=len(counts) * len(split.torso), evaluations=len(counts))

    piece = pieces.get(f"curve: {fmt}, ranked by {scores.estimator}", compute)
    return pose_figures.Curve(
        label=f"ranked by {scores.estimator}", layers=counts.tolist(), nme=piece.arrays["nme"].tolist()
    )


def plan_of(config: Config, fmt: str, found: Found, scores: sensitivity.Scores) -> dict[str, Any]:
    """One format's part of plan.json."""
    return {
        "format": fmt,
        "assignment": dict(found.assignment),
        "scores": dict(zip(scores.layers, report.jsonable(scores.column(fmt)), strict=True)),
        "estimator": scores.estimator,
        "strategy": config.strategy,
        "tolerance": config.tolerance,
        "tolerance_value": found.tolerance_value,
        "confidence": config.confidence,
        "nme_calibration": found.nme,
        "accepted_in": "emulation",
        "seed": config.seed,
        "trail": found.trail,
    }


# --- rows -------------------------------------------------------------------------------------------------------


def row_of(
    name: str, fmt: str, executed: str, low: int, xy: np.ndarray, calibration_nme: float, split: Split, seed: int
) -> dict[str, Any]:
    """A row without tolerance and latency."""
    measured = measure(xy, split, seed=seed)
    pck = {t: float(metrics.pck(xy, split.xy, split.torso, threshold=t).mean()) for t in (0.05, 0.02)}
    return {
        "name": name,
        "format": fmt,
        "executed": executed,
        "layers_low": low,
        "layers": 0,
        "tolerance": None,
        "tolerance_value": None,
        "within_tolerance": True,
        "nme": measured.value,
        "nme_low": measured.low,
        "nme_high": measured.high,
        "pck_05": pck[0.05],
        "pck_02": pck[0.02],
        "nme_calibration": calibration_nme,
        "latency_ms": None,
        "vs_fp32": None,
    }


def with_tolerance(row: dict[str, Any], config: Config, found: Found) -> dict[str, Any]:
    """The row with the tolerance and whether the evaluation crops keep it."""
    return {
        **row,
        "layers": len(found.assignment),
        "tolerance": config.tolerance,
        "tolerance_value": found.tolerance_value,
        "within_tolerance": bool(row["nme"] <= found.tolerance_value),
    }


def emulated_rows(
    config: Config, evaluator: Evaluator, found: Found, evaluation: Split, pieces: common.Pieces
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """All-low and mixed rows of the emulated format on the evaluation crops, and their landmarks."""
    everything = search.Assignment.uniform(found.assignment, evaluator.fmt)
    rows, drawn = [], {}
    for name, assignment, nme in (("all", everything, found.all_nme), ("mixed", found.assignment, found.nme)):

        def compute(assignment: search.Assignment = assignment) -> tuple[dict, dict, Ledger]:
            xy = evaluator.landmarks(assignment, evaluation.crops.images)
            return {"xy": xy}, {}, Ledger(forward=len(xy), evaluations=1)

        piece = pieces.get(f"evaluation: {evaluator.fmt}, {name}", compute, assignment=dict(assignment))
        drawn[name] = piece.arrays["xy"]
        low = len(assignment.lowered)
        row = row_of(name, evaluator.fmt, "emulated", low, drawn[name], nme, evaluation, config.seed)
        rows.append(with_tolerance(row, config, found))
    return rows, drawn


def executed_rows(
    config: Config, base: Model, found: Found, calibration: Split, evaluation: Split
) -> tuple[list[dict], dict[str, compiled.Compiled], dict[str, common.Timing], list[dict], list[dict], Ledger]:
    """Compile float32, all-low and mixed for one crop, run them on every crop, and time them in turn.

    Programs and latencies are made in every run, never read back: they belong to the process that reports them.
    """
    examples = [(jnp.asarray(evaluation.crops.images[i : i + 1]),) for i in (0, len(evaluation.torso) // 2)]
    everything = dict.fromkeys(base.names, EXECUTED)
    variants = {"fp32": base, "all": apply.apply(base, everything), "mixed": apply.apply(base, found.assignment)}
    programs = {}
    with report.progress("compiling and verifying", len(variants)) as advance:
        for name, each in variants.items():
            programs[name] = compiled.compile(each, examples, lowering="rule")
            advance()
    image = examples[0][0]
    timings = common.interleaved(
        {name: functools.partial(program, image) for name, program in programs.items()}, rounds=config.rounds
    )
    rows = []
    for name, program in programs.items():

        def landmarks(split: Split, program: compiled.Compiled = program) -> np.ndarray:
            outputs = [np.asarray(program(jnp.asarray(each[None]))["Identity"]) for each in split.crops.images]
            return data.landmarks_xy(np.concatenate(outputs))

        on_calibration = float(metrics.nme(landmarks(calibration), calibration.xy, calibration.torso).mean())
        low = sum(each != "float32" for each in program.assignment.values())
        fmt = "float32" if name == "fp32" else EXECUTED
        row = row_of(name, fmt, "xla", low, landmarks(evaluation), on_calibration, evaluation, config.seed)
        row = {**row, "layers": len(base.layers)} if name == "fp32" else with_tolerance(row, config, found)
        rows.append({**row, "latency_ms": timings[name].median, "vs_fp32": timings[name].ratio})
    executed_table = [
        {
            "layer": layer,
            "requested": programs["mixed"].assignment[layer],
            "product": each.opcode,
            "operands": each.operands,
            "result": each.result,
            "product_all": programs["all"].executed[layer].opcode,
            "operands_all": programs["all"].executed[layer].operands,
        }
        for layer, each in programs["mixed"].executed.items()
    ]
    check_table = [
        {
            "program": name,
            "error": each.verification.error,
            "limit": each.verification.limit,
            "distance": each.verification.distance,
            "noise": each.verification.noise,
            "options": " ".join(f"{k}={v!r}" for k, v in each.options.items()) or "default",
            "compile_seconds": each.compile_seconds,
            "weights_mb": each.weight_bytes / 1e6,
            "peak_mb": each.peak_bytes / 1e6,
            "median": timings[name].median,
            "quartiles": f"{timings[name].low:.2f}–{timings[name].high:.2f}",
            "ratio": timings[name].ratio,
        }
        for name, each in programs.items()
    ]
    crops = len(calibration.torso) + len(evaluation.torso)
    # To verify: float32 and the same nudged for each program, and its formats emulated for the two low ones. Then the program on
    # these examples, on each crop and for the timing.
    definitions = len(examples) * (2 * 3 + 2)
    ledger = Ledger(
        forward=definitions + len(programs) * (len(examples) + crops + config.rounds + 1),
        compilations=2 * len(programs) + 2,
        evaluations=2 * len(programs),
    )
    return rows, programs, timings, executed_table, check_table, ledger


# --- what is left behind ----------------------------------------------------------------------------------------


def draw(
    folder: Path,
    config: Config,
    scores: Sequence[sensitivity.Scores],
    found: Mapping[str, Found],
    curves: Mapping[str, Sequence[pose_figures.Curve]],
    evaluation: Split,
    emulated_xy: Mapping[str, np.ndarray],
) -> dict[str, Path]:
    """All figures, by name."""
    figures = {
        f"sensitivity_{fmt}": pose_figures.sensitivity_bars(folder, scores, fmt, frozenset(found[fmt].lowered))
        for fmt in FORMATS
    }
    lines: dict[str, list[pose_figures.Curve]] = {}
    for fmt, each in found.items():
        known = {(step["layers_low"], step["nme"]) for step in each.trail if step["nme"] is not None}
        first = curves[fmt][0]
        if config.strategy == "binary":  # its trail lies on the same curve
            known |= set(zip(first.layers, first.nme, strict=True))
            ordered = sorted(known)
            first = replace(first, layers=[n for n, _ in ordered], nme=[value for _, value in ordered])
        lines[fmt] = [first, *curves[fmt][1:]]
    chosen = {fmt: (len(each.lowered), each.nme) for fmt, each in found.items()}
    limits = {fmt: each.tolerance_value for fmt, each in found.items()}
    figures["nme"] = pose_figures.nme_against_layers(folder, lines, chosen, limits)
    error = {name: metrics.nme(xy, evaluation.xy, evaluation.torso) for name, xy in emulated_xy.items()}
    order = np.argsort(error["all"])
    shown = order[[len(order) // 2, (9 * len(order)) // 10, -1]]  # median, 90 %, worst
    low = len(found[EMULATED].lowered)
    figures["landmarks"] = pose_figures.landmarks(
        folder,
        evaluation.crops.images[shown],
        evaluation.xy[shown],
        emulated_xy["mixed"][shown],
        emulated_xy["all"][shown],
        fmt=EMULATED,
        titles=[
            (
                f"{low} of {len(scores[0].layers)} layers low: NME {error['mixed'][i]:.4f}",
                f"all low: NME {error['all'][i]:.4f}",
            )
            for i in shown
        ],
    )
    return figures


ROWS_TABLE = (
    Column(key="name", title="model"),
    Column(key="format", title="format"),
    Column(key="executed", title="run"),
    Column(key="layers_low", title="layers low"),
    Column(key="nme", title="NME", format=".4f"),
    Column(key="nme_low", title="low", format=".4f"),
    Column(key="nme_high", title="high", format=".4f"),
    Column(key="pck_05", title="PCK@.05", format=".3f"),
    Column(key="pck_02", title="PCK@.02", format=".3f"),
    Column(key="nme_calibration", title="NME calib.", format=".4f"),
    Column(key="tolerance_value", title="limit", format=".4f"),
    Column(key="within_tolerance", title="within"),
    Column(key="latency_ms", title="ms", format=".2f"),
    Column(key="vs_fp32", title="time / fp32", format=".2f"),
)
_TERMINAL = ("name", "format", "layers_low", "nme", "pck_05", "pck_02", "latency_ms", "vs_fp32")
SHORT_TABLE = tuple(column for column in ROWS_TABLE if column.key in _TERMINAL)
AGREEMENT_TABLE = (
    Column(key="estimator", title="estimator"),
    Column(key=f"spearman_{EMULATED}", title=f"Spearman {EMULATED}", format=".3f"),
    Column(key=f"spearman_{EXECUTED}", title=f"Spearman {EXECUTED}", format=".3f"),
    Column(key="seconds", title="seconds", format=".1f"),
    Column(key="vs_measured", title="time / measured", format=".3f"),
    Column(key="compile_seconds", title="compile s", format=".1f"),
    Column(key="forward", title="forward"),
    Column(key="vjp", title="VJP"),
    Column(key="jvp", title="JVP"),
)
EXECUTED_TABLE = (
    Column(key="layer", title="layer"),
    Column(key="requested", title="requested"),
    Column(key="product", title="product"),
    Column(key="operands", title="operands executed"),
    Column(key="result", title="result"),
    Column(key="product_all", title="product (all low)"),
    Column(key="operands_all", title="operands (all low)"),
)
CHECK_TABLE = (
    Column(key="program", title="program"),
    Column(key="error", title="error", format=".1e"),
    Column(key="limit", title="limit", format=".1e"),
    Column(key="distance", title="distance to fp32", format=".1e"),
    Column(key="noise", title="noise", format=".1e"),
    Column(key="options", title="compiler options"),
    Column(key="compile_seconds", title="compile s", format=".1f"),
    Column(key="weights_mb", title="weights MB", format=".2f"),
    Column(key="peak_mb", title="peak MB", format=".1f"),
    Column(key="median", title="ms", format=".2f"),
    Column(key="quartiles", title="quartiles"),
    Column(key="ratio", title="time / fp32", format=".2f"),
)


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    found: Mapping[str, Found],
    figures: Mapping[str, Path],
    agreement: Sequence[Mapping[str, Any]],
    executed_table: Sequence[Mapping[str, Any]],
    check_table: Sequence[Mapping[str, Any]],
    base: Model,
    by_name: Mapping[str, sensitivity.Scores],
    usage: str,
) -> None:
    """Tables (CSV, LaTeX), and everything on one self-contained page."""
    rows = summary["rows"]
    by_row = {(row["name"], row["format"]): row for row in rows}
    all_low, mixed = by_row["all", EMULATED], by_row["mixed", EMULATED]
    run_all, run_mixed = by_row["all", EXECUTED], by_row["mixed", EXECUTED]
    total = len(base.layers)
    layer_rows = [
        {
            "layer": layer.name,
            "weights": layer.weights,
            "mflop": layer.flops / 1e6,
            **{f"assigned_{fmt}": found[fmt].assignment[layer.name] for fmt in FORMATS},
            **{
                f"{name}_{fmt}": report.jsonable(each.column(fmt)[number])
                for name, each in by_name.items()
                for fmt in FORMATS
            },
        }
        for number, layer in enumerate(base.layers)
    ]
    layer_columns = [
        Column(key="layer", title="layer"),
        Column(key="weights", title="weights", format=","),
        Column(key="mflop", title="MFLOP", format=".2f"),
        *(Column(key=f"assigned_{fmt}", title=f"assigned ({fmt})") for fmt in FORMATS),
        *(Column(key=f"{n}_{fmt}", title=f"{n} {fmt}", format=".2e") for n in by_name for fmt in FORMATS),
    ]
    environment = summary["environment"]
    truth = (
        "Truth is the float32 model's own output: NME and PCK measure the drift from it, relative to the torso length."
    )
    confidence = summary["config"]["confidence"]
    how = "by the mean" if confidence is None else f"by the upper bound of its {confidence:.0%} interval"
    kept = "keeps" if mixed["within_tolerance"] else "misses"
    local = next(row for row in agreement if row["estimator"].startswith(RANKED_BY))
    determinant = next(row for row in agreement if row["estimator"].startswith("logdet"))
    lead = (
        f"{total} layers, {summary['data']['calibration']} calibration and {summary['data']['evaluation']} evaluation crops of "
        f"{summary['data']['source']}. {truth}"
    )
    findings = [
        f"With float16 accumulation everywhere ({EMULATED}, emulated) the landmarks drift by NME {all_low['nme']:.4f}, and "
        f"{all_low['pck_05']:.0%} of them stay within 5 % of the torso. Lowering {mixed['layers_low']} of {total} layers "
        f"({mixed['layers_low'] / total:.0%}) instead, accepted {how} at {mixed['tolerance']:.0%} of the all-low error on the "
        f"calibration crops, gives NME {mixed['nme']:.4f} and PCK@.02 {mixed['pck_02']:.3f} on the evaluation crops: it {kept} "
        f"the limit of {mixed['tolerance_value']:.4f} there ({mixed['nme'] / all_low['nme']:.1%} of the all-low error).",
        f"In {EXECUTED}, as XLA really runs it on this machine, {run_mixed['layers_low']} layers are lowered (NME "
        f"{run_mixed['nme']:.4f}; all layers: {run_all['nme']:.4f}). The mixed program takes {run_mixed['vs_fp32']:.2f} "
        f"times, the all-low one {run_all['vs_fp32']:.2f} times the float32 program's time: the products "
        "are XLA's own, and the table of what each layer really executes says why.",
        f"The layer's own rounding error, carried to the output ({local['estimator']}), ranks layers as measuring them one by "
        f"one does (Spearman {local[f'spearman_{EMULATED}']:.3f} and {local[f'spearman_{EXECUTED}']:.3f}) at "
        f"{local['vs_measured']:.2f} of the time. The exact log-determinant of the layer's Hessian block, which does not see "
        f"how large the rounding is, reaches {determinant[f'spearman_{EMULATED}']:.2f} and "
        f"{determinant[f'spearman_{EXECUTED}']:.2f}. The quadratic form sees weights only, and this model's weights are "
        "stored in float16, so it is zero for float16.",
    ]
    tables = {
        "results": report.write_table(folder, "results", rows, ROWS_TABLE, caption=truth),
        "agreement": report.write_table(folder, "agreement", agreement, AGREEMENT_TABLE),
        "programs": report.write_table(folder, "programs", check_table, CHECK_TABLE),
        "executed": report.write_table(folder, "executed", executed_table, EXECUTED_TABLE),
        "layers": report.write_table(folder, "layers", layer_rows, layer_columns),
    }
    report.print_table(rows, SHORT_TABLE, title=f"{MODEL}: drift from the float32 output")
    report.print_table(agreement, AGREEMENT_TABLE[:5], title="Estimators against the measured error")
    machine = (
        f"{environment['device']}, {environment['cores']} cores; Python {environment['python']}, jax {environment['jax']}, "
        f"flax {environment['flax']}; {environment['date']}; commit {summary['commit']}."
    )
    sections = [
        Section(heading="What was found", paragraphs=findings, html=[tables["results"]]),
        Section(
            heading="Which layers are sensitive",
            paragraphs=["One chart per estimator, layers in execution order; green layers were lowered by the search."],
            pictures=[
                Picture(
                    path=figures[f"sensitivity_{fmt}"], alt=f"Bar charts of sensitivity per layer in {fmt}", caption=fmt
                )
                for fmt in FORMATS
            ],
        ),
        Section(
            heading="How many layers",
            pictures=[
                Picture(path=figures["nme"], alt="NME against the number of lowered layers, with the chosen point")
            ],
            paragraphs=[
                f"{fmt}: {len(each.lowered)} of {total} layers after {each.evaluations} evaluations of the metric."
                for fmt, each in found.items()
            ],
        ),
        Section(
            heading="Landmarks",
            pictures=[
                Picture(
                    path=figures["landmarks"],
                    alt="Landmarks on three crops: mixed on the left, all layers low on the right",
                    caption=f"float32 green, {EMULATED} blue; mixed left, all layers low right. Evaluation crops with the "
                    "median, the 90 % and the largest error of all-low.",
                )
            ],
        ),
        Section(
            heading="Estimators against measuring",
            paragraphs=[
                "Spearman's rank correlation with the error of each layer lowered alone; seconds without compilation, in one "
                f"process. local_rounding and measured saw all calibration crops, quadratic and logdet {CURVATURE_CROPS}.",
            ],
            html=[tables["agreement"]],
        ),
        Section(
            heading="The compiled programs",
            paragraphs=[
                "Each program was compared with its definition (formats emulated, compiled without optimisation) on two crops "
                "before it was used. Error: ‖program − definition‖ over ‖definition‖, at most the limit; distance: the same of "
                "definition and float32; noise: what numbers one float32 rounding away make of float32's, times 16. Times are "
                "interleaved, one crop a call: median and quartiles.",
                "Load and call the exported mixed program:",
            ],
            html=[report.code(usage), tables["programs"]],
        ),
        Section(
            heading="Requested and executed, per layer",
            paragraphs=[
                "Read from the optimised HLO. Where operands are float32 although bfloat16 was requested, XLA converts the "
                "rounded numbers up before the product: the accuracy is that of bfloat16, the speed is not.",
            ],
            html=[tables["executed"]],
        ),
        Section(heading="All layers", html=[tables["layers"]]),
        Section(heading="Where and how", paragraphs=[machine], html=[report.code(summary["command"])]),
    ]
    page = report.html_page("A pose model in mixed precision", sections, lead=lead)
    (folder / "report.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
