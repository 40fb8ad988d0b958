"""How much cheaper local rounding is than measuring layer by layer: one format, and six formats at once.

    .venv/bin/python scripts/local_rounding_speed.py        (about 8 minutes on 2 cores)

Same crops, same process, seconds without compilation. Prints a table; writes docs/pose_landmark/local_rounding_speed.csv.
Run it on an idle machine. One of the six is float32, which costs `measured` a pass per layer and local rounding nothing.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import assets, common, data, pose_landmark  # noqa: E402
from experiments.models.tflite_import import load_tflite  # noqa: E402
from mpjax import emulate, metrics, models, report, sensitivity  # noqa: E402
from mpjax.formats import FORMATS  # noqa: E402
from mpjax.pages import Column  # noqa: E402


def main() -> None:
    """Score, compare, print."""
    imported = load_tflite(assets.fetch(pose_landmark.MODEL), outputs=("Identity",))
    example = jnp.zeros((1, data.SIZE, data.SIZE, 3), jnp.float32)
    base = models.from_linen(imported.module, imported.variables, example)
    model = models.with_output(base, pose_landmark.in_torso_units)
    run = jax.jit(lambda params, x: base.call(params, x)["Identity"])
    split = pose_landmark.split_of(data.pose_crops().calibration, base, run)
    ranges = emulate.calibrate(model, split.batches(pose_landmark.BATCH))
    key, rows = jax.random.key(0), []
    for names in (("bfloat16",), tuple(FORMATS)):
        truth = sensitivity.measured(calibration=ranges)(model, split.batches(pose_landmark.BATCH), names, key)
        scorers = [truth]
        for probes in (2, 4, 8):
            scorer = sensitivity.local_rounding(num_probes=probes, calibration=ranges)
            scorers.append(scorer(model, split.batches(1), names, key))
        for each in scorers:
            rows.append(
                {
                    "estimator": each.estimator,
                    "formats": "+".join(sorted(names)),
                    "seconds": each.seconds,
                    "vs_measured": each.seconds / truth.seconds,
                    "compile_seconds": each.compile_seconds,
                    "spearman_bfloat16": metrics.spearman(each.column("bfloat16"), truth.column("bfloat16")),
                    "spearman_min": min(
                        (
                            value
                            for name in names
                            if name != "float32"
                            and (value := metrics.spearman(each.column(name), truth.column(name))) is not None
                        ),
                        default=None,
                    ),
                    "device": common.device_name(),
                    "jax": jax.__version__,
                    **{name: each.ledger.as_dict()[name] for name in ("forward", "vjp")},
                }
            )
    formats = {"seconds": ".1f", "vs_measured": ".3f", "compile_seconds": ".1f"}
    columns = [
        Column(key=name, title=name, format=formats.get(name, ".3f" if name.startswith("spearman") else ""))
        for name in rows[0]
    ]
    report.write_table(report.run_folder(ROOT / "docs", "pose_landmark"), "local_rounding_speed", rows, columns)
    report.print_table(rows, columns[:9])


if __name__ == "__main__":
    main()
