"""A search problem: layers, formats, predicted penalties, known costs and what is allowed. NumPy only, no jax.

An *index* is an assignment as (L,) numbers: 0 for float32 and 1 + f for the f-th low format. A *table* has a column for each
of these numbers, float32 first.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

REFERENCE = "float32"  # the format of a layer that is not lowered
MARGIN = 1e-9  # of a limit: how far a sum may lie above it by rounding
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


class Limit(NamedTuple):
    """Σ over layers of a table's entries, at most `most`.

    Attributes:
        table: as `Problem.cost`; None for that itself, casts included.
        most: in the table's unit.
    """

    table: ArrayLike | None
    most: float


class InfeasibleError(ValueError):
    """No assignment meets the constraints; the message names them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Which layers may take which formats, at which predicted penalty and known cost.

    Layers that the problem does not list are left out: assignments do not name them, so that they stay in float32.

    Attributes:
        layers: L distinct names, in execution order.
        formats: F distinct low formats; float32 is not listed.
        penalty: (L, F) predicted loss of accuracy of each layer alone in each format. A value that is not finite, or a negative
            loss (an indefinite Hessian), counts as most sensitive: strategies that add penalties up never take it.
        kind: "loss" if penalties may be added up (≥ 0, one unit), "ranking" if only their order means something.
        cost: (L, 1 + F) latency, bytes or FLOPs of each layer in each format, float32 first; or None. Where float32 is no choice
            that column may be left out, here and in the other tables.
        edges: (producer, consumer) pairs of layers whose outputs and inputs meet.
        cast_cost: (E, F + 1, F + 1) ≥ 0: additional cost of edge e when its producer has format a and its consumer format b
            (0: float32, 1 + f: formats[f]); given exactly where `edges` are, in the unit of `cost`.
        interactions: (L·F, L·F) symmetric, positive semi-definite G, layer by layer: the predicted loss of a set of lowered
            layers is ½ xᵀGx instead of the sum of its penalties. Entries between two formats of one layer enter no prediction.
        objective: "lower_max", as many layers below float32 as possible (then the least cost, then the least penalty), or
            "cost_min", the least cost.
        float32: whether float32 is a choice.
        allowed: (L, 1 + F) which formats a layer may take, as far as they are given; then also as `float32`, `fixed` and `ties`
            leave them.
        fixed: layer -> its format, "float32" or another.
        ties: groups of layers that share a format (query, key and value; the partners of a residual; experts). Groups with a
            layer in common are one.
        limits: name -> (table, most), e.g. {"bytes": (weight_bytes, 2e6)}: constraints beside the one that a search has.
        counts: (L,) how many layers each one stands for in "lower_max"; by default one.

    Raises:
        ValueError: arrays, names, kind or objective that do not fit together; interactions that are no Gram matrix.
        InfeasibleError: a layer or a tie without a format, a limit that nothing meets.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    penalty: Floats
    kind: Literal["loss", "ranking"] = "loss"
    cost: Floats | None = None
    edges: tuple[tuple[str, str], ...] = ()
    cast_cost: Floats | None = None
    interactions: Floats | None = None
    objective: Literal["lower_max", "cost_min"] = "lower_max"
    float32: bool = True
    allowed: NDArray[np.bool_] = None  # type: ignore[assignment]  # an array after __post_init__
    fixed: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    limits: Mapping[str, Limit] = field(default_factory=dict)
    counts: Index = None  # type: ignore[assignment]  # an array after __post_init__

    @classmethod
    def from_scores(
        cls,
        scores: LayerScores,
        *,
        layers: Sequence[str] | None = None,
        formats: Sequence[str] | None = None,
        cost: ArrayLike | None = None,
        interactions: ArrayLike | None = None,
        limits: Mapping[str, tuple[ArrayLike | None, float]] | None = None,
        **constraints: Any,
    ) -> "Problem":
        """The problem of scored layers. Rows and columns of all arrays are the scores' layers and formats.

        Args:
            scores: of L layers; a column of float32 is left out.
            layers: which of the scores' layers are searched; by default all.
            formats: which of the scores' formats a layer may take; by default all but float32.
            cost: (L, 1 + F), float32 first and then the low formats of the scores, as in `weight_bytes` and `seconds` of
                `cost.static` and `cost.measure(model, scores.formats, ...)`.
            interactions: (L·F, L·F) of the layers and formats of the scores: `sensitivity.interactions(...).gram`.
            limits: name -> (table as `cost`, most).
            constraints: `objective`, `float32`, `fixed`, `ties`, as in `Problem`.

        Raises:
            ValueError: a layer or format without scores, or as `Problem`.
        """
        low = [name for name in scores.formats if name != REFERENCE]
        wanted, names = tuple(scores.layers if layers is None else layers), tuple(low if formats is None else formats)
        if unknown := [name for name in names if name not in low]:
            raise ValueError(f"no scores in {', '.join(unknown)}; these are in {', '.join(low)}")
        if unknown := [name for name in wanted if name not in scores.layers]:
            raise ValueError(f"no scores of {', '.join(unknown[:5])}; these are of {', '.join(scores.layers[:5])} …")
        rows, columns = [list(scores.layers).index(name) for name in wanted], [0, *(1 + low.index(f) for f in names)]

        def table(name: str, values: ArrayLike) -> Floats:
            return _array(name, values, (len(scores.layers), 1 + len(low)))[np.ix_(rows, columns)]

        arrays: dict[str, Any] = {
            "limits": {
                name: Limit(None if values is None else table(f"limits[{name!r}]", values), most)
                for name, (values, most) in (limits or {}).items()
            }
        }
        if cost is not None:
            arrays["cost"] = table("cost", cost)
        scored, count = [scores.formats.index(name) for name in names], len(scores.formats)
        if interactions is not None:
            gram = _array("interactions", interactions, (len(scores.layers) * count,) * 2)
            flat = np.add.outer(np.multiply(rows, count), scored).ravel()
            arrays["interactions"] = gram[np.ix_(flat, flat)]
        penalty = np.asarray(scores.value)[np.ix_(rows, scored)]
        return cls(layers=wanted, formats=names, penalty=penalty, kind=scores.kind, **arrays, **constraints)

    def __post_init__(self) -> None:
        for name in ("layers", "formats"):
            if not getattr(self, name) or len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name} must be distinct names, at least one; got {getattr(self, name)}")
        for name, options in (("kind", ("loss", "ranking")), ("objective", ("lower_max", "cost_min"))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be {options[0]!r} or {options[1]!r}; got {getattr(self, name)!r}")
        for name, named in (
            ("edges", (layer for edge in self.edges for layer in edge)),
            ("ties", (layer for tie in self.ties for layer in tie)),
            ("fixed", self.fixed),
        ):
            if unknown := sorted(set(named) - set(self.layers)):
                raise ValueError(f"{name} names unknown layers: {', '.join(unknown[:5])}")
        choices = (REFERENCE, *self.formats) if self.float32 else self.formats
        wrong_formats = sorted(set(self.fixed.values()) - set(choices))
        no_cost, no_casts = self.cost is None, self.cast_cost is None
        for wrong, message in (
            (REFERENCE in self.formats, f"formats lists the low formats only, float32 is implicit; got {self.formats}"),
            (bool(self.edges) == no_casts, "edges and cast_cost belong together: give both or neither"),
            (no_cost and bool(self.edges), "cast_cost is added to cost: give cost, too"),
            (no_cost and self.objective == "cost_min", "objective='cost_min' needs a cost; got none"),
            (bool(wrong_formats), f"fixed names {', '.join(wrong_formats)}; the formats are {', '.join(choices)}"),
            (
                self.objective == "lower_max" and not self.float32,
                "objective='lower_max' counts layers below float32, which is no choice here: take 'cost_min'",
            ),
        ):
            if wrong:
                raise ValueError(message)
        layers, formats = len(self.layers), len(self.formats)
        for name, shape in (
            ("penalty", (layers, formats)),
            ("cast_cost", (len(self.edges), formats + 1, formats + 1)),
            ("interactions", (layers * formats, layers * formats)),
        ):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, _array(name, given, shape))
        if self.cast_cost is not None and not (np.isfinite(self.cast_cost) & (self.cast_cost >= 0)).all():
            raise ValueError(f"cast_cost must be finite and ≥ 0; the least is {self.cast_cost.min():.3g}")
        if self.interactions is not None:
            _check_gram(self.interactions, self.kind)
        counts = np.ones(layers, np.int64) if self.counts is None else np.array(self.counts, np.int64)
        if counts.shape != (layers,) or (counts < 1).any():
            raise ValueError(f"counts must be {layers} numbers ≥ 1; got {counts}")
        object.__setattr__(self, "counts", counts)
        if self.cost is not None:
            object.__setattr__(self, "cost", self._table("cost", self.cost))
        limits = {}
        for name, (table, most) in self.limits.items():
            if math.isnan(most) or (table is None and no_cost):
                raise ValueError(
                    f"limits[{name!r}] needs a number and " + ("a cost; got none" if no_cost else f"not {most}")
                )
            limits[name] = Limit(None if table is None else self._table(f"limits[{name!r}]", table), most)
        object.__setattr__(self, "limits", limits)
        object.__setattr__(self, "allowed", self._allowed())
        self._check_limits()

    def _table(self, name: str, values: ArrayLike) -> Floats:
        """A read-only (L, 1 + F) copy; NaN stands where float32 is no choice."""
        table, shape = np.array(values, np.float64), (len(self.layers), 1 + len(self.formats))
        if not self.float32 and table.shape == (shape[0], shape[1] - 1):
            table = np.pad(table, ((0, 0), (1, 0)))
        if not self.float32 and table.shape == shape:
            table[:, 0] = np.nan
        array = _array(name, table, shape)
        chosen = array[:, 0 if self.float32 else 1 :]
        if not np.isfinite(chosen).all():
            raise ValueError(f"{name} must be finite; got {chosen[~np.isfinite(chosen)][:3]}")
        return array

    def _allowed(self) -> NDArray[np.bool_]:
        """(L, 1 + F): what `allowed`, `float32`, `fixed` and `ties` leave to each layer."""
        layers, columns = len(self.layers), 1 + len(self.formats)
        given = np.ones((layers, columns)) if self.allowed is None else self._table("allowed", self.allowed)
        allowed = np.nan_to_num(given) != 0
        allowed[:, 0] &= self.float32
        for layer, name in self.fixed.items():
            allowed[self.layers.index(layer)] &= np.array([name == option for option in (REFERENCE, *self.formats)])
        for row in np.flatnonzero(~allowed.any(axis=1)):
            fixed = self.fixed.get(self.layers[row])
            raise InfeasibleError(
                f"layer {self.layers[row]!r} has no format left"
                + (
                    f": it is fixed to {fixed}, which is forbidden"
                    if fixed is not None
                    else "; see allowed and float32"
                )
            )
        shared = np.stack([allowed[self.groups == group].all(axis=0) for group in range(max(self.groups) + 1)])
        for group in np.flatnonzero(~shared.any(axis=1)):
            tied = [layer for layer, number in zip(self.layers, self.groups, strict=True) if number == group]
            raise InfeasibleError(f"the tied layers {', '.join(tied)} have no allowed format in common")
        shared = shared[self.groups]
        shared.flags.writeable = False
        return shared

    def _check_limits(self) -> None:
        """Refuses a limit that no assignment meets, and a layer without a penalty that can be added up."""
        for name, (table, most) in self.limits.items():
            sums = self._summed(
                np.where(self.allowed, np.asarray(self.cost if table is None else table), 0.0)
            )  # casts are ≥ 0
            allowed = self.allowed[np.unique(self.groups, return_index=True)[1]]
            least = float(np.where(allowed, sums, np.inf).min(axis=1).sum())
            if not least <= most + MARGIN * abs(most):
                raise InfeasibleError(f"no assignment meets the limit on {name}, {most:.6g}: the least is {least:.6g}")
        for row in np.flatnonzero(~self.usable.any(axis=1)) if self.kind == "loss" else ():
            raise InfeasibleError(
                f"layer {self.layers[row]!r} has no allowed format with a penalty that can be added up (finite, ≥ 0; of all "
                "layers that it is tied to): allow float32, or give it a penalty"
            )

    @property
    def baseline(self) -> Assignment:
        """The most precise assignment, whatever the limits: all layers in float32, where they may be."""
        return self.assignment(self.start)

    @cached_property
    def start(self) -> Index:
        """(L,) the index of `baseline`: float32, or the allowed format of the least penalty."""
        if self.contracted is not self:
            return self.expand(self.contracted.start)
        penalty = np.pad(np.nan_to_num(self.penalty, nan=np.inf), ((0, 0), (1, 0)))
        if self.kind == "loss":
            penalty = np.where(self.usable, penalty, np.inf)
        order = np.where(self.allowed, np.clip(penalty, -1e300, 1e300), np.inf)
        return np.where(self.allowed[:, 0], 0, order.argmin(axis=1)).astype(np.int64)

    @cached_property
    def usable(self) -> NDArray[np.bool_]:
        """(L, 1 + F): allowed, with a penalty that can be added up (finite, and not negative) for all layers of a tie."""
        usable = np.isfinite(self.penalty) & (self.penalty >= 0)
        if self.interactions is not None:
            usable = usable & np.isfinite(np.diagonal(self.interactions)).reshape(usable.shape)
        usable = np.pad(usable, ((0, 0), (1, 0)), constant_values=True)
        return np.asarray(self.allowed & (self._summed(~usable)[self.groups] == 0))

    @cached_property
    def gram(self) -> Floats:
        """(L·F, L·F) interactions, exactly symmetric, 0 in rows and columns that are not usable."""
        assert self.interactions is not None
        usable = self.usable[:, 1:].ravel()
        gram = np.where(usable[:, None] & usable, self.interactions, 0.0)
        return 0.5 * (gram + gram.T)

    # ties: solvers see one layer for each group

    @cached_property
    def groups(self) -> Index:
        """(L,) number of the group of tied layers, in the order of their first layers."""
        groups = np.arange(len(self.layers))
        for tie in self.ties:
            members = np.unique(groups[[self.layers.index(layer) for layer in tie]])
            groups[np.isin(groups, members)] = members.min(initial=len(groups))
        return np.unique(groups, return_inverse=True)[1].astype(np.int64)

    def _summed(self, table: ArrayLike) -> Floats:
        """(number of groups, …): rows added up over the layers of each group."""
        values = np.asarray(table, np.float64)
        sums = np.zeros((int(self.groups.max()) + 1, *values.shape[1:]))
        np.add.at(sums, self.groups, values)
        return sums

    @cached_property
    def contracted(self) -> "Problem":
        """The problem of the groups, each named by its first layer, without ties and edges inside a group; often itself.

        Costs, penalties (of a ranking the largest), limits and interactions are those of a group in one format.
        """
        size, options = int(self.groups.max()) + 1, 1 + len(self.formats)
        group = dict(zip(self.layers, self.groups.tolist(), strict=True))
        inside = np.array([group[a] == group[b] for a, b in self.edges], np.bool_)
        if size == len(self.layers) and not inside.any():
            return self
        first = np.unique(self.groups, return_index=True)[1]
        layers = tuple(self.layers[number] for number in first)
        changed: dict[str, Any] = {"allowed": self.allowed[first], "counts": self._summed(self.counts).astype(np.int64)}
        if self.kind == "ranking":
            changed["penalty"] = np.stack([self.penalty[self.groups == number].max(axis=0) for number in range(size)])
        else:
            changed["penalty"] = self._summed(np.where(self.usable[:, 1:], self.penalty, np.inf))
        if self.cost is not None:
            changed["cost"] = self._summed(self.cost)
        if self.cast_cost is not None:
            for (layer, _), table in zip(np.array(self.edges)[inside], self.cast_cost[inside], strict=True):
                changed["cost"][group[layer]] += np.diagonal(table)
            across = [(layers[group[a]], layers[group[b]]) for a, b in self.edges if group[a] != group[b]]
            changed |= {"edges": tuple(across), "cast_cost": self.cast_cost[~inside] if across else None}
        if self.interactions is not None:
            usable = self.usable[:, 1:].ravel()
            flat = (self.groups[:, None] * (options - 1) + np.arange(options - 1)).ravel()
            gram = np.zeros((size * (options - 1),) * 2)
            np.add.at(gram, np.ix_(flat, flat), self.gram)
            gram[flat[~usable]] = gram[:, flat[~usable]] = np.nan
            changed["interactions"] = gram
        changed["limits"] = {
            name: Limit(None if table is None else self._summed(table), most)
            for name, (table, most) in self.limits.items()
        }
        return replace(self, layers=layers, ties=(), fixed={}, **changed)

    def expand(self, index: Index) -> Index:
        """(L,) from an index of `contracted`."""
        return index[self.groups]

    def expanded(self, assignment: Mapping[str, str]) -> Assignment:
        """All layers from an assignment of `contracted`."""
        return self.assignment(self.expand(self.contracted.index(assignment)))

    # sums

    @cached_property
    def casts(self) -> tuple[Index, Index, Floats]:
        """(E,) producers, (E,) consumers, (E, F + 1, F + 1) costs of the edges."""
        ends = np.array([[self.layers.index(layer) for layer in edge] for edge in self.edges], np.int64).reshape(-1, 2)
        options = len(self.formats) + 1
        return ends[:, 0], ends[:, 1], np.zeros((0, options, options)) if self.cast_cost is None else self.cast_cost

    def index(self, assignment: Mapping[str, str]) -> Index:
        """(L,) numbers of the formats.

        Raises:
            ValueError: a layer that the assignment lacks, or a format that the problem does not have.
        """
        number = {name: f for f, name in enumerate((REFERENCE, *self.formats)) if f or self.float32}
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
        return float(self.cost[np.arange(len(index)), index].sum() + casts.sum())

    def costs_at(self, index: Index) -> Floats:
        """(L, F + 1) costs of each layer's formats and of its casts, where the others are as in an index."""
        assert self.cost is not None
        costs = self.cost.copy()
        producer, consumer, casts = self.casts
        edges = np.arange(len(casts))
        np.add.at(costs, producer, casts[edges, :, index[consumer]])
        np.add.at(costs, consumer, casts[edges, index[producer], :])
        return costs

    def limited(self, name: str, index: Index) -> tuple[float, Floats]:
        """The sum of a limit at an index, and the (L, F + 1) sums with one layer in another format (of a contracted problem)."""
        table = self.limits[name].table
        total = self.cost_of(index) if table is None else np.asarray(table)[np.arange(len(index)), index].sum()
        at = self.costs_at(index) if table is None else np.asarray(table)
        assert total is not None
        return float(total), total + at - np.take_along_axis(at, index[:, None], axis=1)

    def exceeded(self, index: Index) -> dict[str, float]:
        """The limits that an index does not meet -> its sums."""
        sums = {name: self.limited(name, index)[0] for name in self.limits}
        most = {name: limit.most for name, limit in self.limits.items()}
        return {name: x for name, x in sums.items() if not x <= most[name] + MARGIN * abs(most[name])}

    def objective_of(self, index: Index) -> float:
        """The number that is minimised: the cost, or minus the number of lowered layers."""
        if self.objective == "lower_max":
            return -float(self.counts[index > 0].sum())
        cost = self.cost_of(index)
        assert cost is not None
        return cost

    def rank(self, index: Index) -> tuple[float, float, float]:
        """Smaller is better: the objective, then the cost, then the penalty (infinite where it is not defined)."""
        cost, penalty = self.cost_of(index), self.penalty_of(index)
        usable = self.kind == "loss" and math.isfinite(penalty)
        return self.objective_of(index), 0.0 if cost is None else cost, penalty if usable else math.inf

    def changes(self, index: Index, table: Floats | None = None) -> tuple[Floats, Floats, Floats]:
        """Differences that giving one layer of a contracted problem another format makes, each (L, F + 1).

        Args:
            table: (L, F + 1) sums to use instead of the objective.

        Returns:
            predicted loss (infinite where it is not usable); objective; and the rate, loss per decrease of the objective,
            infinite where the objective does not decrease, or a limit is exceeded that was met.
        """
        layers, count = self.penalty.shape
        added = self.penalty
        if self.interactions is not None:
            present = np.eye(count + 1)[index][:, 1:]
            within = self.gram.reshape(layers, count, layers, count)[np.arange(layers), :, np.arange(layers), :]
            others = (self.gram @ present.ravel()).reshape(layers, count) - (within @ present[:, :, None])[:, :, 0]
            added = 0.5 * np.diagonal(self.gram).reshape(layers, count) + others
        loss = np.where(self.usable, np.pad(added, ((0, 0), (1, 0))), np.inf)
        value = table
        if value is None and self.objective == "lower_max":
            value = np.pad(np.repeat(-1.0 * self.counts[:, None], count, axis=1), ((0, 0), (1, 0)))
        elif value is None:
            value = self.costs_at(index)
        with np.errstate(invalid="ignore"):  # infinite minus infinite: a present format that is not usable
            loss, value = (table - np.take_along_axis(table, index[:, None], axis=1) for table in (loss, value))
        useful = np.isfinite(loss) & (value < -1e-12 * np.nanmax(np.abs(value)))
        for name, (_, most) in self.limits.items():
            total, changed = self.limited(name, index)
            if total <= (most := most + MARGIN * abs(most)):
                useful &= changed <= most
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
