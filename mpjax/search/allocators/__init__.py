"""Which assignment at a budget: the allocators of the field, by prediction alone, on one interface.

    solution = allocators.ilp(problem, budget, seed)        # least predicted loss with Σ cost ≤ budget
    for name, allocate in allocators.ALLOCATORS.items(): …

All honour the problem's constraints (ties, fixed layers, forbidden formats, further limits), and raise `InfeasibleError` where
they reach no assignment within them. The solution's objective is its predicted loss. A new one is a file, and a line here.
"""

from mpjax.search.allocators.allocator import Allocator
from mpjax.search.allocators.greedy import greedy, greedy_up
from mpjax.search.allocators.ilp import ilp
from mpjax.search.allocators.iqp import iqp
from mpjax.search.allocators.lagrangian import lagrangian
from mpjax.search.allocators.prefix import last_first, prefix, random_order
from mpjax.search.allocators.segments import segments

ALLOCATORS: dict[str, Allocator] = {
    "ilp": ilp,
    "iqp": iqp,  # needs interactions
    "lagrangian": lagrangian,
    "greedy": greedy,
    "greedy_up": greedy_up,
    "segments": segments,
    "prefix": prefix,
    "random_order": random_order,
    "last_first": last_first,
}

__all__ = ["ALLOCATORS", "Allocator", *ALLOCATORS]
