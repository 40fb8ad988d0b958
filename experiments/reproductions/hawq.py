"""HAWQ-V3's 18 choices of 4 and 8 bits for ResNet18 and ResNet50, from its published numbers (hawq.json names the source).

A layer's penalty is its mean Hessian trace × ‖w − quantised w‖². Three costs (size, bit operations, latency on a T4), each
limited to a share of the way from all layers in 4 to all in 8 bits. The layers that a residual adds up share a width; the
first and last layers are left out. Values are as HAWQ's objective: the penalty less that of all layers in 4 bits.

Source: Yao et al., arXiv 2011.10680.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reproductions.rows import Row
from mpjax.search import Assignment, Problem, allocators

DATA = Path(__file__).with_name("hawq.json")
COSTS = ("modelsize", "bops", "latency")
SHARES = (0.75, 0.5, 0.25)


def rows() -> list[Row]:
    """A row for each model, cost and share."""
    data = json.loads(DATA.read_text())
    return [
        _row(name, model, cost, share) for name, model in data["models"].items() for cost in COSTS for share in SHARES
    ]


def finding(rows: Sequence[Row]) -> str:
    """How many of the published choices are ours, and what the others lack."""
    other = [row for row in rows if row.agreement < 1]
    lacks = "; ".join(f"{row.quantity}: {row.published:.5f} published, {row.ours:.5f} possible" for row in other)
    return f"HAWQ-V3: {len(rows) - len(other)} of {len(rows)} published choices are optimal ({lacks})."


def problem(model: dict[str, Any], cost: str) -> Problem:
    """Least penalty at a cost, over 4 and 8 bits alone."""
    trace, layers = np.array(model["trace"]), model["layers"]
    table = {
        "modelsize": np.outer(model["parameters"], [0.5, 1.0]),
        "bops": np.outer(model["operations"], [1 / 64, 1 / 16]),
        "latency": np.stack([model["latency_4bit"], model["latency_8bit"]], axis=1),
    }[cost]
    return Problem(
        layers=tuple(layers),
        formats=("int4", "int8"),
        penalty=np.stack([trace * model["norm_4bit"], trace * model["norm_8bit"]], axis=1),
        cost=table,
        objective="cost_min",
        float32=False,
        ties=tuple(tuple(layers[number] for number in tie) for tie in model["ties"]),
    )


def _row(name: str, model: dict[str, Any], cost: str, share: float) -> Row:
    choice = problem(model, cost)
    four, eight = (Assignment.uniform(choice.layers, fmt) for fmt in choice.formats)
    low, high = (choice.cost_of(choice.index(uniform)) or 0.0 for uniform in (four, eight))
    budget = low + share * (high - low)
    ours = allocators.ilp(choice, budget).index
    published = choice.index(
        {layer: f"int{bits}" for layer, bits in zip(choice.layers, model["bits"][f"{cost} {share}"], strict=True)}
    )
    in_four_bits = choice.penalty_of(choice.index(four))
    spent = choice.cost_of(published)
    differ = [layer for layer, a, b in zip(choice.layers, ours, published, strict=True) if a != b]
    return Row(
        source="arXiv 2011.10680",
        quantity=f"{name}, {cost} {share:g}",
        published=choice.penalty_of(published) - in_four_bits,
        ours=choice.penalty_of(ours) - in_four_bits,
        agreement=1 - len(differ) / len(ours),
        note=("the same widths" if not differ else f"{len(differ)} widths differ: {', '.join(differ)}")
        + ("" if spent is not None and spent <= budget * (1 + 1e-9) else "; the published choice exceeds the limit"),
    )
