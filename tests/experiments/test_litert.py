"""Float32 beside LiteRT, with made-up times."""

import json

import pytest

from experiments.litert import __main__ as experiment
from experiments.litert.__main__ import Config
from mpjax.xla.profiling import OUTSIDE


def timed(model, batch, cores, rounds):
    ms = {1: 10.0, 2: 8.0}[cores]
    row = {"ms": ms, "ms_q1": ms, "ms_q3": ms, "litert_ms": 10.0 / cores, "vs_litert": ms * cores / 10, "vs_whole": 0.5}
    seconds = {1: {"dot.1": 4.0, "fusion": 5.0, OUTSIDE: 1.0}, 2: {"dot.1": 3.5, "fusion": 2.5, OUTSIDE: 1.0}}
    return {"row": row | {"peak_mb": 1.0}, "seconds": seconds[cores]}


def test_what_a_second_core_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "timed", timed)
    monkeypatch.setattr(experiment.xla, "cores", lambda: 2)
    experiment.main(Config(quick=True, batches=(1,), results=tmp_path))
    summary = json.loads((tmp_path / "litert" / "summary.json").read_text())
    assert [row["vs_litert"] for row in summary["rows"]] == [1.0, 1.6]
    (row,) = summary["scaling"]
    assert row["speedup"] == 1.25 and row["litert_speedup"] == 2 and row["serial_operations"] == 1
    assert (row["serial"], row["serial_products"], row["idle"]) == pytest.approx((0.4, 0.4, 0.1))
    assert row["bound"] == pytest.approx(1 / 0.75)


def test_wrong_options_are_refused():
    for wrong in ({"rounds": 2}, {"models": ("iris",)}, {"batches": (0,)}):
        with pytest.raises(SystemExit):
            Config(**wrong)
