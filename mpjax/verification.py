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

from mpjax import apply
from mpjax.metrics import relative_error
from mpjax.models import Array, Batches, Model, check_batches

FLOAT32_LIMIT = 1e-4
_AS_GOOD_AS_FLOAT32 = 1e-5
_ONE_ROUNDING = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The compiled program against an op-by-op run of the same model, on real inputs.

    Attributes:
        error: ‖difference‖₂ over ‖op-by-op run‖₂, of the output nearest to its limit. At most `limit`.
        worst: largest difference over the largest number, likewise. At most `worst_limit`.
        distance: the op-by-op run's own `error` against float32, the largest; 0 for a float32 program.
        own_distance: the compiled program's. At least half of `distance`, at most twice.
        usual_distance: `distance` of the same formats computed in the model's own ways. `distance` is at most three times that.
        spread: `error` between op-by-op runs whose inputs differ by one float32 rounding, the largest; whose float32 weights do,
            where the inputs make no difference (token numbers, an empty cache).
        inputs: how many were compared.

    A float32 program is compared with the user's model, not with its own lowering, and may differ by 1e-4 in both senses; in its
    worst number by four times what the other inputs made of it, if that is more, up to 1e-3 (logits of a thousand next to zero
    amplify any order of sums). The same holds for outputs of a low-precision program that no lowered layer reaches. In the others
    the order of sums decides roundings, and one flipped rounding flips others after it: two right programs may be as far apart as
    each is from float32. So `limit` is a quarter of `distance` there, or twice `spread` where that is more, up to one and a half
    times `distance` (never below 1e-5), and no number may be further off than twice the furthest of those two comparisons. A
    program that drops its roundings is refused by `own_distance`, which is next to nothing; a way that computes something else by
    `usual_distance`.

    Where float32 and a format disagree about what is finite (an overflow), those numbers count in none of the distances; the
    compiled program has to have them where the op-by-op run has.
    """

    error: float
    limit: float
    worst: float
    worst_limit: float
    distance: float
    own_distance: float
    usual_distance: float
    spread: float
    inputs: int

    @property
    def agrees(self) -> bool:
        """Whether the program may be used."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why not; empty where it may."""
        if not np.isfinite(self.worst):
            return "NaN or infinity stand in other places"
        if self.error > self.limit:
            return f"differs by {self.error:.2g} (2-norm; at most {self.limit:.2g})"
        if self.worst > self.worst_limit:
            return f"one number differs by {self.worst:.2g} of the largest (at most {self.worst_limit:.2g})"
        if self.distance <= _AS_GOOD_AS_FLOAT32:
            return ""
        if not self.distance / 2 <= self.own_distance <= 2 * self.distance:
            return f"is {self.own_distance:.2g} from float32, its op-by-op run {self.distance:.2g}: other roundings"
        if self.distance > 3 * self.usual_distance:
            return f"its ways are {self.distance:.2g} from float32, the model's own in these formats {self.usual_distance:.2g}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """Op-by-op runs of a model, and how far from them a compiled program may be: see `Verification`.

    `outputs`: what the program has to agree with; `truth`: in float32. `limits`: of error and of the worst number, per output.
    """

    batches: Batches
    outputs: tuple[Any, ...]
    truth: tuple[Any, ...]
    limits: tuple[tuple[float, float], ...]
    distance: float
    usual_distance: float
    spread: float

    def verify(self, run: Callable[..., Any]) -> Verification:
        """`run(*inputs)` of a compiled program, on every batch."""
        found = [run(*batch) for batch in self.batches]
        each = by_output(found, self.outputs)
        error, limit = max(zip((e for e, _ in each), (e for e, _ in self.limits), strict=True), key=_nearness)
        worst, worst_limit = max(zip((w for _, w in each), (w for _, w in self.limits), strict=True), key=_nearness)
        return Verification(
            error=error,
            limit=limit,
            worst=worst,
            worst_limit=worst_limit,
            distance=self.distance,
            own_distance=_largest(by_output(found, self.truth, overflows=True))[0] if self.distance else 0.0,
            usual_distance=self.usual_distance,
            spread=self.spread,
            inputs=len(self.batches),
        )


class MiscompiledError(RuntimeError):
    """The compiled program disagrees with an op-by-op run of the same program, with every option that was tried."""


def stepwise(model: Model, batches: Batches) -> Stepwise:
    """Run a model op by op: in its formats, in float32, and in its own ways where it was lowered.

    Args:
        model: float32 or made by `apply`.
        batches: at least two different input tuples of equal shapes.

    Raises:
        ValueError: fewer.
    """
    check_inputs(batches)
    formats = {model.attention, *(model.assignment or {}).values()} - {"float32"}
    low = model.original is not None and bool(formats)
    original = model.original or model
    expected = model if low else original  # a float32 program has to agree with what the user gave
    own = apply.lowered(model, "own") if low and model.lowering != "own" else None

    def run(each: Model, inputs: Change = _unchanged, weights: Change = _unchanged) -> tuple[Any, ...]:
        params = jax.tree.map(weights, each.params)
        with jax.disable_jit():
            return tuple(each.call(params, *map(inputs, batch)) for batch in batches)

    outputs = run(expected)
    truth = run(original) if low else outputs
    distances = by_output(outputs, truth, overflows=True)
    floats = any(np.asarray(each).dtype == np.float32 for each in batches[0])
    spreads = by_output(run(expected, inputs=_nudge), outputs, overflows=True) if floats else ()
    if _largest(spreads)[0] < _ONE_ROUNDING:
        spreads = by_output(run(expected, weights=_nudge), outputs, overflows=True)
    (distance, worst_distance), (spread, worst_spread) = _largest(distances), _largest(spreads)
    loose = (
        max(_AS_GOOD_AS_FLOAT32, distance / 4, min(2 * spread, 1.5 * distance)),
        max(FLOAT32_LIMIT, 2 * worst_distance, 2 * worst_spread),
    )
    limits = tuple(
        (FLOAT32_LIMIT, max(FLOAT32_LIMIT, min(4 * worst, 10 * FLOAT32_LIMIT))) if far <= _AS_GOOD_AS_FLOAT32 else loose
        for (far, _), (_, worst) in zip(distances, spreads, strict=True)
    )
    usual = distance if own is None else _largest(by_output(run(own), truth, overflows=True))[0]
    return Stepwise(
        batches=batches,
        outputs=outputs,
        truth=truth,
        limits=limits,
        distance=distance,
        usual_distance=usual,
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


def by_output(
    found: Sequence[Any], expected: Sequence[Any], *, overflows: bool = False
) -> tuple[tuple[float, float], ...]:
    """Relative errors by the 2-norm and by the largest number, of each output (leaf), the worst over runs.

    Infinite where NaN or ±inf stand in other places; with `overflows`, only numbers that are finite in both are compared.
    """
    pairs = [zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True) for a, b in zip(found, expected, strict=True)]
    each = [[_error(np.asarray(a), np.asarray(b), overflows) for a, b in pair] for pair in pairs]
    return tuple((max(e for e, _ in runs), max(w for _, w in runs)) for runs in zip(*each, strict=True))


def errors(found: Sequence[Any], expected: Sequence[Any]) -> tuple[float, float]:
    """The same, the worst over outputs as well."""
    return _largest(by_output(found, expected))


def _error(a: np.ndarray, b: np.ndarray, overflows: bool) -> tuple[float, float]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    if overflows:
        finite &= np.isfinite(a)
    elif not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf"), float("inf")
    if not finite.any():
        return 0.0, 0.0
    norm = float(np.linalg.norm(b[finite]))
    return float(np.linalg.norm(a[finite] - b[finite])) / (norm or 1.0), relative_error(a[finite], b[finite])


def _largest(each: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return max((e for e, _ in each), default=0.0), max((w for _, w in each), default=0.0)


def _nearness(pair: tuple[float, float]) -> float:
    """An error over its limit."""
    return pair[0] / pair[1]


Change = Callable[[Array], Array]


def _unchanged(x: Array) -> Array:
    return x


def _nudge(x: Array) -> Array:
    """`x` with every second number one float32 rounding away; other dtypes as they are."""
    if x.dtype != np.float32:
        return x
    values = np.array(x)
    values.flat[::2] = np.nextafter(values.flat[::2], np.float32(np.inf))
    return jax.numpy.asarray(values)
