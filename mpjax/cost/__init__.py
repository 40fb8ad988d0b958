"""What a layer costs in a format: bytes, FLOPs, and its measured latency."""

from mpjax.cost.costs import Costs as Costs
from mpjax.cost.costs import predicted
from mpjax.cost.costs import table as table
from mpjax.cost.counting import static
from mpjax.cost.measuring import Progress as Progress
from mpjax.cost.measuring import measure

__all__ = ["measure", "predicted", "static"]
