"""mpjax: which layers of a JAX model may run in low precision, how we know, and how fast the result is.

model = mp.from_linen(module, variables, images)
scores = mp.sensitivity.local_rounding()(model, batches, ("bfloat16",), key)
result = mp.search.solve(problem, mp.search.ilp(), evaluate=error, tolerance=0.01)
program = mp.compile(mp.apply(model, result.assignment), batches)
"""

from mpjax import compiled, cost, curvature, formats, losses, partition, plan, program, search, sensitivity, xla
from mpjax.apply import apply
from mpjax.compiled import compile, load
from mpjax.emulation import calibrate
from mpjax.evaluation import Evaluation
from mpjax.optimize import optimize
from mpjax.program import from_function, from_linen, from_nnx

__version__ = "0.2.0"

__all__ = [
    "Evaluation",
    "apply",
    "calibrate",
    "compile",
    "compiled",
    "cost",
    "curvature",
    "formats",
    "from_function",
    "from_linen",
    "from_nnx",
    "load",
    "losses",
    "optimize",
    "partition",
    "plan",
    "program",
    "search",
    "sensitivity",
    "xla",
]
