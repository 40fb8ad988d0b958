"""What experiments that are not yet on `experiments.lib.run` use; it goes with the last of them."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich
import rich.table
import rich.text

from experiments.lib import contract
from experiments.lib.contract import SCHEMA as SCHEMA
from experiments.lib.contract import SummaryError as SummaryError
from experiments.lib.pages import Column as Column
from experiments.lib.pages import Picture as Picture
from experiments.lib.pages import Row, cells, csv_table, html_table, latex_table, numeric
from experiments.lib.pages import Section as Section
from experiments.lib.pages import code as code
from experiments.lib.pages import html_page as html_page
from experiments.lib.plots import BLUE as BLUE
from experiments.lib.plots import GREEN as GREEN
from experiments.lib.plots import PALETTE as PALETTE
from experiments.lib.plots import Figure, plt
from experiments.lib.progress import Advance as Advance
from experiments.lib.progress import progress as progress
from mpjax.files import Checkpoint as Checkpoint
from mpjax.files import Piece as Piece
from mpjax.files import jsonable as jsonable
from mpjax.files import write_bytes
from mpjax.files import write_json as write_json
from mpjax.xla.timing import environment as environment


def run_folder(root: str | Path, experiment: str) -> Path:
    """The folder of an experiment's results, made if it is not there."""
    folder = Path(root) / experiment
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def validate(summary: Mapping[str, Any], *, row_fields: Mapping[str, Any] | None = None) -> None:
    """`contract.validate`; `row_fields` are types or tuples of types."""
    shape = {name: kinds if isinstance(kinds, tuple) else (kinds,) for name, kinds in (row_fields or {}).items()}
    contract.validate(summary, {"rows": shape} if shape else None)


def write_summary(folder: Path, summary: Mapping[str, Any], *, row_fields: Mapping[str, Any] | None = None) -> Path:
    """Writes `summary.json` if it keeps the contract."""
    validate(summary, row_fields=row_fields)
    write_json(folder / "summary.json", summary)
    return folder / "summary.json"


def write_table(folder: Path, name: str, rows: Sequence[Row], columns: Sequence[Column], *, caption: str = "") -> str:
    """Writes `name.csv` (raw values) and `name.tex` (booktabs); returns the HTML, for a `Section`."""
    write_bytes(folder / f"{name}.csv", csv_table(rows, columns).encode())
    write_bytes(folder / f"{name}.tex", latex_table(rows, columns).encode())
    return html_table(rows, columns, caption=caption)


def print_table(rows: Sequence[Row], columns: Sequence[Column], *, title: str = "") -> None:
    """Prints a table to the terminal."""
    table = rich.table.Table(title=title or None)
    for column in columns:
        table.add_column(rich.text.Text(column.title), justify="right" if numeric(rows, column) else "left")
    for line in cells(rows, columns):
        table.add_row(*map(rich.text.Text, line))
    rich.print(table)


@contextmanager
def style() -> Iterator[None]:
    """The style of `experiments.lib.plots`, which is always on."""
    yield


def save_figure(folder: Path, name: str, figure: Figure) -> Path:
    """Writes `name.png` and `name.pdf`, closes the figure, and returns the PNG's path, for a `Picture`."""
    for kind in ("png", "pdf"):
        data = io.BytesIO()
        figure.savefig(data, format=kind)
        write_bytes(folder / f"{name}.{kind}", data.getvalue())
    plt.close(figure)
    return folder / f"{name}.png"
