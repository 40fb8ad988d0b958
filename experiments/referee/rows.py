"""The tables."""

from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Method:
    """An estimator with an allocator, over all models, formats and budgets: the geometric mean of its error over the least
    that is known at the same budget (1: the best known everywhere), with an interval over the held-out blocks."""

    estimator: str = column("estimator", short=True)
    allocator: str = column("allocator", short=True)
    regret: float = column("error / best known", ".2f", short=True)
    regret_low: float
    regret_high: float
    worst: float = column("worst", ".2f", short=True)
    cells: int = column("cells", "d", short=True)
    wins: int = column("within 2 % of the best", "d", short=True)
    passes: float = column("passes per example", ".0f", short=True)
    seconds: float = column("s per model", ".1f", short=True)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a method chose for a model, a set of formats and a budget, mean over its seeds."""

    model: str = column("model", short=True)
    formats: str = column("formats", short=True)
    share: float = column("bytes / uniform", "g", short=True)
    estimator: str = column("estimator", short=True)
    allocator: str = column("allocator", short=True)
    error: float = column("error", ".3g", short=True)
    regret: float = column("error / best known", ".2f", short=True)
    regret_low: float
    regret_high: float
    bytes: int = column("bytes", ",d")
    seeds: int = column("seeds", "d")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What an estimator took on a model and a set of formats."""

    model: str = column("model")
    formats: str = column("formats")
    estimator: str = column("estimator")
    kind: str = column("kind")
    forward: float = column("forward passes per example", ".1f")
    backward: float = column("backward passes per example", ".1f")
    seconds: float = column("s", ".1f")
    compile_seconds: float = column("compiling, s", ".1f")
    note: str | None = column("note", default=None)


@dataclass(frozen=True, kw_only=True)
class Additivity:
    """Whether losses of single layers add up: on the examples that were scored, the loss of a whole storage over the sum of what
    each of its layers loses alone, measured and predicted."""

    model: str = column("model", short=True)
    storage: str = column("storage", short=True)
    bits: float = column("bits per weight", ".3g", short=True)
    whole: float = column("loss", ".3g", short=True)
    vs_measured: float | None = column("/ Σ of single layers", ".2f", short=True, default=None)
    vs_predicted: float | None = column("/ Σ local rounding", ".2f", short=True, default=None)
