"""The contract of `summary.json` (schema 1): fields, types, flat rows, fractions in [0, 1], intervals the right way up."""

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpjax.ledger import Ledger

SCHEMA = 1
Types = tuple[type | None, ...]  # None stands for null; float takes integers, too; a boolean is no number

_SUMMARY: Mapping[str, Types] = {
    **{"schema": (int,), "experiment": (str,), "command": (str,), "config": (dict,), "environment": (dict,)},
    **{"seconds": (float,), "ledger": (dict,), "rows": (list,)},
}
_PARTS: Mapping[str, Mapping[str, Types]] = {
    "environment": {**dict.fromkeys(("python", "jax", "jaxlib", "flax", "device", "date"), (str,)), "cores": (int,)},
    "ledger": dict.fromkeys(Ledger().as_dict(), (int,)),
}
_FRACTION = re.compile(r"pck_\w+|(tolerance|confidence|agreement|accuracy)(_low|_high)?")


class SummaryError(ValueError):
    """A summary that breaks the contract; `problems` has every break."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"the summary breaks the contract in {len(problems)} places:", *problems]))


def validate(summary: Mapping[str, Any], rows: Mapping[str, Mapping[str, Types]] | None = None) -> None:
    """Raises a `SummaryError` that lists every break.

    Args:
        summary: plain JSON values.
        rows: lists of rows in the summary -> field -> types: each row has exactly these fields.
    """
    problems = list(_fields(summary, _SUMMARY, "summary"))
    for name, shape in _PARTS.items():
        if isinstance(part := summary.get(name), Mapping):
            problems += _fields(part, shape, name, exactly=True)
    if summary.get("schema") != SCHEMA:
        problems.append(f"schema: {summary.get('schema')}, expected {SCHEMA}")
    if isinstance(seconds := summary.get("seconds"), float | int) and seconds < 0:
        problems.append(f"seconds: {seconds} is negative")
    try:
        datetime.datetime.fromisoformat(summary["environment"]["date"])
    except ValueError:
        problems.append(f"environment.date: {summary['environment']['date']!r} is not an ISO 8601 date")
    except (KeyError, TypeError):  # missing or of a wrong type: named above
        pass
    shapes = {"rows": {}, **(rows or {})}
    for name, shape in shapes.items():
        listed = summary.get(name)
        for i, row in enumerate(listed if isinstance(listed, list) else ()):
            problems += _row(row, shape, f"{name}[{i}]")
    problems += _numbers({name: part for name, part in summary.items() if name != "config"}, "")
    if problems:
        raise SummaryError(problems)


def _fields(part: Mapping[str, Any], shape: Mapping[str, Types], path: str, exactly: bool = False) -> Iterator[str]:
    """Missing fields, wrong types, and unknown fields where it has to have exactly these."""
    for name, kinds in shape.items():
        if name not in part:
            yield f"{path}.{name}: missing"
        elif not any(_is(part[name], kind) for kind in kinds):
            names = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
            yield f"{path}.{name}: expected {names}, got {part[name]!r} ({type(part[name]).__name__})"
    yield from (f"{path}.{name}: unknown" for name in part if exactly and name not in shape)


def _row(row: Any, shape: Mapping[str, Types], path: str) -> Iterator[str]:
    if not isinstance(row, Mapping):
        yield f"{path}: a row is an object, not {type(row).__name__}"
        return
    for name, value in row.items():
        if isinstance(value, Mapping | list | tuple):
            yield f"{path}.{name}: rows are flat, this is a {type(value).__name__}"
    yield from _fields(row, shape, path, exactly=bool(shape))


def _is(value: Any, kind: type | None) -> bool:
    if kind is None or value is None:
        return value is kind
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, float | int if kind is float else kind)


def _numbers(value: Any, path: str) -> Iterator[str]:
    """Fractions outside [0, 1] and intervals upside down, anywhere inside."""
    if isinstance(value, list):
        for i, part in enumerate(value):
            yield from _numbers(part, f"{path}[{i}]")
    elif isinstance(value, Mapping):
        for name, number in value.items():
            yield from _numbers(number, where := f"{path}.{name}".removeprefix("."))
            if not _is(number, float):
                continue
            if _FRACTION.fullmatch(name) and not 0 <= number <= 1:
                yield f"{where}: {number} is no fraction in [0, 1]"
            high = value.get(name.removesuffix("_low") + "_high")
            if name.endswith("_low") and _is(high, float) and number > high:
                yield f"{where}: {number} lies above {name.removesuffix('_low')}_high, {high}"
