"""Implementations of a product, each equal to XLA's up to float32 rounding, and the choice among them."""

from mpjax.kernels.choice import CHOICES, IMPLEMENTATIONS, Implemented, implementations, implemented, rule, suited

__all__ = ["CHOICES", "IMPLEMENTATIONS", "Implemented", "implementations", "implemented", "rule", "suited"]
