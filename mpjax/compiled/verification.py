"""A compiled program against its definition on real inputs.

XLA:CPU has been seen to miscompile silently (jaxlib 0.10.2: its YNN fusion returned wrong numbers for a chain of
convolution, depthwise convolution, pad, add, relu and max-pool), and by default it drops roundings to bfloat16.

Two programs are compiled without optimisation: a model's formats emulated in float32 (`arithmetic.emulated`, the definition that
scores and searches use), and, once for all mixed models of an original, float32 at the highest precision. With

    d  the distance of the emulation to float32,
    n  the distance of float32 to itself with inputs and each product's activations moved by one rounding; or, if that is more,
       twice the distance of a backend's own float32 products, which may be narrower by default (TensorFloat-32),

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
from mpjax.program import Array, Batches, Layer, Model, Override, Product, check_batches
from mpjax.xla import executable

# A product's sums round oftener than its operands; what was seen is at most a quarter of this (docs/speed.md).
_NOISE, _LEAST = 16.0, 1e-5
_DEFAULT_NOISE = 2.0  # of the distance that a backend's default precision makes, where that is not float32's


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A compiled program against its definition on real inputs, at the output nearest to its limit.

    Attributes:
        error: ‖program − emulation‖₂ / ‖emulation‖₂; at most `limit` = 2 d + n.
        worst: largest difference over the largest number; at most `worst_limit`, likewise.
        distance: d, of the emulation to float32, the largest over outputs; 0 for a float32 program.
        program_distance: of the program to float32, the largest over outputs.
        noise: n, the largest over outputs.
        dropped: outputs whose distance to float32 is less than half of the emulation's: roundings were dropped.
        not_finite: share of output numbers that are not finite though float32's are; the same in program and emulation.
        inputs: number of inputs compared.
    """

    error: float
    limit: float
    worst: float
    worst_limit: float
    distance: float
    program_distance: float
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
        """Why the program may not be used; empty where it may."""
        if not np.isfinite(self.worst):
            return "NaN or infinity stand in other places"
        if self.error > self.limit:
            return f"differs by {self.error:.2g} (2-norm; at most {self.limit:.2g})"
        if self.worst > self.worst_limit:
            return f"one number differs by {self.worst:.2g} of the largest (at most {self.worst_limit:.2g})"
        if self.dropped:
            return (
                f"is {self.program_distance:.2g} from float32, its definition {self.distance:.2g} ({self.dropped[0]}): "
                "roundings were dropped"
            )
        return ""


class MiscompiledError(RuntimeError):
    """The compiled program disagrees with its definition, with every option that was tried."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a model's programs are compared with.

    `expected`: outputs of its formats, emulated; `truth`: in float32; `distances`, `noise`: (outputs, 2), as `by_output`.
    """

    batches: Batches
    expected: tuple[Any, ...]
    truth: tuple[Any, ...]
    distances: np.ndarray
    noise: np.ndarray

    def verify(self, run: Callable[..., Any]) -> Verification:
        """Compare `run(*inputs)` of a compiled program, on every batch."""
        outputs = [run(*batch) for batch in self.batches]
        difference, limits = by_output(outputs, self.expected), 2 * self.distances + self.noise
        nearest = np.argmax(difference / limits, axis=0, keepdims=True)
        error, worst = np.take_along_axis(difference, nearest, axis=0)[0].tolist()
        limit, worst_limit = np.take_along_axis(limits, nearest, axis=0)[0].tolist()
        norms = by_output(outputs, self.truth, overflows=True)[:, 0]
        d, n = self.distances[:, 0], self.noise[:, 0]
        dropped = (norms < d / 2) & (d > n)
        return Verification(
            error=error,
            limit=limit,
            worst=worst,
            worst_limit=worst_limit,
            distance=float(d.max()),
            program_distance=float(norms.max()),
            noise=float(n.max()),
            inputs=len(self.batches),
            dropped=tuple(np.array(_names(self.expected[0]))[dropped].tolist()),
            not_finite=_overflown(outputs, self.truth),
        )


@dataclass(frozen=True, kw_only=True)
class Float32Outputs:
    """A float32 model's outputs on real inputs, which the programs of all its mixed models are compared with.

    `outputs`: at the highest precision; `default`: at the backend's own, the same on a CPU; `noise`: (outputs, 2), as
    `by_output`.
    """

    model: Model
    batches: Batches
    outputs: tuple[Any, ...]
    default: tuple[Any, ...]
    noise: np.ndarray


def float32_outputs(model: Model, batches: Batches) -> Float32Outputs:
    """Compile a float32 model without optimisation, and run it.

    Args:
        model: float32, or a mixed model, whose original is taken.
        batches: at least two different input tuples of equal shapes.

    Raises:
        ValueError: fewer.
    """
    check_inputs(batches)
    original = as_mixed(model).original
    with jax.default_matmul_precision("highest"):
        outputs, moved = _outputs(original, original.lowerable, _moved_activations, batches, (0, 1))
    noise = np.maximum(_NOISE * by_output(moved, outputs, overflows=True), _LEAST)
    default = outputs
    if jax.default_backend() != "cpu":  # float32's own products may be narrower by default, as TensorFloat-32 is
        (default,) = _outputs(original, original.layers, lambda _: _plainly, batches)
        noise = np.maximum(noise, _DEFAULT_NOISE * by_output(default, outputs, overflows=True))
    return Float32Outputs(model=original, batches=batches, outputs=outputs, default=default, noise=noise)


def reference(model: Model, batches: Batches, *, float32: Float32Outputs | None = None) -> Reference:
    """Compile a model's definition without optimisation, and run it.

    Args:
        model: float32 or made by `apply`.
        batches: at least two different input tuples of equal shapes.
        float32: of its original on these batches, where they are known.

    Raises:
        ValueError: fewer, or outputs of another model or on other batches.
    """
    model = as_mixed(model)
    if float32 is None:
        float32 = float32_outputs(model, batches)
    elif float32.model is not model.original or float32.batches is not batches:
        raise ValueError("Expected float32_outputs of this model's original on these very batches, found others'.")
    expected = float32.default
    if any(fmt != FLOAT32 for fmt in model.formats.values()):
        (expected,) = _outputs(model.original, model.assigned, lambda _: _definition(model), batches)
    return Reference(
        batches=batches,
        expected=expected,
        truth=float32.outputs,
        distances=by_output(expected, float32.outputs, overflows=True),
        noise=float32.noise,
    )


def _outputs(
    original: Model,
    layers: Sequence[Layer],
    override: Callable[[Array], Override],
    batches: Batches,
    amounts: Sequence[float] = (0,),
) -> list[tuple[Any, ...]]:
    """For each amount by which inputs are moved, the outputs on each batch, with `override(amount)` in place of products."""

    def run(params: Any, amount: Array, *inputs: Array) -> Any:
        inputs = jax.tree.map(lambda x: _moved(x, amount), inputs)
        return original.call(params, *inputs, override=override(amount), layers=layers)

    program = executable.build(run, (original.params, np.float32(0), *batches[0]), executable.PLAIN)
    return [tuple(program(original.params, np.float32(n), *batch) for batch in batches) for n in amounts]


def _plainly(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
    return product(lhs, rhs)


def check_inputs(batches: Batches) -> None:
    """Refuse fewer than two different inputs.

    Raises:
        ValueError: names the difference to what is expected.
    """
    if not isinstance(batches, Sequence) or any(not isinstance(batch, tuple) for batch in batches):
        check_batches(batches)
    if len(batches) < 2:
        raise ValueError(f"Expected at least two real inputs to verify the program on, found {len(batches)}.")
    first, *others = [jax.tree.leaves(batch) for batch in batches]
    shapes = [[np.shape(leaf) for leaf in batch] for batch in (first, *others)]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"Expected inputs of equal shapes, found {shapes}: compile once for each.")
    if all(np.all(a == b) for batch in others for a, b in zip(first, batch, strict=True)):
        raise ValueError("Expected at least two different inputs to verify the program on, found the same one again.")


def by_output(outputs: Sequence[Any], expected: Sequence[Any], *, overflows: bool = False) -> np.ndarray:
    """(outputs, 2) distances of each output (leaf), the largest over runs: ‖a − b‖₂ / ‖b‖₂, and max |a − b| / max |b|.

    Only floating-point outputs are compared where there are any: integers and booleans may flip where two numbers are near each
    other. Infinite where NaN or ±inf stand in other places; with `overflows`, only numbers that are finite in both are compared.
    """
    runs = []
    for a, b in zip(outputs, expected, strict=True):
        leaves = jax.tree.leaves(b)
        pairs = zip(jax.tree.leaves(a), leaves, _compared(leaves), strict=True)
        runs.append([_distance(np.asarray(x), np.asarray(y), overflows) for x, y, compared in pairs if compared])
    return np.max(np.reshape(runs, (len(runs), -1, 2)), axis=0)


def errors(outputs: Sequence[Any], expected: Sequence[Any]) -> tuple[float, float]:
    """The two distances of `by_output`, the largest over outputs."""
    norm, worst = by_output(outputs, expected).max(axis=0, initial=0.0).tolist()
    return norm, worst


def _distance(a: np.ndarray, b: np.ndarray, overflows: bool) -> tuple[float, float]:
    wide = np.complex128 if np.iscomplexobj(b) else np.float64
    a, b = (np.ascontiguousarray(x.astype(wide)).reshape(-1).view(np.float64) for x in (a, b))
    finite = np.isfinite(b)
    if overflows:
        finite &= np.isfinite(a)
    elif not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf"), float("inf")
    if not finite.any():
        return 0.0, 0.0
    a, b = a[finite], b[finite]
    return float(np.linalg.norm(a - b)) / (float(np.linalg.norm(b)) or 1.0), relative_error(a, b)


def _compared(leaves: Sequence[Any]) -> list[bool]:
    inexact = [bool(jnp.issubdtype(leaf.dtype, jnp.inexact)) for leaf in leaves]
    return inexact if any(inexact) else [True] * len(leaves)


def _names(outputs: Any) -> list[str]:
    """Path of each output that is compared."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(outputs), strict=True)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") or "output" for path in paths)
    return [name for name, compared in zip(names, _compared(leaves), strict=True) if compared]


def _overflown(outputs: Sequence[Any], truth: Sequence[Any]) -> float:
    """Share of numbers that are finite in float32 and not in the program."""
    pairs = zip(jax.tree.leaves(list(outputs)), jax.tree.leaves(list(truth)), strict=True)
    lost = [np.isfinite(b) & ~np.isfinite(a) for a, b in pairs if jnp.issubdtype(b.dtype, jnp.inexact)]
    return sum(int(np.sum(x)) for x in lost) / max(sum(x.size for x in lost), 1)


def _definition(model: MixedModel) -> Override:
    formats = model.formats
    emulation = in_format(formats, calibration=model.calibration)

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        out = emulation(layer, product, lhs, rhs)
        low = formats.get(layer.name, FLOAT32) != FLOAT32 and model.activations != "float32"
        return round_to(out.astype(jnp.float32), model.activations) if low else out

    return override


def _moved_activations(amount: Array) -> Override:
    """Float32 products whose activations (or looked-up rows) are moved by so many roundings."""

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        return _moved(product(lhs, rhs), amount) if product.kind == "lookup" else product(_moved(lhs, amount), rhs)

    return override


def _moved(x: Array, amount: Array) -> Array:
    """Floating-point numbers moved by so many roundings, up and down in turns; scalars and other dtypes as they are."""
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    sign = 1 - 2 * (lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) % 2)
    return x * (1 + amount.astype(x.dtype) * sign.astype(x.dtype) * float(jnp.finfo(x.dtype).eps)).astype(x.dtype)
