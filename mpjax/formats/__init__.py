"""Number formats: the registry, rounding, and how weights are stored."""

from mpjax.formats.registry import FLOAT32 as FLOAT32
from mpjax.formats.registry import FORMATS, Format, register
from mpjax.formats.registry import parse as parse
from mpjax.formats.registry import parse_all as parse_all
from mpjax.formats.rounding import amax_scale as amax_scale
from mpjax.formats.rounding import narrowed as narrowed
from mpjax.formats.rounding import round_to as round_to

__all__ = ["FORMATS", "Format", "register"]
