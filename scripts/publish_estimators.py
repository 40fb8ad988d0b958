"""Put a run of experiments/estimators into README.md and docs/estimators/: figures, tables, the numbers with machine and date.

.venv/bin/python -m experiments.estimators --fresh
.venv/bin/python scripts/publish_estimators.py ["A remark on how the run went, if it needs one."]
"""

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.estimators.findings import advice, findings  # noqa: E402

RUN = ROOT / "results/estimators"
DOCS = ROOT / "docs/estimators"
START, END = "<!-- estimators -->", "<!-- end of estimators -->"
TABLES = (
    "estimators",
    "compact",
    "examples",
    "interactions",
    "damping",
    "logdet_cost",
    "slq_check",
    "targets",
    "facts",
)
FIGURES = ("agreement_cost", "layers_lowered", "interactions", "damping")
MODELS = {"pose_landmark_full": "pose", "iris_landmark": "iris", "digits_cnn": "digits"}
COSTLY = "pose_landmark_full"
FORMATS = ("float16_acc16", "bfloat16", "float8_e4m3fn")


def main() -> None:
    """Copy and rewrite."""
    summary = json.loads((RUN / "summary.json").read_text())
    check(summary)
    readme = ROOT / "README.md"
    text = insert(readme.read_text(), block(summary, " ".join(sys.argv[1:])))
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        shutil.copy(RUN / f"{name}.csv", DOCS / f"{name}.csv")
    for name in FIGURES:
        shutil.copy(RUN / f"{name}.png", DOCS / f"{name}.png")
    page = ROOT / "docs/estimators.md"
    measured = "\n".join(
        ["**Measured** (the same run as README's table):", "", *(f"- {each}" for each in findings(summary)), ""]
    )
    written = insert(page.read_text(), measured, "<!-- measured -->", "<!-- end of measured -->")
    page.write_text(written)
    readme.write_text(text)


def check(summary: dict[str, Any], models: Iterable[str] = MODELS) -> None:
    """Refuse a run whose numbers would not be what the README says they are."""
    wrong = []
    if summary["config"]["quick"]:
        wrong.append("it ran with --quick")
    if missing := set(models) - {row.get("model") for row in summary["rows"]}:
        wrong.append(f"it lacks {', '.join(sorted(missing))}")
    if summary["commit"].endswith("+") or summary["commit"] == "unknown":
        wrong.append(f"it ran on uncommitted changes ({summary['commit']})")
    if wrong:
        raise SystemExit("Not published:\n  " + "\n  ".join(wrong))


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(each) + " |" for each in (header, ["---"] * len(header), *rows)]


def insert(text: str, block: str, start: str = START, end: str = END) -> str:
    """The text with the block between the markers.

    Raises:
        SystemExit: a marker is missing.
    """
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"README.md or docs/estimators.md lacks {start} or {end}; nothing was written.")
    return before + start + "\n" + block + end + after


def block(summary: dict[str, Any], remark: str = "") -> str:
    """The README's table, in Markdown; the remark stands behind the command."""
    names = list(MODELS.values())
    head = [
        "estimator",
        *(f"Spearman {each}" for each in names),
        *(f"low at 10 % {each}" for each in names),
        "s (pose)",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in summary["compact"]:
        name = f"`{line['estimator']}`" + ("" if line["loss"] in ("output", "none") else f" on {line['loss']}")
        spearman = [joined(line, "spearman", model, ".2f") for model in MODELS]
        low = [joined(line, "low_10", model, "d") for model in MODELS]
        seconds = line[f"seconds_{COSTLY}"]
        lines.append("| " + " | ".join([name, *spearman, *low, "–" if seconds is None else f"{seconds:.1f}"]) + " |")
    layers = {row["model"]: row["layers"] for row in summary["rows"]}
    where = summary["environment"]
    resumed = f", resumed once with {len(summary['reused_pieces'])} pieces finished" if summary["reused_pieces"] else ""
    seconds = max(summary["seconds"], summary["pieces_seconds"])
    models = list(dict.fromkeys(row["model"] for row in summary["rows"]))
    return "\n".join(
        [
            " ".join(advice(summary["rows"], models)),
            "",
            *lines,
            "",
            f"Each cell: {' / '.join(f'`{fmt}`' for fmt in FORMATS)}; – : zero by construction, or not for this model. "
            "Spearman is with the measured output loss of each layer lowered alone, on the examples that the estimator saw; "
            "low: layers of "
            + ", ".join(f"{layers[model]} ({name})" for model, name in MODELS.items())
            + " that a bisected ranking lowers at 10 % of the all-low error; s: all layers and formats at once, without "
            "compilation.",
            "",
            f"`{summary['command']}` on {where['device']}, {where['cores']} cores, Python {where['python']}, jax {where['jax']}, "
            f"flax {where['flax']}, {where['date'][:10]}, commit {summary['commit']}{resumed}, in "
            f"{seconds / 60:.0f} minutes with {summary['peak_rss_mb'] / 1e3:.1f} GB at most. Tables: "
            + ", ".join(f"[{name}](docs/estimators/{name}.csv)" for name in TABLES)
            + ". A new version or machine gives other numbers."
            + (f" {remark}" if remark else ""),
            "",
        ]
    )


def joined(line: dict[str, Any], what: str, model: str, form: str) -> str:
    """The formats' numbers in one cell."""
    values = [line.get(f"{what}_{model}_{fmt}") for fmt in FORMATS]
    return "–" if all(v is None for v in values) else " / ".join("–" if v is None else f"{v:{form}}" for v in values)


if __name__ == "__main__":
    main()
