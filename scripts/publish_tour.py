"""Put a run of experiments/tour.py into docs/formats.md.

.venv/bin/python -m experiments.tour
.venv/bin/python scripts/publish_tour.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from publish_estimators import check, insert, markdown  # noqa: E402

from experiments.models.architectures import NAMES  # noqa: E402


def main() -> None:
    """Rewrite the page."""
    summary = json.loads((ROOT / "results/tour/summary.json").read_text())
    check(summary, ())
    if missing := set(NAMES) - {row["architecture"] for row in summary["rows"]}:
        raise SystemExit(f"Not published: it lacks {', '.join(sorted(missing))}.")
    rows = [
        [
            f"`{row['architecture']}`",
            str(row["layers"]),
            row["kinds"],
            str(row["layers_low"]),
            f"{row['error']:.1e} / {row['error_all']:.1e}",
            f"{row['weight_bytes']:,} / {row['weight_bytes_fp32']:,}",
            f"{row['vs_flax']:.2f}",
            row["left"] or "–",
        ]
        for row in summary["rows"]
    ]
    header = [
        "architecture",
        "layers",
        "kinds",
        "in bfloat16",
        "error / all low",
        "bytes / float32",
        "time / Flax",
        "weights left in float32",
    ]
    lines = markdown(header, rows)
    where = summary["environment"]
    said = (
        "Small, with random weights; each is scored, searched (bfloat16, half of the all-low error), compiled and verified. "
        "Time / Flax: the jitted float32 model through mpjax's hooks over Flax's own call, jitted, in turns. "
        f"`{summary['command'].strip()}` on {where['device']}, Python {where['python']}, jax {where['jax']}, flax "
        f"{where['flax']}, {where['date'][:10]}, commit {summary['commit']}, {summary['seconds']:.0f} s."
    )
    page = ROOT / "docs/formats.md"
    page.write_text(
        insert(page.read_text(), "\n".join([*lines, "", said, ""]), "<!-- tour -->", "<!-- end of tour -->")
    )


if __name__ == "__main__":
    main()
