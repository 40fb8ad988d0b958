"""Put runs of experiments/sentence_encoder and experiments/language_model into docs/transformers.md and docs/transformers/.

.venv/bin/python -m experiments.sentence_encoder
.venv/bin/python -m experiments.language_model
.venv/bin/python scripts/publish_transformers.py
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from publish_estimators import check, insert, markdown  # noqa: E402

from experiments.language_model import __main__ as language_model  # noqa: E402
from experiments.lib.pages import Column, cells  # noqa: E402
from experiments.sentence_encoder import __main__ as sentence_encoder  # noqa: E402
from experiments.storage import report as storage_report  # noqa: E402

DOCS = ROOT / "docs/transformers"
EXPERIMENTS = {"sentence_encoder": sentence_encoder.TEXTS, "language_model": language_model.TEXTS}
FIGURES = ("error_against_bytes", "sensitivity_by_kind", "chosen_formats", "times")
TABLES = ("rows", "comparison", "searches", "speed", "scores", "targets")


def main() -> None:
    """Copy and rewrite."""
    found = {name: json.loads((ROOT / f"results/{name}/summary.json").read_text()) for name in EXPERIMENTS}
    for summary in found.values():
        check(summary, ())
    page = ROOT / "docs/transformers.md"
    text = page.read_text()
    for name, summary in found.items():
        text = insert(text, block(name, summary), f"<!-- {name} -->", f"<!-- end of {name} -->")
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in EXPERIMENTS:
        for figure in FIGURES:
            shutil.copy(ROOT / f"results/{name}/{figure}.png", DOCS / f"{name}_{figure}.png")
        for table in TABLES:
            shutil.copy(ROOT / f"results/{name}/{table}.csv", DOCS / f"{name}_{table}.csv")
    page.write_text(text)


def block(name: str, summary: dict[str, Any]) -> str:
    """Findings, targets, mixes beside those without scores, searches, speed, rows by scores, figures."""
    where = summary["environment"]
    rows = [row for row in summary["rows"] if row["method"] not in ("random", "depth")]
    columns = [each for each in storage_report.ROWS_TABLE if any(row[each.key] is not None for row in rows)]
    tables = ", ".join(f"[{table}](transformers/{name}_{table}.csv)" for table in TABLES)
    said = (
        f"`{summary['command'].strip()}` on {where['device']}, {where['cores']} cores, Python {where['python']}, jax "
        f"{where['jax']}, flax {where['flax']}, {where['date'][:10]}, commit {summary['commit']}, {summary['seconds']:.0f} s, "
        f"{summary['peak_rss_mb'] / 1e3:.1f} GB. Tables: {tables}."
    )
    return "\n\n".join(
        [
            "\n".join(f"- {each}" for each in storage_report.findings(summary, EXPERIMENTS[name])),
            table(summary["targets"], storage_report.TARGETS_TABLE),
            table(storage_report.comparison(summary["mixes"]), storage_report.COMPARISON_TABLE),
            table(summary["searches"], storage_report.SEARCHES_TABLE),
            table(summary["speed"], storage_report.SPEED_TABLE),
            table(rows, columns),
            *(f"![{figure.replace('_', ' ')}](transformers/{name}_{figure}.png)" for figure in FIGURES),
            said,
            "",
        ]
    )


def table(rows: list[dict[str, Any]], columns: Any) -> str:
    """Markdown of rows."""
    columns = [each for each in columns if isinstance(each, Column)]
    return "\n".join(markdown([each.title for each in columns], cells(rows, columns)))


if __name__ == "__main__":
    main()
