"""Which estimators are judged, on how many examples and with how many probes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.problems.benchmarks import Benchmark
from mpjax import losses, sensitivity
from mpjax.emulation import Calibration
from mpjax.losses import Loss
from mpjax.sensitivity import Scorer, Spectra


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Examples and probes for one model. What costs a Hessian-vector product per layer and step gets few.

    Attributes:
        examples: of the benchmark; None takes its default.
        batch: examples in a batch of `local_rounding` and the interactions, whose memory grows with it; None: the benchmark's.
        spectra: examples for exact spectra (one vector-Jacobian product per example and output).
        per_layer: examples for estimators with products per layer.
        joint_probes, layer_probes: Hutchinson's probes, joint and per layer.
        xtrace: products per layer of XTrace.
        depth, slq_probes: Lanczos steps, and probes of the quadrature.
        gram_probes: output probes per example for the interactions; None is exact.
        subsets: random subsets of the layers that the interactions are tested on.
        costed: numbers of examples for the cost of exact log-determinants; empty: not measured.
        checked: how many of the largest blocks stochastic quadrature is compared with the exact value on.
        random_searches: draws of the random ranking that are searched.
        judged: names of the estimators; None stands for all.
        checks: whether interactions, damping and stochastic quadrature are looked at.
    """

    examples: int | None = None
    batch: int | None = None
    spectra: int = 4
    per_layer: int = 1
    joint_probes: int = 8
    layer_probes: int = 2
    xtrace: int = 4
    depth: int = 8
    slq_probes: int = 2
    gram_probes: int | None = None
    subsets: int = 40
    costed: tuple[int, ...] = ()
    checked: int = 6
    check_probes: int = 16
    check_depth: int = 20
    random_searches: int = 5
    judged: tuple[str, ...] | None = None
    checks: bool = True


RANDOM_DRAWS = 32
FULL = {
    "pose_landmark_full": Sizes(examples=8, batch=1, costed=(1, 2, 4, 8)),
    "iris_landmark": Sizes(examples=8, batch=1, per_layer=2),
    "digits_cnn": Sizes(spectra=64, per_layer=64, layer_probes=8, xtrace=16, depth=16, slq_probes=8),
}
BASELINES = ("rounding_norm", "depth", "random")
# Compiling takes half a minute for each estimator of the large models, so a first look leaves most of it to the small one.
QUICK = {
    "pose_landmark_full": Sizes(
        examples=1, spectra=1, joint_probes=2, random_searches=1, checks=False,
        judged=(
            *("measured", "local_rounding[4]", "quadratic[gauss_newton]", "fisher[true,elementwise]"),
            *("trace[hutchinson,joint]", "trace[exact]", "top_eigenvalue[exact]", "logdet[exact]"),
            *BASELINES,
        ),
    ),
    "iris_landmark": Sizes(
        examples=2, random_searches=1, checks=False,
        judged=("measured", "local_rounding[4]", "quadratic[gauss_newton]", *BASELINES),
    ),
    "digits_cnn": Sizes(
        examples=160, spectra=16, per_layer=16, xtrace=4, depth=4, subsets=12, checked=1, check_probes=8, check_depth=8,
        random_searches=1,
    ),
}  # fmt: skip
LABELLED = {  # other losses, where there are labels -> the estimators that they change
    losses.CROSS_ENTROPY: (
        *("measured", "quadratic[gauss_newton]", "quadratic[true]", "first_order", "fisher[empirical,elementwise]"),
        *("fisher[empirical,mean]", "trace[hutchinson,joint]", "logdet[exact]"),
    ),
    losses.KL: ("local_rounding[4]", "gauss_newton[4]"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One estimator under one loss.

    Attributes:
        name: `Scores.estimator`.
        loss: what the score is about.
        make: gives the scorer; None where the library refuses it: zero by construction under this loss.
        examples: how many it sees; 0 for baselines without data.
        batch: how many at a time; None takes the benchmark's batches.
        settings: its knobs, in words.
        draws: how many times a random ranking is drawn.
        shared: its scores come from the spectra, whose cost each of them states and the run pays once.
    """

    name: str
    loss: Loss
    make: Callable[[], Scorer] | None
    examples: int
    batch: int | None = None
    settings: str = ""
    draws: int = 1
    shared: bool = False


def cases(
    benchmark: Benchmark, sizes: Sizes, calibration: Calibration, spectra: Callable[[Loss], Spectra]
) -> list[Case]:
    """Every estimator under the output loss and, where there are labels, those that another loss changes.

    `spectra` gives the exact spectra of `sizes.spectra` examples, computed once for all that need them.
    """
    plan = _under(losses.OUTPUT, benchmark, sizes, calibration, spectra)
    for loss, names in LABELLED.items() if benchmark.labelled is not None else ():
        plan += [c for c in _under(loss, benchmark, sizes, calibration, spectra) if c.name in names]
    return plan


def _under(
    loss: Loss, benchmark: Benchmark, sizes: Sizes, calibration: Calibration, spectra: Callable[[Loss], Spectra]
) -> list[Case]:
    s, every = sensitivity, benchmark.examples
    few = min(sizes.per_layer, every)

    def case(
        name: str, factory: Callable[..., Scorer], settings: str = "", examples: int = every, **knobs: Any
    ) -> Case:
        make = partial(factory, loss=loss, **knobs)
        return Case(name=name, loss=loss, make=make, examples=examples, settings=settings)

    def rounding(name: str, factory: Callable[..., Scorer], settings: str = "", **knobs: Any) -> Case:
        make = partial(factory, loss=loss, calibration=calibration, **knobs)
        batch = None if name == "measured" else sizes.batch
        return Case(name=name, loss=loss, make=make, examples=every, settings=settings, batch=batch)

    def gradient(name: str, factory: Callable[..., Scorer], **knobs: Any) -> Case:
        if not loss.stationary:
            return case(name, factory, **knobs)
        return Case(name=name, loss=loss, make=None, examples=every, settings="gradient zero by construction")

    def exact(name: str, factory: Callable[..., Scorer], **knobs: Any) -> Case:
        def make() -> Scorer:
            return factory(method="exact", loss=loss, spectra=spectra(loss), **knobs)

        some = min(sizes.spectra, every)
        settings = f"all rows of H^½ J of {some} examples"
        return Case(name=name, loss=loss, make=make, examples=some, settings=settings, shared=True)

    def baseline(name: str, factory: Callable[[], Scorer], settings: str = "", draws: int = 1) -> Case:
        return Case(name=name, loss=loss, make=factory, examples=0, settings=settings, draws=draws)

    probes, lanczos = f"{sizes.layer_probes} probes per layer", f"{sizes.depth} steps per layer"
    joint, rows = f"{sizes.joint_probes} probes for all layers", f"{sizes.xtrace} products per layer"
    per_layer: dict[str, Any] = {"examples": few, "probes": "per_layer"}
    quadrature = {"method": "slq", "num_probes": sizes.slq_probes, "depth": sizes.depth}
    return [
        rounding("measured", s.measured),
        rounding("local_rounding[4]", s.local_rounding, "4 probes", num_probes=4),
        rounding("local_rounding[exact]", s.local_rounding, "all rows of H^½", num_probes=None),
        case("quadratic[gauss_newton]", s.quadratic, hessian="gauss_newton"),
        case("quadratic[true]", s.quadratic, hessian="true"),
        case("gauss_newton[4]", s.gauss_newton, "4 probes", num_probes=4),
        gradient("first_order", s.first_order),
        case("fisher[true,elementwise]", s.fisher, "4 probes", num_probes=4),
        case("fisher[true,mean]", s.fisher, "4 probes", num_probes=4, elementwise=False),
        gradient("fisher[empirical,elementwise]", s.fisher, kind="empirical"),
        gradient("fisher[empirical,mean]", s.fisher, kind="empirical", elementwise=False),
        case("trace[hutchinson,joint]", s.trace, joint, num_probes=sizes.joint_probes),
        case("trace[hutchinson,per_layer]", s.trace, probes, num_probes=sizes.layer_probes, **per_layer),
        case("trace[xtrace,per_layer]", s.trace, rows, num_probes=sizes.xtrace, method="xtrace", **per_layer),
        case("trace[output]", s.trace, "4 probes", num_probes=4, method="output"),
        exact("trace[exact]", s.trace),
        exact("top_eigenvalue[exact]", s.top_eigenvalue),
        exact("top_eigenvalue[exact,noise]", s.top_eigenvalue, scale="noise"),
        case("top_eigenvalue[lanczos]", s.top_eigenvalue, lanczos, few, method="lanczos", depth=sizes.depth),
        exact("logdet[exact]", s.logdet),
        exact("logdet[exact,raw]", s.logdet, form="raw"),
        exact("logdet[exact,per_parameter]", s.logdet, per_parameter=True),
        case("logdet[slq]", s.logdet, f"{sizes.slq_probes} probes of {lanczos}", few, **quadrature),
        baseline("rounding_norm", s.rounding_norm),
        baseline("depth", s.depth),
        baseline("random", s.random, f"mean of {RANDOM_DRAWS} draws", RANDOM_DRAWS),
    ]
