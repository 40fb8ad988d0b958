"""What an experiment leaves behind: a checked summary, tables, figures, a page. No mathematics.

Only `style`, `save_figure`, `print_table` and `progress` need matplotlib and rich: `mpjax[experiments]`.
"""

import datetime
import importlib
import importlib.metadata
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from experiments.lib.pages import (
    Column,
    Picture,
    Row,
    Section,
    cells,
    code,
    csv_table,
    html_page,
    html_table,
    latex_table,
    numeric,
)
from mpjax.files import Checkpoint, Piece, jsonable, write_bytes, write_json
from mpjax.timing import cores, environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "MODELS",
    "PALETTE",
    "SCHEMA",
    "Checkpoint",
    "Column",
    "Picture",
    "Piece",
    "Section",
    "SummaryError",
    "code",
    "cores",
    "environment",
    "html_page",
    "jsonable",
    "print_table",
    "progress",
    "run_folder",
    "save_figure",
    "style",
    "validate",
    "write_json",
    "write_summary",
    "write_table",
]

SCHEMA = 1
MODELS = frozenset(
    "pose_landmark_full iris_landmark face_landmark digits_cnn efficientnet_lite0 minilm smollm2 "
    "encoder_6x384 encoder_12x768".split()
)
LEDGER = ("forward", "vjp", "jvp", "hvp", "compilations", "evaluations")

# Okabe and Ito's colours, distinct also to the colour-blind (https://jfly.uni-koeln.de/color/).
BLUE, GREEN = "#0072B2", "#009E73"
PALETTE = (BLUE, "#D55E00", GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")

TypeSpec = type | None | tuple[type | None, ...]  # float takes integers too; None is null; a boolean is no number


class SummaryError(ValueError):
    """A summary that breaks the contract; `problems` has every one of the breaks."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"the summary breaks the contract in {len(problems)} places:", *problems]))


# ---- run folders


def run_folder(root: str | Path, experiment: str) -> Path:
    """The folder of an experiment's results, made if it is not there."""
    if not re.fullmatch(r"\w[\w.-]*", experiment):
        raise ValueError(f"an experiment's name is one plain word, as in pose_landmark, not {experiment!r}")
    folder = Path(root) / experiment
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_summary(
    folder: Path, summary: Mapping[str, Any], *, row_fields: Mapping[str, TypeSpec] | None = None
) -> Path:
    """Writes `summary.json` if it keeps the contract, and beside it the config, environment and dated rows.

    `rows.jsonl` only ever grows: it keeps the rows of every run.
    """
    validate(summary, row_fields=row_fields)
    write_json(folder / "config.json", summary["config"])
    write_json(folder / "environment.json", summary["environment"])
    dated = [{"date": summary["environment"]["date"], **row} for row in summary["rows"]]
    with (folder / "rows.jsonl").open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        half_a_line = size and file.read() != b"\n"  # a run that was killed while it wrote
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in dated)
        file.write(("\n" * half_a_line + lines).encode())
    write_json(folder / "summary.json", summary)
    return folder / "summary.json"


# ---- the contract


def validate(summary: Mapping[str, Any], *, row_fields: Mapping[str, TypeSpec] | None = None) -> None:
    """Raises a `SummaryError` that lists every break of the result files' contract.

    `row_fields` are an experiment's own: each row has exactly these, so typed: `{"nme": (float, None)}`.
    """
    problems = list(_fields(summary, _SUMMARY, "summary"))
    for path, value in _walk(summary, ""):
        problems += _strict(value, path)
        if isinstance(value, Mapping) and not path.startswith("config"):
            problems += _numbers(value, path)
    if type(summary.get("schema")) is int and summary["schema"] != SCHEMA:
        problems.append(f"schema: {summary['schema']}, expected {SCHEMA}")
    if isinstance(summary.get("seconds"), float | int) and summary["seconds"] < 0:
        problems.append(f"seconds: {summary['seconds']} is negative")
    for name, shape in (("environment", _ENVIRONMENT), ("ledger", dict.fromkeys(LEDGER, int))):
        if isinstance(part := summary.get(name), Mapping):
            problems += _fields(part, shape, name)
            problems += [f"{name}.{key}: unknown" for key in part if key not in shape]
    problems += _date(summary.get("environment"))
    model = summary.get("model")
    problems += _model(model.get("name"), "model.name") if isinstance(model, Mapping) else []
    rows = summary.get("rows")
    for i, row in enumerate(rows if isinstance(rows, list | tuple) else ()):
        problems += _row(row, f"rows[{i}]", row_fields)
    if problems:
        raise SummaryError(problems)


_SUMMARY: Mapping[str, TypeSpec] = {
    "schema": int,
    "experiment": str,
    "command": str,
    "config": dict,
    "environment": dict,
    "seconds": float,
    "ledger": dict,
    "rows": list,
}
_ENVIRONMENT: Mapping[str, TypeSpec] = {
    **dict.fromkeys(("python", "jax", "jaxlib", "flax", "device", "date"), str),
    "cores": int,
}
_FRACTION = re.compile(r"pck_\w+|(tolerance|confidence|agreement|accuracy)(_low|_high)?")


def _fields(part: Mapping[str, Any], shape: Mapping[str, TypeSpec], path: str) -> Iterator[str]:
    """Problems of missing fields and wrong types."""
    for key, spec in shape.items():
        kinds = spec if isinstance(spec, tuple) else (spec,)
        if key not in part:
            yield f"{path}.{key}: missing"
        elif not any(_is(part[key], kind) for kind in kinds):
            names = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
            yield f"{path}.{key}: expected {names}, got {part[key]!r} ({type(part[key]).__name__})"


def _is(value: Any, kind: type | None) -> bool:
    if kind is None or value is None:
        return value is kind
    if isinstance(value, np.generic | bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, float | int if kind is float else kind)


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value inside, with where it stands."""
    yield path or "summary", value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{i}]")


def _strict(value: Any, path: str) -> Iterator[str]:
    """Problems of a value that strict JSON cannot hold."""
    if isinstance(value, np.generic | np.ndarray):
        yield f"{path}: a NumPy {value.dtype}; convert it with report.jsonable"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: {value}; what is undefined is null (report.jsonable)"
    elif isinstance(value, Mapping):
        yield from (f"{path}: the key {key!r} is not a string" for key in value if not isinstance(key, str))
    elif value is not None and not isinstance(value, str | bool | int | float | list | tuple):
        yield f"{path}: {type(value).__name__} has no JSON form; convert it with report.jsonable"


def _numbers(part: Mapping[str, Any], path: str) -> Iterator[str]:
    """Problems of fractions outside [0, 1] and of intervals upside down."""
    for key, value in part.items():
        if not isinstance(key, str) or not _is(value, float):
            continue
        if _FRACTION.fullmatch(key) and not (0 <= value <= 1):
            yield f"{path}.{key}: {value} is no fraction in [0, 1]"
        high = part.get(key.removesuffix("_low") + "_high")
        if key.endswith("_low") and _is(high, float) and value > high:
            yield f"{path}.{key}: {value} lies above {key.removesuffix('_low')}_high, {high}"


def _row(row: Any, path: str, row_fields: Mapping[str, TypeSpec] | None) -> Iterator[str]:
    if not isinstance(row, Mapping):
        yield f"{path}: a row is an object, not {type(row).__name__}"
        return
    for key, value in row.items():
        if isinstance(value, Mapping | list | tuple):
            yield f"{path}.{key}: rows are flat, this is a {type(value).__name__}"
    yield from _fields(row, {k: int for name in LEDGER if (k := f"ledger_{name}") in row}, path)
    if row_fields is not None:
        yield from _fields(row, row_fields, path)
        yield from (f"{path}.{key}: no field of this experiment's rows" for key in row if key not in row_fields)
    if "model" in row:
        yield from _model(row["model"], f"{path}.model")
    if isinstance(names := row.get("formats"), str) and names != "+".join(sorted(set(names.split("+")))):
        yield f"{path}.formats: {names!r} is not sorted, or repeats a format"


def _model(name: Any, path: str) -> list[str]:
    known = isinstance(name, str) and name in MODELS
    return [] if known else [f"{path}: {name!r} is none of {', '.join(sorted(MODELS))}"]


def _date(environment: Any) -> list[str]:
    date = environment.get("date") if isinstance(environment, Mapping) else None
    try:
        datetime.datetime.fromisoformat(date if isinstance(date, str) else "2000-01-01")  # its type: see _fields
    except ValueError:
        return [f"environment.date: {date!r} is not an ISO 8601 date"]
    return []


# ---- tables and figures


def write_table(folder: Path, name: str, rows: Sequence[Row], columns: Sequence[Column], *, caption: str = "") -> str:
    """Writes `name.csv` (raw values) and `name.tex` (booktabs); returns the HTML, for a `Section`."""
    write_bytes(folder / f"{name}.csv", csv_table(rows, columns).encode())
    write_bytes(folder / f"{name}.tex", latex_table(rows, columns).encode())
    return html_table(rows, columns, caption=caption)


def print_table(rows: Sequence[Row], columns: Sequence[Column], *, title: str = "") -> None:
    """Prints a table to the terminal."""
    text = _needs("rich.text").Text
    table = _needs("rich.table").Table(title=title or None)
    for column in columns:
        table.add_column(text(column.title), justify="right" if numeric(rows, column) else "left")
    for line in cells(rows, columns):
        table.add_row(*map(text, line))
    _needs("rich.console").Console().print(table)


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for every figure: readable at a column's width, safe for the colour-blind."""
    settings: dict[str, Any] = {
        "figure.figsize": (8, 4),
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.prop_cycle": _needs("cycler").cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "pdf.fonttype": 42,  # TrueType: what publishers ask for
    }
    with _needs("matplotlib").rc_context(settings):
        yield


def save_figure(folder: Path, name: str, figure: "Figure") -> Path:
    """Writes `name.png` and `name.pdf`, closes the figure, and returns the PNG's path, for a `Picture`."""
    for kind, options in (("png", {"dpi": 150}), ("pdf", {"metadata": {"CreationDate": None}})):
        data = io.BytesIO()
        figure.savefig(data, format=kind, **options)  # type: ignore[arg-type]
        write_bytes(folder / f"{name}.{kind}", data.getvalue())
    _needs("matplotlib.pyplot").close(figure)
    return folder / f"{name}.png"


# ---- progress


class Advance(Protocol):
    """Reports further steps as done."""

    def __call__(self, steps: int = 1) -> None: ...


@contextmanager
def progress(description: str, total: int, *, every: float = 10.0) -> Iterator[Advance]:
    """A bar with M/N, elapsed and remaining time; where stderr is no terminal, a line every ten seconds.

    It yields the function that reports a step as done:

        with report.progress("scoring layers", len(layers)) as advance:
            for layer in layers:
                ...
                advance()
    """
    if not sys.stderr.isatty():
        with _plain_progress(description, total, every) as advance:
            yield advance
        return
    parts = _needs("rich.progress")
    columns = (
        parts.TextColumn("{task.description}"),
        parts.BarColumn(),
        parts.MofNCompleteColumn(),
        parts.TimeElapsedColumn(),
        parts.TimeRemainingColumn(),
    )
    console = _needs("rich.console").Console(stderr=True)
    with parts.Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task(_needs("rich.markup").escape(description), total=total)
        yield lambda steps=1: bar.advance(task, steps)


@contextmanager
def _plain_progress(description: str, total: int, every: float) -> Iterator[Advance]:
    start = said = time.monotonic()
    done = 0

    def advance(steps: int = 1) -> None:
        nonlocal done, said
        done += steps
        now = time.monotonic()
        if now - said >= every and 0 < done < total:
            said = now
            left = (now - start) / done * (total - done)
            print(f"{description}: {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
    print(f"{description}: {done}/{total} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _needs(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = module.partition(".")[0]
        raise ImportError(f"{missing} is not installed: pip install 'mpjax[experiments]'") from error
