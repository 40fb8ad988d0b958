"""experiments/speed on rows of a toy and a tiny transformer: searches are covered by test_searches."""

import json
import os

import numpy as np
import pytest

from experiments.speed import __main__ as speed
from experiments.speed import figures, steps, worker
from experiments.speed.rows import Row, Search, Tuning
from mpjax import xla
from mpjax.files import jsonable

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def row(variant, ms, *, model="pose_landmark_full", batch=1, naive=100.0, litert=9.0):
    return {
        **{"model": model, "outputs": "all", "batch": batch, "cores": 1, "variant": variant},
        **{"ms": ms, "ms_min": ms, "ms_q1": ms, "ms_q3": ms},
        **{"vs_fp32_naive": ms / naive, "vs_fp32_tuned": ms / 10, "vs_flax_bf16": ms / 30},
        **{"vs_litert": None if litert is None else ms / litert, "nme": 0.0015, "max_rel_error": 0.0},
    }


TIMES = {"fp32_naive": 100.0, "fp32_tuned": 10.0, "mixed": 7.0, "litert_fp32": 9.0, "flax_bf16": 30.0}
POSE = [Row(**row(name, ms)) for name, ms in TIMES.items()]


def result(model):
    return {
        "speed": [row(name, ms, model=model, batch=8, litert=None) for name, ms in TIMES.items()],
        **{"tuning": [], "layers": [], "programs": [], "notes": ["a note"], "model": model, "heldout": {}},
    }


def test_the_worst_tuning_and_the_held_out_error_are_from_their_rows():
    blank = dict.fromkeys(Search.__dataclass_fields__, 0)
    search = Search(**{**blank, "model": "pose_landmark_full", "nme_limit": 0.001, "nme_mixed": 0.0015})
    tuning = [Tuning(**{**dict.fromkeys(Tuning.__dataclass_fields__, 0), "rule_vs_tuned": r}) for r in (1.2, 0.99)]
    sentences = speed.findings(POSE, tuning, [search])
    assert [text.split(": ")[1].split(" ")[0] for text in sentences] == ["0.78", "0.70", "1.50", "1.20"]


def test_the_error_is_the_worst_over_the_outputs_that_both_have():
    truth = [{"x": np.array([1.0, -2.0])}]
    assert worker.largest_error([{"x": np.array([1.0, -1.0]), "y": np.zeros(3)}], truth) == 0.5
    assert worker.largest_error([{"x": np.array([np.nan, -2.0])}], truth) is None


@pytest.mark.slow
def test_a_transformer_is_timed_in_all_its_variants(tmp_path, monkeypatch):
    monkeypatch.setitem(worker.ENCODERS, "encoder_6x384", (1, 32, 2))
    answer = worker.main(worker.Job(model="encoder_6x384", cache=str(tmp_path), rounds=3, report=True, quick=True))
    rows = [Row(**line) for line in answer["speed"]]
    assert [line.variant for line in rows] == ["fp32_naive", "fp32_tuned", "flax_bf16", "bf16_profitable"]
    assert rows[0].max_rel_error == 0 < rows[3].max_rel_error < 0.05 and rows[0].vs_fp32_naive == 1
    assert all(line.vs_litert is None and line.nme is None for line in rows)
    assert all(0 < line.ms_min <= line.ms_q1 <= line.ms <= line.ms_q3 for line in rows)
    assert answer["layers"] and answer["programs"][0].error <= answer["programs"][0].limit
    json.dumps(jsonable(answer), allow_nan=False)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot pin a thread")
def test_a_thread_is_pinned_for_a_while():
    before = os.sched_getaffinity(0)
    with steps.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(models=("pose",)), "found pose"),
        (dict(cores=(99,)), "found"),
        (dict(cores=()), "cores"),
        (dict(batches=(0,)), "batches"),
        (dict(rounds=1), "rounds"),
    ],
)
def test_misuse_is_refused(wrong, message):
    with pytest.raises(SystemExit, match=message):
        speed.Config(**wrong)
    assert speed.Config(quick=True).effective.models == ("iris_landmark", "encoder_6x384")


def test_a_bar_that_is_cut_keeps_its_number_and_a_group_without_litert_its_bars():
    more = [Row(**row(name, ms, batch=8, litert=None)) for name, ms in {"fp32_tuned": 10.0, "flax_bf16": 90.0}.items()]
    (axes,) = figures.bars("pose_landmark_full", [*POSE, *more]).axes
    labels = [text.get_text() for text in axes.texts]
    assert "9.00" in labels and labels.count("1.00") == 2  # over tuned float32, which every group has
    assert all(np.isnan(bar.get_height()) or bar.get_height() <= 3 for bar in axes.patches)


def test_a_job_that_fails_is_a_note_and_the_others_results_stay(tmp_path, monkeypatch):
    def timed(job, run):
        if job.cores == 2:
            raise steps.JobFailed("encoder_6x384, 2 cores: it broke")
        return result(job.model)

    monkeypatch.setattr(steps, "timed", timed)
    monkeypatch.setattr(xla, "cores", lambda: 2)
    config = speed.Config(models=("encoder_6x384",), batches=(8,), results=tmp_path)
    with pytest.raises(SystemExit, match="it broke"):
        speed.main(config)
    summary = json.loads((tmp_path / "speed/summary.json").read_text())
    assert len(summary["rows"]) == len(TIMES)
    assert [line["note"] for line in summary["notes"]] == ["a note", "encoder_6x384, 2 cores: it broke"]
    with pytest.raises(SystemExit, match="it broke"):
        speed.main(speed.Config(models=("encoder_6x384",), batches=(8,), cores=(2,), results=tmp_path))
    assert (tmp_path / "speed/speed_encoder_6x384.png").stat().st_size > 5_000
