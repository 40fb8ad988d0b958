"""A search problem: layers, low formats, predicted penalties and known costs. NumPy only, no jax.

An *index* is an assignment as (L,) numbers: 0 for float32 and 1 + f for the f-th low format.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

REFERENCE = "float32"  # the format of a layer that is not lowered
Floats = NDArray[np.float64]
Index = NDArray[np.int64]


class Assignment(Mapping[str, str]):
    """Layer -> format name, in layer order; immutable and hashable.

    Equal to any mapping with the same items, whatever their order.
    """

    __slots__ = ("_formats",)

    def __init__(self, formats: Mapping[str, str]) -> None:
        for layer, name in formats.items():
            if not isinstance(layer, str) or not isinstance(name, str):
                raise TypeError(f"expected layer name -> format name, both strings; got {layer!r}: {name!r}")
        self._formats = dict(formats)

    @classmethod
    def uniform(cls, layers: Iterable[str], name: str = REFERENCE) -> "Assignment":
        """Every layer in one format."""
        return cls(dict.fromkeys(layers, name))

    @property
    def lowered(self) -> tuple[str, ...]:
        """The layers that are not in float32, in layer order."""
        return tuple(layer for layer, name in self._formats.items() if name != REFERENCE)

    def replace(self, formats: Mapping[str, str]) -> "Assignment":
        """This assignment with some layers in other formats.

        Raises:
            ValueError: an unknown layer.
        """
        for layer in formats:
            if layer not in self._formats:
                near = difflib.get_close_matches(layer, self._formats, n=1, cutoff=0.0)
                raise ValueError(f"unknown layer {layer!r}; the nearest of {len(self)} is {near}")
        return Assignment({**self._formats, **formats})

    def __getitem__(self, layer: str) -> str:
        return self._formats[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def __hash__(self) -> int:
        return hash(frozenset(self._formats.items()))

    def __repr__(self) -> str:
        return f"Assignment({len(self.lowered)} of {len(self)} layers lowered: {self._formats})"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The user's metric of an assignment; lower is better.

    Attributes:
        value: loss of the metric against the float32 model, e.g. the mean NME. NaN is never accepted.
        low, high: its confidence interval, if there is one.
        confidence: level of that interval, if known; `solve` refuses another level than the one asked for.
        per_sample: (N,) values behind the mean, for the report; not compared.
    """

    value: float
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    per_sample: Floats | None = field(default=None, compare=False, repr=False)


Evaluate: TypeAlias = Callable[[Assignment], Measurement]


class LayerScores(Protocol):
    """What `Problem.from_scores` reads: `sensitivity.Scores`, or any object with these attributes."""

    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def formats(self) -> tuple[str, ...]: ...
    @property
    def value(self) -> Floats: ...
    @property
    def kind(self) -> Literal["loss", "ranking"]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Which layers may be lowered, to which formats, at which predicted penalty and known cost.

    Attributes:
        layers: L distinct names, in execution order.
        formats: F distinct low formats; float32 is always available and not listed.
        penalty: (L, F) predicted loss of accuracy of each layer alone in each format. A value that is not finite, or a negative
            loss (an indefinite Hessian), counts as most sensitive: strategies that add penalties up never lower such a layer.
        kind: "loss" if penalties may be added up (≥ 0, one unit), "ranking" if only their order means something.
        cost: (L, F) latency, bytes or FLOPs of each layer in each format; or None.
        float32_cost: (L,) the same in float32; given exactly where `cost` is.
        edges: (producer, consumer) pairs of layers whose outputs and inputs meet.
        cast_cost: (E, F + 1, F + 1) ≥ 0: additional cost of edge e when its producer has format a and its consumer format b
            (0: float32, 1 + f: formats[f]); given exactly where `edges` are, in the unit of `cost`.
        interactions: (L·F, L·F) symmetric, positive semi-definite G, layer by layer: the predicted loss of a set of lowered
            layers is ½ xᵀGx instead of the sum of its penalties. Entries between two formats of one layer enter no prediction.
        objective: "lower_max", as many layers below float32 as possible (then the least cost, then the least penalty), or
            "cost_min", the least cost.

    Raises:
        ValueError: arrays, names, kind or objective that do not fit together; interactions that are no Gram matrix.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    penalty: Floats
    kind: Literal["loss", "ranking"] = "loss"
    cost: Floats | None = None
    float32_cost: Floats | None = None
    edges: tuple[tuple[str, str], ...] = ()
    cast_cost: Floats | None = None
    interactions: Floats | None = None
    objective: Literal["lower_max", "cost_min"] = "lower_max"

    @classmethod
    def from_scores(
        cls,
        scores: LayerScores,
        *,
        formats: Sequence[str] | None = None,
        cost: ArrayLike | None = None,
        interactions: ArrayLike | None = None,
        objective: Literal["lower_max", "cost_min"] = "lower_max",
    ) -> "Problem":
        """The problem of scored layers. The columns of all three arrays are those of the scores' low formats.

        Args:
            scores: of L layers; a column of float32 is left out.
            formats: which of the scores' formats a layer may take; by default all but float32.
            cost: (L, 1 + F), float32 first and then the low formats of the scores, as in `weight_bytes` and `seconds` of
                `cost.static` and `cost.measure(model, scores.formats, ...)`.
            interactions: (L·F, L·F) of the layers and formats of the scores: `sensitivity.interactions(...).gram`.

        Raises:
            ValueError: a format without scores, or as `Problem`.
        """
        low = [name for name in scores.formats if name != REFERENCE]
        names = tuple(low if formats is None else formats)
        if unknown := [name for name in names if name not in low]:
            raise ValueError(f"no scores in {', '.join(unknown)}; these are in {', '.join(low)}")
        columns, count = [scores.formats.index(name) for name in names], len(scores.formats)
        arrays: dict[str, Any] = {}
        if cost is not None:
            table = _array("cost", cost, (len(scores.layers), 1 + len(low)))
            arrays = {"cost": table[:, [1 + low.index(name) for name in names]], "float32_cost": table[:, 0]}
        if interactions is not None:
            gram = _array("interactions", interactions, (len(scores.layers) * count,) * 2)
            flat = np.add.outer(np.arange(len(scores.layers)) * count, columns).ravel()
            arrays["interactions"] = gram[np.ix_(flat, flat)]
        penalty = np.asarray(scores.value)[:, columns]
        layers = tuple(scores.layers)
        return cls(layers=layers, formats=names, penalty=penalty, kind=scores.kind, objective=objective, **arrays)

    def __post_init__(self) -> None:
        for name in ("layers", "formats"):
            if not getattr(self, name) or len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name} must be distinct names, at least one; got {getattr(self, name)}")
        for name, options in (("kind", ("loss", "ranking")), ("objective", ("lower_max", "cost_min"))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be {options[0]!r} or {options[1]!r}; got {getattr(self, name)!r}")
        unknown = sorted({layer for edge in self.edges for layer in edge} - set(self.layers))
        no_cost, no_casts = self.cost is None, self.cast_cost is None
        for wrong, message in (
            (REFERENCE in self.formats, f"formats lists the low formats only, float32 is implicit; got {self.formats}"),
            (no_cost != (self.float32_cost is None), "cost and float32_cost belong together: give both or neither"),
            (bool(self.edges) == no_casts, "edges and cast_cost belong together: give both or neither"),
            (no_cost and bool(self.edges), "cast_cost is added to cost: give cost and float32_cost, too"),
            (no_cost and self.objective == "cost_min", "objective='cost_min' needs cost and float32_cost; got none"),
            (bool(unknown), f"edges name unknown layers: {', '.join(unknown[:5])}"),
        ):
            if wrong:
                raise ValueError(message)
        layers, formats = len(self.layers), len(self.formats)
        for name, shape in (
            ("penalty", (layers, formats)),
            ("cost", (layers, formats)),
            ("float32_cost", (layers,)),
            ("cast_cost", (len(self.edges), formats + 1, formats + 1)),
            ("interactions", (layers * formats, layers * formats)),
        ):
            if (given := getattr(self, name)) is not None:
                array = _array(name, given, shape)
                if name.endswith("cost") and not np.isfinite(array).all():
                    raise ValueError(f"{name} must be finite; got {array[~np.isfinite(array)][:3]}")
                object.__setattr__(self, name, array)
        if self.cast_cost is not None and (self.cast_cost < 0).any():
            raise ValueError(f"cast_cost must be ≥ 0; the least is {self.cast_cost.min():.3g}")
        if self.interactions is not None:
            _check_gram(self.interactions, self.kind)

    @property
    def baseline(self) -> Assignment:
        """All layers in float32."""
        return Assignment.uniform(self.layers)

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """(L, F): which penalties can be added up: finite, and not negative."""
        usable = np.isfinite(self.penalty) & (self.penalty >= 0)
        if self.interactions is not None:
            usable = usable & np.isfinite(np.diagonal(self.interactions)).reshape(usable.shape)
        return usable

    @cached_property
    def gram(self) -> Floats:
        """(L·F, L·F) interactions, exactly symmetric, 0 in rows and columns that are not allowed."""
        assert self.interactions is not None
        usable = self.allowed.ravel()
        gram = np.where(usable[:, None] & usable, self.interactions, 0.0)
        return 0.5 * (gram + gram.T)

    @cached_property
    def casts(self) -> tuple[Index, Index, Floats]:
        """Of the edges between two different layers: (E,) producers, (E,) consumers, (E, F + 1, F + 1) costs."""
        ends = np.array([[self.layers.index(layer) for layer in edge] for edge in self.edges], np.int64).reshape(-1, 2)
        options = len(self.formats) + 1
        table = np.zeros((0, options, options)) if self.cast_cost is None else self.cast_cost
        between = ends[:, 0] != ends[:, 1]
        return ends[between, 0], ends[between, 1], table[between]

    @cached_property
    def costs(self) -> Floats:
        """(L, F + 1) costs of the layers, float32 first, with the casts of a layer that feeds itself (under a scan)."""
        assert self.cost is not None and self.float32_cost is not None
        costs = np.concatenate([self.float32_cost[:, None], self.cost], axis=1)
        for edge, (producer, consumer) in enumerate(self.edges):
            if producer == consumer and self.cast_cost is not None:
                costs[self.layers.index(producer)] += np.diagonal(self.cast_cost[edge])
        return costs

    def index(self, assignment: Mapping[str, str]) -> Index:
        """(L,) numbers of the formats.

        Raises:
            ValueError: a layer that the assignment lacks, or a format that the problem does not have.
        """
        number = {name: f for f, name in enumerate((REFERENCE, *self.formats))}
        try:
            return np.array([number[assignment[layer]] for layer in self.layers], np.int64)
        except KeyError as error:
            raise ValueError(f"no layer or format {error} in this problem of {self.formats}") from error

    def assignment(self, index: Sequence[int] | Index) -> Assignment:
        """The inverse of `index`."""
        names = (REFERENCE, *self.formats)
        return Assignment({layer: names[int(f)] for layer, f in zip(self.layers, index, strict=True)})

    def penalty_of(self, index: Index, *, additive: bool = False) -> float:
        """Predicted loss: Σ penalties, or ½ xᵀGx where there are interactions, unless `additive`. NaN or ∞ if a part is."""
        low = np.flatnonzero(index)
        if self.interactions is None or additive:
            return float(self.penalty[low, index[low] - 1].sum())
        flat = low * len(self.formats) + index[low] - 1
        return 0.5 * float(self.interactions[np.ix_(flat, flat)].sum())

    def cost_of(self, index: Index) -> float | None:
        """Σ costs of the layers and of the casts on the edges; None if the problem has no cost."""
        if self.cost is None:
            return None
        producer, consumer, table = self.casts
        casts = table[np.arange(len(table)), index[producer], index[consumer]]
        return float(self.costs[np.arange(len(index)), index].sum() + casts.sum())

    def objective_of(self, index: Index) -> float:
        """The number that is minimised: the cost, or minus the number of lowered layers."""
        if self.objective == "lower_max":
            return -float(np.count_nonzero(index))
        cost = self.cost_of(index)
        assert cost is not None
        return cost

    def rank(self, index: Index) -> tuple[float, float, float]:
        """Smaller is better: the objective, then the cost, then the penalty (infinite where it is not defined)."""
        cost, penalty = self.cost_of(index), self.penalty_of(index)
        usable = self.kind == "loss" and math.isfinite(penalty)
        return self.objective_of(index), 0.0 if cost is None else cost, penalty if usable else math.inf

    def changes(self, index: Index) -> tuple[Floats, Floats, Floats]:
        """Differences that giving one layer another format makes, each (L, F + 1), column 0 float32.

        Returns:
            predicted loss (infinite where it is not allowed); objective; and the rate, loss per decrease of the objective,
            infinite where the objective does not decrease.
        """
        layers, count = self.penalty.shape
        added = self.penalty
        if self.interactions is not None:
            present = np.eye(count + 1)[index][:, 1:]
            within = self.gram.reshape(layers, count, layers, count)[np.arange(layers), :, np.arange(layers), :]
            others = (self.gram @ present.ravel()).reshape(layers, count) - (within @ present[:, :, None])[:, :, 0]
            added = 0.5 * np.diagonal(self.gram).reshape(layers, count) + others
        loss = np.pad(np.where(self.allowed, added, np.inf), ((0, 0), (1, 0)))
        if self.objective == "lower_max":
            value = np.repeat([[0.0] + [-1.0] * count], layers, axis=0)
        else:
            value = self.costs.copy()
            producer, consumer, table = self.casts
            edges = np.arange(len(table))
            np.add.at(value, producer, table[edges, :, index[consumer]])
            np.add.at(value, consumer, table[edges, index[producer], :])
        with np.errstate(invalid="ignore"):  # infinite minus infinite: a present format that is not allowed
            loss, value = (table - np.take_along_axis(table, index[:, None], axis=1) for table in (loss, value))
        useful = np.isfinite(loss) & (value < -1e-12 * np.abs(value).max())
        return loss, value, np.where(useful, loss, np.inf) / np.where(useful, -value, 1.0)


def _array(name: str, values: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """A read-only copy in float64."""
    array = np.array(values, np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape} (layers, formats); got {array.shape}")
    array.flags.writeable = False
    return array


def _check_gram(gram: Floats, kind: str) -> None:
    """Refuse a matrix that is no Gram matrix."""
    if kind != "loss":
        raise ValueError("interactions predict a loss: they need kind='loss', not a ranking")
    usable = np.isfinite(np.diagonal(gram))
    finite = gram[np.ix_(usable, usable)]
    if not np.isfinite(finite).all():
        raise ValueError("interactions have entries that are not finite beside a finite diagonal")
    scale = float(np.abs(finite).max(initial=0.0))
    if np.abs(finite - finite.T).max(initial=0.0) > 1e-6 * scale:
        raise ValueError("interactions must be symmetric")
    least = float(np.linalg.eigvalsh(finite).min(initial=0.0))
    if least < -1e-6 * scale * max(1, len(finite)):
        raise ValueError(f"interactions must be positive semi-definite; the least eigenvalue is {least:.3g}")
