"""Wall times of functions that take turns, round after round, so that whatever else the machine does falls on all alike."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from mpjax.xla import timing


class Quartiles(NamedTuple):
    """Of some samples."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Times:
    """Name -> (R,) milliseconds, one a round."""

    ms: Mapping[Any, np.ndarray]

    def quartiles(self, name: Hashable) -> Quartiles:
        """In milliseconds."""
        return Quartiles(*np.percentile(self.ms[name], (25, 50, 75)).tolist())

    def columns(self, name: Hashable, **references: Hashable) -> dict[str, float]:
        """A row's `ms`, `ms_q1`, `ms_q3`, and the median of the ratios to each reference under its keyword."""
        low, median, high = self.quartiles(name)
        ratios = {column: self.ratio(name, reference).median for column, reference in references.items()}
        return {"ms": median, "ms_q1": low, "ms_q3": high, **ratios}

    def fastest(self, name: Hashable) -> float:
        """The least, in milliseconds."""
        return float(self.ms[name].min())

    def ratio(self, name: Hashable, reference: Hashable) -> Quartiles:
        """Of the ratios within each round: below 1, `name` is faster."""
        return Quartiles(*np.percentile(self.ms[name] / self.ms[reference], (25, 50, 75)).tolist())


def interleaved(functions: Mapping[str, Callable[[], Any]], *, rounds: int, shortest: float = 0.0) -> Times:
    """Each function once a round; one that takes less than `shortest` seconds is repeated within its turn."""
    runs = [lambda run=run: jax.block_until_ready(run()) for run in functions.values()]
    samples = timing.in_turns(runs, rounds, shortest=shortest)
    return Times({name: 1e3 * np.asarray(seconds) for name, seconds in zip(functions, samples, strict=True)})
