"""Put runs of experiments/number_formats and experiments/classifier into docs/formats.md and docs/formats/.

.venv/bin/python -m experiments.number_formats
.venv/bin/python -m experiments.classifier
.venv/bin/python scripts/publish_formats.py
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from publish_estimators import check, insert, markdown  # noqa: E402

DOCS = ROOT / "docs/formats"
FIGURES = {
    "number_formats": ("layouts", "number_line", "errors", "ranges"),
    "classifier": (
        "kl_against_layers",
        "sensitivity_bfloat16",
        "sensitivity_float16_acc16",
        "sensitivity_float8_e4m3fn",
    ),
}
TABLES = {"number_formats": ("formats", "value", "shares"), "classifier": ("rows", "searches", "targets")}


def main() -> None:
    """Copy and rewrite."""
    found = {name: json.loads((ROOT / f"results/{name}/summary.json").read_text()) for name in FIGURES}
    for summary in found.values():
        check(summary, ())
    page = ROOT / "docs/formats.md"
    text = page.read_text()
    for name, block in (("number_formats", numbers), ("classifier", classifier)):
        text = insert(text, block(found[name]), f"<!-- {name} -->", f"<!-- end of {name} -->")
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        for figure in FIGURES[name]:
            shutil.copy(ROOT / f"results/{name}/{figure}.png", DOCS / f"{figure}.png")
        for table in TABLES[name]:
            shutil.copy(ROOT / f"results/{name}/{table}.csv", DOCS / f"{name}_{table}.csv")
    page.write_text(text)


def machine(summary: dict[str, Any], name: str) -> str:
    """What a run was."""
    where = summary["environment"]
    tables = ", ".join(f"[{table}](formats/{name}_{table}.csv)" for table in TABLES[name])
    return (
        f"`{summary['command'].strip()}` on {where['device']}, Python {where['python']}, jax {where['jax']}, "
        f"{where['date'][:10]}, commit {summary['commit']}, {summary['seconds']:.0f} s. Tables: {tables}."
    )


def numbers(summary: dict[str, Any]) -> str:
    """0.3952 in each format, and the figures."""
    rows = [
        [
            f"`{row['format']}`",
            str(row["bits"]),
            *(f"{row[key]:.4g}" for key in ("max", "min_normal", "min_subnormal", "epsilon")),
            f"{row['value_of_0_3952']:.10g}",
            f"{row['error_of_0_3952']:.2g}",
            f"{row['largest_gap_near_0_3952']:.2g}",
        ]
        for row in summary["rows"]
    ]
    header = ["format", "bits", "largest", "least normal", "least", "epsilon", "0.3952 is", "error", "step there"]
    figures = [f"![{figure.replace('_', ' ')}](formats/{figure}.png)" for figure in FIGURES["number_formats"]]
    return "\n\n".join(["\n".join(markdown(header, rows)), *figures, machine(summary, "number_formats"), ""])


def classifier(summary: dict[str, Any]) -> str:
    """EfficientNet-Lite0 in each format and tolerance."""
    rows = [
        [
            row["name"],
            f"`{row['format']}`",
            row["batch_norm"],
            "–" if row["tolerance"] is None else f"{row['tolerance']:g}",
            f"{row['layers_low']} of {row['layers']}",
            f"{row['top1_agreement']:.3f}",
            f"{row['kl']:.2g}",
            f"{row['sanity_top1']:.2f}",
        ]
        for row in summary["rows"]
    ]
    header = ["run", "format", "batch norm", "tolerance", "low", "top-1 agreement", "KL, nats", "sanity"]
    figures = [f"![{figure.replace('_', ' ')}](formats/{figure}.png)" for figure in FIGURES["classifier"]]
    return "\n\n".join(["\n".join(markdown(header, rows)), *figures, machine(summary, "classifier"), ""])


if __name__ == "__main__":
    main()
