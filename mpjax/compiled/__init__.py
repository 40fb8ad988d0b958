"""A model compiled to one XLA program that is verified against its definition, exported, and loaded again."""

from mpjax.compiled.export import ExportError, Loaded, load
from mpjax.compiled.program import Compiled, Fastest, compile, fastest
from mpjax.compiled.report import Report
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
