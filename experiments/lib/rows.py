"""Rows declared once: a frozen dataclass whose fields carry title and number format. Everything shown derives from it.

    @dataclass(frozen=True, kw_only=True)
    class Row:
        model: str = column("model", short=True)
        nme: float = column("NME", ".4f", short=True)     # shown as 0.0066 (0.0057–0.0077)
        nme_low: float
        nme_high: float
        vs_fp32: float | None = column("time / fp32", ".2f")

A field made by `column` is shown on the page and in LaTeX, one with `short=True` in the terminal and in docs/ too; a plain field
is in the summary and the CSV alone. Plain fields `X_low` and `X_high`, or quartiles `X_q1` and `X_q3`, beside a column `X` are
shown in its cell. A column that no row has a value for is left out. `dataclasses.make_dataclass` makes rows whose fields
depend on the run; `fill` makes a row of other objects' attributes.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import pandas as pd
import rich.console
import rich.table
import rich.text

from mpjax.files import jsonable

NOTHING = "–"  # how a table shows None
T = TypeVar("T")
_MISSING = object()
_LATEX = str.maketrans(
    {"≤": r"$\leq$", "≥": r"$\geq$", "→": r"$\rightarrow$", "×": r"$\times$", "±": r"$\pm$", "–": "--"}
)


def column(title: str, format: str = "", *, short: bool = False, default: Any = dataclasses.MISSING) -> Any:
    """A shown field: title, format specification of its numbers (".3f", ".1%"), and whether short tables have it."""
    return dataclasses.field(default=default, metadata={"title": title, "format": format, "short": short})


def schema(kind: type) -> dict[str, tuple[type | None, ...]]:
    """Field -> the types that it may have in JSON; None stands for null."""
    return {name: _types(hint) for name, hint in get_type_hints(kind).items()}


def _types(hint: Any) -> tuple[type | None, ...]:
    if get_origin(hint) in (types.UnionType, Union):
        return tuple(kind for part in get_args(hint) for kind in _types(part))
    if get_origin(hint) is Literal:
        return tuple({type(value) for value in get_args(hint)})
    if hint not in (str, bool, int, float, types.NoneType):
        raise TypeError(f"rows are flat: str, bool, int, float or None, not {hint}")
    return (None,) if hint is types.NoneType else (hint,)


def fill(kind: type[T], *sources: Any, **fields: Any) -> T:
    """A row of `fields`, and of what the first source that has it, as an attribute or a key, calls by a field's name."""
    values = dict(fields)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        for source in sources:
            value = (
                source.get(field.name, _MISSING)
                if isinstance(source, Mapping)
                else getattr(source, field.name, _MISSING)
            )
            if value is not _MISSING:
                values.setdefault(field.name, value)
    return kind(**values)


@dataclass(frozen=True)
class Table:
    """Rows of one kind under a name: `<name>.csv` (all fields, raw values), `<name>.tex` (booktabs), a part of the page."""

    name: str
    kind: type
    rows: Sequence[Any]
    caption: str = ""

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The rows as plain JSON objects."""
        return [jsonable(row) for row in self.rows]

    def csv(self) -> str:
        """All fields under their names; None is an empty field."""
        names = [field.name for field in dataclasses.fields(self.kind)]
        return str(pd.DataFrame(self.records, columns=names, dtype=object).to_csv(index=False, lineterminator="\n"))

    def latex(self) -> str:
        """A booktabs `tabular`, to be `\\input` into a table that has the paper's own caption."""
        style = self.frame().style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
        align = "".join("r" if number else "l" for number in self.numeric())
        return str(style.to_latex(hrules=True, column_format=align)).translate(_LATEX)

    def markdown(self) -> str:
        """The short table, for docs/."""
        frame = self.frame(short=True)
        lines = [list(frame), ["---:" if number else "---" for number in self.numeric(short=True)], *frame.values]
        return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)

    def print(self, title: str = "") -> None:
        """The short table, to the terminal."""
        frame, table = self.frame(short=True, intervals=False), rich.table.Table(title=title or self.name)
        for text, number in zip(frame, self.numeric(short=True), strict=True):
            table.add_column(rich.text.Text(text), justify="right" if number else "left")
        for line in frame.values:
            table.add_row(*map(rich.text.Text, line))
        console = rich.console.Console()
        if not console.is_terminal:
            console.width = 120
        console.print(table)

    def frame(self, *, short: bool = False, intervals: bool = True) -> pd.DataFrame:
        """The cells as shown, under the titles."""
        fields = self.fields(short=short)
        lines = [[self._cell(record, field, intervals) for field in fields] for record in self.records]
        return pd.DataFrame(lines, columns=[field.metadata["title"] for field in fields], dtype=object)

    def numeric(self, *, short: bool = False) -> list[bool]:
        """Which of the shown columns hold numbers, and are therefore aligned to the right."""
        kinds = schema(self.kind)
        return [not {str, bool} & set(kinds[field.name]) for field in self.fields(short=short)]

    def fields(self, *, short: bool = False) -> list[dataclasses.Field]:
        """The shown fields."""
        columns = [field for field in dataclasses.fields(self.kind) if "title" in field.metadata]
        if short and any(field.metadata["short"] for field in columns):
            columns = [field for field in columns if field.metadata["short"]]
        return [f for f in columns if not self.records or any(record[f.name] is not None for record in self.records)]

    def _cell(self, record: dict[str, Any], field: dataclasses.Field, intervals: bool) -> str:
        form, name = field.metadata["format"], field.name
        text, columns = _text(record[name], form), {other.name for other in self.fields()}
        for low, high in ((f"{name}_low", f"{name}_high"), (f"{name}_q1", f"{name}_q3")):
            if intervals and record.get(low) is not None and record.get(high) is not None and low not in columns:
                text += f" ({record[low]:{form}}–{record[high]:{form}})"
        return text


def _text(value: Any, form: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:{form}}"
