"""The result of every estimator: one score per (layer, format), its error and its cost.

A score of kind "loss" predicts (or, for `measured`, is) the growth of the loss per example when that layer alone takes that
format. A score of kind "ranking" only orders layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

import numpy as np

from mpjax.formats import Format
from mpjax.ledger import Ledger
from mpjax.program import Array, Batches, Model

Key: TypeAlias = Array
Scorer: TypeAlias = Callable[[Model, Batches, Sequence[str | Format], Key], "Scores"]
Kind = Literal["loss", "ranking"]


class Status(StrEnum):
    """The status of a score. INDEFINITE and UNCONVERGED scores keep their value.

    OK.
    ZERO: nothing that the score depends on changes.
    NOT_FINITE.
    OVERFLOW: beyond the range of float16.
    INDEFINITE: a predicted loss below 0: no optimum, or too few probes.
    UNCONVERGED: a Lanczos residual above a tenth of the value.
    """

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
        stderr: (L, F) standard error from the random probes (0 where there are none, NaN with one probe).
        residual: (L, F) error that more probes do not shrink, in the unit of `value`: Lanczos residual, depth doubling; 0 where
            there is none.
        layers, formats: names.
        kind: "loss" (may be summed) or "ranking" (only the order has a meaning).
        status: (L, F) strings, the values of `Status`.
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


def label(estimator: str, *knobs: str) -> str:
    """`trace[hutchinson,joint]`: the estimator's name with those of its knobs that are not empty."""
    return f"{estimator}[{','.join(filter(None, knobs))}]"
