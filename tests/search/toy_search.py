"""Problems, and a metric whose answer is known."""

import itertools

import numpy as np

from mpjax.search import Assignment, Measurement, Problem

LOW = "bfloat16"


def names(count: int) -> tuple[str, ...]:
    return tuple(f"layer/{i}" for i in range(count))


def lowered(*numbers: int) -> tuple[str, ...]:
    return tuple(f"layer/{i}" for i in numbers)


def problem(penalty, **fields) -> Problem:
    penalty = np.asarray(penalty, dtype=float)
    return Problem(layers=names(len(penalty)), formats=(LOW,), penalty=penalty[:, None], **fields)


def with_interactions(penalty, **fields) -> Problem:
    """The same, as a problem that `iqp` takes, too."""
    return problem(penalty, interactions=np.diag(2 * np.abs(np.asarray(penalty, float))), **fields)


def random_problem(
    seed: int, layers: int, formats: int, objective: str, *, cost: bool = True, edges: bool = False, gram: bool = False
) -> Problem:
    """Penalties over three decades, some of them zero, equal or not finite; with edges one layer feeds itself."""
    rng = np.random.default_rng(seed)
    penalty = rng.exponential(size=(layers, formats)) * 10.0 ** rng.uniform(-3, 0, size=(layers, 1))
    penalty[rng.random(penalty.shape) < 0.1] = 0.0
    fields: dict = {}
    if gram:
        rank = int(rng.integers(1, 2 * layers * formats + 1))
        effects = rng.normal(size=(layers * formats, rank)) * np.sqrt(2 * penalty.reshape(-1, 1) / rank)
        fields["interactions"] = effects @ effects.T
        penalty = 0.5 * np.diag(fields["interactions"]).reshape(layers, formats)
    elif rng.random() < 0.3:
        penalty[rng.integers(layers), rng.integers(formats)] = np.inf
    if cost:
        low, high = rng.uniform(0.2, 1.2, (layers, formats)), rng.uniform(0.8, 1.2, (layers, 1))
        fields |= {"cost": np.concatenate([high, low], axis=1)}
    if cost and edges and layers > 1:
        pairs = [*itertools.pairwise(range(layers)), (0, layers - 1), (1, 1)]
        cast = rng.uniform(0, 0.3, (len(pairs), formats + 1, formats + 1))
        cast[:, range(formats + 1), range(formats + 1)] = 0.0
        fields |= {"edges": tuple((f"l{a}", f"l{b}") for a, b in pairs), "cast_cost": cast}
    names, low = tuple(f"l{i}" for i in range(layers)), tuple(f"f{i}" for i in range(formats))
    return Problem(layers=names, formats=low, penalty=penalty, objective=objective, **fields)


class Additive:
    """Adds up the harm of the lowered layers, and records what it is asked."""

    def __init__(self, harm, power: float = 1.0) -> None:
        self.harm = dict(zip(names(len(harm)), harm, strict=True))
        self.power = power
        self.asked: list[Assignment] = []

    def __call__(self, assignment: Assignment) -> Measurement:
        self.asked.append(assignment)
        return Measurement(value=float(sum(self.harm[layer] for layer in assignment.lowered)) ** self.power)
