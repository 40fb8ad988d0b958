"""Importers that turn published model files into Flax modules, and networks."""

import struct

DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, OSError, struct.error)
"""What parsers raise on files that are cut off or altered."""
