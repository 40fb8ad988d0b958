"""One self-contained HTML page from page.html: sections of paragraphs, tables, code and pictures, in any order."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from experiments.lib.rows import Table

_TEMPLATE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclass(frozen=True)
class Picture:
    """A PNG file for a page; `alt` describes it to those who cannot see it."""

    path: Path
    alt: str
    caption: str = ""

    @property
    def base64(self) -> str:
        """The file's bytes as text."""
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


@dataclass(frozen=True)
class Code:
    """Text in a block of code."""

    code: str


class Section:
    """A heading and what follows it; a plain string is a paragraph."""

    def __init__(self, heading: str, *parts: str | Table | Picture | Code) -> None:
        self.heading, self.parts = heading, parts


def render(title: str, sections: Sequence[Section], *, lead: str = "") -> str:
    """The page; it loads nothing."""
    return _TEMPLATE.get_template("page.html").render(title=title, lead=lead, sections=sections)
