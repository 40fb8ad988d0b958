"""Put a run of experiments/searches into docs/search.md and docs/search/: figures, tables, the numbers with machine and date.

.venv/bin/python -m experiments.searches --fresh
.venv/bin/python scripts/publish_searches.py ["A remark on how the run went, if it needs one."]
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from publish_estimators import check, insert  # noqa: E402

from experiments.lib.pages import Column  # noqa: E402
from experiments.searches.report import compact, compact_columns, findings  # noqa: E402

RUN = ROOT / "results/searches"
DOCS = ROOT / "docs/search"
TABLES = ("searches", "enumerated", "latency", "targets", "solvers", "costs")


def main() -> None:
    """Copy and rewrite."""
    summary = json.loads((RUN / "summary.json").read_text())
    check(summary)
    page = ROOT / "docs/search.md"
    written = insert(
        page.read_text(), block(summary, " ".join(sys.argv[1:])), "<!-- measured -->", "<!-- end of measured -->"
    )
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        shutil.copy(RUN / f"{name}.csv", DOCS / f"{name}.csv")
    models = list(dict.fromkeys(row["model"] for row in summary["rows"]))
    for name in ("lowered", "evaluations", "enumerated", "costs", *(f"pareto_{model}" for model in models)):
        shutil.copy(RUN / f"{name}.png", DOCS / f"{name}.png")
    page.write_text(written)


def markdown(rows: list[dict[str, Any]], columns: list[Any]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(column.title for column in columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(str(row.get(column.key, "–")) for column in columns) + " |" for row in rows]


def block(summary: dict[str, Any], remark: str = "") -> str:
    """What the page says of a run."""
    where, rows = summary["environment"], summary["rows"]
    seconds = max(summary["seconds"], summary["pieces_seconds"])
    latency = [
        {
            "model": row["model"],
            "assignment": row["assignment"],
            "sum": f"{row['predicted_ms']:.2f}",
            "compiled": "refused" if row["compiled_ms"] is None else f"{row['compiled_ms']:.2f}",
            "error": "–" if row["error"] is None else f"{row['error']:+.0%}",
        }
        for row in summary["latency"]
    ]
    titles = {"sum": "sum of layers, ms", "compiled": "compiled, ms"}
    columns = [Column(key=key, title=titles.get(key, key)) for key in latency[0]]
    return "\n".join(
        [
            "## Measured",
            "",
            *(f"- {each}" for each in findings(summary)),
            "",
            "Layers lowered, and evaluations in brackets, by tolerance:",
            "",
            *markdown(compact(rows), compact_columns(rows)),
            "",
            "![Layers lowered against tolerance](search/lowered.png)",
            "",
            "![Layers missing to the enumerated optimum of 12 layers](search/enumerated.png)",
            "",
            *markdown(latency, columns),
            "",
            f"`{summary['command']}` on {where['device']}, {where['cores']} cores, Python {where['python']}, jax {where['jax']}, "
            f"flax {where['flax']}, {where['date'][:10]}, commit {summary['commit']}, in {seconds / 60:.0f} minutes. Tables: "
            + ", ".join(f"[{name}](search/{name}.csv)" for name in TABLES)
            + "; the trade-off: "
            + ", ".join(f"[{name}](search/pareto_{name}.png)" for name in dict.fromkeys(row["model"] for row in rows))
            + "."
            + (f" {remark}" if remark else ""),
            "",
        ]
    )


if __name__ == "__main__":
    main()
