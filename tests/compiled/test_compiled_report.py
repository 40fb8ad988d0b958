"""The report of a compiled program: rows, shares of time, the printed table."""

import json

import pytest

from mpjax.xla import executable, profiling

pytestmark = [pytest.mark.optimised, pytest.mark.usefixtures("relaxed_promotion")]
HEADER = "layer requested executed by implementation KiB MFLOP share weights"


@pytest.mark.parametrize("shares", [False, True])
def test_rows_and_table(small, mixed_program, shares, monkeypatch):
    model, batches = small
    seconds = {"stem": 3e-3, "pointwise": 1e-3, profiling.OUTSIDE: 1e-3}
    monkeypatch.setattr(profiling, "layer_seconds", lambda run, text, layers: (run(), seconds)[1])
    report = mixed_program.report(*(batches[0] if shares else ()))
    columns = {name: [row[name] for row in report.rows] for name in report.rows[0]}
    assert columns["layer"] == list(model.names)
    assert columns["requested"] == ["float32", "float32", "bfloat16", "float16"]
    assert columns["weights"] == [layer.weights for layer in model.layers]
    assert columns["weight_bytes"] == [4 * 27 * 8, 4 * 9 * 8, 2 * 8 * 16, 2 * 16 * 3]
    assert columns["flops"] == [2 * layer.flops for layer in model.layers]  # two examples
    for row in report.rows:
        executed = mixed_program.executed[row["layer"]]
        assert (row["executed"], row["result"], row["opcode"]) == (executed.operands, executed.result, executed.opcode)
        assert row["implementation"] == "xla" and row["dropped"] is False and row["full_copy"] is None
    assert columns["share"] == (pytest.approx([0.6, 0.0, 0.2, 0.0]) if shares else [None] * 4)
    assert report.program["outside"] == (pytest.approx(0.2) if shares else None)
    assert report.program["flops"] == sum(columns["flops"])
    assert report.program["weight_bytes"] == mixed_program.weight_bytes
    assert report.program["error"] == mixed_program.verification.error
    header, *lines = str(report).splitlines()
    assert header.split() == HEADER.split() and len(lines) == 5
    assert [line.split()[0] for line in lines[:4]] == list(model.names)
    assert ("60.0%" in lines[0]) == shares and "%" not in lines[4]
    assert "limit" in lines[4] and executable.name(mixed_program.options) in lines[4]
    json.dumps([*report.rows, report.program], allow_nan=False)
