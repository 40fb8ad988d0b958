"""What every estimator returns, and what all of them need: one score per (layer, format), its error and its cost.

A score of kind "loss" predicts (or, for `measured`, is) how much the loss grows per example when that layer alone takes
that format. A score of kind "ranking" only orders layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.formats import FLOAT32, Format, parse_all
from mpjax.formats.storage import round_weights
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss, flat, inexact, with_inexact
from mpjax.partition import Partition, select_all
from mpjax.program.model import Array, Batches, Model, Params, check_batches, with_output

Key = Array
Scorer = Callable[[Model, Batches, Sequence[str | Format], Key], "Scores"]
Kind = Literal["loss", "ranking"]

OK = "ok"
ZERO = "zero_by_construction"
NOT_FINITE = "not_finite"
OVERFLOW = "overflow"
INDEFINITE = "indefinite"
UNCONVERGED = "unconverged"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of L layers in F formats.

    Attributes:
        estimator: the factory's name with its knobs in brackets, `trace[hutchinson,joint]`.
        loss: name of the loss that the score is about; "none" for baselines that need none.
        value: (L, F) float64; a score that is not finite is +inf, so it ranks as most sensitive.
        stderr: (L, F) standard error from the random probes (0 where there are none, NaN where it cannot be told).
        residual: (L, F) error that more probes do not shrink, in the unit of `value`: Lanczos residual, depth
            doubling; 0 where there is none.
        layers, formats: names.
        kind: "loss" (may be summed) or "ranking" (only the order means something).
        status: (L, F) strings: "ok"; "zero_by_construction" (nothing that the score sees changes); "not_finite";
            "overflow" (beyond float16's range); "indefinite" (a predicted loss below 0: no optimum, or too few
            probes); "unconverged" (a Lanczos residual above a tenth of the value). The last two keep their value.
        ledger: passes used.
        seconds, compile_seconds: running time without, and of, compilation.
        peak_mb: largest program by XLA's memory analysis (temporaries, arguments and outputs), 10⁶ bytes.
    """

    estimator: str
    loss: str
    value: np.ndarray
    stderr: np.ndarray
    residual: np.ndarray
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    kind: Kind
    status: np.ndarray
    ledger: Ledger
    seconds: float
    compile_seconds: float
    peak_mb: float

    def column(self, fmt: str) -> np.ndarray:
        """(L,) scores of one format."""
        return self.value[:, self._position(fmt)]

    def statuses(self, fmt: str) -> np.ndarray:
        """(L,) status of one format."""
        return self.status[:, self._position(fmt)]

    def ranking(self, fmt: str) -> tuple[str, ...]:
        """Layers from least to most sensitive; ties in execution order."""
        return tuple(self.layers[i] for i in np.argsort(self.column(fmt), kind="stable"))

    def _position(self, fmt: str) -> int:
        if fmt not in self.formats:
            raise ValueError(f"No scores for format {fmt!r}; these are for {', '.join(self.formats)}.")
        return self.formats.index(fmt)


def pack(scores: Scores) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Scores as (arrays, plain-JSON notes), for a checkpoint."""
    arrays = {name: getattr(scores, name) for name in ("value", "stderr", "residual", "status")}
    names = ("estimator", "loss", "kind", "seconds", "compile_seconds", "peak_mb")
    notes = {name: getattr(scores, name) for name in names}
    return arrays, notes | {
        "layers": list(scores.layers),
        "formats": list(scores.formats),
        "ledger": scores.ledger.as_dict(),
    }


def unpack(arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> Scores:
    """The inverse of `pack`; further notes are ignored."""
    return Scores(
        estimator=notes["estimator"],
        loss=notes["loss"],
        value=arrays["value"],
        stderr=arrays["stderr"],
        residual=arrays["residual"],
        layers=tuple(notes["layers"]),
        formats=tuple(notes["formats"]),
        kind=notes["kind"],
        status=arrays["status"],
        ledger=Ledger(**notes["ledger"]),
        seconds=notes["seconds"],
        compile_seconds=notes["compile_seconds"],
        peak_mb=notes["peak_mb"],
    )


class Timed:
    """Jitted functions that keep the seconds of compiling and of running apart, and know the memory they take."""

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self.seconds = 0.0
        self.peak_mb = 0.0
        self.compilations = 0
        self.forward = 0  # forward passes of examples on the side: calibration

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Adds the seconds of what is done on the host."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """The function, compiled ahead of time once per shapes of its arguments."""
        jitted = jax.jit(function, **options)
        programs: dict[Any, Any] = {}

        def run(*args: Any) -> Any:
            shapes = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), args)
            key = (jax.tree.structure(args), tuple(map(str, jax.tree.leaves(shapes, is_leaf=_is_shape))))
            start = time.perf_counter()
            if key not in programs:
                programs[key] = _lowered(jitted, args).compile()
                self.compilations += 1
                self.compile_seconds += time.perf_counter() - start
                self.peak_mb = max(self.peak_mb, _peak_mb(programs[key]))
                start = time.perf_counter()
            out = jax.block_until_ready(programs[key](*args))
            self.seconds += time.perf_counter() - start
            return out

        return run


def _lowered(jitted: Any, args: Sequence[Any]) -> Any:
    """The program, or why there is none for what the model contains."""
    try:
        return jitted.lower(*args)
    except (TypeError, ValueError) as error:
        if "custom_vjp" in str(error):
            raise ValueError(
                "The model contains a custom_vjp function, which has no forward-mode derivative (jvp): this score needs one. Use "
                "quadratic(hessian='true'), gauss_newton() or local_rounding()."
            ) from error
        if "Reverse-mode differentiation does not work for lax.while_loop" in str(error):
            raise ValueError(
                "The model contains a while_loop, which has no reverse-mode derivative: this score needs one. Use measured() or "
                "quadratic(), or write the loop as a scan."
            ) from error
        raise


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and len(node) == 2 and isinstance(node[0], tuple)


def _peak_mb(program: Any) -> float:
    memory = program.memory_analysis()
    if memory is None:  # a backend without one
        return 0.0
    return (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes) / 1e6


def examples_in(batches: Batches) -> int:
    """Number of examples in all batches."""
    return sum(batch[0].shape[0] for batch in batches)


def prepare(batches: Batches, formats: Sequence[str | Format], loss: Loss) -> tuple[Format, ...]:
    """The parsed formats, after the batches were checked.

    Raises:
        ValueError: ragged or empty batches, batches without the loss's targets, unknown or repeated formats.
    """
    low = parse_all(formats)
    for batch in check_batches(batches):
        loss.split(batch)
    return low


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What rounding does to the weights.

    `deltas`: for each format path -> rounded weights − weights, in the weights' dtype. `squares`: (L, F) ‖δ‖² of each block.
    `unchanged`: (L, F) True where no weight changes. `overflowed`: (L, F) True where a
    finite weight lies beyond the format's range and becomes infinite.
    """

    deltas: tuple[dict[str, Array], ...]
    squares: np.ndarray
    unchanged: np.ndarray
    overflowed: np.ndarray


def rounding_of(params: Params, blocks: Partition, formats: Sequence[Format], timed: Timed | None = None) -> Rounding:
    """The rounding errors of every block's weights in every format (with scales where a format has them: `quantized`)."""
    timed = timed or Timed()
    leaves = select_all(params, blocks)
    owner = {path: block for block in blocks for path in block.paths}

    def errors(fmt: Format, values: dict[str, Array]) -> dict[str, Array]:
        return {
            path: round_weights(w, fmt, owner[path].summed, owner[path].stacked).astype(w.dtype) - w
            for path, w in values.items()
        }

    deltas = tuple(timed.jit(partial(errors, fmt))(leaves) for fmt in formats)
    host = [{path: np.float64(value) for path, value in delta.items()} for delta in deltas]
    squares = np.array([[sum(float(np.sum(d[p] ** 2)) for p in block.paths) for d in host] for block in blocks])
    unchanged = np.array([[not any(np.any(d[p]) for p in block.paths) for d in host] for block in blocks])
    overflowed = np.array([[any(np.isinf(d[p]).any() for p in block.paths) for d in host] for block in blocks])
    return Rounding(deltas=deltas, squares=squares, unchanged=unchanged, overflowed=overflowed)


def block_sizes(params: Params, blocks: Partition) -> np.ndarray:
    """(L,) number of parameters of each block."""
    leaves = select_all(params, blocks)
    return np.array([sum(leaves[path].size for path in block.paths) for block in blocks], np.int64)


def make_scores(
    name: str,
    layers: Sequence[str],
    formats: Sequence[Format],
    value: np.ndarray,
    *,
    loss: str,
    ledger: Ledger,
    timed: Timed,
    kind: Kind,
    stderr: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    unchanged: np.ndarray | None = None,
    overflowed: np.ndarray | None = None,
) -> Scores:
    """Scores with their status.

    Args:
        value: (L, F), or (L,) for a score that does not depend on the format.
        unchanged: (L, F) True where the score is zero because nothing that it sees changes.
        overflowed: (L, F) True where the layer's own product left float16's range.
    """
    count = len(formats)
    wide = [_per_format(each, len(layers), count) for each in (value, stderr, residual)]
    value, stderr, residual = wide
    finite = np.isfinite(value)
    status = np.where(finite, OK, NOT_FINITE).astype("U32")
    if kind == "loss":
        status[finite & (value < 0)] = INDEFINITE
    with np.errstate(invalid="ignore"):
        status[finite & (residual > 0.1 * np.abs(value))] = UNCONVERGED
    if overflowed is not None:
        status[overflowed] = OVERFLOW
        finite = finite & ~overflowed
    if unchanged is not None:
        status[unchanged & finite] = ZERO
    if kind == "loss":
        status[:, [fmt == FLOAT32 for fmt in formats]] = ZERO  # float32 itself, asked for beside the others
    return Scores(
        estimator=name,
        loss=loss,
        value=np.where(finite, value, np.inf),
        stderr=stderr,
        residual=residual,
        layers=tuple(layers),
        formats=tuple(fmt.name for fmt in formats),
        kind=kind,
        status=status,
        ledger=ledger,
        seconds=timed.seconds,
        compile_seconds=timed.compile_seconds,
        peak_mb=timed.peak_mb,
    )


def for_layers(scores: Scores, names: Sequence[str]) -> Scores:
    """The same for more layers: a score of weights is zero by construction for a product without them."""
    rows = {name: row for row, name in enumerate(scores.layers)}
    at = np.array([rows.get(name, -1) for name in names])
    value, stderr, residual = (
        np.where((at >= 0)[:, None], each[at], 0.0) for each in (scores.value, scores.stderr, scores.residual)
    )
    status = np.where((at >= 0)[:, None], scores.status[at], ZERO)
    return replace(scores, layers=tuple(names), status=status, value=value, stderr=stderr, residual=residual)


_SMALL, _LARGE = 1e-30, 1e30  # of squares in float32, beyond which digits are lost


def in_range(scorer: Scorer, loss: Loss) -> Scorer:
    """The scorer, also where squares of the outputs leave float32: then of outputs near 1, scaled back.

    Only the output loss is known to scale with the square of the outputs; and of a ranking only the order is kept.
    """

    def scaled_scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        scores = scorer(model, batches, formats, key)
        finite = scores.value[np.isfinite(scores.value)]
        lost = (scores.status == NOT_FINITE).any() or not finite.any() or np.abs(finite).max() < _SMALL
        if loss is not OUTPUT or not (lost or np.abs(finite).max() > _LARGE):
            return scores
        outputs = flat(jax.jit(model.call)(model.params, *batches[0]))
        largest = float(jnp.max(jnp.where(jnp.isfinite(outputs), jnp.abs(outputs), 0.0)))
        if not largest or 1e-12 < largest < 1e12:
            return scores
        power = -round(math.log2(largest))

        def near_one(outputs: Any) -> Any:
            return with_inexact(outputs, [jnp.ldexp(1.0, power).astype(x.dtype) * x for x in inexact(outputs)])

        scores = scorer(with_output(model, near_one), batches, formats, key)
        if scores.kind == "ranking":
            return scores
        value, stderr, residual = (np.ldexp(e, -2 * power) for e in (scores.value, scores.stderr, scores.residual))
        return replace(scores, value=value, stderr=stderr, residual=residual)

    return scaled_scorer


def _per_format(array: np.ndarray | None, layers: int, formats: int) -> np.ndarray:
    if array is None:
        return np.zeros((layers, formats))
    array = np.asarray(array, np.float64)
    return np.repeat(array[:, None], formats, axis=1) if array.ndim == 1 else array


def overflows(value: np.ndarray, formats: Sequence[Format], *, finite: bool) -> np.ndarray:
    """(L, F): where a score is not finite because of the format's range: float16 alone overflows, from finite data only."""
    half = np.array([fmt.operand == "float16" for fmt in formats])
    return ~np.isfinite(value) & half[None, :] & finite


def all_finite(params: Params, batches: Batches) -> bool:
    """Whether every weight and every input is finite."""
    leaves = [leaf for leaf in jax.tree.leaves((params, list(batches))) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)


def standard_error(samples: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis; NaN with one sample."""
    count = samples.shape[0]
    return np.std(samples, axis=0, ddof=1) / count**0.5 if count > 1 else np.full(samples.shape[1:], np.nan)
