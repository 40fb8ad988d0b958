"""A model in words: what formats can lower of it, and what stays as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpjax.program.model import Model

UNUSED = "not used with these inputs"


def summary(model: Model) -> str:
    """The share of the weights that formats can lower, a table of the layers, and what stays as it is, with its share."""
    layers, others = model.layers, [other for other in model.others if other.reason != "bias"]
    weights = sum(layer.weights for layer in layers)
    used = [math.prod(other.shape) for other in model.others if other.reason != UNUSED and not other.folded]
    every = weights + sum(used)
    flops = sum(layer.flops for layer in layers)
    rows = [
        (
            layer.name,
            f"{layer.kind} ({layer.module})" if layer.module else layer.kind,
            _by(layer.kernel_shape),
            _by(layer.output_shape),
            str(layer.groups),
            str(layer.calls),
            f"{layer.weights:,}",
            f"{layer.weights * 4 / 1024:.1f}",
            f"{layer.flops / 1e6:.2f}",
        )
        for layer in layers
    ]
    lines = [
        f"{len(rows)} layers hold {weights:,} of {every:,} weights ({weights / max(every, 1):.1%}), "
        f"{flops / 1e6:.1f} MFLOP per example",
        *_table(("layer", "kind", "kernel", "output", "groups", "calls", "weights", "KiB fp32", "MFLOP"), rows),
    ]
    if several := [layer.name for layer in layers if layer.calls > 1]:
        lines.append(
            f"{len(several)} of them run more than once (shared, or under a scan), always in one format: {_some(several)}."
        )
    if folded := [f"{layer.name} (of {', '.join(layer.sources[:4])})" for layer in layers if layer.folded]:
        lines.append(f"{len(folded)} of their weights are computed from parameters, once: {_some(folded)}.")
    if free := [layer.name for layer in model.activation_products if layer not in layers]:
        lines.append(
            f"{len(free)} products of two activations stay as they are unless an assignment names them: {_some(free)}."
        )
    if biases := len(model.others) - len(others):
        lines.append(f"{biases} biases of these layers stay as they are.")
    if others:
        shares = [f"{math.prod(other.shape) / max(every, 1):.1%}" for other in others]
        cells = [(e.path, _by(e.shape), share, e.owner, e.reason) for e, share in zip(others, shares, strict=True)]
        lines += [f"{len(others)} other parameters:", *_table(("parameter", "shape", "share", "owner", "why"), cells)]
    return "\n".join(lines)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    first, *lines = aligned([header, *rows])
    return [first, "-" * len(first), *lines]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row of cells, whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)) for row in rows]
