"""mpjax: which layers of a JAX/Flax model may run in low precision, how we know, and how fast the result is.

The package exports modules, not names: `import mpjax as mp; mp.sensitivity.local_rounding(...)`.
"""

from mpjax import (
    apply,
    compiled,
    cost,
    curvature,
    emulate,
    estimate,
    evaluation,
    formats,
    gradients,
    grams,
    graph,
    hlo,
    ledger,
    losses,
    lowering,
    metrics,
    models,
    pareto,
    partition,
    plan,
    predicted,
    problem,
    report,
    search,
    sensitivity,
)

__version__ = "0.1.0"

__all__ = [
    "apply",
    "compiled",
    "cost",
    "curvature",
    "emulate",
    "estimate",
    "evaluation",
    "formats",
    "gradients",
    "graph",
    "grams",
    "hlo",
    "ledger",
    "losses",
    "lowering",
    "metrics",
    "models",
    "pareto",
    "partition",
    "plan",
    "predicted",
    "problem",
    "report",
    "search",
    "sensitivity",
]
