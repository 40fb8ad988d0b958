"""A model compiled to one XLA program that is verified against its definition, exported, and loaded again."""

from mpjax.compiled.export import ExportError, Loaded
from mpjax.compiled.export import load as load
from mpjax.compiled.program import Compiled, fastest
from mpjax.compiled.program import Fastest as Fastest
from mpjax.compiled.program import compile as compile
from mpjax.compiled.report import Report
from mpjax.compiled.tuning import Candidate as Candidate
from mpjax.compiled.tuning import Tuning, tune
from mpjax.compiled.tuning import from_plan as from_plan
from mpjax.compiled.tuning import into_plan as into_plan
from mpjax.compiled.verification import MiscompiledError
from mpjax.compiled.verification import Verification as Verification

__all__ = ["Compiled", "ExportError", "Loaded", "MiscompiledError", "Report", "Tuning", "fastest", "tune"]
