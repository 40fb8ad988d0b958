"""Baseline: the search of TensorRT Polygraphy's `debug precision`, written from its description."""

from typing import Literal

from mpjax.search.problem import Problem
from mpjax.search.strategies.strategy import Probe, Strategy, bisect, only_format


def bisect_precision(*, direction: Literal["forward", "reverse"] = "forward") -> Strategy:
    """Baseline: the first n layers stay in float32 ("reverse": the last n), n bisected (Polygraphy's `debug precision`).

    No scores. Every layer before the last sensitive one stays in float32, needed or not. Needs one low format. Two differences
    to the tool: all layers low is tried as well, and the answer is the best that was measured.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse'; got {direction!r}")

    def strategy(problem: Problem, probe: Probe) -> None:
        low, count = only_format(problem, "bisect_precision"), len(problem.layers)

        def fails(wide: int) -> bool:
            layers = problem.layers[wide:] if direction == "forward" else problem.layers[: count - wide]
            end = "first" if direction == "forward" else "last"
            lowered = problem.baseline.replace(dict.fromkeys(layers, low))
            return not probe(lowered, f"the {end} {wide} layers in float32").accepted

        probe(problem.baseline, "all layers in float32")
        bisect(fails, -1, count)

    return strategy
