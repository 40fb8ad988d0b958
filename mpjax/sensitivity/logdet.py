"""The log-determinant of each layer's Hessian block."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from mpjax.curvature import estimates, grams
from mpjax.curvature.estimates import Estimate
from mpjax.curvature.operators import block_hessian, dense, eigenvalues
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, Loss
from mpjax.partition import Block
from mpjax.program import Array, Params
from mpjax.sensitivity.hessian import estimate_blocks
from mpjax.sensitivity.output_probes import output_size, probe
from mpjax.sensitivity.scores import Scorer, Scores, label
from mpjax.sensitivity.spectra import Spectra, check_given, exact_spectra, per_layer
from mpjax.sensitivity.task import ModelTask, Task, check_choice, check_probes, exactly, scorer_of

Form = Literal["score", "raw"]


def logdet(
    *,
    damping: float = 1e-2,
    method: Literal["exact", "slq"] = "exact",
    form: Form = "score",
    per_parameter: bool = False,
    loss: Loss = OUTPUT,
    max_outputs: int = 1024,
    num_probes: int = 8,
    depth: int = 20,
    spectra: Spectra | None = None,
) -> Scorer:
    """The log-determinant of a layer's Hessian block, as Σ log(1 + λ/ε) (ENERZAi, *Mixed precision inference*, 2024).

    "exact": of the Gauss-Newton block JᵀHJ, mean over the examples; its non-zero eigenvalues are those of a small k × k matrix
    (the Weinstein-Aronszajn identity), so blocks of any size are exact from k = examples × outputs vector-Jacobian products.
    "slq": of the true Hessian's block, by stochastic Lanczos quadrature, `num_probes` × `depth` Hessian-vector products per
    layer, with a standard error and a depth-doubling residual.

    Subtracting d log ε from log det(H + εI) leaves Σ log(1 + λ/ε), which does not depend on the number of weights d; "raw" adds
    it back. No form depends on the number format: the score is about how much the output moves, not how large the rounding is.
    Kind "ranking".

    Args:
        damping: ε, relative to the mean eigenvalue that can differ from 0, Σ trace / Σ min(d, k) over all layers ("slq": the
            traces from output probes).
        per_parameter: divide by d.
        max_outputs: k at most ("exact"); examples are taken from the front of the batches, as many as fit.
        spectra: for "exact", those of `spectra(model, batches)`, if they are there already.
    """
    _check(damping, method, form)
    check_given(spectra, method)
    if method == "slq":
        check_probes(num_probes, loss, "logdet[slq]")
    finish = partial(_scores, form=form, per_parameter=per_parameter)

    def by_slq(task: ModelTask) -> Scores:
        traces = probe(replace(task, key=jax.random.fold_in(task.key, 1)), "squares", num_probes)
        finite = np.isfinite(traces.value)
        ranks = np.minimum(task.sizes, task.examples * output_size(task.model, task.batches, loss))[finite].sum()
        epsilon = damping * float(np.sum(traces.value, where=finite)) / max(1, int(ranks)) or 1.0
        estimate = _quadrature(task, num_probes, depth, epsilon)
        return finish(task, "slq", epsilon, replace(estimate, ledger=estimate.ledger + traces.ledger))

    def exact(task: ModelTask) -> Scores:
        known = exact_spectra(task, max_outputs, spectra)
        epsilon = damping * known.mean
        return finish(task, "exact", epsilon, per_layer(known, partial(grams.logdet_score, damping=epsilon)))

    return scorer_of(by_slq if method == "slq" else exact, loss)


def hessian_logdet(
    *,
    damping: float,
    method: Literal["exact", "slq"] = "slq",
    form: Form = "score",
    per_parameter: bool = False,
    num_probes: int = 8,
    depth: int = 20,
) -> Callable[[Task], Scores]:
    """Log-determinant of each block of the Hessian, over absolute eigenvalues: finite on an indefinite Hessian, too.

    "score" is Σ log(1 + |λ|/ε), "raw" Σ log(|λ| + ε) = score + d log ε: the log-determinant of H + εI where H is positive
    semi-definite. Kind "ranking"; it does not depend on the format.

    Sources: Ubaru, Chen and Saad 2017, doi 10.1137/16M1104974 (stochastic Lanczos quadrature).

    Args:
        damping: ε > 0, in the unit of H.
        method: "exact" by the dense block (d² numbers, at most 2 GiB), "slq" by `num_probes` probes of `depth` products.
        per_parameter: divide by d.
    """
    _check(damping, method, form)
    finish = partial(_scores, form=form, per_parameter=per_parameter)

    def exact(task: Task) -> Scores:
        def spectrum(block: Block, params: Params) -> Array:
            operator = block_hessian(task.total, params, block)
            return eigenvalues(dense(operator, batch_size=16))

        spectra = [np.abs(np.float64(task.timed.jit(partial(spectrum, block))(task.params))) for block in task.blocks]
        value = np.array([np.sum(np.log1p(values / damping)) for values in spectra])
        ledger = Ledger(hvp=int(task.sizes.sum()), vjp=len(task.blocks))
        return finish(task, "exact", damping, exactly(value, ledger))

    if method == "exact":
        return exact
    return lambda task: finish(task, "slq", damping, _quadrature(task, num_probes, depth, damping))


def _check(damping: float, method: str, form: str) -> None:
    """Refuse a damping that is not positive, and an unknown method or form."""
    if not (np.isfinite(damping) and damping > 0):
        raise ValueError(f"Expected damping > 0 and finite, found {damping}.")
    check_choice("method", method, ("exact", "slq"))
    check_choice("form", form, ("score", "raw"))


def _quadrature(task: Task, num_probes: int, depth: int, damping: float) -> Estimate:
    """Σ log(1 + |λ|/ε) of the true Hessian's blocks by stochastic Lanczos quadrature."""
    return estimate_blocks(task, estimates.logdet_score(num_probes=num_probes, depth=depth, damping=damping))


def _scores(task: Task, method: str, damping: float, estimate: Estimate, *, form: Form, per_parameter: bool) -> Scores:
    """Σ log(1 + |λ|/ε) as scores; "raw" adds d log ε."""
    sizes: Any = task.sizes
    if form == "raw":
        estimate = replace(estimate, value=estimate.value + sizes * np.log(damping))
    if per_parameter:
        estimate = jax.tree.map(lambda array: array / sizes, estimate)
    name = label("logdet", method, "" if form == "score" else form, "per_parameter" if per_parameter else "")
    return task.scores(name, estimate, kind="ranking")
