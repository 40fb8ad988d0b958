"""Toy models that several test files use."""

import flax.linen as nn


class SmallConv(nn.Module):
    """Conv 3x3 to half the size, depthwise 3x3, two equal Dense layers, a head without bias; for (N, 8, 8, 3)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = x.mean((1, 2))
        x = nn.Dense(8, name="second")(nn.relu(nn.Dense(8, name="first")(x)))
        return nn.Dense(5, use_bias=False, name="head")(x)
