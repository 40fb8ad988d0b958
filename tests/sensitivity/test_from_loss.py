"""Curvature scores of a plain loss, in float64, against the dense Hessian of a quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mpjax import formats, partition
from mpjax.formats import storage
from mpjax.partition import Block
from mpjax.sensitivity import Status, from_loss

SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)))
KEY = jax.random.key(0)
LOW = ("bfloat16", "float16")  # unscaled: their rounding is the same bit for bit inside and outside of jit
TIGHT = {"rtol": 1e-10, "atol": 1e-14}
SIZES = {"a": 3, "b": 7, "c": 1}


def problem(seed: int):
    """½ wᵀAw + bᵀw over three blocks of different sizes, A indefinite: loss, params, blocks; gradient, blocks of A."""
    rng = np.random.default_rng(seed)
    matrix = reference.symmetric_with_eigenvalues(rng.normal(size=11) * 3, seed)
    slope = rng.normal(size=11)
    params = {name: {"kernel": jnp.asarray(rng.normal(size=size))} for name, size in SIZES.items()}

    def loss(params):
        w = jnp.concatenate([params[name]["kernel"] for name in SIZES])
        return 0.5 * w @ jnp.asarray(matrix) @ w + jnp.asarray(slope) @ w

    gradient = matrix @ np.concatenate([params[name]["kernel"] for name in SIZES]) + slope
    parts = [slice(0, 3), slice(3, 10), slice(10, 11)]
    hessians = [matrix[part, part] for part in parts]
    return (loss, params, partition.by_module(params)), [gradient[part] for part in parts], hessians


def rounding(w, fmt: str) -> np.ndarray:
    return np.ravel(np.float64(storage.round_weights(w, formats.parse(fmt))) - np.float64(w))


@pytest.mark.parametrize("seed", SEEDS)
def test_quadratic_first_order_and_fisher(seed: int) -> None:
    plain, gradients, hessians = problem(seed)
    quadratic, first, fisher = (
        factory()(*plain, LOW, KEY) for factory in (from_loss.quadratic, from_loss.first_order, from_loss.fisher)
    )
    for row, name in enumerate(SIZES):
        for column, fmt in enumerate(LOW):
            delta, at = rounding(plain[1][name]["kernel"], fmt), (row, column)
            expected = 0.5 * delta @ hessians[row] @ delta
            np.testing.assert_allclose(quadratic.value[at], expected, **TIGHT)
            np.testing.assert_allclose(first.value[at], abs(gradients[row] @ delta), **TIGHT)
            np.testing.assert_allclose(fisher.value[at], 0.5 * np.sum((gradients[row] * delta) ** 2), **TIGHT)
            assert (quadratic.status[at] == Status.INDEFINITE) == (expected < 0)
    assert quadratic.ledger.hvp == 6 and first.ledger.hvp == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_joint_and_per_layer_traces_are_unbiased_and_their_errors_honest(seed: int) -> None:
    plain, _, hessians = problem(seed)
    truth = np.array([np.trace(h) for h in hessians])
    for probes, products in (("joint", 400), ("per_layer", 1200)):
        factory = from_loss.trace(num_probes=400, probes=probes, scale="none", batch_size=50)
        scores = factory(*plain, ("bfloat16",), jax.random.key(seed))
        z = (scores.value[:, 0] - truth) / np.maximum(scores.stderr[:, 0], 1e-9)
        assert np.abs(z).max() < 4 and scores.ledger.hvp == products
        if probes == "per_layer":  # a 1 × 1 block has no off-diagonal: exact
            np.testing.assert_allclose(scores.value[2, 0], truth[2], rtol=1e-12)


def test_a_trace_does_not_depend_on_the_order_of_the_blocks_nor_on_the_batch_size() -> None:
    (loss, params, blocks), *_ = problem(0)
    for probes, batch_size in (("joint", 3), ("per_layer", 100)):
        values = from_loss.trace(num_probes=5, probes=probes)(loss, params, blocks, LOW, KEY).value
        factory = from_loss.trace(num_probes=5, probes=probes, batch_size=batch_size)
        reversed_values = factory(loss, params, blocks[::-1], LOW, KEY).value[::-1]
        np.testing.assert_allclose(values, reversed_values, rtol=1e-10)


def test_xtrace_is_exact_where_the_probes_span_the_block() -> None:
    (loss, params, _), _, hessians = problem(0)
    factory = from_loss.trace(num_probes=8, method="xtrace", probes="per_layer", scale="none")  # 8 products ≥ 7
    scores = factory(loss, params, (Block(name="b", paths=("b/kernel",)),), ("bfloat16",), KEY)
    assert scores.value[0, 0] == pytest.approx(np.trace(hessians[1]), rel=1e-8)


def test_hawq_v2_scale() -> None:
    plain, *_ = problem(0)
    raw = from_loss.trace(num_probes=4, scale="none")(*plain, LOW, KEY)
    scaled = from_loss.trace(num_probes=4)(*plain, LOW, KEY)
    for row, (name, size) in enumerate(SIZES.items()):
        for column, fmt in enumerate(LOW):
            power = np.sum(rounding(plain[1][name]["kernel"], fmt) ** 2) / size
            assert scaled.value[row, column] == pytest.approx(0.5 * raw.value[row, column] * power, rel=1e-10)
    assert raw.kind == "ranking" and scaled.kind == "loss"


@pytest.mark.parametrize("seed", SEEDS)
def test_top_eigenvalue_is_the_largest_in_magnitude_with_its_sign(seed: int) -> None:
    plain, _, hessians = problem(seed)
    spectra = [np.linalg.eigvalsh(h) for h in hessians]
    truth = np.array([values[np.abs(values).argmax()] for values in spectra])
    scores = from_loss.top_eigenvalue(depth=7, scale="none")(*plain, ("bfloat16",), KEY)
    np.testing.assert_allclose(scores.value[:, 0], truth, rtol=1e-6)
    np.testing.assert_array_less(scores.residual, 1e-5)
    scores = from_loss.top_eigenvalue(depth=7)(*plain, ("bfloat16",), KEY)
    np.testing.assert_allclose(scores.value[:, 0], truth / list(SIZES.values()), rtol=1e-6)


def test_too_few_lanczos_steps_are_reported() -> None:
    scores = from_loss.top_eigenvalue(depth=2, scale="none")(*problem(1)[0], ("bfloat16",), KEY)
    assert scores.status[1, 0] == Status.UNCONVERGED and np.isfinite(scores.value).all()
    assert scores.status[2, 0] == Status.OK  # 1 × 1


@pytest.mark.parametrize("seed", SEEDS)
def test_logdet_exact_and_slq(seed: int) -> None:
    plain, _, hessians = problem(seed)
    spectra = [np.abs(np.linalg.eigvalsh(h)) for h in hessians]
    truths = {
        "score": np.array([np.sum(np.log1p(values / 0.3)) for values in spectra]),
        "raw": np.array([np.sum(np.log(values + 0.3)) for values in spectra]),
    }
    for form, truth in truths.items():
        exact = from_loss.logdet(damping=0.3, method="exact", form=form)(*plain, LOW, KEY)
        np.testing.assert_allclose(exact.value, np.stack([truth, truth], axis=1), rtol=1e-8)
        slq = from_loss.logdet(damping=0.3, form=form, num_probes=200, depth=7)(*plain, LOW, KEY)
        assert (np.abs(slq.value[:, 0] - truth) < 4 * slq.stderr[:, 0] + 1e-8).all()
        assert exact.kind == slq.kind == "ranking"
    mean = from_loss.logdet(damping=0.3, method="exact", per_parameter=True)(*plain, LOW, KEY)
    np.testing.assert_allclose(mean.value[:, 0] * list(SIZES.values()), truths["score"])


def test_clear_errors() -> None:
    (loss, params, blocks), *_ = problem(0)
    vector = lambda p: p["a"]["kernel"]  # noqa: E731
    with_integers = {**params, "a": {"kernel": jnp.arange(3)}}
    for function, tree, partitioned, low, message in (
        (vector, params, blocks, LOW, "one floating-point scalar"),
        (loss, params, (), LOW, "at least one block"),
        (loss, params, (*blocks, Block(name="again", paths=("a/kernel",))), LOW, "in one block only"),
        (loss, params, (Block(name="x", paths=("x/kernel",)),), LOW, "unknown path"),
        (loss, with_integers, blocks, LOW, "'a/kernel' is int64; leave it out"),
        (loss, params, blocks, ("bf16",), "Unknown format"),
    ):
        with pytest.raises(ValueError, match=message):
            from_loss.quadratic()(function, tree, partitioned, low, KEY)
    for make, message in (
        (lambda: from_loss.trace(num_probes=0), "num_probes"),
        (lambda: from_loss.trace(method="xtrace"), "per_layer"),
        (lambda: from_loss.top_eigenvalue(scale="relative"), "scale"),  # type: ignore[arg-type]
        (lambda: from_loss.logdet(damping=0.0), "damping"),
        (lambda: from_loss.logdet(damping=0.1, method="sql"), "method"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            make()
