"""English prose that every Python brings along: the language reference, `pydoc_data.topics` (PSF licence), in paragraphs.

It differs from version to version of Python: `digest` says which one it was. Topics are split, not paragraphs, so that no
topic is in both parts.
"""

import ast
import hashlib
import re
import sysconfig
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LEAST_LETTERS = 0.75  # of the characters: prose, not code or tables
_CODE = re.compile(r"::=|>>>|\||___")


@dataclass(frozen=True, kw_only=True)
class Prose:
    """Paragraphs of one part: `text` and the topic each is from."""

    text: tuple[str, ...]
    topic: tuple[str, ...]

    @property
    def joined(self) -> str:
        """All paragraphs, one after the other."""
        return "\n\n".join(self.text)


def prose(*, shortest: int = 120) -> tuple[Prose, Prose]:
    """Calibration and held-out paragraphs of at least so many characters: every second topic, in an order by checksum."""
    ordered = sorted(topics, key=lambda name: zlib.crc32(name.encode()))
    seen: set[str] = set()
    parts = []
    for names in (ordered[::2], ordered[1::2]):
        topic_of: dict[str, str] = {}
        for name in names:
            for text in _paragraphs(topics[name]):
                if len(text) >= shortest and text not in seen:
                    topic_of.setdefault(text, name)
        seen |= topic_of.keys()
        parts.append(Prose(text=tuple(topic_of), topic=tuple(topic_of.values())))
    return parts[0], parts[1]


def digest(texts: Mapping[str, str] = topics) -> str:
    """sha256 of all topics, in the order of their names."""
    return hashlib.sha256("\0".join(f"{name}\0{texts[name]}" for name in sorted(texts)).encode()).hexdigest()


def _paragraphs(text: str) -> list[str]:
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        letters = sum(character.isalpha() or character.isspace() for character in line)
        prose = line and line[0].isalpha() and line[-1] in ".:" and letters >= _LEAST_LETTERS * len(line)
        if prose and not _CODE.search(line):
            paragraphs.append(line)
    return paragraphs


def spread(texts: Sequence[str], count: int) -> list[str]:
    """So many texts, evenly spaced."""
    if len(texts) < count:
        raise SystemExit(
            f"Expected at least {count} paragraphs in this Python's pydoc_data.topics, found {len(texts)}."
        )
    return [texts[place] for place in np.linspace(0, len(texts) - 1, count).round().astype(int)]


def windows(ids: ArrayLike, count: int, width: int) -> NDArray[np.int32]:
    """(count, width) tokens, evenly spaced in a text's (N,)."""
    tokens = np.asarray(ids, np.int32)
    if len(tokens) < count * width:
        raise SystemExit(f"Expected at least {count * width} tokens of text in this Python, found {len(tokens)}.")
    starts = np.linspace(0, len(tokens) - width, count).round().astype(int)
    return np.stack([tokens[start : start + width] for start in starts])


def docstrings(*, shortest: int = 400) -> str:
    """Prose of another source: long docstrings of the standard library's modules and classes (PSF licence), in order of name."""
    parts: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef) and len(text := ast.get_docstring(node) or "") >= shortest:
                parts.setdefault(text)
    return "\n\n".join(parts)
