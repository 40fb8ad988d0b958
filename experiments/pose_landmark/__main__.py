"""A pose-landmark model of 72 layers, from sensitivity to a compiled mixed-precision function, as in ENERZAi, *Mixed precision
inference*, 2024.

    python -m experiments.pose_landmark            (about 6 minutes on 2 cores; again: about 1)

The model is MediaPipe's pose_landmark_full, the data are crops of two people from a public video; both are fetched. The truth is
the float32 model's own output: NME and PCK say what lower precision changed, not how good the model is. `float16_acc16` (float16
accumulation, as on small edge hardware) is emulated, so it has an accuracy and no latency; `bfloat16` is what XLA really runs.
Expected: about 40 % of the layers in float16_acc16 at 10 % of the all-low error, at an NME of about 0.0008.

local_rounding and measured see all calibration crops, quadratic and logdet eight. Each program is compared with its definition
(formats emulated, compiled without optimisation) on two crops before it is used. Where operands are float32 although bfloat16 was
requested, XLA converts the rounded numbers up before the product: the accuracy is that of bfloat16, the speed is not.

Writes results/pose_landmark/: summary.json, a plan for each format, the exported program, tables, figures and report.html.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import tyro

from experiments.lib import assets, metrics
from experiments.lib.rows import Table
from experiments.lib.run import Options, Run
from experiments.pose_landmark import figures, steps
from experiments.pose_landmark.rows import (
    EMULATED,
    EXECUTED,
    FORMATS,
    Agreement,
    Executed,
    Program,
    Row,
    agreement,
    layers,
)
from experiments.problems import data, pose
from mpjax import plan, xla
from mpjax.ledger import Ledger
from mpjax.program import with_output
from mpjax.xla.environment import instruction_sets


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """How the experiment runs."""

    tolerance: float = 0.1
    """Largest accepted NME, as a fraction of the NME with all layers low (calibration crops)."""
    confidence: float | None = None
    """None accepts by the mean; 0.95, say, by the upper bound of that interval instead."""
    probes: int = 4
    """Random output probes per crop of the local-rounding score."""
    seed: int = 0
    """Seed of the probes and of the bootstrap."""
    rounds: int = 60
    """Rounds of interleaved timing."""

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise SystemExit(f"--tolerance: expected a fraction in (0, 1) such as 0.1, found {self.tolerance}.")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise SystemExit(f"--confidence: expected a level in (0, 1) such as 0.95, found {self.confidence}.")
        if self.probes < 1 or self.rounds < 5:
            raise SystemExit(f"Expected --probes ≥ 1 and --rounds ≥ 5, found {self.probes} and {self.rounds}.")


def main(config: Config) -> None:
    """Scores, search, rows, figures, page."""
    run = Run("pose_landmark", config)
    crops, base = data.pose_crops(), pose.model()
    calibration, evaluation = pose.splits(base, crops.calibration, crops.evaluation)
    run.ledger += Ledger(forward=len(calibration.torso) + len(evaluation.torso), compilations=1)
    run.depends_on(crops=plan.digest(crops.calibration.images, crops.evaluation.images), seed=config.seed)
    parity = run.piece("parity with LiteRT", lambda: steps.litert_parity(base, evaluation)).meta["parity"]

    model = with_output(base, pose.in_torso_units)
    scores = steps.all_scores(run, model, calibration, probes=config.probes, seed=config.seed)
    ranking = scores["local_rounding"]
    emulators = {fmt: steps.Emulator(model, fmt, calibration) for fmt in FORMATS}
    knobs: dict[str, Any] = {"confidence": config.confidence, "probes": config.probes, "seed": config.seed}
    outcomes = {
        fmt: steps.search_format(run, ranking, emulators[fmt], calibration, tolerance=config.tolerance, **knobs)
        for fmt in FORMATS
    }
    curves = {
        fmt: {
            f"ranked by {score.estimator}": steps.curve(run, score, emulators[fmt], calibration)
            for score in (ranking, scores["logdet"])
        }
        for fmt in FORMATS
    }
    for fmt in FORMATS:  # the search's trail lies on the ranking's curve
        curves[fmt][f"ranked by {ranking.estimator}"] |= dict(outcomes[fmt].trail)

    judged = {"tolerance": config.tolerance, "seed": config.seed}
    emulated, drawn = steps.emulated_rows(run, emulators[EMULATED], outcomes[EMULATED], evaluation, **judged)
    least_time = steps.fastest(
        run, base, ranking, emulators[EXECUTED], outcomes[EXECUTED], calibration, seed=config.seed
    )
    executed, programs, checks = steps.executed_rows(
        run, base, outcomes[EXECUTED], least_time, calibration, evaluation, rounds=config.rounds, **judged
    )
    best = fastest(executed)
    exported = programs[best.name].export(run.folder / f"{pose.MODEL}.mpjax")
    for fmt, outcome in outcomes.items():
        metric = {"value": outcome.nme, "tolerance": outcome.limit}
        column = {name: {fmt: float(score)} for name, score in zip(ranking.layers, ranking.column(fmt), strict=True)}
        made = plan.Plan(assignment=outcome.assignment, scores=column, estimator=ranking.estimator, metric=metric)
        plan.save(made, run.folder / f"plan_{fmt}.json")

    results = Table("results", Row, [*executed[:2], *emulated, *executed[2:]])
    agreements = agreement(scores)
    for fmt in FORMATS:
        run.save(
            figures.sensitivity(list(scores.values()), fmt, frozenset(outcomes[fmt].assignment.lowered)),
            f"sensitivity_{fmt}",
            alt=f"Sensitivity per layer in {fmt}, in execution order, by estimator; green: lowered by the search",
        )
    chosen = {fmt: (len(outcome.assignment.lowered), outcome.nme) for fmt, outcome in outcomes.items()}
    limits = {fmt: outcome.limit for fmt, outcome in outcomes.items()}
    run.save(
        figures.nme_against_layers(curves, chosen, limits),
        "nme_against_layers",
        alt="NME against the number of lowered layers, with the chosen point",
    )
    landmarks(run, evaluation, drawn)
    run.finish(
        "A pose model in mixed precision",
        lead=__doc__,
        results=results,
        tables=[
            agreements,
            Table("programs", Program, checks),
            Table("executed", Executed, steps.executed_layers(programs)),
            layers(base, scores, {fmt: outcome.assignment for fmt, outcome in outcomes.items()}),
        ],
        findings=[*findings(results.rows, agreements.rows), here(executed)],
        facts={
            "model": {
                "name": pose.MODEL,
                "sha256": assets.ASSETS[pose.MODEL].sha256,
                "layers": len(base.layers),
                "parameters": sum(int(leaf.size) for leaf in jax.tree.leaves(base.params)),
            },
            "data": {
                "calibration": len(calibration.torso),
                "evaluation": len(evaluation.torso),
                "source": crops.source,
                "sha256": assets.ASSETS["sports2d_demo"].sha256,
            },
            "parity_max_rel": parity,
            "search_evaluations": {fmt: outcome.evaluations for fmt, outcome in outcomes.items()},
        },
        show=[agreements],
    )
    print(here(executed))
    print(f"What is fastest here, wherever mpjax runs on this platform: mpjax.load('{exported}')(images)['Identity']")


def landmarks(run: Run, split: pose.Split, drawn: Mapping[str, np.ndarray]) -> None:
    """The crops with the median, the 90 % and the largest error of all-low."""
    errors = {name: metrics.nme(xy, split.xy, split.torso) for name, xy in drawn.items()}
    order = np.argsort(errors["all"])
    shown = order[[len(order) // 2, (9 * len(order)) // 10, -1]]
    columns = {"mixed": "mixed", "all": "all layers low"}
    figure = figures.landmarks(
        split.crops.images[shown],
        split.xy[shown],
        {title: drawn[name][shown] for name, title in columns.items()},
        {title: errors[name][shown] for name, title in columns.items()},
    )
    alt = f"float32 green, {EMULATED} blue, on the crops with the median, the 90 % and the largest error of all layers low"
    run.save(figure, f"landmarks_{EMULATED}", alt=alt)


def fastest(rows: Sequence[Row]) -> Row:
    """The fastest program within the tolerance on the calibration crops; float32 by the rule where none is faster by 1 %."""
    reference = next(row for row in rows if row.name == "fp32")
    low = [row for row in rows if row.format == EXECUTED and row.nme_calibration <= (row.tolerance_value or np.inf)]
    best = min(low, key=lambda row: row.latency_ms or np.inf, default=reference)
    return best if (best.vs_fp32 or 1.0) < 0.99 else reference


def here(rows: Sequence[Row]) -> str:
    """What pays on this device, in a sentence."""
    best, jit = fastest(rows), next(row for row in rows if row.name == "jit")
    device = ", ".join([xla.device_name(), *instruction_sets()])
    gain = f"float32 by the rule takes {1 / (jit.vs_fp32 or 1.0):.2f} of the time of what jax.jit makes of the model"
    if best.name == "fp32":
        low = min((row for row in rows if row.format == EXECUTED), key=lambda row: row.latency_ms or np.inf)
        return (
            f"On this device ({device}) {gain}; no {EXECUTED} program within the tolerance is faster (the best, {low.name}, "
            f"takes {low.vs_fp32:.2f} of float32's time). What pays on other devices: docs/speed.md."
        )
    return (
        f"On this device ({device}) {gain}, and {best.layers_low} of {best.layers} layers in {EXECUTED}, chosen by what each "
        f"takes inside whole programs, {best.vs_fp32:.2f} of float32's, at an NME of {best.nme:.4f}."
    )


def findings(rows: Sequence[Row], agreements: Sequence[Agreement]) -> list[str]:
    """What the run says, in three sentences."""
    by_name = {(row.name, row.format): row for row in rows}
    local, determinant = (next(a for a in agreements if a.estimator.startswith(n)) for n in ("local", "logdet"))
    lines = []
    for fmt in FORMATS:
        everything, mixed = by_name["all", fmt], by_name["mixed", fmt]
        time = "" if mixed.vs_fp32 is None else f", in {mixed.vs_fp32:.2f} times float32's time"
        lines.append(
            f"{fmt}: {mixed.layers_low} of {mixed.layers} layers are lowered at {mixed.tolerance:.0%} of the all-low error on "
            f"the calibration crops; on the evaluation crops the NME is {mixed.nme:.4f}, {mixed.nme / everything.nme:.1%} of the "
            f"all-low error of {everything.nme:.4f}{time}."
        )
    lines.append(
        f"{local.estimator} ranks layers as measuring them one by one does (Spearman {local.spearman_float16_acc16:.3f} and "
        f"{local.spearman_bfloat16:.3f}) in {local.vs_measured:.2f} of the time. The exact log-determinant of a layer's Hessian "
        f"block reaches {determinant.spearman_float16_acc16:.2f} and {determinant.spearman_bfloat16:.2f}: it does not see how "
        "large the rounding is."
    )
    return lines


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
