"""Rows, estimates with their errors, and times of the comparison with PyHessian and curvlinops."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.lib.rows import column
from experiments.lib.times import Times

PLAIN, MATRIX = "mpjax", "mpjax[matrix_gradients]"
PYHESSIAN, CURVLINOPS = "pyhessian", "curvlinops"
JOINT, PER_LAYER = "joint probes", "per-layer probes"
PASSES = {"gradient": "gradient", "hvp": "HVP", "hvp_again": "HVP, same point"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity of one network by one tool.

    `quantity`: "gradient", "hvp" (from the parameters), "hvp_again" (a further product at the same point), "trace",
    "top_eigenvalue", "layer_traces" (the time of all) or "layer_trace" (one layer's value). `gradients`: the time over the same
    tool's gradient, `vs_pyhessian` over PyHessian's in the same round. `z` and `difference` are against mpjax's value (a layer's:
    from per-layer probes). `relative_deviation`: of a probe, the median over the layers; `*_at_target`: for a median relative
    standard error of 10 %.
    """

    network: str = column("network", short=True)
    quantity: str = column("quantity")
    tool: str = column("tool", short=True)
    method: str = column("method", short=True)
    layer: str | None = column("layer", default=None)
    probes: int | None = column("probes", default=None)
    ledger_hvp: int = column("HVPs", default=0)
    value: float | None = column("value", ".5g", default=None)
    stderr: float | None = column("standard error", ".2g", default=None)
    residual: float | None = column("residual", ".1e", default=None)
    z: float | None = column("z", ".2f", default=None)
    difference: float | None = column("difference", ".1e", default=None)
    seconds: float | None = column("seconds (quartiles)", ".3g", short=True, default=None)
    seconds_q1: float | None = None
    seconds_q3: float | None = None
    compile_seconds: float | None = column("compile s", ".1f", default=None)
    gradients: float | None = column("in gradients", ".2f", default=None)
    vs_pyhessian: float | None = column("time / PyHessian", ".3f", short=True, default=None)
    relative_deviation: float | None = column("relative deviation", ".2f", default=None)
    probes_at_target: int | None = column("probes for 10 %", default=None)
    seconds_at_target: float | None = column("seconds for 10 %", ".3g", short=True, default=None)

    @property
    def name(self) -> tuple[str, str]:
        """Tool and method."""
        return self.tool, self.method


@dataclass(frozen=True, kw_only=True)
class Check:
    """‖a − b‖ / ‖b‖ of one quantity between two frameworks."""

    network: str = column("network")
    what: str = column("compared")
    difference: float = column("relative difference", ".1e")


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
    weights = np.array([[estimate.probes] for estimate in estimates], float)
    value = (weights * [estimate.value for estimate in estimates]).sum(0) / weights.sum()
    variance = ((weights - 1) * [estimate.deviation**2 for estimate in estimates]).sum(0) / (weights - 1).sum()
    return Sampled(value=value, deviation=np.sqrt(variance), probes=int(weights.sum()))


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


def clocked(function: Callable[[], Any]) -> tuple[Any, float]:
    """The finished result and its wall seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - start


def in_rounds(functions: Mapping[Any, Callable[[], float]], rounds: int) -> Times:
    """Functions in turn, round after round; each returns its own seconds."""
    seconds = [[function() for function in functions.values()] for _ in range(rounds)]
    return Times(dict(zip(functions, 1e3 * np.array(seconds).T, strict=True)))


def second_call(function: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of the second of two calls: during the first one the other framework's threads go to sleep."""

    def run() -> float:
        jax.block_until_ready(function())
        return clocked(function)[1]

    return run


def seconds_of(times: Times, name: Any) -> dict[str, Any]:
    """Median and quartiles, as a row has them."""
    low, median, high = (value / 1e3 for value in times.quartiles(name))
    return {"seconds": median, "seconds_q1": low, "seconds_q3": high}


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float]:
    """The function, compiled for these arguments, and the seconds that took."""
    return clocked(lambda: jax.jit(function).lower(*args).compile())


# --- in sentences -----------------------------------------------------------------------------------------------


def findings(rows: Sequence[Row]) -> list[str]:
    """Per network, of mpjax's own best way: times over PyHessian's."""
    lines = []
    for network in dict.fromkeys(row.network for row in rows):
        some = {(row.quantity, *row.name): row for row in rows if row.network == network and row.layer is None}
        tool = MATRIX if any(name[1] == MATRIX for name in some) else PLAIN
        hvp = next(row for row in some.values() if (row.quantity, row.tool) == ("hvp", tool))
        line = f"{network}: one HVP costs mpjax {hvp.gradients:.2f} gradients"
        if ("layer_traces", tool, JOINT) in some:
            joint, single = (some["layer_traces", tool, method] for method in (JOINT, PER_LAYER))
            peer = some["layer_traces", PYHESSIAN, PER_LAYER].seconds_at_target or math.nan
            line += (
                f", and {hvp.vs_pyhessian:.2f} times PyHessian's time. All layer traces from joint probes take "
                f"{joint.vs_pyhessian:.3f} times PyHessian's time (one call per layer) at the same number of probes; at the same "
                f"median standard error {(joint.seconds_at_target or math.nan) / peer:.2f} times from joint and "
                f"{(single.seconds_at_target or math.nan) / peer:.2f} from per-layer probes"
            )
        lines.append(f"{line}.")
    return lines
