"""Compiled XLA programs: building, timing and profiling them, and reading what they execute. Knows nothing of models."""

from mpjax.xla.environment import cores as cores
from mpjax.xla.environment import device_name as device_name
from mpjax.xla.environment import environment as environment
from mpjax.xla.executable import EXACT as EXACT
from mpjax.xla.executable import PLAIN as PLAIN
from mpjax.xla.executable import Executable as Executable
from mpjax.xla.executable import Options as Options
from mpjax.xla.executable import build as build
from mpjax.xla.executable import option_sets as option_sets
from mpjax.xla.hlo import Executed as Executed
from mpjax.xla.hlo import executed_dtypes as executed_dtypes
from mpjax.xla.profile import ROWS as ROWS
from mpjax.xla.profile import DeviceProfile as DeviceProfile
from mpjax.xla.profile import assumed as assumed
from mpjax.xla.profile import device_profile
from mpjax.xla.profiling import layer_seconds as layer_seconds
from mpjax.xla.timing import Timings as Timings
from mpjax.xla.timing import in_turns as in_turns

__all__ = ["device_profile"]
