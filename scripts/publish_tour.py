"""Put a run of experiments/tour into docs/formats.md.

.venv/bin/python -m experiments.tour
.venv/bin/python scripts/publish_tour.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from publish_estimators import check, insert, markdown  # noqa: E402

from experiments.tour.__main__ import EVERY  # noqa: E402


def main() -> None:
    """Rewrite the page."""
    summary = json.loads((ROOT / "results/tour/summary.json").read_text())
    check(summary, ())
    if missing := set(EVERY) - {row["architecture"] for row in summary["rows"]}:
        raise SystemExit(f"Not published: it lacks {', '.join(sorted(missing))}.")
    rows = [
        [
            f"`{row['architecture']}`",
            row["kinds"],
            f"{row['reached']:.1%}",
            f"{row['folded']} / {row['activation_products']}",
            f"{row['difference']:.0e}" if row["difference"] else "0",
            f"{row['vs_own']:.2f}",
            f"{row['error_all']:.1e}",
            "–" if row["layers_low"] is None else f"{row['layers_low']} of {row['layers']}",
            f"{row['trace_seconds']:.2f} / {row['model_seconds']:.2f}",
            f"{row['scores_seconds']:.1f} / {row['compile_seconds']:.1f}",
            row["left"] or "–",
        ]
        for row in summary["rows"]
    ]
    header = [
        "architecture",
        "layers",
        "weights reached",
        "folded / activation products",
        "difference",
        "time / own",
        "error",
        "low within half of it",
        "traced by jax / model, s",
        "scores / compiled, s",
        "weights left in float32",
    ]
    lines = markdown(header, rows)
    where = summary["environment"]
    said = (
        "Small, with random weights. Difference and time: jitted float32 model and the user's own function, jitted. Error: of "
        "all products in bfloat16, compiled and verified. Scores: `local_rounding` with 4 probes, its compilation included. "
        f"`{summary['command'].strip()}` on {where['device']}, Python {where['python']}, jax {where['jax']}, flax "
        f"{where['flax']}, {where['date'][:10]}, commit {summary['commit']}, {summary['seconds']:.0f} s."
    )
    page = ROOT / "docs/formats.md"
    page.write_text(
        insert(page.read_text(), "\n".join([*lines, "", said, ""]), "<!-- tour -->", "<!-- end of tour -->")
    )


if __name__ == "__main__":
    main()
