"""Read an optimised HLO program: which dtypes each layer's arithmetic really runs in.

What a compiled program runs in is only known from its optimised HLO: XLA may convert narrow operands up before a product.
Layers are found by their named scope in the instructions' `op_name` metadata.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "s8": "int8",
    "s32": "int32",
}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(?[a-z]\w*\[).*")
_OPCODE = re.compile(r"(?:[\])}>]|\)) (?P<opcode>[a-z][\w\-]*)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TYPE = re.compile(r"\b(pred|[suf]\d+\w*|bf16)\[")
_SHAPE = re.compile(r"\b(?P<dtype>pred|[suf]\d+\w*|bf16)\[(?P<sizes>[\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_PRODUCTS = ("convolution", "dot")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One HLO instruction: its opcode, result dtype, operands' dtypes and the scope it came from."""

    name: str
    opcode: str
    dtype: str
    operand_dtypes: tuple[str, ...]
    scope: str


@dataclass(frozen=True, kw_only=True)
class Executed:
    """How one layer's product runs: "convolution", "dot", "custom-call" (a library), "gather" or "multiply" (multiply-adds).

    `operands` and `result` are dtype names joined by "+" where instructions differ; "unknown" where nothing was found.
    """

    layer: str
    opcode: str
    operands: str
    result: str


def instructions(text: str) -> tuple[Instruction, ...]:
    """All instructions of an HLO module's text, of every computation in it, fused ones too."""
    dtypes: dict[str, str] = {}  # names are unique in a module, so one table serves all computations
    parsed: list[tuple[str, str, str, str]] = []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        body = line.split(" = ", 1)[1]
        opcode = _OPCODE.search(body)
        if opcode is None:
            continue
        dtype = _dtype(_TYPE.search(body))
        dtypes[match["name"]] = dtype
        arguments = body[opcode.end() :].split("), ", 1)[0]
        op_name = _OP_NAME.search(body)
        parsed.append((match["name"], opcode["opcode"], arguments, op_name.group(1) if op_name else ""))
    return tuple(
        Instruction(
            name=name,
            opcode=opcode,
            dtype=dtypes[name],
            operand_dtypes=tuple(dtypes[each] for each in _OPERAND.findall(arguments) if each in dtypes),
            scope=scope,
        )
        for name, opcode, arguments, scope in parsed
    )


def executed_dtypes(text: str, layers: Sequence[str]) -> dict[str, Executed]:
    """Per layer, the dtypes of the product that the optimised program computes.

    A layer without a dot or convolution is read from its multiplications (depthwise convolutions as multiply-adds).
    """
    by_layer: dict[str, list[Instruction]] = {name: [] for name in layers}
    owner = _owner(layers)
    for each in instructions(text):
        if (name := owner(each.scope)) is not None:
            by_layer[name].append(each)
    return {name: _executed(name, found) for name, found in by_layer.items()}


def copied(text: str, sizes: Mapping[str, int], scope: str) -> set[str]:
    """Layers for which the program keeps an array of at least so many numbers in memory, made in a scope below the layer's.

    Args:
        text: of an optimised program.
        sizes: layer -> number of elements.
        scope: name of the scope.
    """
    found, inside = set(), ""
    fused = {match[1] for match in _CALLS.finditer(text)}  # what a fusion computes on the way is not kept
    patterns = {name: re.compile(rf"(?:^|/){re.escape(name)}/{re.escape(scope)}(?:/|$)") for name in sizes}
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            inside = head["name"]
        match, op_name = _INSTRUCTION.match(line), _OP_NAME.search(line)
        if match is None or op_name is None or inside in fused or scope not in op_name.group(1):
            continue
        shape = _SHAPE.search(line.split(" = ", 1)[1])
        count = math.prod(int(each) for each in shape["sizes"].split(",") if each) if shape else 0
        wide = shape is not None and shape["dtype"] in ("f32", "bf16", "f16")
        found |= {
            name for name, each in patterns.items() if wide and count >= sizes[name] and each.search(op_name.group(1))
        }
    return found


def owners(text: str, layers: Sequence[str]) -> dict[str, str | None]:
    """Instruction -> the layer it works for; None outside of layers.

    A fusion works for the layer that most of its multiplications and products belong to, or most of its instructions: what XLA
    fused to it (an activation, the next layer's padding) is often its last operation, and the last one gives a fusion its scope.
    """
    owner = _owner(layers)
    weights: dict[str, Counter[str]] = {}  # computation -> layer -> how much of it
    calls: dict[str, str] = {}
    found: dict[str, str | None] = {}
    inside = ""
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            inside = head["name"]
            continue
        for each in instructions(line):
            found[each.name] = name = owner(each.scope)
            if name is not None:
                heavy = each.opcode in (*_PRODUCTS, "multiply", "custom-call")
                weights.setdefault(inside, Counter())[name] += 1000 if heavy else 1
            if (called := _CALLS.search(line)) is not None:
                calls[each.name] = called[1]
    for name, computation in calls.items():
        if computation in weights:
            found[name] = weights[computation].most_common(1)[0][0]
    return found


def _owner(layers: Sequence[str]) -> Callable[[str], str | None]:
    """Scope -> layer, the longest name first."""
    ordered = sorted(layers, key=len, reverse=True)
    patterns = [(name, re.compile(rf"(?:^|/){re.escape(name)}(?:/|$)")) for name in ordered]

    @functools.cache
    def owner(scope: str) -> str | None:
        return next((name for name, pattern in patterns if pattern.search(scope)), None)

    return owner


def _executed(name: str, found: Iterable[Instruction]) -> Executed:
    found = [each for each in found if each.dtype in _DTYPES.values()]
    products = [each for each in found if each.opcode in _PRODUCTS]
    found = [each for each in found if not each.dtype.startswith("int")]  # positions and row numbers
    # Without a product of XLA's own the layer is a library's call, or written out as multiply-adds.
    products = products or [each for each in found if each.opcode == "custom-call"]
    products = products or [each for each in found if each.opcode == "gather"]  # of a table's rows
    products = products or [each for each in found if each.opcode == "multiply"]
    if not products:
        return Executed(layer=name, opcode="unknown", operands="unknown", result="unknown")
    indices = {"int32", "s64", "u32", "pred"}
    operands = {
        dtype for each in products for dtype in each.operand_dtypes if each.opcode != "gather" or dtype not in indices
    }
    return Executed(
        layer=name,
        opcode="+".join(sorted({each.opcode for each in products})),
        operands="+".join(sorted(operands)) or "unknown",
        result="+".join(sorted({each.dtype for each in products})),
    )


def _dtype(match: re.Match[str] | None) -> str:
    return "unknown" if match is None else _DTYPES.get(match.group(1), match.group(1))
