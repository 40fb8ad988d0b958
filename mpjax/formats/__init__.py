"""Number formats: the registry, rounding, and how weights are stored."""

from mpjax.formats.registry import FLOAT32, FORMATS, Format, parse, parse_all, register
from mpjax.formats.rounding import amax_scale, narrowed, round_to

__all__ = ["FLOAT32", "FORMATS", "Format", "amax_scale", "narrowed", "parse", "parse_all", "register", "round_to"]
