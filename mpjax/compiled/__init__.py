"""A model compiled to one XLA program that is verified against its definition, exported, and loaded again."""

from mpjax.compiled.export import ExportError
from mpjax.compiled.export import Loaded as Loaded
from mpjax.compiled.export import load as load
from mpjax.compiled.program import Compiled as Compiled
from mpjax.compiled.program import Fastest as Fastest
from mpjax.compiled.program import compile as compile
from mpjax.compiled.program import fastest
from mpjax.compiled.report import Report as Report
from mpjax.compiled.tuning import Candidate as Candidate
from mpjax.compiled.tuning import Tuning as Tuning
from mpjax.compiled.tuning import from_plan, into_plan, tune
from mpjax.compiled.verification import MiscompiledError
from mpjax.compiled.verification import Verification as Verification

__all__ = ["ExportError", "MiscompiledError", "fastest", "from_plan", "into_plan", "tune"]
