"""Compiled XLA programs: building, timing and profiling them, and reading what they execute. Knows nothing of models."""

from mpjax.xla.environment import cores, device_name, environment
from mpjax.xla.executable import EXACT, PLAIN, Executable, Options, build, option_sets
from mpjax.xla.hlo import Executed, executed_dtypes
from mpjax.xla.profiling import layer_seconds
from mpjax.xla.timing import Timings, in_turns

__all__ = [
    "EXACT",
    "PLAIN",
    "Executable",
    "Executed",
    "Options",
    "Timings",
    "build",
    "cores",
    "device_name",
    "environment",
    "executed_dtypes",
    "in_turns",
    "layer_seconds",
    "option_sets",
]
