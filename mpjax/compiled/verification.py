"""A compiled program against its definition on real inputs: nobody gets one that was not compared.

XLA:CPU has been seen to miscompile silently (jaxlib 0.10.2: its YNN fusion returned wrong numbers for a chain of
convolution, depthwise convolution, pad, add, relu and max-pool), and by default it drops roundings to bfloat16.

Two programs are compiled without optimisation, once for each model: its formats emulated in float32 (`arithmetic.emulated`, the
definition that scores and searches look at), and float32 at the highest precision. With

    d  how far the emulation is from float32,
    n  how far float32 is from itself, where inputs and each product's activations are one rounding away,

a program is used if it is within 2 d + n of the emulation, and at least d / 2 from float32: each output, in the 2-norm and in its
largest number. Two right programs add up in other orders, which flips roundings, and a flipped rounding flips others after it, so
that they may be as far apart as each is from float32 (2 d); where nothing is low they differ by the noise of float32 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.apply import MixedModel, as_mixed
from mpjax.emulation import in_format
from mpjax.formats import FLOAT32, round_to
from mpjax.metrics import relative_error
from mpjax.program.model import Array, Batches, Layer, Model, Override, Product, check_batches
from mpjax.xla import executable

# A product's sums round oftener than its operands; what was seen is at most a quarter of this (docs/speed.md).
_NOISE, _LEAST = 16.0, 1e-5


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Between two sets of outputs: ‖a − b‖₂ / ‖b‖₂, and the largest difference over the largest number."""

    norm: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A compiled program against its definition on real inputs, at the output nearest to its limit.

    Attributes:
        error: ‖program − emulation‖₂ over ‖emulation‖₂; at most `limit` = 2 d + n.
        worst: largest difference over the largest number, likewise.
        distance: d, of the emulation to float32, the largest over outputs; 0 for a float32 program.
        own_distance: the program's own to float32, the largest over outputs.
        noise: n, the largest over outputs.
        dropped: names of outputs whose distance to float32 is less than half of the emulation's: roundings were dropped.
        not_finite: share of output numbers that are not finite though float32's are; the same in program and emulation.
        inputs: how many were compared.
    """

    error: float
    limit: float
    worst: float
    worst_limit: float
    distance: float
    own_distance: float
    noise: float
    inputs: int
    dropped: tuple[str, ...] = ()
    not_finite: float = 0.0

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
        if self.dropped:
            return (
                f"is {self.own_distance:.2g} from float32, its definition {self.distance:.2g} ({self.dropped[0]}): "
                "roundings were dropped"
            )
        return ""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a model's programs are compared with.

    `expected`: outputs of its formats, emulated; `truth`: in float32; `distances`, `noise`: per output.
    """

    batches: Batches
    expected: tuple[Any, ...]
    truth: tuple[Any, ...]
    distances: tuple[Distance, ...]
    noise: tuple[Distance, ...]

    def verify(self, run: Callable[..., Any]) -> Verification:
        """`run(*inputs)` of a compiled program, on every batch."""
        found = [run(*batch) for batch in self.batches]
        errors = by_output(found, self.expected)
        own = by_output(found, self.truth, overflows=True)
        limits = [
            Distance(norm=2 * d.norm + n.norm, worst=2 * d.worst + n.worst)
            for d, n in zip(self.distances, self.noise, strict=True)
        ]
        pairs = list(zip(errors, limits, strict=True))
        error, limit = max(((e.norm, m.norm) for e, m in pairs), key=_nearness)
        worst, worst_limit = max(((e.worst, m.worst) for e, m in pairs), key=_nearness)
        dropped = [
            name
            for name, d, mine, n in zip(names_of(self.expected[0]), self.distances, own, self.noise, strict=True)
            if mine.norm < d.norm / 2 and d.norm > n.norm
        ]
        return Verification(
            error=error,
            limit=limit,
            worst=worst,
            worst_limit=worst_limit,
            distance=max(d.norm for d in self.distances),
            own_distance=max(each.norm for each in own),
            noise=max(n.norm for n in self.noise),
            inputs=len(self.batches),
            dropped=tuple(dropped),
            not_finite=_overflown(found, self.truth),
        )


class MiscompiledError(RuntimeError):
    """The compiled program disagrees with its definition, with every option that was tried."""


def reference(model: Model, batches: Batches) -> Reference:
    """Compile a model's definition without optimisation, and run it.

    Args:
        model: float32 or made by `apply`.
        batches: at least two different input tuples of equal shapes.

    Raises:
        ValueError: fewer.
    """
    check_inputs(batches)
    model = as_mixed(model)
    original, formats, layers = model.original, model.formats, model.assigned
    low = any(fmt != FLOAT32 for fmt in formats.values())

    def outputs(override: Callable[[Array], Override], precision: str | None, *amounts: float) -> list[tuple[Any, ...]]:
        with jax.default_matmul_precision(precision):
            program = executable.build(
                lambda params, n, *inputs: original.call(
                    params, *jax.tree.map(lambda x: _moved(x, n), inputs), override=override(n), layers=layers
                ),
                (original.params, jnp.float32(0), *batches[0]),
                executable.PLAIN,
            )
        return [tuple(program(original.params, jnp.float32(n), *batch) for batch in batches) for n in amounts]

    truth, nudged = outputs(_nudged, "highest", 0, 1)
    spread = by_output(nudged, truth, overflows=True)
    noise = tuple(
        Distance(norm=max(_NOISE * each.norm, _LEAST), worst=max(_NOISE * each.worst, _LEAST)) for each in spread
    )
    if low or jax.default_backend() != "cpu":  # elsewhere float32's own products may be narrower by default
        (expected,) = outputs(lambda _: _definition(model), None, 0)
    else:
        expected = truth
    distances = by_output(expected, truth, overflows=True)
    return Reference(batches=batches, expected=expected, truth=truth, distances=distances, noise=noise)


def _definition(model: MixedModel) -> Override:
    formats = model.formats
    emulation = in_format(formats, calibration=model.calibration)

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        out = emulation(layer, product, lhs, rhs)
        low = formats.get(layer.name, FLOAT32) != FLOAT32 and model.activations != "float32"
        return round_to(out.astype(jnp.float32), model.activations) if low else out

    return override


def check_inputs(batches: Batches) -> None:
    """Refuse fewer than two different inputs.

    Raises:
        ValueError: says what was found.
    """
    if not isinstance(batches, Sequence) or any(not isinstance(batch, tuple) for batch in batches):
        check_batches(batches)
    if len(batches) < 2:
        raise ValueError(f"Expected at least two real inputs to verify the program on, found {len(batches)}.")
    leaves = [jax.tree.leaves(batch) for batch in batches]
    shapes = [[np.shape(each) for each in batch] for batch in leaves]
    if any(each != shapes[0] for each in shapes):
        raise ValueError(f"Expected inputs of equal shapes, found {shapes}: compile once for each.")
    same = (bool(jnp.all(a == b)) for batch in leaves[1:] for a, b in zip(leaves[0], batch, strict=True))
    if all(same):
        raise ValueError("Expected at least two different inputs to verify the program on, found the same one again.")


def names_of(outputs: Any) -> list[str]:
    """Path of each output that is compared."""
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    named = [(jax.tree_util.keystr(keys, simple=True, separator="/") or "output", leaf) for keys, leaf in leaves]
    return [name for name, leaf in named if _compared(leaf, [each for _, each in named])]


def by_output(found: Sequence[Any], expected: Sequence[Any], *, overflows: bool = False) -> tuple[Distance, ...]:
    """Distances of each output (leaf), the largest over runs; of floating-point outputs, where there are any.

    Infinite where NaN or ±inf stand in other places; with `overflows`, only numbers that are finite in both are compared.
    """
    each = []
    for a, b in zip(found, expected, strict=True):
        leaves = jax.tree.leaves(b)
        pairs = zip(jax.tree.leaves(a), leaves, strict=True)
        each.append([_error(np.asarray(x), np.asarray(y), overflows) for x, y in pairs if _compared(y, leaves)])
    return tuple(
        Distance(norm=max(e.norm for e in runs), worst=max(e.worst for e in runs)) for runs in zip(*each, strict=True)
    )


def errors(found: Sequence[Any], expected: Sequence[Any]) -> tuple[float, float]:
    """(2-norm, worst number) of the same, the largest over outputs."""
    each = by_output(found, expected)
    return max((e.norm for e in each), default=0.0), max((e.worst for e in each), default=0.0)


def _compared(leaf: Any, leaves: Sequence[Any]) -> bool:
    """Integers and booleans may flip where two numbers are near each other: only where there is nothing else."""
    inexact = [np.issubdtype(each.dtype, np.inexact) or "float" in str(each.dtype) for each in leaves]
    return not any(inexact) or np.issubdtype(leaf.dtype, np.inexact) or "float" in str(leaf.dtype)


def _error(a: np.ndarray, b: np.ndarray, overflows: bool) -> Distance:
    wide = np.complex128 if np.iscomplexobj(b) else np.float64
    a, b = (np.ascontiguousarray(each.astype(wide)).reshape(-1).view(np.float64) for each in (a, b))
    finite = np.isfinite(b)
    if overflows:
        finite &= np.isfinite(a)
    elif not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return Distance(norm=float("inf"), worst=float("inf"))
    if not finite.any():
        return Distance(norm=0.0, worst=0.0)
    norm = float(np.linalg.norm(b[finite]))
    return Distance(
        norm=float(np.linalg.norm(a[finite] - b[finite])) / (norm or 1.0), worst=relative_error(a[finite], b[finite])
    )


def _overflown(found: Sequence[Any], truth: Sequence[Any]) -> float:
    """Share of numbers that are finite in float32 and not in the program."""
    pairs = [
        (np.asarray(a), np.asarray(b))
        for one, other in zip(found, truth, strict=True)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        if jnp.issubdtype(b.dtype, jnp.inexact)
    ]
    lost = sum(int((np.isfinite(b) & ~np.isfinite(a)).sum()) for a, b in pairs)
    return lost / max(sum(a.size for a, _ in pairs), 1)


def _nearness(pair: tuple[float, float]) -> float:
    """An error over its limit."""
    return pair[0] / pair[1]


def _nudged(amount: Array) -> Override:
    """Float32 products whose activations (or rows that are looked up) are so many roundings away."""

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        return _moved(product(lhs, rhs), amount) if product.kind == "lookup" else product(_moved(lhs, amount), rhs)

    return override


def _moved(x: Array, amount: Array) -> Array:
    """Numbers so many roundings away, up and down in turns; what is no real number of floating point, as it is."""
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    sign = 1 - 2 * (lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) % 2)
    return x * (1 + amount.astype(x.dtype) * sign.astype(x.dtype) * float(jnp.finfo(x.dtype).eps)).astype(x.dtype)
