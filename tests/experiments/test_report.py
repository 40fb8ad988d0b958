"""The result files' contract, whole-or-absent files, tables, pages and figures."""

import copy
import dataclasses
import datetime
import importlib
import json
import math
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from experiments.lib import report
from mpjax import ledger

ROW_FIELDS = {
    "name": str,
    "nme": (float, None),
    "nme_low": (float, None),
    "nme_high": (float, None),
    "layers": int,
}


@dataclasses.dataclass(frozen=True)
class Pair:
    left: object
    right: object


@pytest.fixture
def summary():
    row = {"name": "mixed", "nme": 0.03, "nme_low": 0.02, "nme_high": 0.04, "layers": 72}
    return {
        "schema": 1,
        "experiment": "toy",
        "command": "python -m experiments.toy",
        "config": {"seeds": [0, 1]},
        "environment": report.environment(device="CPU"),
        "seconds": 1.5,
        "ledger": ledger.Ledger(forward=3).as_dict(),
        "rows": [row, {**row, "name": "fp32", "nme": None, "nme_low": None, "nme_high": None}],
        "model": {"name": "iris_landmark", "layers": 72, "parameters": 10},
    }


def problems(summary, row_fields=None):
    with pytest.raises(report.SummaryError) as caught:
        report.validate(summary, row_fields=row_fields)
    return caught.value.problems


# ---- the contract


def test_a_good_summary_is_accepted(summary):
    report.validate(summary)
    report.validate(summary, row_fields=ROW_FIELDS)
    report.validate(json.loads(json.dumps(summary)), row_fields=ROW_FIELDS)
    report.validate({**summary, "seconds": 2})  # an integer is a number


def test_the_contracts_ledger_is_the_librarys():
    assert tuple(f.name for f in dataclasses.fields(ledger.Ledger)) == report.LEDGER


TOP = ["schema", "experiment", "command", "config", "environment", "seconds", "ledger", "rows"]


@pytest.mark.parametrize("key", TOP)
def test_every_field_is_needed_and_typed(summary, key):
    wrong = {**summary, key: object() if key != "schema" else True}
    assert any(p.startswith(f"summary.{key}: expected") for p in problems(wrong))
    assert f"summary.{key}: missing" in problems({k: v for k, v in summary.items() if k != key})


@pytest.mark.parametrize("part", ["environment", "ledger"])
def test_every_field_of_a_part_is_needed_and_no_other(summary, part):
    for key in list(summary[part]):
        wrong = copy.deepcopy(summary)
        del wrong[part][key]
        wrong[part]["more"] = 1
        assert problems(wrong) == (f"{part}.{key}: missing", f"{part}.more: unknown")


BREAKS = {
    "schema 2": (["schema"], 2, "schema: 2, expected 1"),
    "negative time": (["seconds"], -1.0, "seconds: -1.0 is negative"),
    "boolean as seconds": (["seconds"], True, "summary.seconds: expected float, got True (bool)"),
    "boolean as count": (["ledger", "hvp"], False, "ledger.hvp: expected int, got False (bool)"),
    "float as count": (["ledger", "vjp"], 2.0, "ledger.vjp: expected int, got 2.0 (float)"),
    "cores as text": (["environment", "cores"], "2", "environment.cores: expected int, got '2' (str)"),
    "date": (["environment", "date"], "yesterday", "environment.date: 'yesterday' is not an ISO 8601 date"),
    "NaN": (["rows", 0, "nme"], math.nan, "rows[0].nme: nan; what is undefined is null (report.jsonable)"),
    "infinity": (["config", "deep"], {"x": [math.inf]}, "config.deep.x[0]: inf; what is undefined is null"),
    "NumPy scalar": (["rows", 0, "nme"], np.float64(0.03), "rows[0].nme: a NumPy float64; convert it"),
    "NumPy array": (
        ["config", "a"],
        np.zeros(2),
        "config.a: a NumPy float64; convert it with report.jsonable",
    ),
    "no JSON": (["config", "a"], Path("x"), "config.a: PosixPath has no JSON form"),
    "key": (["config", "a"], {1: 2}, "config.a: the key 1 is not a string"),
    "row": (["rows", 0], 3, "rows[0]: a row is an object, not int"),
    "nested row": (["rows", 0, "more"], {"a": 1}, "rows[0].more: rows are flat, this is a dict"),
    "interval": (["rows", 0, "nme_low"], 0.5, "rows[0].nme_low: 0.5 lies above nme_high, 0.04"),
    "interval outside rows": (["fit"], {"r_low": 2, "r_high": 1}, "fit.r_low: 2 lies above r_high, 1"),
    "PCK": (["rows", 0, "pck_05"], 88.0, "rows[0].pck_05: 88.0 is no fraction in [0, 1]"),
    "tolerance": (["rows", 0, "tolerance"], 10, "rows[0].tolerance: 10 is no fraction in [0, 1]"),
    "ledger in a row": (["rows", 0, "ledger_hvp"], 1.5, "rows[0].ledger_hvp: expected int, got 1.5 (float)"),
    "formats": (
        ["rows", 0, "formats"],
        "float32+bfloat16",
        "rows[0].formats: 'float32+bfloat16' is not sorted",
    ),
    "formats twice": (["rows", 0, "formats"], "float16+float16", "rows[0].formats: 'float16+float16' is not"),
    "row's model": (["rows", 0, "model"], "pose", "rows[0].model: 'pose' is none of digits_cnn, "),
    "model": (["model", "name"], None, "model.name: None is none of digits_cnn, "),
}


@pytest.mark.parametrize("path, value, expected", BREAKS.values(), ids=BREAKS)
def test_each_break_is_named(summary, path, value, expected):
    *outer, last = path
    part = summary
    for step in outer:
        part = part[step]
    part[last] = value
    (problem,) = problems(summary)
    assert problem.startswith(expected)


def test_what_is_allowed(summary):
    more = {"formats": "bfloat16+float32", "tolerance_value": 12.0, "layers_low": 40, "model": "digits_cnn"}
    summary["rows"][0].update(more, ledger_hvp=3, pck_05=1, within_tolerance=True, x_low=None, x_high=1.0)
    summary["config"]["tolerance"] = [0.1, 10.0]
    report.validate(summary)


def test_row_fields_are_exact(summary):
    summary["rows"][0]["nme_lwo"] = 1.0
    del summary["rows"][1]["nme"]
    summary["rows"][1]["layers"] = 72.0
    assert problems(summary, ROW_FIELDS) == (
        "rows[0].nme_lwo: no field of this experiment's rows",
        "rows[1].nme: missing",
        "rows[1].layers: expected int, got 72.0 (float)",
    )


def test_all_problems_are_listed_at_once(summary):
    summary["schema"] = 2
    summary["rows"][0]["nme"] = math.nan
    with pytest.raises(ValueError, match=r"(?s)in 2 places.*rows\[0\]\.nme: nan.*schema: 2"):
        report.validate(summary)


# ---- files


def test_environment():
    found = report.environment(device="a CPU")
    strings = {key: value for key, value in found.items() if key != "cores"}
    assert set(strings) == {"python", "jax", "jaxlib", "flax", "device", "date"}
    assert all(isinstance(value, str) and value for value in strings.values())
    assert type(found["cores"]) is int and found["cores"] >= 1
    assert datetime.datetime.fromisoformat(found["date"]).tzinfo is not None


def test_jsonable():
    value = {
        "scalars": (np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a"), ml_dtypes.bfloat16(1.5)),
        "array": np.array([[1.0, np.nan], [np.inf, -np.inf]]),
        "low": np.ones(2, ml_dtypes.float8_e4m3fn),
        "pair": Pair(Path("a/b"), {2, 1}),
        "plain": [True, 1, "x", None, -math.inf],
    }
    plain = report.jsonable(value)
    assert plain == {
        "scalars": [0.5, 3, True, "a", 1.5],
        "array": [[1.0, None], [None, None]],
        "low": [1.0, 1.0],
        "pair": {"left": "a/b", "right": [1, 2]},
        "plain": [True, 1, "x", None, None],
    }
    assert [type(v) for v in plain["scalars"]] == [float, int, bool, str, float]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


@pytest.mark.parametrize("value", [object(), {1: 2}, np.array([1j]), len])
def test_jsonable_refuses_what_json_cannot_hold(value):
    with pytest.raises(TypeError):
        report.jsonable(value)


def test_write_json_is_strict_and_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    report.write_json(path, {"π": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "π": 1\n}\n'
    with pytest.raises(ValueError):
        report.write_json(path, {"x": math.nan})

    def crash(*_):
        raise OSError("the disk went away")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="went away"):
        report.write_json(path, {"π": 2})
    assert json.loads(path.read_text()) == {"π": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_run_folder(tmp_path):
    folder = report.run_folder(tmp_path / "results", "pose_landmark")
    assert folder == report.run_folder(str(tmp_path / "results"), "pose_landmark") and folder.is_dir()
    for name in ("", "../up", "a/b", "."):
        with pytest.raises(ValueError, match="one plain word"):
            report.run_folder(tmp_path, name)


def test_write_summary(tmp_path, summary):
    path = report.write_summary(tmp_path, summary, row_fields=ROW_FIELDS)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"half')
    report.write_summary(tmp_path, summary)
    assert json.loads(path.read_text()) == summary
    assert json.loads((tmp_path / "config.json").read_text()) == summary["config"]
    assert json.loads((tmp_path / "environment.json").read_text()) == summary["environment"]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    dated = [{"date": summary["environment"]["date"], **row} for row in summary["rows"]]
    assert [json.loads(line) for line in lines if line != '{"half'] == dated * 2


def test_a_bad_summary_is_not_written(tmp_path, summary):
    with pytest.raises(report.SummaryError):
        report.write_summary(tmp_path, {**summary, "schema": 2})
    assert list(tmp_path.iterdir()) == []


# ---- checkpoints


def test_checkpoint_round_trip(tmp_path):
    held = report.Checkpoint(tmp_path / "pieces", {"seed": 0, "formats": ("a", "b")})
    assert held.load("encoder/conv_1") is None
    arrays = {
        "scores": np.arange(6, dtype=np.float32).reshape(2, 3),
        "note": np.array(3),
        "names": np.array(["x"]),
    }
    held.save("encoder/conv_1", arrays, {"seconds": np.float32(0.5)})
    piece = held.load("encoder/conv_1")
    assert piece is not None and piece.meta == {"seconds": 0.5} and set(piece.arrays) == set(arrays)
    for name, array in arrays.items():
        assert piece.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(piece.arrays[name], array)
    assert held.load("encoder.conv_1") is None
    assert len(list((tmp_path / "pieces").iterdir())) == 1


def test_checkpoint_of_another_key_is_not_seen(tmp_path):
    report.Checkpoint(tmp_path, {"a": 1, "b": 2}).save("x", {})
    assert report.Checkpoint(tmp_path, {"b": 2, "a": 1}).load("x") is not None
    assert report.Checkpoint(tmp_path, {"a": 1, "b": 3}).load("x") is None


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "text", "renamed"])
def test_damaged_checkpoint_is_set_aside(tmp_path, damage):
    held = report.Checkpoint(tmp_path, {"seed": 0})
    held.save("piece", {"x": np.arange(100.0)})
    path = held.path("piece")
    data = path.read_bytes()
    if damage == "renamed":
        held.save("other", {"x": np.zeros(3)})
        os.replace(held.path("other"), path)
    else:
        middle = data.index(np.arange(100.0).tobytes()) + 400
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": data[:-40], "flipped": flipped, "text": b"hello"}[damage])
    with pytest.warns(UserWarning, match=r"piece-.* is damaged .* set aside"):
        assert held.load("piece") is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name + ".damaged"]
    held.save("piece", {"x": np.ones(1)})
    assert held.load("piece") is not None


@pytest.mark.parametrize("array", [np.zeros(2, ml_dtypes.bfloat16), np.array([object()], object)])
def test_checkpoint_refuses_what_an_npz_forgets(tmp_path, array):
    with pytest.raises(TypeError, match="x: .* cannot be kept"):
        report.Checkpoint(tmp_path, {}).save("piece", {"x": array})
    assert list(tmp_path.iterdir()) == []


# ---- tables, pages, figures

COLUMNS = [
    report.Column(key="name", title="Name & <kind>"),
    report.Column(key="nme", title="NME", format=".3f"),
    report.Column(key="ok", title="100 %"),
]
ROWS = [
    {"name": 'conv_1 {50%} ~^\\ "a", <b>', "nme": 1 / 3, "ok": True},
    {"name": "x", "nme": None, "ok": False},
]


def test_tables(tmp_path):
    html = report.write_table(tmp_path, "scores", ROWS, COLUMNS, caption="a < b")
    assert (tmp_path / "scores.csv").read_text() == (
        'name,nme,ok\n"conv_1 {50%} ~^\\ ""a"", <b>",0.3333333333333333,True\nx,,False\n'
    )
    assert (tmp_path / "scores.tex").read_text() == "\n".join(
        [
            r"\begin{tabular}{lrl}",
            r"\toprule",
            r"Name \& \textless{}kind\textgreater{} & NME & 100 \% \\",
            r"\midrule",
            r"conv\_1 \{50\%\} \textasciitilde{}\textasciicircum{}\textbackslash{} "
            r'"a", \textless{}b\textgreater{} & 0.333 & yes \\',
            r"x & -- & no \\",
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
    assert "<caption>a &lt; b</caption>" in html and '<div class="scroll"' in html
    assert '<td>conv_1 {50%} ~^\\ &quot;a&quot;, &lt;b&gt;</td><td class="number">0.333</td>' in html


def test_a_column_that_no_row_has_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="nem"):
        report.write_table(tmp_path, "scores", ROWS, [report.Column(key="nem", title="NME")])
    assert list(tmp_path.iterdir()) == []


def test_tables_without_rows(tmp_path):
    assert "<td" not in report.write_table(tmp_path, "scores", [], COLUMNS)
    assert (tmp_path / "scores.csv").read_text() == "name,nme,ok\n"


def test_print_table(capsys):
    report.print_table([{"name": "[bold]x[/]", "nme": 0.25}], COLUMNS[:2], title="scores")
    printed = capsys.readouterr().out
    assert "[bold]x[/]" in printed and "0.250" in printed and "scores" in printed


def test_figure_and_page(tmp_path):
    with report.style():
        plt = importlib.import_module("matplotlib.pyplot")
        figure, axes = plt.subplots()
        axes.plot([0, 1])
        assert axes.lines[0].get_color() == report.BLUE
    path = report.save_figure(tmp_path, "line", figure)
    assert path == tmp_path / "line.png" and not plt.get_fignums()
    assert path.read_bytes().startswith(b"\x89PNG") and (tmp_path / "line.pdf").read_bytes().startswith(b"%PDF")

    picture = report.Picture(path=path, alt='a "rising" line', caption="1 < 2")
    table = report.write_table(tmp_path, "scores", ROWS, COLUMNS)
    first = report.Section(heading="A & B", paragraphs=["<script>x</script>"], html=[table, report.code("f(x) < 1")])
    page = report.html_page("<t>", [first, report.Section(heading="C", pictures=[picture])], lead="5 > 4")
    assert "<title>&lt;t&gt;</title>" in page and "<h2>A &amp; B</h2>" in page and "5 &gt; 4" in page
    assert "<script" not in page and "&lt;script&gt;" in page and "<code>f(x) &lt; 1</code>" in page
    assert 'alt="a &quot;rising&quot; line"' in page and "<figcaption>1 &lt; 2</figcaption>" in page
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 1
    assert not any(word in page for word in ("http:", "https:", "<link", "@import", "url("))
    assert 'name="viewport" content="width=device-width' in page


def test_a_page_takes_pictures_only(tmp_path):
    section = report.Section(heading="A", pictures=[report.Picture(path=tmp_path / "a.pdf", alt="a")])
    with pytest.raises(ValueError, match="not a.pdf"):
        report.html_page("t", [section])


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ImportError, match=r"rich is not installed: pip install 'mpjax\[experiments\]'"):
        report.print_table(ROWS, COLUMNS)


def test_progress_without_a_terminal(capsys):
    with report.progress("scoring", 3, every=0.0) as advance:
        advance()
        advance(2)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "scoring: 1/3, 0 s left" and last == "scoring: 3/3 in 0 s"


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with report.progress("[scoring]", 3) as advance:
        advance()
        advance(2)
    shown = capsys.readouterr().err
    assert "[scoring]" in shown and "3/3" in shown
