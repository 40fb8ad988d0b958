"""What a layer costs in a format: bytes, FLOPs, and its measured latency."""

from mpjax.cost.costs import Costs, measure, predicted, static, table

__all__ = ["Costs", "measure", "predicted", "static", "table"]
