"""One price for the budget: each layer alone takes its least loss + λ · cost."""

import numpy as np

from mpjax.search.allocators.allocator import allocation, with_budget
from mpjax.search.optimum.lagrangian import priced
from mpjax.search.optimum.solution import Solution
from mpjax.search.problem import Problem


def lagrangian(problem: Problem, budget: float, seed: int = 0) -> Solution:
    """fᵢ = argmin pᵢ(f) + λ cᵢ(f), with λ bisected to the least at which the budget is met; what is left of it stays unused.

    With further limits one price stands for all: c is then the sum of their tables, each over its range. Interactions are
    ignored, and casts where the price is weighed. Cost: 80 passes over L·F numbers.
    Source: Everett 1963, doi 10.1287/opre.11.3.399; llama.cpp's `--target-bpw` (https://github.com/ggml-org/llama.cpp, #15550).

    Raises:
        InfeasibleError: the choice at the highest price exceeds a limit.
        ValueError: as `ilp`.
    """
    limited = with_budget(problem, budget)
    value = np.where(limited.usable, np.pad(limited.penalty, ((0, 0), (1, 0))), np.inf)
    weight = np.zeros(value.shape)
    for table, _ in limited.limits.values():
        part = np.where(limited.usable, np.asarray(limited.cost if table is None else table), np.nan)
        spread = float((np.nanmax(part, axis=1) - np.nanmin(part, axis=1)).sum())
        weight += np.nan_to_num(part) / (spread or 1.0)
    index, _ = priced(value, weight, lambda index: not limited.exceeded(index))
    return allocation(problem, limited, index, additive=True)
