"""Strategies: what to measure next, one file each.

By a ranking, a prefix of it bisected on the measured metric: `binary`, and the baselines `last_first`, `random`, `segments`,
`bisect_precision`. By prediction, the best assignment within a moving limit on the predicted loss: `ilp`, `iqp`, `greedy`.
"""

from mpjax.search.strategies.binary import binary
from mpjax.search.strategies.bisect_precision import bisect_precision
from mpjax.search.strategies.exhaustive import exhaustive
from mpjax.search.strategies.greedy import greedy
from mpjax.search.strategies.ilp import ilp
from mpjax.search.strategies.iqp import iqp
from mpjax.search.strategies.last_first import last_first
from mpjax.search.strategies.random import random
from mpjax.search.strategies.segments import segments
from mpjax.search.strategies.strategy import Probe, Step, Strategy

__all__ = [
    "Probe",
    "Step",
    "Strategy",
    "binary",
    "bisect_precision",
    "exhaustive",
    "greedy",
    "ilp",
    "iqp",
    "last_first",
    "random",
    "segments",
]
