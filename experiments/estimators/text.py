"""Columns and fixed paragraphs of the page of experiments/estimators."""

from experiments.estimators.judge import FORMATS
from experiments.lib.pages import Column
from mpjax.ledger import Ledger

ROWS_TABLE = (
    Column(key="model", title="model"),
    Column(key="estimator", title="estimator"),
    Column(key="loss", title="loss"),
    Column(key="format", title="format"),
    Column(key="status", title="status"),
    Column(key="spearman", title="Spearman", format=".3f"),
    Column(key="kendall", title="Kendall", format=".3f"),
    Column(key="topk_overlap", title="top fifth", format=".2f"),
    Column(key="layers", title="layers"),
    Column(key="layers_low_10", title="low at 10 %"),
    Column(key="layers_low_25", title="25 %"),
    Column(key="layers_low_50", title="50 %"),
    Column(key="seconds", title="s", format=".2f"),
    Column(key="compile_seconds", title="compile s", format=".1f"),
    Column(key="peak_mb", title="peak MB", format=".0f"),
    *(Column(key=f"ledger_{name}", title=name) for name in Ledger().as_dict()),
)
ALL_LOW_TABLE = (
    Column(key="model", title="model"),
    Column(key="format", title="format"),
    Column(key="metric", title="metric"),
    Column(key="error", title="error", format=".4g"),
)
TARGETS_TABLE = (
    Column(key="target", title="target"),
    Column(key="model", title="model"),
    Column(key="format", title="format"),
    Column(key="value", title="value", format=".3g"),
    Column(key="limit", title="limit", format=".3g"),
    Column(key="met", title="met"),
)
INTERACTIONS_TABLE = (
    Column(key="model", title="model"),
    Column(key="format", title="format"),
    Column(key="probes", title="probes"),
    Column(key="subsets", title="subsets"),
    Column(key="usable", title="usable"),
    Column(key="spearman_cross_terms", title="Spearman, cross terms", format=".3f"),
    Column(key="spearman_diagonal", title="diagonal", format=".3f"),
    Column(key="log_rmse_cross_terms", title="log-RMSE, cross terms", format=".3f"),
    Column(key="log_rmse_diagonal", title="diagonal", format=".3f"),
    Column(key="gain_low", title="difference of squares, low", format=".3f"),
    Column(key="gain_high", title="high", format=".3f"),
    Column(key="better", title="better"),
)
DAMPING_TABLE = (
    Column(key="model", title="model"),
    Column(key="epsilon", title="ε / mean eigenvalue", format="g"),
    *(Column(key=f"spearman_{fmt}", title=f"measured, {fmt}", format=".3f") for fmt in FORMATS),
    Column(key="spearman_previous", title="previous ε", format=".3f"),
)
COST_TABLE = (
    Column(key="model", title="model"),
    Column(key="examples", title="examples"),
    Column(key="outputs", title="outputs k"),
    Column(key="layers", title="layers"),
    Column(key="largest_block", title="largest block", format=","),
    Column(key="seconds", title="s", format=".1f"),
    Column(key="compile_seconds", title="compile s", format=".1f"),
    Column(key="peak_mb", title="peak MB", format=".0f"),
)
SLQ_TABLE = (
    Column(key="model", title="model"),
    Column(key="layer", title="layer"),
    Column(key="weights", title="weights", format=","),
    Column(key="exact", title="exact", format=".2f"),
    Column(key="value", title="SLQ", format=".2f"),
    Column(key="stderr", title="standard error", format=".2f"),
    Column(key="residual", title="residual", format=".2f"),
    Column(key="deviation", title="deviation in errors", format=".2f"),
)
EXAMPLES_TABLE = (
    Column(key="model", title="model"),
    Column(key="estimator", title="estimator"),
    Column(key="loss", title="loss"),
    Column(key="examples", title="examples"),
    Column(key="settings", title="settings"),
    *(Column(key=f"ceiling_{fmt}", title=f"truth on these, {fmt}", format=".3f") for fmt in FORMATS),
    Column(key="search_seconds", title="search s", format=".1f"),
)
STATUS_TABLE = (
    Column(key="model", title="model"),
    Column(key="estimator", title="estimator"),
    Column(key="loss", title="loss"),
    Column(key="format", title="format"),
    Column(key="status", title="status"),
    Column(key="count", title="count"),
    Column(key="layers", title="layers"),
)
FACTS_TABLE = (
    Column(key="model", title="model"),
    Column(key="fact", title="fact"),
    Column(key="value", title="value", format=".6g"),
)

HOW = (
    "Spearman, Kendall (τ-b) and the overlap of the most sensitive fifth are with the output loss that was measured on the "
    "examples that the estimator saw (all of them for the baselines without data), also where the estimator is about another "
    "loss. Seconds are those of the scorer for all layers and all three formats at once, without compilation, in one process; "
    "peak MB is XLA's, of the largest program. Rows that are zero by construction are empty. A status other than ok says that "
    "some layers have it: they are named below. random is the mean of 32 draws. The range of activations that scales float8 is "
    "measured once, beforehand, and not counted. The [exact] scores of curvature share one computation of the spectra; each "
    "states all of its cost."
)
TARGETS = (
    "What was aimed at. Nothing is said of a ranking where the model with all layers low is destroyed: an error above a tenth of "
    "the torso or the eye, or of a nat."
)
LOWERING = (
    "The least sensitive layers are lowered, as many as keep the benchmark's own error within 10, 25 and 50 % of the error with "
    "all layers low; the number is bisected on the emulated model, on all examples. An assignment is measured once for all "
    "estimators and tolerances. For random the median of a few draws."
)
INTERACTIONS = (
    "Random subsets of 10 to 90 % of the layers, all in one format: the output loss that was measured, against ½ xᵀGx and "
    "against ½ Σ Gᵢᵢ. The difference of squares is that of squared log errors, cross terms minus diagonal, with its 95 % "
    "interval over subsets: below 0, cross terms are better."
)
LOGDET = (
    "Σ log(1 + λ/ε) of each layer's Gauss-Newton block. Left: the rank of each layer over ε; right: agreement with the measured "
    "error. The score is the same for all formats. Deviation: stochastic value minus exact one, over the root of squared "
    "standard error and squared residual."
)
EXAMPLES = (
    "What each estimator saw. Truth on these: Spearman between the measured loss on those examples and on all, what an "
    "estimator of so few examples could reach against the latter. 0 examples: a baseline without data."
)
STATUSES = (
    "overflow: beyond float16's range. not_finite: an infinite or undefined score. indefinite: a predicted loss below 0. "
    "unconverged: Lanczos left more than a tenth of the value open. zero_by_construction: nothing that the score sees changes."
)
