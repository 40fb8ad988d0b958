"""One scoring task, as all estimators see it: blocks of weights, their rounding in each format, a loss, and the batches.

An estimator is a function `Task -> Scores`. `scorer_of` makes it a `Scorer` of a model, `from_loss` one of a plain loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import losses, partition
from mpjax.arithmetic import Calibration
from mpjax.curvature.estimates import Estimate
from mpjax.emulation import calibrate
from mpjax.formats import FLOAT32, Format, parse_all
from mpjax.formats.storage import round_weights
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss, flat, inexact, with_inexact
from mpjax.partition import Partition
from mpjax.program import Array, Batches, Model, Params, check_batches, examples_in, with_output
from mpjax.sensitivity.gradients import scored
from mpjax.sensitivity.scores import Key, Kind, Scorer, Scores, Status
from mpjax.sensitivity.timed import Timed

Values: TypeAlias = dict[str, Array]  # slash path -> leaf

_SMALL, _LARGE = 1e-30, 1e30  # of squares in float32, beyond which digits are lost


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What rounding does to the weights.

    `deltas`: for each format path -> rounded weights − weights, in the weights' dtype. `squares`: (L, F) ‖δ‖² of each block.
    `unchanged`: (L, F) True where no weight changes. `overflowed`: (L, F) True where a finite weight becomes infinite.
    """

    deltas: tuple[Values, ...]
    squares: np.ndarray
    unchanged: np.ndarray
    overflowed: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Task:
    """A loss of parameters, the blocks to be scored and the formats.

    Attributes:
        params: where derivatives are taken.
        blocks: the layers' weights.
        batches: equal shapes; `((),)` for a loss that is closed over its data.
        examples: what the sum over all batches is divided by.
        formats, key: as given to the scorer.
        loss_name: of the loss.
        timed: seconds and memory.
    """

    params: Params
    blocks: Partition
    batches: Batches
    examples: int
    formats: tuple[Format, ...]
    key: Key
    loss_name: str
    timed: Timed = field(default_factory=Timed)

    def total(self, params: Params, *batch: Array) -> Array:
        """The loss summed over the batch's examples."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(block.name for block in self.blocks)

    @property
    def sizes(self) -> np.ndarray:
        """(L,) parameters of each block."""
        leaves = self.leaves(self.params)
        return np.array([sum(leaves[path].size for path in block.paths) for block in self.blocks], np.int64)

    def leaves(self, params: Params) -> Values:
        """The blocks' leaves."""
        return partition.select_all(params, self.blocks)

    def gradient(self, params: Params, batch: Sequence[Array]) -> Callable[[Values], Values]:
        """∇ of the batch's loss with respect to the blocks' leaves, everything else held fixed."""
        return jax.grad(lambda values: self.total(partition.replace(params, values), *batch))

    def hvp(self, params: Params, batch: Sequence[Array], vector: Values) -> Values:
        """The batch's Hessian times a vector, forward over reverse."""
        return jax.jvp(self.gradient(params, batch), (self.leaves(params),), (vector,))[1]

    def block_dots(self, a: Values, b: Values) -> Array:
        """(L,) inner products, block by block."""
        return per_block(self.blocks, lambda path: jnp.vdot(a[path], b[path]))

    def sum_batches(self, run: Callable[..., Array], *args: Any) -> np.ndarray:
        """The sum of run(params, *args, *batch) over the batches, in float64."""
        return np.asarray(sum(np.float64(run(self.params, *args, *batch)) for batch in self.batches))

    @cached_property
    def rounding(self) -> Rounding:
        """The rounding errors of every block's weights in every format, with scales where a format has them."""
        owner = {path: block for block in self.blocks for path in block.paths}

        def errors(fmt: Format, values: Values) -> Values:
            return {
                path: round_weights(w, fmt, owner[path].summed, owner[path].stacked).astype(w.dtype) - w
                for path, w in values.items()
            }

        deltas = tuple(self.timed.jit(partial(errors, fmt))(self.leaves(self.params)) for fmt in self.formats)
        host = [{path: np.asarray(value, np.float64) for path, value in delta.items()} for delta in deltas]

        def table(number: Callable[[list[np.ndarray]], Any]) -> np.ndarray:
            return np.array([[number([d[path] for path in block.paths]) for d in host] for block in self.blocks])

        return Rounding(
            deltas=deltas,
            squares=table(lambda arrays: sum(float(np.sum(d**2)) for d in arrays)),
            unchanged=table(lambda arrays: not any(np.any(d) for d in arrays)),
            overflowed=table(lambda arrays: any(np.isinf(d).any() for d in arrays)),
        )

    def scores(
        self, name: str, estimate: Estimate, *, kind: Kind, rounded: bool = False, overflowed: np.ndarray | None = None
    ) -> Scores:
        """An estimate as scores, with their status.

        Args:
            estimate: (L, F), or (L,) for a score that does not depend on the format; compilations and calibration are added to
                its ledger.
            rounded: the score is one of the weights' rounding: 0 by construction where that changes nothing.
            overflowed: (L, F) True where the layer's own product left float16's range; default: where its weights do (`rounded`).
        """
        shape = (len(self.names), len(self.formats))
        value, stderr, residual = (
            np.array(np.broadcast_to(np.reshape(np.asarray(array, np.float64), (shape[0], -1)), shape))
            for array in (estimate.value, estimate.stderr, estimate.residual)
        )
        finite = np.isfinite(value)
        status = np.where(finite, Status.OK, Status.NOT_FINITE).astype("U32")
        if kind == "loss":
            status[finite & (value < 0)] = Status.INDEFINITE
        with np.errstate(invalid="ignore"):
            status[finite & (residual > 0.1 * np.abs(value))] = Status.UNCONVERGED
        overflowed = self.rounding.overflowed if rounded else overflowed
        if overflowed is not None:
            status[overflowed] = Status.OVERFLOW
            finite = finite & ~overflowed
        if rounded:
            status[self.rounding.unchanged & finite] = Status.ZERO
        if kind == "loss":
            status[:, [fmt == FLOAT32 for fmt in self.formats]] = Status.ZERO  # float32 itself, as one of the formats
        return Scores(
            estimator=name,
            loss=self.loss_name,
            value=np.where(finite, value, np.inf),
            stderr=stderr,
            residual=residual,
            layers=self.names,
            formats=tuple(fmt.name for fmt in self.formats),
            kind=kind,
            status=status,
            ledger=estimate.ledger + self.timed.ledger,
            seconds=self.timed.seconds,
            compile_seconds=self.timed.compile_seconds,
            peak_mb=self.timed.peak_mb,
        )

    def curvature_scores(self, name: str, estimate: Estimate, *, scale: str, mean: bool) -> Scores:
        """A curvature (L,) as scores: as it is ("none"), per parameter, or times half the rounding's power ("noise").

        With `mean` the curvature is a trace, and "noise" takes its mean over the block's parameters (HAWQ-V2).
        """
        factors, noise = np.ones((len(self.blocks), len(self.formats))), scale == "noise"
        if scale == "per_parameter" or (noise and mean):
            factors /= self.sizes[:, None]
        if noise:
            factors *= 0.5 * self.rounding.squares
        with np.errstate(invalid="ignore"):  # where a weight overflows: 0 · inf
            estimate = jax.tree.map(lambda array: factors * np.reshape(array, (-1, 1)), estimate)
        return self.scores(name, estimate, kind="loss" if noise else "ranking", rounded=noise)


@dataclass(frozen=True, kw_only=True)
class ModelTask(Task):
    """A model's loss: `total` compares with the model itself, so the two have the same value at the trained weights."""

    model: Model
    loss: Loss

    def total(self, params: Params, *batch: Array) -> Array:
        inputs, targets = self.loss.split(batch)
        outputs = self.model.call(params, *inputs, override=scored)
        return jnp.sum(self.loss.value(outputs, jax.lax.stop_gradient(outputs), *targets))

    @property
    def names(self) -> tuple[str, ...]:
        return self.model.names

    def outputs_of_leaves(self, params: Params, inputs: Sequence[Array], override: Any) -> Callable[[Values], Any]:
        """Leaves -> (the outputs that have derivatives, all outputs)."""

        def outputs_of(values: Values) -> tuple[list[Array], losses.Outputs]:
            outputs = self.model.call(partition.replace(params, values), *inputs, override=override)
            return inexact(outputs), outputs

        return outputs_of

    def ranges(self, calibration: Calibration | None) -> Calibration | None:
        """The calibration, measured on the batches where a scaled format needs it and none is given."""
        if calibration is None and any(fmt.needs_range for fmt in self.formats):
            self.timed.forward += self.examples
            return calibrate(self.model, [self.loss.split(batch)[0] for batch in self.batches], jit=self.timed.jit)
        return calibration

    def overflows(self, value: np.ndarray) -> np.ndarray:
        """(L, F): not finite because of the format's range: float16 alone overflows, from finite weights and inputs only."""
        leaves = [
            x for x in jax.tree.leaves((self.params, list(self.batches))) if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        finite = all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
        return ~np.isfinite(value) & np.array([fmt.overflows for fmt in self.formats]) & finite


def model_task(
    model: Model, batches: Batches, formats: Sequence[str | Format], key: Key, loss: Loss | None = OUTPUT
) -> ModelTask:
    """The task of scoring a model's layers; without a loss for baselines that need none.

    Raises:
        ValueError: ragged or empty batches, batches without the loss's targets, unknown or repeated formats.
    """
    low = parse_all(formats)
    for batch in check_batches(batches):
        (loss or OUTPUT).split(batch)
    return ModelTask(
        params=model.params,
        blocks=model.partition,
        batches=batches,
        examples=examples_in(batches),
        formats=low,
        key=key,
        loss_name=loss.name if loss else "none",
        model=model,
        loss=loss or OUTPUT,
    )


def scorer_of(estimate: Callable[[ModelTask], Scores], loss: Loss | None, *, weights_only: bool = True) -> Scorer:
    """An estimator as a scorer of models.

    With `weights_only` products without weights are zero by construction.
    """
    if loss is not None:
        losses.check(loss)

    def scorer(model: Model, batches: Batches, formats: Sequence[str | Format], key: Key) -> Scores:
        layers = tuple(layer for layer in model.layers if layer.kernel or not weights_only)
        task = model_task(replace(model, layers=layers), batches, formats, key, loss)
        return _for_layers(_in_range(estimate, task), model.names)

    return scorer


def _for_layers(scores: Scores, names: Sequence[str]) -> Scores:
    """The same for more layers, which are zero by construction."""
    rows = np.array([scores.layers.index(name) if name in scores.layers else -1 for name in names])
    scores = _with_arrays(scores, lambda array: np.where(rows[:, None] >= 0, array[rows], 0.0))
    status = np.where(rows[:, None] >= 0, scores.status[rows], Status.ZERO)
    return replace(scores, layers=tuple(names), status=status)


def _with_arrays(scores: Scores, function: Callable[[np.ndarray], np.ndarray]) -> Scores:
    """The scores with a function of their value, standard error and residual."""
    value, stderr, residual = map(function, (scores.value, scores.stderr, scores.residual))
    return replace(scores, value=value, stderr=stderr, residual=residual)


def _in_range(estimate: Callable[[ModelTask], Scores], task: ModelTask) -> Scores:
    """The estimate, also where squares of the outputs leave float32's range: then of outputs near 1, scaled back.

    Only the output loss is known to scale with the square of the outputs; and of a ranking only the order matters.
    """
    scores = estimate(task)
    finite = np.abs(scores.value[np.isfinite(scores.value)])
    lost = (scores.status == Status.NOT_FINITE).any() or not finite.any() or not _SMALL <= finite.max() <= _LARGE
    if scores.loss == "none" or task.loss is not OUTPUT or not lost:
        return scores
    outputs = flat(jax.jit(task.model.call)(task.params, *task.batches[0]))
    largest = float(jnp.max(jnp.where(jnp.isfinite(outputs), jnp.abs(outputs), 0.0)))
    if not largest or 1e-12 < largest < 1e12:
        return scores
    power = -round(math.log2(largest))

    def near_one(outputs: losses.Outputs) -> losses.Outputs:
        return with_inexact(outputs, [jnp.ldexp(1.0, power).astype(x.dtype) * x for x in inexact(outputs)])

    scores = estimate(replace(task, model=with_output(task.model, near_one), timed=Timed()))
    return scores if scores.kind == "ranking" else _with_arrays(scores, lambda array: np.ldexp(array, -2 * power))


def exactly(value: Any, ledger: Ledger | None = None) -> Estimate:
    """A value without error as an estimate."""
    zeros: Any = np.zeros(np.shape(value))
    return Estimate(value=value, stderr=zeros, residual=zeros, ledger=ledger or Ledger())


def per_block(blocks: Partition, term: Callable[[str], Array]) -> Array:
    """(L, …) sums of term(path) over each block's leaves."""
    return jnp.stack([sum(map(term, block.paths[1:]), start=term(block.paths[0])) for block in blocks])


# --- checks of knobs --------------------------------------------------------------------------------------------------


def check_choice(knob: str, value: str, known: Sequence[str]) -> None:
    """Refuse what is not among the known values."""
    if value not in known:
        raise ValueError(f"Expected {knob} to be one of {', '.join(map(repr, known))}; found {value!r}.")


def check_not_stationary(loss: Loss, estimator: str) -> None:
    """Refuse a loss whose gradient is zero by construction."""
    if losses.check(loss).stationary:
        raise ValueError(
            f"{estimator}: under the loss {loss.name!r} the gradient at the trained weights is zero by construction, so every "
            "score would be 0. Use a loss with labels (losses.CROSS_ENTROPY, losses.MSE), or a score of second order."
        )


def check_probes(num_probes: int | None, loss: Loss, estimator: str) -> None:
    """Refuse fewer than one probe, and random probes of a loss that cannot draw them; None: exact."""
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"{estimator}: expected num_probes ≥ 1, found {num_probes}.")
    if losses.check(loss).cotangents is None and num_probes is not None:
        raise ValueError(
            f"{estimator}: the loss {loss.name!r} has no `cotangents` to draw output probes from; give it some."
        )
