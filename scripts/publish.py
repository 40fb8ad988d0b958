"""Put a run of the demo into README.md and docs/pose_landmark/: figures, small tables, the numbers with machine and date.

scripts/demo --fresh
mkdir -p results/confidence && cp -r results/pose_landmark results/confidence/    (its scores are reused)
scripts/demo --confidence 0.95 --results results/confidence
.venv/bin/python scripts/publish.py
"""

import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN, CONFIDENT = ROOT / "results/pose_landmark", ROOT / "results/confidence/pose_landmark"
DOCS = ROOT / "docs/pose_landmark"
START, END = "<!-- results -->", "<!-- end of results -->"


def main() -> None:
    """Copy and rewrite."""
    summary = json.loads((RUN / "summary.json").read_text())
    confident = json.loads((CONFIDENT / "summary.json").read_text())
    check(summary, confident)
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in ("results.csv", "agreement.csv", "executed.csv", "programs.csv"):
        shutil.copy(RUN / name, DOCS / name)
    for name in ("sensitivity_float16_acc16.png", "nme_against_layers.png"):
        shutil.copy(RUN / name, DOCS / name)
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"README.md lacks {START} or {END}; nothing was written to it.")
    readme.write_text(before + START + "\n" + block(summary, confident) + END + after)


def check(summary: dict, confident: dict) -> None:
    """Refuse runs whose numbers would not be what the README says they are."""
    wrong = []
    for name, run, confidence in (("the demo", summary, None), ("the confident run", confident, 0.95)):
        if run["config"]["tolerance"] != 0.1 or run["config"]["confidence"] != confidence:
            wrong.append(f"{name} ran with {run['config']}")
        if run["commit"].endswith("+") or run["commit"] == "unknown":
            wrong.append(f"{name} ran on uncommitted changes ({run['commit']})")
    if summary["commit"] != confident["commit"]:
        wrong.append(f"the runs are of two commits, {summary['commit']} and {confident['commit']}")
    if summary["reused_pieces"]:
        wrong.append(f"the demo reused pieces, so its seconds are partial: {summary['reused_pieces']}; add --fresh")
    if wrong:
        raise SystemExit("Not published:\n  " + "\n  ".join(wrong))


def block(summary: dict, confident: dict) -> str:
    """The README's results, in Markdown."""
    lines = [
        "| model | format | run | layers low | NME (95 %) | PCK@.05 | PCK@.02 | limit | within | ms | time / fp32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        reference = row["tolerance"] is None
        cells = [
            row["name"],
            row["format"],
            row["executed"],
            f"{row['layers_low']} of {row['layers']}",
            f"{row['nme']:.4f} ({row['nme_low']:.4f}–{row['nme_high']:.4f})",
            f"{row['pck_05']:.3f}",
            f"{row['pck_02']:.3f}",
            "–" if reference or row["name"] == "all" else f"{row['tolerance_value']:.5f}",
            "–" if reference or row["name"] == "all" else ("yes" if row["within_tolerance"] else "no"),
            "–" if row["latency_ms"] is None else f"{row['latency_ms']:.1f}",
            "–" if row["vs_fp32"] is None else f"{row['vs_fp32']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    counts = {
        row["format"]: (row["layers_low"], other["layers_low"])
        for row, other in zip(summary["rows"], confident["rows"], strict=True)
        if row["name"] == "mixed"
    }
    rows = {(row["name"], row["format"]): row for row in summary["rows"]}
    ratio = {fmt: rows["mixed", fmt]["nme"] / rows["all", fmt]["nme"] for fmt in counts}
    local = next(each for each in summary["agreement"] if each["estimator"].startswith("local"))
    logdet = next(each for each in summary["agreement"] if each["estimator"].startswith("logdet"))
    where = summary["environment"]
    lines += [
        "",
        "Accepted on the calibration crops at 10 % of the all-low NME (`limit`); the rows are the evaluation crops, on which "
        "nothing was searched, reported as they are: "
        + ", ".join(f"mixed {fmt} has {value:.1%} of the all-low error there" for fmt, value in ratio.items())
        + ". Layers lowered when accepted by the mean / by the upper bound of its 95 % interval (`--confidence 0.95`): "
        + ", ".join(f"{fmt} {mean} / {bound}" for fmt, (mean, bound) in counts.items())
        + ".",
        "",
        f"`local_rounding` ranks the layers as measuring them one by one does (Spearman {local['spearman_float16_acc16']:.3f} "
        f"and {local['spearman_bfloat16']:.3f}) in {local['vs_measured']:.2f} of the time (both formats at once; compilation "
        f"{local['compile_seconds']:.0f} s against {summary['agreement'][0]['compile_seconds']:.0f} s). The exact "
        f"log-determinant of a layer's Hessian block reaches {logdet['spearman_float16_acc16']:.2f} and "
        f"{logdet['spearman_bfloat16']:.2f}: it "
        "does not see how large the rounding is. `experiments/local_rounding` shows how its cost grows with layers and "
        "formats.",
        "",
        f"`scripts/demo` on {where['device']}, {where['cores']} cores, Python {where['python']}, jax {where['jax']}, flax "
        f"{where['flax']}, {where['date'][:10]}, in {summary['seconds']:.0f} s with {summary['peak_rss_mb'] / 1e3:.1f} GB at "
        "most. Tables: [results](docs/pose_landmark/results.csv), [executed dtypes per layer](docs/pose_landmark/executed.csv), "
        "[programs](docs/pose_landmark/programs.csv). A new version or machine gives other numbers.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
