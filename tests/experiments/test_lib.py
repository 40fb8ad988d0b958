"""Rows, the contract of summary.json, pages, figures, progress, times, a whole run, and publishing it."""

import copy
import json
import math
import sys
from dataclasses import dataclass, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from experiments import publish
from experiments.lib import progress, run
from experiments.lib.contract import SummaryError, validate
from experiments.lib.page import Code, Picture, Section, render
from experiments.lib.plots import BLUE, plt
from experiments.lib.rows import Table, column, schema
from experiments.lib.times import interleaved
from mpjax import xla
from mpjax.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Row:
    """A scored layer."""

    name: str = column("Name & <kind>", short=True)
    nme: float | None = column("NME", ".3f", short=True)
    nme_low: float | None
    nme_high: float | None
    ok: bool = column("100 %")
    nothing: float | None = column("never there", default=None)


TABLE = Table(
    "scores",
    Row,
    [
        Row(name='a_1 {5%} ~^\\ "q", <b>|', nme=1 / 3, nme_low=0.25, nme_high=0.5, ok=True),
        Row(name="x", nme=None, nme_low=None, nme_high=None, ok=False),
    ],
    "a < b",
)


# --- tables -----------------------------------------------------------------------------------------------------


def test_csv_has_every_field_and_raw_values() -> None:
    assert TABLE.csv() == (
        'name,nme,nme_low,nme_high,ok,nothing\n"a_1 {5%} ~^\\ ""q"", <b>|",0.3333333333333333,0.25,0.5,True,\nx,,,,False,\n'
    )


def test_latex_is_booktabs_and_escaped() -> None:
    text = TABLE.latex()
    assert text.startswith("\\begin{tabular}{lrl}\n\\toprule\n") and text.endswith("\\bottomrule\n\\end{tabular}\n")
    assert r"Name \& <kind> & NME & 100 \% \\" in text and r"x & -- & no \\" in text
    assert r"a\_1 \{5\%\}" in text and "0.333 (0.250--0.500) & yes" in text


def test_markdown_has_the_short_columns_alone() -> None:
    assert TABLE.markdown().splitlines()[:2] == ["| Name & <kind> | NME |", "| --- | ---: |"]
    assert TABLE.markdown().splitlines()[-1] == "| x | – |" and "<b>\\| | 0.333 (0.250–0.500) |" in TABLE.markdown()


def test_the_terminal_table_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Table("t", Row, [Row(name="[bold]x[/]", nme=0.25, nme_low=None, nme_high=None, ok=True)]).print("scores")
    printed = capsys.readouterr().out
    assert "[bold]x[/]" in printed and "0.250" in printed and "scores" in printed and "100 %" not in printed


def test_an_empty_table_has_its_columns() -> None:
    empty = Table("none", Row, [])
    assert empty.csv() == "name,nme,nme_low,nme_high,ok,nothing\n" and "never there" in empty.latex()


def test_the_schema_follows_the_types() -> None:
    assert schema(Row)["nme"] == (float, None) and schema(Row)["ok"] == (bool,)
    assert schema(make_dataclass("R", [("a", Literal["x", "y"] | None)])) == {"a": (str, None)}
    with pytest.raises(TypeError, match="rows are flat"):
        schema(make_dataclass("R", [("a", list[int])]))


# --- the contract -----------------------------------------------------------------------------------------------


@pytest.fixture
def summary() -> dict[str, Any]:
    row = {"name": "mixed", "nme": 0.03, "nme_low": 0.02, "nme_high": 0.04, "layers": 72}
    return {
        "schema": 1,
        "experiment": "toy",
        "command": "python -m experiments.toy",
        "config": {"tolerance": [0.1, 10.0]},
        "environment": xla.environment(),
        "seconds": 1.5,
        "ledger": Ledger(forward=3).as_dict(),
        "rows": [row, {**row, "name": "fp32", "nme": None, "nme_low": None, "nme_high": None}],
        "fit": [{"r_low": 1, "r_high": 2}],
    }


FIELDS = {"name": (str,), **dict.fromkeys(("nme", "nme_low", "nme_high"), (float, None)), "layers": (int,)}


def problems(summary: dict[str, Any], fields: Any = None) -> tuple[str, ...]:
    with pytest.raises(SummaryError) as caught:
        validate(summary, fields)
    return caught.value.problems


def test_a_good_summary_is_accepted(summary: dict[str, Any]) -> None:
    validate(json.loads(json.dumps({**summary, "seconds": 2})), {"rows": FIELDS})


@pytest.mark.parametrize("key", ["experiment", "command", "config", "environment", "seconds", "ledger", "rows"])
def test_every_field_is_needed_and_typed(summary: dict[str, Any], key: str) -> None:
    assert any(p.startswith(f"summary.{key}: expected") for p in problems({**summary, key: object()}))
    assert f"summary.{key}: missing" in problems({k: v for k, v in summary.items() if k != key})


@pytest.mark.parametrize("part", ["environment", "ledger"])
def test_every_field_of_a_part_is_needed_and_no_other(summary: dict[str, Any], part: str) -> None:
    for key in list(summary[part]):
        wrong = copy.deepcopy(summary)
        del wrong[part][key]
        wrong[part]["more"] = 1
        assert problems(wrong) == (f"{part}.{key}: missing", f"{part}.more: unknown")


BREAKS: dict[str, tuple[list[Any], Any, str]] = {
    "schema": (["schema"], 2, "schema: 2, expected 1"),
    "negative time": (["seconds"], -1.0, "seconds: -1.0 is negative"),
    "boolean as seconds": (["seconds"], True, "summary.seconds: expected float, got True (bool)"),
    "boolean as count": (["ledger", "hvp"], False, "ledger.hvp: expected int, got False (bool)"),
    "float as count": (["ledger", "vjp"], 2.0, "ledger.vjp: expected int, got 2.0 (float)"),
    "date": (["environment", "date"], "yesterday", "environment.date: 'yesterday' is not an ISO 8601 date"),
    "row": (["rows", 0], 3, "rows[0]: a row is an object, not int"),
    "nested row": (["rows", 0, "more"], {"a": 1}, "rows[0].more: rows are flat, this is a dict"),
    "interval": (["rows", 0, "nme_low"], 0.5, "rows[0].nme_low: 0.5 lies above nme_high, 0.04"),
    "interval elsewhere": (["fit", 0, "r_low"], 3, "fit[0].r_low: 3 lies above r_high, 2"),
    "PCK": (["rows", 0, "pck_05"], 88.0, "rows[0].pck_05: 88.0 is no fraction in [0, 1]"),
    "tolerance": (["rows", 0, "tolerance"], 10, "rows[0].tolerance: 10 is no fraction in [0, 1]"),
}


@pytest.mark.parametrize("path, value, expected", BREAKS.values(), ids=BREAKS)
def test_each_break_is_named(summary: dict[str, Any], path: list[Any], value: Any, expected: str) -> None:
    *outer, last = path
    part: Any = summary
    for step in outer:
        part = part[step]
    part[last] = value
    assert problems(summary) == (expected,)


def test_rows_have_exactly_their_fields(summary: dict[str, Any]) -> None:
    summary["rows"][0]["nme_lwo"] = 1.0
    del summary["rows"][1]["nme"]
    summary["rows"][1]["layers"] = 72.0
    assert set(problems(summary, {"rows": FIELDS})) == {
        "rows[0].nme_lwo: unknown",
        "rows[1].nme: missing",
        "rows[1].layers: expected int, got 72.0 (float)",
    }


# --- a page, progress, times ------------------------------------------------------------------------------------


def test_a_page_is_escaped_and_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "line.png").write_bytes(b"\x89PNG")
    picture = Picture(tmp_path / "line.png", 'a "rising" line', "1 < 2")
    page = render("<t>", [Section("A & B", "<script>x</script>", TABLE, Code("f(x) < 1"), picture)], lead="5 > 4")
    for text in (
        "<title>&lt;t&gt;</title>",
        "<h2>A &amp; B</h2>",
        "5 &gt; 4",
        "&lt;script&gt;",
        "<code>f(x) &lt; 1</code>",
    ):
        assert text in page
    assert '<th class="number">NME</th>' in page and "<caption>a &lt; b</caption>" in page and "&lt;b&gt;|</td>" in page
    assert 'alt="a &#34;rising&#34; line"' in page and "<figcaption>1 &lt; 2</figcaption>" in page
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 1
    assert not any(word in page for word in ("<script", "http:", "https:", "<link", "@import", "url(", "never there"))


def test_progress_without_a_terminal_prints_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("scoring", 3, every=0.0) as advance:
        advance()
        advance(2)
    assert capsys.readouterr().err.splitlines() == ["scoring: 1/3, 0 s left", "scoring: 3/3 in 0 s"]


def test_progress_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress("[scoring]", 3) as advance:
        advance(3)
    shown = capsys.readouterr().err
    assert "[scoring]" in shown and "3/3" in shown


def test_times_are_taken_in_turns() -> None:
    order: list[str] = []
    times = interleaved({name: partial(order.append, name) for name in "ab"}, rounds=3)
    assert order[-6:] == ["a", "b", "b", "a", "a", "b"] and len(times.ms["a"]) == 3
    times.ms["b"][:] = 2 * times.ms["a"]
    assert times.ratio("b", "a") == (2, 2, 2) and times.fastest("a") <= times.quartiles("a").median


# --- a whole run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(run.Options):
    quick: bool = False


def toy(results: Path, *, fresh: bool = False, value: float = 0.5, calls: list[int]) -> dict[str, Any]:
    made = run.Run("toy", Config(results=results, fresh=fresh))
    made.depends_on(data="d")

    def compute() -> run.Computed:
        calls.append(1)
        return {"x": np.ones(2)}, {"note": 1}, Ledger(forward=2)

    piece = made.piece("one", compute, knob=3)
    assert piece.arrays["x"].tolist() == [1, 1] and piece.meta["note"] == 1
    made.ledger += Ledger(vjp=1)
    figure, axis = plt.subplots()
    axis.plot([0, 1])
    assert axis.lines[0].get_color() == BLUE
    made.save(figure, "line", alt="a line")
    table = Table("results", Row, [Row(name="a", nme=value, nme_low=None, nme_high=None, ok=True)] * 13)
    more = Table("more_rows", Row, table.rows)
    return made.finish(
        "Toy",
        results=table,
        tables=[more],
        findings=["It is 1."],
        facts={"extra": 2},
        show=[more],
    )


def test_a_run_leaves_everything_and_goes_on_from_its_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    first, second = toy(tmp_path, calls=calls), toy(tmp_path, calls=calls)
    assert len(calls) == 1 and first["reused_pieces"] == [] and second["reused_pieces"] == ["one"]
    assert first["ledger"] == second["ledger"] == Ledger(forward=2, vjp=1).as_dict() and second["extra"] == 2
    assert second["pieces_seconds"] == first["pieces_seconds"]
    folder = tmp_path / "toy"
    assert json.loads((folder / "summary.json").read_text()) == second and second["more_rows"] == second["rows"]
    files = {path.name for path in folder.iterdir()}
    tables = {f"{name}.{kind}" for name in ("results", "more_rows") for kind in ("csv", "tex")}
    assert files == {"pieces", "line.png", "line.pdf", *tables, "report.html", "docs.md", "summary.json"}
    assert (folder / "line.pdf").read_bytes().startswith(b"%PDF") and not plt.get_fignums()
    page = (folder / "report.html").read_text()
    assert "It is 1." in page and "data:image/png" in page and second["environment"]["device"] in page
    assert "<h2>More rows</h2>" in page and "A scored layer." in page
    docs = (folder / "docs.md").read_text()
    assert "Tables: [results](toy/results.csv), [more rows](toy/more_rows.csv). Figures: [line](toy/line.png)." in docs
    assert "12 of 13 rows." in docs and docs.count("| a | ") == run.MOST_ROWS
    assert "finished before, reused" in capsys.readouterr().out
    toy(tmp_path, fresh=True, calls=calls)
    assert len(calls) == 2


def test_a_run_that_breaks_the_contract_writes_no_summary(tmp_path: Path) -> None:
    with pytest.raises(SummaryError, match="expected float or null, got 'x'"):
        toy(tmp_path, value="x", calls=[])  # type: ignore[arg-type]
    assert not {"summary.json", "results.csv", "report.html"} & {path.name for path in (tmp_path / "toy").iterdir()}
    assert toy(tmp_path, value=math.nan, calls=[])["rows"][0]["nme"] is None


def test_names_are_checked() -> None:
    run.check_names("--models", ["a"], ("a", "b"))
    for names, message in ((["c"], "found c"), ([], "found none")):
        with pytest.raises(SystemExit, match=f"--models: expected some of a, b; {message}"):
            run.check_names("--models", names, ("a", "b"))


# --- publishing -------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> publish.Config:
    monkeypatch.setattr(run, "commit", lambda: "abc1234")
    toy(tmp_path / "results", calls=[])
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "page.md").write_text("before\n<!-- toy -->\nold\n<!-- end of toy -->\nafter ![line](toy/line.png)\n")
    (tmp_path / "README.md").write_text("see [table](docs/toy/more_rows.csv)\n")
    return publish.Config("toy", results=tmp_path / "results", docs=docs)


def test_publishing_writes_the_block_and_what_pages_link_to(published: publish.Config) -> None:
    before = (published.docs.parent / "README.md").read_text()
    (published.docs / "toy").mkdir()
    (published.docs / "toy/targets.csv").write_text("of an earlier edition")
    publish.main(published)
    text = (published.docs / "page.md").read_text()
    block = (published.results / "toy/docs.md").read_text()
    assert text == f"before\n<!-- toy -->\n{block}<!-- end of toy -->\nafter ![line](toy/line.png)\n"
    assert {path.name for path in (published.docs / "toy").iterdir()} == {"line.png", "more_rows.csv", "results.csv"}
    publish.main(published)
    assert (published.docs / "page.md").read_text() == text and (
        published.docs.parent / "README.md"
    ).read_text() == before


@pytest.mark.parametrize("what", ["commit", "quick", "marker", "file", "run"])
def test_what_is_not_published(published: publish.Config, what: str) -> None:
    summary = published.results / "toy/summary.json"
    messages = {
        "commit": "uncommitted",
        "quick": "--quick",
        "marker": "found 0",
        "file": "lacks line.png",
        "run": "No .*toy first",
    }
    content = json.loads(summary.read_text())
    if what == "marker":
        (published.docs / "page.md").write_text("<!-- toy -->\n")
    elif what == "file":
        (published.results / "toy/line.png").unlink()
    elif what == "run":
        summary.unlink()
    else:
        change = {"commit": "abc1234+"} if what == "commit" else {"config": {"quick": True}}
        summary.write_text(json.dumps({**content, **change}))
    before = (published.docs / "page.md").read_text()
    with pytest.raises(SystemExit, match=messages[what]):
        publish.main(published)
    assert (published.docs / "page.md").read_text() == before and not (published.docs / "toy").exists()
