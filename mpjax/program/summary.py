"""A model in words: what formats can lower of it, and what stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpjax.program.product import Layer, OtherParameter

if TYPE_CHECKING:
    from mpjax.program.model import Model

UNUSED = "not used with these inputs"


def summary(model: Model) -> str:
    """The share of the weights that formats can lower, a table of the layers, and what stays as it is, with its share."""
    header = ("layer", "kind", "kernel", "output", "groups", "calls", "weights", "KiB fp32", "MFLOP")
    rows = [
        (
            layer.name,
            f"{layer.kind} ({layer.module})" if layer.module else layer.kind,
            "x".join(map(str, layer.kernel_shape)),
            "x".join(map(str, layer.output_shape)),
            str(layer.groups),
            str(layer.calls),
            f"{layer.weights:,}",
            f"{layer.weights * 4 / 1024:.1f}",
            f"{layer.flops / 1e6:.2f}",
        )
        for layer in model.layers
    ]
    weights = sum(layer.weights for layer in model.layers)
    every = weights + sum(
        int(np.prod(each.shape)) for each in model.others if each.reason != UNUSED and not each.folded
    )
    flops = sum(layer.flops for layer in model.layers)
    share = weights / max(every, 1)
    lines = [
        f"{len(rows)} layers hold {weights:,} of {every:,} weights ({share:.1%}), {flops / 1e6:.1f} MFLOP per example"
    ]
    lines += _text_table(header, rows)
    if several := [layer.name for layer in model.layers if layer.calls > 1]:
        lines.append(
            f"{len(several)} of them run more than once (shared, or under a scan), always in one format: {_some(several)}."
        )
    if computed := [
        f"{layer.name} (of {', '.join(layer.sources[:4])})" for layer in model.layers if _is_folded(layer, model.others)
    ]:
        lines.append(f"{len(computed)} of their weights are computed from parameters, once: {_some(computed)}.")
    if free := [layer.name for layer in model.activation_products if layer not in model.layers]:
        lines.append(
            f"{len(free)} products of two activations stay as they are unless an assignment names them: {_some(free)}."
        )
    biases = sum(each.reason == "bias" for each in model.others)
    if biases:
        lines.append(f"{biases} biases of these layers stay as they are.")
    others = [
        (e.path, "x".join(map(str, e.shape)), f"{np.prod(e.shape) / max(every, 1):.1%}", e.owner, e.reason)
        for e in model.others
        if e.reason != "bias"
    ]
    if others:
        lines.append(f"{len(others)} other parameters:")
        lines += _text_table(("parameter", "shape", "share", "owner", "why"), others)
    return "\n".join(lines)


def _is_folded(layer: Layer, others: Sequence[OtherParameter]) -> bool:
    """Whether a layer's weight is computed: its sources are then no weights themselves."""
    return bool(layer.kernel) and (layer.sources != (layer.kernel,) or any(e.path == layer.kernel for e in others))


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"


def _text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
