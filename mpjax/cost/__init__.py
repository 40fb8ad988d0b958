"""What a layer costs in a format: bytes, FLOPs, and its measured latency, alone or inside whole programs."""

from mpjax.cost.attribution import Attributed as Attributed
from mpjax.cost.attribution import attributed
from mpjax.cost.costs import Costs as Costs
from mpjax.cost.costs import predicted
from mpjax.cost.costs import table as table
from mpjax.cost.counting import static
from mpjax.cost.measuring import Progress as Progress
from mpjax.cost.measuring import measure

__all__ = ["attributed", "measure", "predicted", "static"]
