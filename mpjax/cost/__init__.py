"""What a layer costs in a format: bytes, FLOPs, and its measured latency."""

from mpjax.cost.costs import Costs, predicted, table
from mpjax.cost.counting import static
from mpjax.cost.measuring import Progress, measure

__all__ = ["Costs", "Progress", "measure", "predicted", "static", "table"]
