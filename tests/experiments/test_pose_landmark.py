"""The pose experiment without its model: tables, figures and sentences from made-up scores."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.lib.plots import plt
from experiments.pose_landmark import __main__ as pose_landmark
from experiments.pose_landmark import figures, rows
from experiments.pose_landmark.__main__ import Config
from experiments.pose_landmark.rows import FORMATS, Row, agreement, layers
from mpjax.ledger import Ledger
from mpjax.search import Assignment
from mpjax.sensitivity import Scores, Status


def scores(name: str, values: list[list[float]], status: str = "ok") -> Scores:
    value = np.array(values, float)
    return Scores(
        estimator=f"{name}[4]", loss="output", value=value, stderr=0 * value, residual=0 * value, layers=("a", "b", "c"),
        formats=FORMATS, kind="loss", status=np.full(value.shape, status), ledger=Ledger(vjp=4), seconds=0.5,
        compile_seconds=1.0, peak_mb=1.0,
    )  # fmt: skip


ALL = {
    "measured": scores("measured", [[1, 3], [2, 2], [3, 1]]),
    "local_rounding": scores("local_rounding", [[1, 3], [2, 2], [3, 1]]),
    "quadratic": scores("quadratic", [[0, 0]] * 3, Status.ZERO),
    "logdet": scores("logdet", [[3, 4], [2, 2], [1, 1]]),
}


def test_tables_and_sentences() -> None:
    table = agreement(ALL)
    assert [row.spearman_float16_acc16 for row in table.rows] == [
        pytest.approx(1),
        pytest.approx(1),
        None,
        pytest.approx(-1),
    ]
    base = SimpleNamespace(layers=[SimpleNamespace(name=name, weights=1, flops=2e6) for name in "abc"])
    assignments = {fmt: Assignment({"a": fmt, "b": "float32", "c": "float32"}) for fmt in FORMATS}
    shown = layers(base, ALL, assignments)  # type: ignore[arg-type]
    assert shown.records[0]["assigned_bfloat16"] == "bfloat16" and shown.records[0]["logdet_bfloat16"] == 4
    row = Row(
        name="all", format="bfloat16", executed="xla", layers_low=3, layers=3, tolerance=0.1, nme=0.1, nme_low=0.1,
        nme_high=0.2, pck_05=1.0, pck_02=0.5, nme_calibration=0.1, tolerance_value=0.01, within_tolerance=False,
        latency_ms=1.0, vs_fp32=0.5,
    )  # fmt: skip
    mixed = dataclasses.replace(row, name="mixed", nme=0.01, layers_low=1)
    emulated = [dataclasses.replace(line, format=rows.EMULATED, vs_fp32=None) for line in (row, mixed)]
    lines = pose_landmark.findings([row, mixed, *emulated], table.rows)
    assert "1 of 3 layers" in lines[1] and "10.0% of the all-low error" in lines[1] and "0.50 times" in lines[1]
    assert "times" not in lines[0] and "Spearman 1.000" in lines[2]


def test_figures() -> None:
    assert len(figures.sensitivity(list(ALL.values()), "bfloat16", frozenset("a")).axes) == 4
    curves = {fmt: {"ranked": {0: 0.0, 3: 0.1}} for fmt in FORMATS}
    chosen, limit = dict.fromkeys(FORMATS, (1, 0.05)), dict.fromkeys(FORMATS, 0.05)
    assert len(figures.nme_against_layers(curves, chosen, limit).axes) == 2
    xy = np.zeros((2, 33, 2))
    drawn = figures.landmarks(
        np.zeros((2, 8, 8, 3)), xy, {"mixed": xy, "all": xy}, dict.fromkeys(("mixed", "all"), np.zeros(2))
    )
    assert len(drawn.axes) == 4
    plt.close("all")


@pytest.mark.parametrize("wrong", [{"tolerance": 1.0}, {"confidence": 0.0}, {"probes": 0}, {"rounds": 4}])
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SystemExit):
        Config(**wrong)  # type: ignore[arg-type]
