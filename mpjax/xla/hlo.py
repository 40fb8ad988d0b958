"""Read an optimised HLO program: which dtypes each layer's arithmetic really runs in.

What a compiled program runs in is only known from its optimised HLO: XLA may convert narrow operands up before a product.
Layers are recognised by their named scope in the instructions' `op_name` metadata.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
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
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<body>\(?[a-z]\w*\[.*)")
_TYPE = re.compile(r"\b(?P<dtype>pred|[suf]\d+\w*|bf16)\[(?P<sizes>[\d,]*)\]")
_OPCODE = re.compile(r"[\])}>] (?P<opcode>[a-z][\w\-]*)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_PRODUCTS = ("convolution", "dot")
_INDICES = ("int32", "s64", "u32", "pred")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One HLO instruction.

    `dtype`, `size` (number of elements) of the result, of a tuple's first member; `scope`: its `op_name`; `computation`: where it
    stands; `calls`: the computation that a fusion runs, or "".
    """

    name: str
    opcode: str
    dtype: str
    size: int
    operand_dtypes: tuple[str, ...]
    scope: str
    computation: str
    calls: str


@dataclass(frozen=True, kw_only=True)
class Executed:
    """How one layer's product runs: "convolution", "dot", "custom-call" (a library), "gather" or "multiply" (multiply-adds).

    `operands` and `result` are dtype names joined by "+" where instructions differ; "unknown" where there is no such instruction.
    """

    layer: str
    opcode: str
    operands: str
    result: str


def instructions(text: str) -> tuple[Instruction, ...]:
    """All instructions of an HLO module's text, those inside fusions included."""
    dtypes: dict[str, str] = {}  # names are unique in a module, and an operand stands before its use
    result = []
    computation = ""
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            computation = head["name"]
        match = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(match["body"]) if match else None
        if match is None or opcode is None:
            continue
        body, shape = match["body"], _TYPE.search(match["body"])
        operands = body[opcode.end() :].split("), ", 1)[0]
        scope, calls = _OP_NAME.search(body), _CALLS.search(body)
        dtypes[match["name"]] = _DTYPES.get(shape["dtype"], shape["dtype"]) if shape else "unknown"
        result.append(
            Instruction(
                name=match["name"],
                opcode=opcode["opcode"],
                dtype=dtypes[match["name"]],
                size=math.prod(map(int, filter(None, shape["sizes"].split(",")))) if shape else 0,
                operand_dtypes=tuple(dtypes[name] for name in _OPERAND.findall(operands) if name in dtypes),
                scope=scope[1] if scope else "",
                computation=computation,
                calls=calls[1] if calls else "",
            )
        )
    return tuple(result)


def executed_dtypes(text: str, layers: Sequence[str]) -> dict[str, Executed]:
    """Per layer, the dtypes of the product that the optimised program computes.

    A layer without a dot or convolution is read from its multiplications (depthwise convolutions as multiply-adds).
    """
    by_layer: dict[str, list[Instruction]] = {name: [] for name in layers}
    owner = _owner(layers)
    for instruction in instructions(text):
        if (name := owner(instruction.scope)) is not None:
            by_layer[name].append(instruction)
    return {name: _executed(name, members) for name, members in by_layer.items()}


def copied(text: str, sizes: Mapping[str, int], scope: str) -> set[str]:
    """Layers for which the program keeps a float array of at least so many numbers in memory, made in a scope below the layer's.

    Args:
        text: of an optimised program.
        sizes: layer -> number of elements.
        scope: name of the scope.
    """
    parsed = instructions(text)
    fused = {instruction.calls for instruction in parsed}  # intermediate results of a fusion stay in registers
    patterns = {name: re.compile(rf"(?:^|/){re.escape(name)}/{re.escape(scope)}(?:/|$)") for name in sizes}
    return {
        name
        for instruction in parsed
        if instruction.computation not in fused and instruction.dtype in ("float32", "bfloat16", "float16")
        for name, pattern in patterns.items()
        if instruction.size >= sizes[name] and pattern.search(instruction.scope)
    }


def owners(text: str, layers: Sequence[str]) -> dict[str, str | None]:
    """Instruction -> the layer it works for; None outside of layers.

    A fusion works for the layer that most of its multiplications and products belong to, or else most of its instructions: its
    last operation, which gives it its scope, is often another layer's (an activation, padding).
    """
    owner, parsed = _owner(layers), instructions(text)
    result = {instruction.name: owner(instruction.scope) for instruction in parsed}
    work: dict[str, Counter[str]] = defaultdict(Counter)  # computation -> layer -> how much of it
    for instruction in parsed:
        if (name := result[instruction.name]) is not None:
            heavy = instruction.opcode in (*_PRODUCTS, "multiply", "custom-call")
            work[instruction.computation][name] += 1000 if heavy else 1
    fusions = {instruction.name: instruction.calls for instruction in parsed if instruction.calls in work}
    return result | {name: work[computation].most_common(1)[0][0] for name, computation in fusions.items()}


def _owner(layers: Sequence[str]) -> Callable[[str], str | None]:
    """Scope -> layer, the longest name first."""
    ordered = sorted(layers, key=len, reverse=True)
    patterns = [(name, re.compile(rf"(?:^|/){re.escape(name)}(?:/|$)")) for name in ordered]

    @functools.cache
    def owner(scope: str) -> str | None:
        return next((name for name, pattern in patterns if pattern.search(scope)), None)

    return owner


def _executed(layer: str, members: Sequence[Instruction]) -> Executed:
    # Without a dot or convolution the layer is a library's call, a lookup of rows, or written out as multiply-adds.
    for opcodes in (_PRODUCTS, ("custom-call",), ("gather",), ("multiply",)):
        products = [
            instruction
            for instruction in members
            if instruction.opcode in opcodes
            and instruction.dtype in _DTYPES.values()
            and (opcodes == _PRODUCTS or not instruction.dtype.startswith("int"))  # positions and row numbers
        ]
        if products:
            break
    else:
        return Executed(layer=layer, opcode="unknown", operands="unknown", result="unknown")
    operands = {
        dtype
        for instruction in products
        for dtype in instruction.operand_dtypes
        if instruction.opcode != "gather" or dtype not in _INDICES
    }
    return Executed(
        layer=layer,
        opcode="+".join(sorted({instruction.opcode for instruction in products})),
        operands="+".join(sorted(operands)) or "unknown",
        result="+".join(sorted({instruction.dtype for instruction in products})),
    )
