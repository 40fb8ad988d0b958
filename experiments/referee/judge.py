"""From held-out errors to regret: error over the least that any method reached at the same budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.referee.rows import Cell, Method

RESAMPLES, CONFIDENCE = 1000, 0.9
NEAR = 1.02  # of the best known: a win


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a method chose: an assignment's held-out errors (N,), one a seed, for a model, formats and a budget.

    Attributes:
        blocks: (N,) which examples depend on each other.
        bytes: of the largest choice.
    """

    model: str
    formats: str
    share: float
    estimator: str
    allocator: str
    errors: Sequence[np.ndarray]
    blocks: np.ndarray
    bytes: int

    @property
    def mean(self) -> float:
        """Over examples and seeds."""
        return float(np.mean([errors.mean() for errors in self.errors]))


def cells(choices: Sequence[Choice], known: Mapping[tuple[str, str, float], Sequence[np.ndarray]]) -> list[Cell]:
    """Rows of the choices; `known`: of a model, formats and a budget, the errors of everything that fits and was measured."""
    rows = []
    for choice, ratios in zip(choices, _ratios(choices, known), strict=True):
        low, high = np.quantile(ratios[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        rows.append(
            Cell(
                model=choice.model,
                formats=choice.formats,
                share=choice.share,
                estimator=choice.estimator,
                allocator=choice.allocator,
                error=choice.mean,
                regret=float(ratios[0]),
                regret_low=float(low),
                regret_high=float(high),
                bytes=choice.bytes,
                seeds=len(choice.errors),
            )
        )
    return rows


def methods(
    choices: Sequence[Choice],
    known: Mapping[tuple[str, str, float], Sequence[np.ndarray]],
    costs: Mapping[str, tuple[float, float]],
) -> list[Method]:
    """One row for each estimator and allocator that took part in all cells, the least regret first.

    `costs`: estimator -> (passes per example, seconds per model).
    """
    ratios = _ratios(choices, known)
    grouped: dict[tuple[str, str], list[np.ndarray]] = {}
    for choice, drawn in zip(choices, ratios, strict=True):
        grouped.setdefault((choice.estimator, choice.allocator), []).append(drawn)
    rows = []
    for (estimator, allocator), parts in grouped.items():
        logs = np.log(np.stack(parts))  # (cells, 1 + resamples)
        means = np.exp(logs.mean(axis=0))
        low, high = np.quantile(means[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        passes, seconds = costs[estimator]
        rows.append(
            Method(
                estimator=estimator,
                allocator=allocator,
                regret=float(means[0]),
                regret_low=float(low),
                regret_high=float(high),
                worst=float(np.exp(logs[:, 0].max())),
                cells=len(parts),
                wins=int(np.sum(logs[:, 0] <= np.log(NEAR))),
                passes=passes,
                seconds=seconds,
            )
        )
    return sorted(rows, key=lambda row: (-row.cells, row.regret))


def _ratios(
    choices: Sequence[Choice], known: Mapping[tuple[str, str, float], Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """(1 + RESAMPLES,) ratio of each choice's mean error to the best known one's: of the data, then of resampled blocks.

    The best known is chosen on the data, once: a resample moves both errors together.
    """
    drawn: dict[str, np.ndarray] = {}
    ratios = []
    for choice in choices:
        if choice.model not in drawn:
            drawn[choice.model] = _weights(choice.blocks)
        best = min(known[choice.model, choice.formats, choice.share], key=lambda errors: float(errors.mean()))
        weights = drawn[choice.model]
        ratio = (weights @ np.mean(choice.errors, axis=0)) / np.maximum(weights @ best, np.finfo(float).tiny)
        ratios.append(np.maximum(ratio, np.finfo(float).tiny))
    return ratios


def _weights(blocks: np.ndarray) -> np.ndarray:
    """(1 + RESAMPLES, N): ones, then how often each example is in a resample of whole blocks."""
    names, of_example = np.unique(blocks, return_inverse=True)
    random = np.random.default_rng(0)
    counts = np.stack(
        [np.bincount(random.integers(len(names), size=len(names)), minlength=len(names)) for _ in range(RESAMPLES)]
    )
    return np.concatenate([np.ones((1, len(blocks))), counts[:, of_example]])
