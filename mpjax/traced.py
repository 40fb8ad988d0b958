"""Traced programs: marks in them, how often the places that they mark run, and the scopes of their equations.

An override names a product's input (and output) by `checkpoint_name`, with `INPUT` (`OUTPUT`) and a number: the number of the
product in the order of tracing. What Flax traces more often than it runs is then not in the program, and counts nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

INPUT, OUTPUT = "mpjax layer input ", "mpjax layer output "


def count(jaxpr: Jaxpr, times: int, sizes: Sequence[int], runs: Counter[int]) -> None:
    """Adds to `runs` how often each marked product runs; `sizes`: elements of its input in one run."""
    for equation in jaxpr.eqns:
        mark, number = marker(equation)
        if mark == INPUT:
            elements = math.prod(getattr(equation.invars[0].aval, "shape", ()))  # more than one run's under vmap
            runs[number] += times * max(elements // sizes[number], 1)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for each in programs(equation.params):
            count(each, times * turns, sizes, runs)


def marker(equation: Any) -> tuple[str, int]:
    """Which of the two marks an equation is, and of which call; ("", 0) for all others."""
    text = str(equation.params.get("name", "")) if equation.primitive.name == "name" else ""
    for mark in (INPUT, OUTPUT):
        if text.startswith(mark):
            return mark, int(text.removeprefix(mark))
    return "", 0


def programs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs inside an equation."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr | Jaxpr):
                yield program(each)


def program(jaxpr: Any) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def inside(equation: Any) -> Iterator[tuple[str, ClosedJaxpr]]:
    """(parameter, program) of those that an equation itself runs; a tuple of branches is none."""
    for name, value in equation.params.items():
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield name, value if isinstance(value, ClosedJaxpr) else ClosedJaxpr(value, ())


def scope(equation: Any) -> AbstractContextManager[Any]:
    """The scope that an equation was traced in, so that a program that it is put into still names it."""
    name = str(equation.source_info.name_stack)
    return jax.named_scope(name) if name else nullcontext()
