"""An ImageNet classifier in low precision: which layers of EfficientNet-Lite0 can be lowered, batch norm folded or kept.

    python -m experiments.classifier            (about 15 minutes on 2 cores; again: under 1)
    python -m experiments.classifier --quick    (about 2: fewer images, probes and tolerances)

Truth is the float32 model's own output on unlabelled photographs and video frames: top-1 agreement, and KL of the
probabilities in nats. The 20 labelled images are a sanity check (18 right in float32), too few for a claim about accuracy.

Layers are ranked by `local_rounding` under the KL loss, and the longest prefix within a tolerance is bisected on the measured
KL of the calibration images; the held-out images are looked at once for each result, which is reported as it is. The tolerance
is a share of the KL with all 50 layers low, mean of both parts, of whichever form of batch norm has less (at most log 1000):
both forms are held to one limit that neither meets for free.

Expected: with all layers low, bfloat16 changes about one decision in 20, float16_acc16 one in 50 or none, float8 two in three.
In bfloat16 and float8 the first depthwise convolution carries half of the predicted KL or more, in float16_acc16 the classifier.
Kept norms change little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from scipy.special import softmax

from experiments.classifier import figures, steps
from experiments.classifier.rows import Point, Row, Score, Search
from experiments.classifier.steps import FORMS, Data, Form, Size
from experiments.lib import assets
from experiments.lib.page import Section
from experiments.lib.progress import progress
from experiments.lib.rows import Table
from experiments.lib.run import Options, Run
from experiments.models.efficientnet import CLASSES
from experiments.problems import classifier_data
from mpjax import plan
from mpjax.metrics import relative_error
from mpjax.search import Assignment


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer images, probes and points, two tolerances."""
    seed: int = 0
    """Seed of the random probes and of the deal of the images."""


def main(config: Config) -> None:
    """Both forms of batch norm: all layers low, curves, searches; then the page."""
    run = Run("classifier", config)
    size = steps.QUICK if config.quick else steps.FULL
    tolerances = size.tolerances
    data = steps.load_data(size.images, config.seed)
    digest = plan.digest(data.calibration.images, data.heldout.images, data.sanity, data.labels)
    run.depends_on(seed=config.seed, size=size, data=digest)
    forms = [Form(run, form, steps.load_model(form), data, size, config.seed) for form in FORMS]
    formats = steps.FORMATS
    rows: list[Row] = []
    searches: list[Search] = []
    curves: list[Point] = []
    scores: list[Score] = []
    limits = dict.fromkeys(formats, math.log(CLASSES))
    with progress("classifier", len(forms) * len(formats) * (2 + len(tolerances))) as advance:
        for form in forms:
            rows.append(form.row("fp32", "float32", form.baseline))
            for fmt in formats:
                rows.append(form.row("all", fmt, Assignment.uniform(form.model.names, fmt)))
                limits[fmt] = float(np.fmin(limits[fmt], form.kl_of_both_parts(fmt)))  # NaN is no limit
                advance()
        for form in forms:
            for fmt in formats:
                curves += form.curve(fmt)
                advance()
                lowered_at: dict[str, float] = {}
                for tolerance in tolerances:
                    assignment, searched = form.search(fmt, tolerance, tolerance * limits[fmt])
                    rows.append(form.row("mixed", fmt, assignment, tolerance))
                    searches.append(searched)
                    lowered_at |= {layer: lowered_at.get(layer, tolerance) for layer in assignment.lowered}
                    advance()
                scores += form.score_rows(fmt, lowered_at)
    rows.sort(key=lambda row: (row.format != "float32", row.format))
    folded, unfolded = (form.outputs(form.baseline)["heldout"] for form in forms)
    facts = image_facts(data, size)
    facts |= {
        "folding_error": relative_error(folded, unfolded),
        "top_probability": float(np.median(softmax(folded, axis=1).max(axis=1))),
    }
    results = Table("results", Row, rows, "EfficientNet-Lite0 against its float32 output")
    tables = [
        Table("searches", Search, searches),
        Table("curves", Point, curves),
        Table("scores", Score, scores),
    ]
    run.finish(
        "A classifier in low precision",
        lead="Which layers of EfficientNet-Lite0 can be lowered, with batch norm folded into the convolutions or kept in float32 "
        "beside them. Truth is the float32 network's output on images without labels.",
        results=results,
        tables=tables,
        findings=findings(rows, searches, facts),
        sections=[
            Section(
                "KL against layers lowered",
                "The longest prefix of the ranking within the tolerance is bisected on the calibration images; held-out images "
                "were looked at once for each result; intervals are 95 %, over windows and photographs.",
                run.save(figures.kl_against_layers(curves, searches), "kl_against_layers", alt="KL by layers lowered"),
                tables[0],
            ),
            Section(
                "Decisions that stay",
                run.save(figures.agreement(rows), "agreement", alt="Top-1 agreement per format and tolerance"),
            ),
            Section(
                "Sensitivity of each layer",
                *(
                    run.save(
                        figures.sensitivity(scores, tolerances, fmt),
                        f"sensitivity_{fmt}",
                        alt=f"Predicted KL of each layer alone in {fmt}, batch norm folded and kept",
                        caption=fmt,
                    )
                    for fmt in formats
                ),
            ),
            Section(
                "The images",
                f"{size.images} calibration and {size.images} held-out images, from {facts['blocks_calibration']} and "
                f"{facts['blocks_heldout']} photographs and windows of videos, dealt at random. Independent sources: "
                f"{len(facts['photographs'])} photographs and {len(facts['videos'])} videos of {facts['places']} places.",
            ),
            Section("All scores", tables[2]),
        ],
        facts={"facts": facts},
    )


def image_facts(data: Data, size: Size) -> dict[str, Any]:
    """Where the images come from, and how much was computed."""
    return {
        "photographs": list(classifier_data.PHOTOGRAPHS),
        "videos": [assets.ASSETS[name].requirement + " " + name for name in classifier_data.VIDEOS],
        "places": classifier_data.PLACES,
        "images": size.images,
        "blocks_calibration": len(np.unique(data.calibration.block)),
        "blocks_heldout": len(np.unique(data.heldout.block)),
        "scored": size.scored,
        "probes": size.probes,
        "sanity_images": len(data.labels),
    }


def findings(rows: Sequence[Row], searches: Sequence[Search], facts: dict[str, Any]) -> list[str]:
    """How the two parts of the images and the two forms agree."""
    right = min(row.sanity_top1 for row in rows if row.name == "fp32")
    return [
        f"{sum(row.within_tolerance for row in searches)} of {len(searches)} searches are within their limit on the held-out "
        "images, too; they go up to it on the calibration images, with no margin.",
        f"In float32 {right:.0%} of {facts['sanity_images']} labelled images are right; the two forms' logits differ by "
        f"{facts['folding_error']:.1e} of the largest. The median probability of the first choice is "
        f"{facts['top_probability']:.0%}.",
    ]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
