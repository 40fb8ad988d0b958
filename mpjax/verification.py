"""A compiled program against an op-by-op run of the same program, on real inputs: nobody gets one that was not compared.

XLA:CPU has been seen to miscompile silently (jaxlib 0.10.2: its YNN fusion returned wrong numbers for a chain of
convolution, depthwise convolution, pad, add, relu and max-pool), and by default it drops roundings to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mpjax.metrics import relative_error
from mpjax.models import Array, Batches, Model, check_batches

FLOAT32_LIMIT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The compiled program against an op-by-op run of the same program, worst over its outputs.

    Attributes:
        error: ‖difference‖₂ over ‖op-by-op run‖₂. At most `limit`.
        worst: largest difference over the largest number. At most `worst_limit`.
        distance: the op-by-op run's own `error` against float32; 0 for a float32 program.
        own_distance: the compiled program's. At least half of `distance`, at most twice.
        spread: `error` between op-by-op runs whose inputs differ by one float32 rounding.
        inputs: how many were compared.

    A float32 program may differ by 1e-4 in both senses; in its worst number by four times what the other inputs made of it, if
    that is more, up to 1e-3 (logits of a thousand next to zero amplify any order of sums). In a low-precision program the order
    of sums decides roundings, and one flipped rounding flips others after it: two right programs may be as far apart as each is
    from float32. So `limit` is a quarter of `distance` there, or twice `spread` where that is more, up to one and a half times
    `distance` (never below 1e-5), and no number may be further off than twice the furthest of those two comparisons. A program
    that drops its roundings is refused by `own_distance`, which is next to nothing.
    """

    error: float
    limit: float
    worst: float
    worst_limit: float
    distance: float
    own_distance: float
    spread: float
    inputs: int

    @property
    def agrees(self) -> bool:
        """Whether the program may be used."""
        near = bool(np.isfinite(self.worst)) and self.error <= self.limit and self.worst <= self.worst_limit
        if self.distance <= FLOAT32_LIMIT / 10:  # float32, or as good as that
            return near
        return near and self.distance / 2 <= self.own_distance <= 2 * self.distance


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """Op-by-op runs of a model, and how far from them a compiled program may be: see `Verification`."""

    batches: Batches
    outputs: tuple[Any, ...]
    truth: tuple[Any, ...]  # in float32
    limit: float
    worst_limit: float
    distance: float
    spread: float

    def verify(self, run: Callable[..., Any]) -> Verification:
        """`run(*inputs)` of a compiled program, on every batch."""
        found = [run(*batch) for batch in self.batches]
        error, worst = errors(found, self.outputs)
        return Verification(
            error=error,
            limit=self.limit,
            worst=worst,
            worst_limit=self.worst_limit,
            distance=self.distance,
            own_distance=errors(found, self.truth)[0] if self.distance else 0.0,
            spread=self.spread,
            inputs=len(self.batches),
        )


class MiscompiledError(RuntimeError):
    """The compiled program disagrees with an op-by-op run of the same program, with every option that was tried."""


def stepwise(model: Model, batches: Batches) -> Stepwise:
    """Run a model op by op, in its formats and in float32.

    Args:
        model: float32 or made by `apply`.
        batches: at least two different input tuples of equal shapes.

    Raises:
        ValueError: fewer.
    """
    check_inputs(batches)
    low = model.original is not None and any(name != "float32" for name in (model.assignment or {}).values())
    with jax.disable_jit():
        outputs = tuple(model.call(model.params, *batch) for batch in batches)
        nudged = [model.call(model.params, *map(_nudge, batch)) for batch in batches]
        truth = outputs
        if low and model.original is not None:
            truth = tuple(model.original.call(model.original.params, *batch) for batch in batches)
    (spread, worst_spread), (distance, worst_distance) = errors(nudged, outputs), errors(outputs, truth)
    if low:
        limit = max(FLOAT32_LIMIT / 10, distance / 4, min(2 * spread, 1.5 * distance))
        worst_limit = max(FLOAT32_LIMIT, 2 * worst_distance, 2 * worst_spread)
    else:
        limit, worst_limit = FLOAT32_LIMIT, max(FLOAT32_LIMIT, min(4 * worst_spread, 10 * FLOAT32_LIMIT))
    return Stepwise(
        batches=batches,
        outputs=outputs,
        truth=truth,
        limit=limit,
        worst_limit=worst_limit,
        distance=distance,
        spread=spread,
    )


def check_inputs(batches: Batches) -> None:
    """Refuse fewer than two different inputs.

    Raises:
        ValueError: says what was found.
    """
    check_batches(batches)
    if len(batches) < 2:
        raise ValueError(f"Expected at least two real inputs to verify the program on, found {len(batches)}.")
    if all(np.array_equal(a, b) for batch in batches[1:] for a, b in zip(batches[0], batch, strict=True)):
        raise ValueError("Expected at least two different inputs to verify the program on, found the same one again.")


def errors(found: Sequence[Any], expected: Sequence[Any]) -> tuple[float, float]:
    """Relative errors by the 2-norm and by the largest number, each the worst over outputs and runs.

    Infinite where NaN or ±inf stand in other places.
    """
    error = worst = 0.0
    for a, b in zip(jax.tree.leaves(list(found)), jax.tree.leaves(list(expected)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
            return float("inf"), float("inf")
        if finite.any():
            worst = max(worst, relative_error(a[finite], b[finite]))
            norm = float(np.linalg.norm(b[finite]))
            error = max(error, float(np.linalg.norm(a[finite] - b[finite])) / (norm or 1.0))
    return error, worst


def _nudge(x: Array) -> Array:
    """`x` with every second number one float32 rounding away; other dtypes as they are."""
    if x.dtype != np.float32:
        return x
    values = np.array(x)
    values.flat[::2] = np.nextafter(values.flat[::2], np.float32(np.inf))
    return jax.numpy.asarray(values)
