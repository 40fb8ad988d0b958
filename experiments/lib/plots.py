"""matplotlib with one style for every figure: readable at a column's width, distinct to the colour-blind.

from experiments.lib.plots import BLUE, plt
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from cycler import cycler  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

__all__ = ["BLUE", "GREEN", "PALETTE", "RED", "Axes", "Figure", "plt"]

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/).
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")

plt.rcParams.update(
    {
        "figure.figsize": (8, 4),
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "savefig.dpi": 150,
        "pdf.fonttype": 42,  # TrueType: what publishers ask for
    }
)
