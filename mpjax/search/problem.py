"""A search problem: which layers may take which formats, at which predicted penalty and known cost. NumPy only, no jax.

An assignment as a row of numbers, one per layer, 0 for float32 and 1 + f for the f-th low format, is an *index*; every
number here (penalty, cost, objective) can be had of an assignment or of an index.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

FLOAT32 = "float32"
Floats = NDArray[np.float64]
Index = NDArray[np.int64]
Objective = Literal["lower_max", "cost_min"]


class Assignment(Mapping[str, str]):
    """Layer -> format name, in layer order; immutable and hashable. Saved as JSON, it is the plan.

    Equal to any mapping with the same items, whatever their order. `dict(assignment)` and `Assignment(dict)`
    are inverse to each other.
    """

    __slots__ = ("_formats",)

    def __init__(self, formats: Mapping[str, str]) -> None:
        for layer, name in formats.items():
            if not isinstance(layer, str) or not isinstance(name, str):
                raise TypeError(f"expected layer name -> format name, both strings; got {layer!r}: {name!r}")
        self._formats = dict(formats)

    @classmethod
    def uniform(cls, layers: Iterable[str], name: str = FLOAT32) -> "Assignment":
        """Every layer in one format."""
        return cls(dict.fromkeys(layers, name))

    @classmethod
    def from_json(cls, text: str) -> "Assignment":
        """Inverse of `to_json`.

        Raises:
            ValueError: not a JSON object of strings.
        """
        formats = json.loads(text)
        if not isinstance(formats, dict) or not all(isinstance(name, str) for name in formats.values()):
            raise ValueError(f"expected a JSON object of layer -> format name; got {text[:80]!r}")
        return cls(formats)

    def to_json(self) -> str:
        """A JSON object, layers in order."""
        return json.dumps(self._formats)

    @property
    def lowered(self) -> tuple[str, ...]:
        """The layers that are not in float32, in layer order."""
        return tuple(layer for layer, name in self._formats.items() if name != FLOAT32)

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
    """What the user's metric says about an assignment; lower is better.

    Attributes:
        value: loss of the metric against the float32 model, e.g. the mean NME. NaN is never accepted.
        low, high: its confidence interval, where there is one.
        confidence: level of that interval, where it is stated; `solve` refuses another level than it asks
            for.
        per_sample: (N,) values behind the mean, kept for the report and not compared.
    """

    value: float
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    per_sample: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)


Evaluate: TypeAlias = Callable[[Assignment], Measurement]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Which layers may be lowered, to what, at which predicted penalty and known cost.

    Attributes:
        layers: L distinct names, in execution order. (The arrays below may be given as nested lists.)
        formats: F distinct low formats; float32 is always available and not listed.
        penalty: (L, F) predicted loss of accuracy of each layer alone in each format. A value that is not finite means most
            sensitive, and so does a negative loss (an indefinite Hessian): no strategy that adds penalties up lowers such a
            layer.
        kind: "loss" if penalties may be added up (≥ 0, one unit), "ranking" if only their order means something.
        cost: (L, F) latency, bytes or FLOPs of each layer in each format, finite; or None.
        float32_cost: (L,) the same in float32; given exactly where `cost` is.
        edges: (producer, consumer) pairs of layers whose outputs and inputs meet.
        cast_cost: (E, F + 1, F + 1) ≥ 0: what edge e costs beyond the layers when its producer has format a and its consumer
            format b (0: float32, 1 + f: formats[f]); given exactly where `edges` are, in the unit of `cost`.
        interactions: (L·F, L·F) symmetric, positive semi-definite G, layer by layer: the predicted loss of a set of lowered
            layers is ½ xᵀGx and not the sum of its penalties (`sensitivity.interactions`). Entries between two formats of
            one layer are never used, a layer has one; they only keep G positive semi-definite.
        objective: "lower_max", as many layers below float32 as possible (then the least cost, then the least penalty), or
            "cost_min", the least cost.

    Raises:
        ValueError: shapes that do not match, repeated or empty names, float32 among the formats, a bad kind or cost, an edge
            between unknown layers, interactions that are not symmetric or not positive semi-definite, or an objective that
            needs a cost where there is none.
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
    objective: Objective = "lower_max"

    def __post_init__(self) -> None:
        for what, names in (("layers", self.layers), ("formats", self.formats)):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{what} must be distinct names, at least one; got {names}")
        if FLOAT32 in self.formats:
            raise ValueError(f"formats lists the low formats only, float32 is implicit; got {self.formats}")
        if self.kind not in ("loss", "ranking"):
            raise ValueError(f"kind must be 'loss' or 'ranking'; got {self.kind!r}")
        if self.objective not in ("lower_max", "cost_min"):
            raise ValueError(f"objective must be 'lower_max' or 'cost_min'; got {self.objective!r}")
        if (self.cost is None) != (self.float32_cost is None):
            raise ValueError("cost and float32_cost belong together: give both or neither")
        if self.objective == "cost_min" and self.cost is None:
            raise ValueError("objective='cost_min' needs cost and float32_cost (`cost.measure`, or bytes); got none")
        if bool(self.edges) != (self.cast_cost is not None):
            raise ValueError("edges and cast_cost belong together: give both or neither")
        if self.edges and self.cost is None:
            raise ValueError("cast_cost is added to cost: give cost and float32_cost, too")
        count, formats = len(self.layers), len(self.formats)
        self._set("penalty", (count, formats))
        if self.cost is not None:
            self._set("cost", (count, formats), finite=True)
            self._set("float32_cost", (count,), finite=True)
        if self.edges:
            unknown = {name for edge in self.edges for name in edge} - set(self.layers)
            if unknown:
                raise ValueError(f"edges name unknown layers: {', '.join(sorted(unknown)[:5])}")
            self._set("cast_cost", (len(self.edges), formats + 1, formats + 1), finite=True)
            if self.cast_cost is not None and (self.cast_cost < 0).any():
                raise ValueError(f"cast_cost must be ≥ 0; the least is {self.cast_cost.min():.3g}")
        if self.interactions is not None:
            self._set("interactions", (count * formats, count * formats))
            _check_gram(self.interactions, self.kind)

    def _set(self, name: str, shape: tuple[int, ...], finite: bool = False) -> None:
        array = np.array(getattr(self, name), dtype=np.float64)
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} (layers, formats); got {array.shape}")
        if finite and not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite; got {array[~np.isfinite(array)][:3]}")
        array.flags.writeable = False
        object.__setattr__(self, name, array)

    @property
    def baseline(self) -> Assignment:
        """All layers in float32."""
        return Assignment.uniform(self.layers)

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """(L, F): which penalties can be added up: finite, and not negative."""
        finite = np.isfinite(self.penalty) & (self.penalty >= 0)
        if self.interactions is not None:
            finite = finite & np.isfinite(np.diagonal(self.interactions)).reshape(finite.shape)
        return finite

    def index(self, assignment: Mapping[str, str]) -> Index:
        """(L,) numbers of the formats.

        Raises:
            ValueError: a layer that the assignment lacks, or a format that the problem does not have.
        """
        number = {FLOAT32: 0} | {name: 1 + f for f, name in enumerate(self.formats)}
        try:
            return np.array([number[assignment[layer]] for layer in self.layers], np.int64)
        except KeyError as error:
            raise ValueError(f"no layer or format {error} in this problem of {self.formats}") from error

    def assignment(self, index: Sequence[int] | Index) -> Assignment:
        """The inverse of `index`."""
        names = (FLOAT32, *self.formats)
        return Assignment({layer: names[int(f)] for layer, f in zip(self.layers, index, strict=True)})

    def penalty_of(self, index: Index) -> float:
        """Predicted loss: Σ penalties, or ½ xᵀGx where there are interactions. NaN or infinite where a part of it is."""
        low = np.flatnonzero(index)
        if self.interactions is None:
            return float(self.penalty[low, index[low] - 1].sum())
        flat = low * len(self.formats) + index[low] - 1
        return 0.5 * float(self.interactions[np.ix_(flat, flat)].sum())

    def cost_of(self, index: Index) -> float | None:
        """Σ costs of the layers and of the casts on the edges; None where the problem has no cost."""
        if self.cost is None or self.float32_cost is None:
            return None
        low = np.flatnonzero(index)
        total = float(np.where(index == 0, self.float32_cost, 0.0).sum() + self.cost[low, index[low] - 1].sum())
        if self.cast_cost is not None:
            producer, consumer = self.edge_numbers
            total += float(self.cast_cost[np.arange(len(self.edges)), index[producer], index[consumer]].sum())
        return total

    def changes(self, index: Index) -> tuple[Floats, Floats]:
        """What giving one layer another format changes: predicted loss and objective, each (L, F + 1), column 0 float32.

        Infinite in the loss where a penalty is not finite.
        """
        rows, count = np.arange(len(self.layers)), len(self.formats)
        loss = np.zeros((len(self.layers), count + 1))
        if self.interactions is None:
            loss[:, 1:] = np.where(self.allowed, self.penalty, np.inf)
        else:
            gram = np.where(np.isfinite(self.interactions), self.interactions, 0.0)
            low = np.flatnonzero(index)
            flat = low * count + index[low] - 1
            with_others = gram[:, flat].sum(axis=1)
            own = np.zeros(gram.shape[0])  # of the layer's present format, which is no other
            present = np.full(len(self.layers), -1)
            present[low] = flat
            layer_of = np.repeat(rows, count)
            has = present[layer_of] >= 0
            own[has] = gram[np.flatnonzero(has), present[layer_of][has]]
            added = 0.5 * np.diagonal(gram) + with_others - own
            loss[:, 1:] = np.where(self.allowed, added.reshape(-1, count), np.inf)
        if self.objective == "lower_max":
            value = np.repeat([[0.0] + [-1.0] * count], len(self.layers), axis=0)
        else:
            assert self.cost is not None and self.float32_cost is not None
            value = np.concatenate([self.float32_cost[:, None], self.cost], axis=1)
            if self.cast_cost is not None:
                producer, consumer = self.edge_numbers
                edges = np.arange(len(self.edges))
                itself = producer == consumer  # a layer that feeds itself, under a scan say
                own = self.cast_cost[edges[itself]]
                np.add.at(value, producer[itself], np.diagonal(own, axis1=1, axis2=2))
                a, b, between = producer[~itself], consumer[~itself], edges[~itself]
                np.add.at(value, a, self.cast_cost[between, :, index[b]])
                np.add.at(value, b, self.cast_cost[between, index[a], :])
        with np.errstate(invalid="ignore"):  # infinite minus infinite: a present format that is not allowed
            loss = loss - loss[rows, index][:, None]
        return loss, value - value[rows, index][:, None]

    @cached_property
    def edge_numbers(self) -> tuple[Index, Index]:
        """(E,) layer numbers of the producers and of the consumers."""
        position = {layer: number for number, layer in enumerate(self.layers)}
        pairs = np.array([[position[a], position[b]] for a, b in self.edges], np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def objective_of(self, index: Index) -> float:
        """What is minimised: the cost, or minus the number of lowered layers."""
        if self.objective == "lower_max":
            return -float(np.count_nonzero(index))
        cost = self.cost_of(index)
        assert cost is not None
        return cost

    def rank(self, index: Index) -> tuple[float, float, float]:
        """Smaller is better: the objective, then the cost, then the penalty (infinite where it cannot be told)."""
        cost, penalty = self.cost_of(index), self.penalty_of(index)
        known = penalty if self.kind == "loss" and math.isfinite(penalty) else math.inf
        return self.objective_of(index), 0.0 if cost is None else cost, known


def _check_gram(gram: Floats, kind: str) -> None:
    """Refuse what is no Gram matrix."""
    if kind != "loss":
        raise ValueError("interactions predict a loss: they need kind='loss', not a ranking")
    known = np.isfinite(np.diagonal(gram))
    finite = gram[np.ix_(known, known)]
    if not np.isfinite(finite).all():
        raise ValueError("interactions have entries that are not finite beside a finite diagonal")
    scale = float(np.abs(finite).max(initial=0.0))
    if np.abs(finite - finite.T).max(initial=0.0) > 1e-6 * scale:
        raise ValueError("interactions must be symmetric")
    least = float(np.linalg.eigvalsh(finite).min(initial=0.0))
    if least < -1e-6 * scale * max(1, len(finite)):
        raise ValueError(f"interactions must be positive semi-definite; the least eigenvalue is {least:.3g}")
