"""A model compiled to one XLA program that is verified against its definition, exported, and loaded again."""

from mpjax.compiled.program import Compiled, ExportError, Fastest, Loaded, Report, compile, fastest, load
from mpjax.compiled.tuning import Candidate, Tuning, from_plan, into_plan, tune
from mpjax.compiled.verification import MiscompiledError, Verification

__all__ = [
    "Candidate",
    "Compiled",
    "ExportError",
    "Fastest",
    "Loaded",
    "MiscompiledError",
    "Report",
    "Tuning",
    "Verification",
    "compile",
    "fastest",
    "from_plan",
    "into_plan",
    "load",
    "tune",
]
