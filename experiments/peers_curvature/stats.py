"""Rows, errors and times of experiments/peers_curvature."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Row = dict[str, Any]
PYHESSIAN, CURVLINOPS, EXACT = "pyhessian", "curvlinops", "exact"
JOINT, PER_LAYER = "joint probes", "per-layer probes"
OPTIONAL = (float, None)

ROW_FIELDS: dict[str, Any] = {
    "network": str,
    "quantity": str,
    "tool": str,
    "method": str,
    "layer": (str, None),
    "probes": (int, None),
    **dict.fromkeys(("value", "stderr", "residual", "z", "difference"), OPTIONAL),
    **dict.fromkeys(("seconds", "seconds_q1", "seconds_q3", "compile_seconds", "gradients", "vs_pyhessian"), OPTIONAL),
    **dict.fromkeys(("relative_deviation", "seconds_at_target"), OPTIONAL),
    "probes_at_target": (int, None),
    "ledger_hvp": int,
}


# --- estimates with their errors --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Estimates (L,), the standard deviation of one probe's value, and the number of probes behind the estimates."""

    value: np.ndarray
    deviation: np.ndarray
    probes: int

    @property
    def stderr(self) -> np.ndarray:
        """(L,) standard error of the values."""
        return self.deviation / math.sqrt(self.probes)


def from_samples(samples: np.ndarray) -> Sampled:
    """From (n, L) values of single probes."""
    return Sampled(value=samples.mean(0), deviation=samples.std(0, ddof=1), probes=len(samples))


def from_estimates(values: np.ndarray, stderrs: np.ndarray, probes: int) -> Sampled:
    """From R estimates (R, L) of `probes` probes each, with their standard errors."""
    deviation = np.sqrt(np.mean(stderrs**2, 0) * probes)
    return Sampled(value=values.mean(0), deviation=deviation, probes=probes * len(values))


def pooled(*estimates: Sampled) -> Sampled:
    """Independent estimates by one estimator, together: means weighted by probes, variances by degrees of freedom."""
    weights = np.array([each.probes for each in estimates], float)
    variance = sum((n - 1) * each.deviation**2 for n, each in zip(weights, estimates, strict=True))
    return Sampled(
        value=np.asarray(sum(n * each.value for n, each in zip(weights, estimates, strict=True)) / weights.sum()),
        deviation=np.sqrt(variance / (weights - 1).sum()),
        probes=int(weights.sum()),
    )


def z_scores(a: Sampled, b: Sampled) -> np.ndarray:
    """(L,) difference of two independent estimates over its standard error."""
    return (a.value - b.value) / np.sqrt(a.stderr**2 + b.stderr**2)


def relative_deviation(sampled: Sampled, truth: np.ndarray) -> float:
    """Median over the layers of one probe's standard deviation over the layer's trace."""
    return float(np.median(sampled.deviation / np.abs(truth)))


def probes_at(deviation: float, target: float) -> int:
    """Probes that bring a relative deviation down to the target; at least one."""
    return max(1, math.ceil((deviation / target) ** 2))


# --- time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds (R, F) of F functions in R interleaved rounds."""

    names: tuple[str, ...]
    seconds: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """(R,) seconds of one function."""
        return self.seconds[:, self.names.index(name)]

    def ratio(self, name: str, reference: str) -> float | None:
        """Median over the rounds of its time over the reference's; None where there is no such reference."""
        return float(np.median(self.of(name) / self.of(reference))) if reference in self.names else None

    def fields(self, name: str) -> dict[str, float]:
        """Median and quartiles, as a row has them."""
        low, median, high = np.percentile(self.of(name), (25, 50, 75))
        return {"seconds": float(median), "seconds_q1": float(low), "seconds_q3": float(high)}


def clocked(function: Callable[[], Any]) -> tuple[Any, float]:
    """The finished result and its wall seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - start


def interleaved(functions: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """Functions in turn, round after round; each returns its own seconds."""
    seconds = [[function() for function in functions.values()] for _ in range(rounds)]
    return Times(names=tuple(functions), seconds=np.array(seconds))


def second_call(function: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of the second of two calls: during the first one the other framework's threads go to sleep."""

    def run() -> float:
        jax.block_until_ready(function())
        return clocked(function)[1]

    return run


def row(network: str, quantity: str, tool: str, method: str, values: Mapping[str, Any]) -> Row:
    """A row with all of its fields; what is not given is None (HVPs: 0).

    Raises:
        KeyError: a value that rows do not have.
    """
    if unknown := values.keys() - ROW_FIELDS.keys():
        raise KeyError(f"No fields of a row: {sorted(unknown)}.")
    empty = {**dict.fromkeys(ROW_FIELDS), "ledger_hvp": 0}
    return {**empty, "network": network, "quantity": quantity, "tool": tool, "method": method, **values}


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float]:
    """The function, compiled for these arguments, and the seconds that took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - start
