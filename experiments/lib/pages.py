"""Rows as CSV, LaTeX (booktabs) and HTML tables; one self-contained HTML page. Standard library only."""

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
NOTHING = "–"  # how a table shows None


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: the rows' key, its printed title, and how its numbers are formatted (`.3f`, `.1%`)."""

    key: str
    title: str
    format: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG or JPEG file for a page; `alt` says what it shows to whom does not see it."""

    path: Path
    alt: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page, in this order: heading, paragraphs (plain text), tables and other HTML, pictures."""

    heading: str
    paragraphs: Sequence[str] = ()
    html: Sequence[str] = ()
    pictures: Sequence[Picture] = ()


def cell(value: Any, format: str = "") -> str:
    """A value as a table shows it; the format specification applies to numbers only."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:{format}}"


def cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """The rows as shown. A key missing from a row shows as nothing; one missing from all is an error."""
    _check(rows, columns)
    return [[cell(row.get(column.key), column.format) for column in columns] for row in rows]


def numeric(rows: Sequence[Row], column: Column) -> bool:
    """Whether the column holds numbers only, and is therefore aligned to the right."""
    values = [row.get(column.key) for row in rows]
    return all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in values)


def csv_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The raw values under their keys; None is an empty field."""
    _check(rows, columns)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.key for column in columns])
    writer.writerows([row.get(column.key) for column in columns] for row in rows)
    return text.getvalue()


def latex_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A booktabs `tabular`, to be `\\input` into a table that has the paper's own caption."""
    align = "".join("r" if numeric(rows, column) else "l" for column in columns)
    lines = [[column.title for column in columns], *cells(rows, columns)]
    head, *body = (" & ".join(map(latex, line)) + r" \\" for line in lines)
    parts = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}", ""])


def html_table(rows: Sequence[Row], columns: Sequence[Column], *, caption: str = "") -> str:
    """A table in its own scrolling container, so that a wide one does not widen the page."""
    kinds = [' class="number"' if numeric(rows, column) else "" for column in columns]

    def line(tag: str, texts: Sequence[str]) -> str:
        pairs = zip(kinds, texts, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(text)}</{tag}>" for kind, text in pairs) + "</tr>"

    head = line("th", [column.title for column in columns])
    body = "\n".join(line("td", texts) for texts in cells(rows, columns))
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    table = f"<table>{title}<thead>{head}</thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def code(text: str) -> str:
    """Text as a block of code, as HTML."""
    return f'<pre class="scroll" tabindex="0"><code>{html.escape(text)}</code></pre>'


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def html_page(title: str, sections: Sequence[Section], *, lead: str = "") -> str:
    """One page with its pictures and style inside it; it loads nothing."""
    body = "\n".join(map(_section, sections))
    opening = f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
    return _PAGE.format(title=html.escape(title), style=_STYLE, lead=opening, body=body)


def _check(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    known = set().union(*rows)
    missing = [column.key for column in columns if column.key not in known]
    if rows and missing:
        raise KeyError(f"no row has the column {missing}; the rows have {sorted(known)}")


def _section(section: Section) -> str:
    paragraphs = [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
    parts = [*paragraphs, *section.html, *map(_picture, section.pictures)]
    return f"<section>\n<h2>{html.escape(section.heading)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _picture(picture: Picture) -> str:
    kind = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}.get(picture.path.suffix.lower())
    if kind is None:
        raise ValueError(f"a page takes PNG or JPEG pictures, not {picture.path.name}")
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    image = f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(picture.alt)}">'
    caption = f"<figcaption>{html.escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f"<figure>{image}{caption}</figure>"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "–": "--",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "±": r"$\pm$",
    "→": r"$\rightarrow$",
}

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: #1a1a1a; }
body { font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
p { max-width: 42rem; } .lead { font-size: 1.1rem; }
p, h1, h2, figcaption { overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 80vh; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .3rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #444; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f4f4f4; padding: .7rem; font-size: .85rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: #444; margin-top: .4rem; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{lead}
{body}
</body>
</html>
"""
