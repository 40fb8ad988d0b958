"""Strategies: what to measure next, one file each.

By a ranking, a prefix of it bisected on the measured metric: `binary`, and the baselines `last_first`, `random`, `segments`,
`bisect_precision`. By prediction, the best assignment within a moving limit on the predicted loss: `ilp`, `iqp`, `greedy`.
"""
