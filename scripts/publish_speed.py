"""Put a run of experiments/speed into docs/speed.md, docs/speed/ and README.md: figures, tables, machine and date.

.venv/bin/python -m experiments.speed --fresh
.venv/bin/python scripts/publish_speed.py ["A remark on how the run went, if it needs one."]
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from publish_estimators import check, insert, markdown  # noqa: E402

from experiments.speed.__main__ import Config  # noqa: E402
from mpjax.files import jsonable  # noqa: E402

RUN = ROOT / "results/speed"
DOCS = ROOT / "docs/speed"
TABLES = ("speed", "targets", "tuning", "searches", "layers", "programs", "spread")
SHORT = {
    "pose_landmark_full": "pose",
    "iris_landmark": "iris",
    "face_landmark": "face",
    "encoder_6x384": "encoder 6 x 384",
    "encoder_12x768": "encoder 12 x 768",
}
VARIANTS = ("fp32_naive", "fp32_tuned", "flax_bf16", "mixed", "bf16_profitable", "litert_fp32", "litert_fp16")


def main() -> None:
    """Copy and rewrite."""
    summary = json.loads((RUN / "summary.json").read_text())
    check(summary, SHORT)
    config = {name: value for name, value in summary["config"].items() if name not in ("results", "fresh")}
    full = {name: value for name, value in jsonable(Config()).items() if name in config}
    if config != full:
        raise SystemExit(f"Not published: the run was {config}, a full one is {full}.")
    page, readme = ROOT / "docs/speed.md", ROOT / "README.md"
    remark = " ".join(sys.argv[1:])
    text = insert(page.read_text(), block(summary, remark), "<!-- measured -->", "<!-- end of measured -->")
    text = insert(text, examples(summary), "<!-- examples -->", "<!-- end of examples -->")
    first = insert(readme.read_text(), front(summary), "<!-- speed -->", "<!-- end of speed -->")
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        shutil.copy(RUN / f"{name}.csv", DOCS / f"{name}.csv")
    for model in dict.fromkeys(row["model"] for row in summary["rows"]):
        shutil.copy(RUN / f"speed_{model}.png", DOCS / f"speed_{model}.png")
    page.write_text(text)
    readme.write_text(first)


def times(rows: list[dict[str, Any]]) -> list[str]:
    """One line per model, outputs, batch and cores: milliseconds of every variant."""
    lines = []
    for key in dict.fromkeys((r["model"], r["outputs"], r["batch"], r["cores"]) for r in rows):
        own = {r["variant"]: r for r in rows if (r["model"], r["outputs"], r["batch"], r["cores"]) == key}
        model, outputs, batch, cores = key
        best = own.get("mixed") or own.get("bf16_profitable") or own["fp32_tuned"]
        lines.append(
            [
                SHORT[model] + (" (landmarks only)" if outputs == "landmarks" else ""),
                str(batch),
                str(cores),
                *(f"{own[name]['ms_median']:.2f}" if name in own else "–" for name in VARIANTS),
                "–" if best["vs_fp32_tuned"] is None else f"{best['vs_fp32_tuned']:.2f}",
                "–" if best["vs_litert"] is None else f"{best['vs_litert']:.2f}",
            ]
        )
    header = ["model", "batch", "cores", *(f"{name}, ms" for name in VARIANTS), "low / tuned", "low / LiteRT"]
    return markdown(header, lines)


def front(summary: dict[str, Any]) -> str:
    """README's table: batch 1, and the transformers at batch 8."""
    rows = [
        row
        for row in summary["rows"]
        if row["outputs"] == "all" and (row["batch"] == 1 or row["model"].startswith("enc"))
    ]
    return "\n".join([*times(rows), "", machine(summary), ""])


def machine(summary: dict[str, Any]) -> str:
    """What a run was."""
    where = summary["environment"]
    seconds = max(summary["seconds"], summary["piece_seconds"])
    return (
        f"`{summary['command'].strip()}` on {where['device']}, {where['cores']} cores, Python {where['python']}, jax "
        f"{where['jax']}, flax {where['flax']}, LiteRT {summary['litert']}, {where['date'][:10]}, "
        f"commit {summary['commit']}, in {seconds / 60:.0f} minutes; "
        "medians of interleaved runs. A new version or machine gives other numbers."
    )


def block(summary: dict[str, Any], remark: str) -> str:
    """What docs/speed.md says of a run."""
    targets = [
        [row["target"], f"{row['found']:.3f}", f"{row['limit']:.3f}", "yes" if row["met"] else "no"]
        for row in summary["targets"]
    ]
    tuning = [
        [
            SHORT[row["model"]],
            str(row["batch"]),
            str(row["cores"]),
            row["variant"],
            f"{row['tune_seconds']:.0f}",
            "–" if row["again_seconds"] is None else f"{row['again_seconds']:.1f}",
            f"{row['rule_ms']:.2f}",
            f"{row['tuned_ms']:.2f}",
            f"{row['rule_vs_tuned']:.3f}",
            row["chosen"],
        ]
        for row in summary["tuning"]
    ]
    searches = [
        [
            SHORT[row["model"]],
            f"{row['layers_low']} of {row['layers']}",
            str(row["layers_profitable"]),
            f"{row['tolerance_value']:.5f}",
            f"{row['error_calibration']:.5f}",
            "–" if row["nme_limit"] is None else f"{row['nme_mixed']:.5f} / {row['nme_limit']:.5f}",
        ]
        for row in summary["searches"]
    ]
    return "\n".join(
        [
            "Milliseconds, medians. `low` is mixed, or bfloat16 for the transformers. Tuned: batch 1, all outputs, and the "
            "transformers; elsewhere, and in `bf16_profitable`, by the rule. Naive float32 and Flax's bfloat16 have XLA's own "
            "convolutions. LiteRT takes iris one image at a time.",
            "",
            *times(summary["rows"]),
            "",
            *(
                f"![{SHORT[model]}: time of each variant](speed/speed_{model}.png)\n"
                for model in dict.fromkeys(row["model"] for row in summary["rows"])
            ),
            "Set out to reach, and found (ratios of times):",
            "",
            *markdown(["target", "found", "limit", "met"], targets),
            "",
            "Searched: bfloat16 where it pays, within 10 % of the all-bfloat16 error on calibration examples.",
            "",
            *markdown(
                ["model", "low", "profitable", "limit", "calibration error", "held out: NME / limit"],
                searches,
            ),
            "",
            "Tuned (batch 1, all outputs; transformers at both batches):",
            "",
            *markdown(
                [
                    "model",
                    "batch",
                    "cores",
                    "variant",
                    "s",
                    "s again",
                    "rule, ms",
                    "tuned, ms",
                    "rule / tuned",
                    "chosen",
                ],
                tuning,
            ),
            "",
            machine(summary)
            + " Tables: "
            + ", ".join(f"[{name}](speed/{name}.csv)" for name in TABLES)
            + "."
            + (f" {remark}" if remark else ""),
            *(["", "Notes of the run:", "", *(f"- {note}" for note in summary["notes"])] if summary["notes"] else []),
            "",
        ]
    )


def examples(summary: dict[str, Any]) -> str:
    """The table of python -m experiments.speed.examples.

    Raises:
        SystemExit: it was not run, or elsewhere.
    """
    path = DOCS / "examples.json"
    if not path.exists():
        raise SystemExit("Not published: run python -m experiments.speed.examples --cores 1 first.")
    found = json.loads(path.read_text())
    where, here = found["environment"], summary["environment"]
    if any(where[name] != here[name] for name in ("device", "jax", "jaxlib")):
        raise SystemExit(
            "Not published: python -m experiments.speed.examples ran on another machine or jax: run it again."
        )
    lines = [
        [each["example"], each["way"], each["options"], f"{each['us']:.0f}", f"{each['vs_first']:.2f}"]
        for each in found["rows"]
    ]
    said = (
        f"{where['device']}, {where['cores']} core, jax {where['jax']}, {where['date'][:10]}, commit {found['commit']}."
    )
    return "\n".join([*markdown(["example", "way", "options", "µs", "/ first"], lines), "", said, ""])


if __name__ == "__main__":
    main()
