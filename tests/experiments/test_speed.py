"""experiments/speed without its models: what is asked for, how it is timed, what is said of it."""

import itertools
import json
import os
import time

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib import report
from experiments.speed import __main__ as speed
from experiments.speed import report as speed_report
from experiments.speed import run as speed_run
from mpjax import xla
from mpjax.ledger import Ledger

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def row(variant, ms, *, model="pose_landmark_full", cores=1, batch=1, naive=100.0, tuned=10.0, litert=9.0):
    return {
        "model": model,
        "outputs": "all",
        "batch": batch,
        "cores": cores,
        "variant": variant,
        "ms_median": ms,
        "ms_min": ms,
        "vs_fp32_naive": ms / naive,
        "vs_fp32_tuned": ms / tuned,
        "vs_litert": None if litert is None else ms / litert,
        "nme": None if litert is None else 0.001,
        "max_rel_error": 0.0,
    }


POSE = [
    row(name, ms)
    for name, ms in (
        ("fp32_naive", 100.0),
        ("fp32_tuned", 10.0),
        ("mixed", 7.0),
        ("litert_fp32", 9.0),
        ("flax_bf16", 30.0),
    )
]
ENCODER = [
    row(name, ms, model="encoder_6x384", batch=8, cores=cores, naive=20.0, tuned=19.0, litert=None)
    for cores in (1, 2)
    for name, ms in (("fp32_naive", 20.0), ("fp32_tuned", 19.0), ("flax_bf16", 30.0), ("bf16_profitable", 10.0 * cores))
]

SPREAD = [
    {**each, "low": each["ms_median"], "high": each["ms_median"], "vs_flax_bf16": each["ms_median"] / 30}
    for each in ENCODER
]
SEARCHES = [{"model": "pose_landmark_full", "nme_all_low": 0.01, "nme_limit": 0.001, "nme_mixed": 0.0015}]


def test_targets_are_met_or_not_and_what_was_not_measured_is_left_out():
    found = {each["target"]: each for each in speed_report.targets(POSE + ENCODER, [], SPREAD, SEARCHES)}
    assert found["pose_landmark_full, mixed / LiteRT float32, 1 core"]["met"]
    assert found["pose_landmark_full, mixed / LiteRT float32, 1 core"]["found"] == pytest.approx(7 / 9)
    assert not found["pose_landmark_full, mixed / naive, 1 core"]["met"]  # 14 times faster, not 16
    assert found["encoder_6x384, batch 8, 1 core, bfloat16 / jitted float32"]["met"]
    assert not found["encoder_6x384, batch 8, 2 cores, bfloat16 / jitted float32"]["met"]
    assert found["encoder_6x384, batch 8, 1 core, bfloat16 / Flax's bfloat16"]["found"] == pytest.approx(1 / 3)
    assert not any("iris" in name or "2 cores" in name and "pose" in name or "tun" in name[:5] for name in found)
    assert found["pose_landmark_full, mixed, held-out NME / its limit"]["found"] == pytest.approx(1.5)
    assert not found["pose_landmark_full, mixed, held-out NME / its limit"]["met"]
    tuning = [
        {"rule_vs_tuned": 1.2, "tune_seconds": 60.0, "again_seconds": 0.3},
        {"rule_vs_tuned": 0.99, "tune_seconds": 90.0, "again_seconds": 0.5},
    ]
    found = {each["target"]: each for each in speed_report.targets(POSE, tuning, [], [])}
    assert not found["rule / tuned, worst"]["met"] and found["minutes of tuning, worst"]["found"] == 1.5
    assert found["seconds of tuning the second time, worst (1 is as good as 0)"]["met"]
    tuning[0]["again_seconds"] = None  # the choice was not kept
    (again,) = (each for each in speed_report.targets(POSE, tuning, [], []) if "second time" in each["target"])
    assert not again["met"]


def test_a_report_is_written_and_keeps_the_contract(tmp_path):
    layers = [
        {
            "layer": "conv_00",
            "requested": "bfloat16",
            "executed": "bfloat16",
            "result": "float32",
            "opcode": "dot",
            "implementation": "dot",
            "weight_bytes": 2,
            "flops": 4,
            "share": 0.5,
        }
    ]
    summary = {
        "schema": 1,
        "experiment": "speed",
        "command": "python -m experiments.speed",
        "config": {},
        "environment": xla.environment(),
        "seconds": 1.0,
        "ledger": dict.fromkeys(Ledger().as_dict(), 0),
        "rows": POSE + ENCODER,
        "targets": speed_report.targets(POSE, [], [], []),
        "searches": [],
        "tuning": [],
        "spread": [],
        "programs": [],
        "layers": [{"model": "pose_landmark_full", **each} for each in layers],
        "notes": ["a note"],
    }
    report.write_summary(tmp_path, summary, row_fields=speed.ROW_FIELDS)
    page = speed_report.write(tmp_path, summary)
    text = page.read_text()
    assert "conv_00" in text and "a note" in text and "data:image/png" in text
    assert {"speed.csv", "targets.csv", "layers.csv", "speed_encoder_6x384.png"} <= {
        each.name for each in tmp_path.iterdir()
    }


def test_functions_take_turns_and_ratios_are_within_rounds():
    order = []

    def run(name, seconds):
        def function():
            order.append(name)
            time.sleep(seconds)
            return jnp.zeros(())

        return function

    times = speed_run.in_turns({"a": run("a", 0.03), "b": run("b", 0.06)}, 3)
    assert order[:4] == ["a", "a", "b", "b"] and order[4:] == ["a", "b", "b", "a", "a", "b"]
    assert times["a"].shape == (3,) and (times["b"] > times["a"]).all()
    ratios = speed_run.base_ratios({"a": np.array([1.0, 2.0, 4.0]), "b": np.array([3.0, 4.0, 8.0])}, "a")
    assert ratios == {"a": 1.0, "b": 2.0}


def test_the_error_is_the_worst_over_the_outputs_that_both_have():
    truth = [{"x": np.array([1.0, -2.0])}]
    assert speed_run.largest_error([{"x": np.array([1.0, -1.0]), "y": np.zeros(3)}], truth) == 0.5
    assert speed_run.largest_error([{"x": np.array([np.nan, -2.0])}], truth) is None


@pytest.mark.slow
def test_a_transformer_is_timed_in_a_process_of_its_own(tmp_path):
    job = speed_run.Job(
        model="encoder_6x384", assignments={}, tune=False, cache=str(tmp_path), rounds=3, report=True, quick=True
    )
    speed_run.ENCODERS["encoder_6x384"], kept = (1, 32, 2), speed_run.ENCODERS["encoder_6x384"]
    try:
        found = speed_run.main(job)
    finally:
        speed_run.ENCODERS["encoder_6x384"] = kept
    variants = [each["variant"] for each in found["rows"]]
    assert variants == ["fp32_naive", "fp32_tuned", "flax_bf16", "bf16_profitable"]
    assert found["rows"][0]["max_rel_error"] == 0 < found["rows"][3]["max_rel_error"] < 0.05
    assert all(each["vs_litert"] is None and each["nme"] is None for each in found["rows"])
    json.dumps(found, allow_nan=False)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot pin a thread")
def test_a_thread_is_pinned_for_a_while():
    before = os.sched_getaffinity(0)
    with speed.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(models=("pose",)), "found pose"),
        (dict(cores=(99,)), "found"),
        (dict(cores=()), "cores"),
        (dict(batches=(0,)), "batches"),
        (dict(rounds=1), "rounds"),
    ],
)
def test_misuse_is_refused(wrong, said):
    with pytest.raises(SystemExit, match=said):
        speed.Config(**wrong)
    assert speed.Config(quick=True).effective.models == ("iris_landmark", "encoder_6x384")
    assert list(itertools.chain(speed.Config().batches)) == [1, 8]


def test_a_bar_that_is_cut_keeps_its_number_and_a_group_without_litert_its_bars(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        speed_report.plt.Axes,
        "bar_label",
        lambda self, bars, labels, **_: shown.append((labels, [b.get_height() for b in bars])),
    )
    rows = [*POSE, row("fp32_tuned", 10.0, batch=8, litert=None), row("flax_bf16", 90.0, batch=8, litert=None)]
    speed_report._figure(tmp_path, "pose_landmark_full", rows)
    labels = [label for each, _ in shown for label in each]
    assert "9.00" in labels and labels.count("1.00") == 2  # over tuned float32, which every group has
    assert all(height <= 3 for _, heights in shown for height in heights if height == height)


def test_a_job_that_fails_is_a_note_and_the_others_are_kept(tmp_path, monkeypatch):
    made = {"rows": ENCODER[:4], "spread": SPREAD[:4], "notes": [], "tuning": [], "report": None, "nme_all_low": None}

    def run(job, cores, pieces):
        if cores == 2:
            raise speed.JobFailed("encoder_6x384, 2 cores: it broke")
        return made

    monkeypatch.setattr(speed, "run", run)
    monkeypatch.setattr(xla, "cores", lambda: 2)
    config = speed.Config(models=("encoder_6x384",), batches=(8,), results=tmp_path)
    with pytest.raises(SystemExit, match="it broke"):
        speed.main(config)
    summary = json.loads((tmp_path / "speed/summary.json").read_text())
    assert len(summary["rows"]) == 4 and summary["notes"] == ["encoder_6x384, 2 cores: it broke"]
    with pytest.raises(SystemExit, match="it broke"):
        speed.main(speed.Config(models=("encoder_6x384",), batches=(8,), cores=(2,), results=tmp_path))
