"""Curvature scores of a plain loss, in float64, against the dense Hessian of a quadratic and of a small network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree

from mpjax import formats, partition, sensitivity
from mpjax.formats import storage
from mpjax.partition import Block
from mpjax.sensitivity import from_loss

SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)))
KEY = jax.random.key(0)
LOW = ("bfloat16", "float16")  # unscaled: their rounding is the same bit for bit inside and outside of jit
TIGHT = {"rtol": 1e-10, "atol": 1e-14}
SIZES = {"a": 3, "b": 7, "c": 1}


def problem(seed: int, *, definite: bool = False):
    """½ wᵀAw + bᵀw over three blocks of different sizes; A indefinite unless asked otherwise."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=11) * 3
    matrix = reference.symmetric_with_eigenvalues(np.abs(values) + 0.1 if definite else values, seed)
    slope = rng.normal(size=11)
    params = {name: {"kernel": jnp.asarray(rng.normal(size=size))} for name, size in SIZES.items()}

    def loss(params):
        w = jnp.concatenate([params[name]["kernel"] for name in SIZES])
        return 0.5 * w @ jnp.asarray(matrix) @ w + jnp.asarray(slope) @ w

    starts = np.cumsum([0, *SIZES.values()])
    where = {name: slice(starts[i], starts[i + 1]) for i, name in enumerate(SIZES)}
    return loss, params, partition.by_module(params), matrix, slope, where


def rounding(params, name: str, fmt: str) -> np.ndarray:
    w = params[name]["kernel"]
    return np.float64(storage.round_weights(w, formats.parse(fmt))) - np.float64(w)


@pytest.mark.parametrize("seed", SEEDS)
def test_quadratic_first_order_and_fisher(seed: int) -> None:
    loss, params, blocks, matrix, slope, where = problem(seed)
    gradient = matrix @ np.concatenate([params[name]["kernel"] for name in SIZES]) + slope
    found = {
        name: factory()(loss, params, blocks, LOW, KEY)
        for name, factory in (
            ("quadratic", from_loss.quadratic),
            ("first", from_loss.first_order),
            ("fisher", from_loss.fisher),
        )
    }
    for row, name in enumerate(SIZES):
        for column, fmt in enumerate(LOW):
            delta, block = rounding(params, name, fmt), where[name]
            expected = 0.5 * delta @ matrix[block, block] @ delta
            np.testing.assert_allclose(found["quadratic"].value[row, column], expected, **TIGHT)
            np.testing.assert_allclose(found["first"].value[row, column], abs(gradient[block] @ delta), **TIGHT)
            squares = 0.5 * np.sum((gradient[block] * delta) ** 2)
            np.testing.assert_allclose(found["fisher"].value[row, column], squares, **TIGHT)
            negative = found["quadratic"].status[row, column] == sensitivity.Status.INDEFINITE
            assert negative == (expected < 0)
    assert found["quadratic"].ledger.hvp == 6 and found["first"].ledger.hvp == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_joint_and_per_layer_traces_are_unbiased_and_their_errors_honest(seed: int) -> None:
    loss, params, blocks, matrix, _, where = problem(seed)
    truth = np.array([np.trace(matrix[where[name], where[name]]) for name in SIZES])
    for probes in ("joint", "per_layer"):
        factory = from_loss.trace(num_probes=400, probes=probes, scale="none", batch_size=50)
        found = factory(loss, params, blocks, ("bfloat16",), jax.random.key(seed))
        z = (found.value[:, 0] - truth) / np.maximum(found.stderr[:, 0], 1e-9)
        assert np.abs(z).max() < 4
        assert found.ledger.hvp == (400 if probes == "joint" else 1200)
        if probes == "per_layer":  # a 1 × 1 block has no off-diagonal: exact
            np.testing.assert_allclose(found.value[2, 0], truth[2], rtol=1e-12)


def test_a_trace_does_not_depend_on_the_order_of_the_blocks() -> None:
    loss, params, blocks, *_ = problem(0)
    for probes in ("joint", "per_layer"):
        factory = from_loss.trace(num_probes=4, probes=probes)
        one = factory(loss, params, blocks, LOW, KEY)
        two = factory(loss, params, blocks[::-1], LOW, KEY)
        np.testing.assert_allclose(one.value, two.value[::-1], rtol=1e-10)


@pytest.mark.parametrize("batch_size", (1, 3, 100))
def test_a_trace_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    loss, params, blocks, *_ = problem(0)
    one = from_loss.trace(num_probes=5)(loss, params, blocks, LOW, KEY)
    two = from_loss.trace(num_probes=5, batch_size=batch_size)(loss, params, blocks, LOW, KEY)
    np.testing.assert_allclose(one.value, two.value, rtol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_xtrace_is_exact_where_the_probes_span_the_block(seed: int) -> None:
    loss, params, _, matrix, _, where = problem(seed, definite=True)
    factory = from_loss.trace(num_probes=8, method="xtrace", probes="per_layer", scale="none")  # 8 products ≥ 7
    found = factory(loss, params, (Block(name="b", paths=("b/kernel",)),), ("bfloat16",), jax.random.key(seed))
    assert found.value[0, 0] == pytest.approx(np.trace(matrix[where["b"], where["b"]]), rel=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_hawq_v2_scale(seed: int) -> None:
    loss, params, blocks, *_ = problem(seed)
    raw = from_loss.trace(num_probes=4, scale="none")(loss, params, blocks, LOW, KEY)
    scaled = from_loss.trace(num_probes=4)(loss, params, blocks, LOW, KEY)
    for row, name in enumerate(SIZES):
        for column, fmt in enumerate(LOW):
            power = np.sum(rounding(params, name, fmt) ** 2) / SIZES[name]
            assert scaled.value[row, column] == pytest.approx(0.5 * raw.value[row, column] * power, rel=1e-10)
    assert raw.kind == "ranking" and scaled.kind == "loss"


@pytest.mark.parametrize("seed", SEEDS)
def test_top_eigenvalue_is_the_largest_in_magnitude_with_its_sign(seed: int) -> None:
    loss, params, blocks, matrix, _, where = problem(seed)
    found = from_loss.top_eigenvalue(depth=7, scale="none")(loss, params, blocks, ("bfloat16",), KEY)
    per = from_loss.top_eigenvalue(depth=7)(loss, params, blocks, ("bfloat16",), KEY)
    for row, name in enumerate(SIZES):
        values = np.linalg.eigvalsh(matrix[where[name], where[name]])
        truth = values[np.abs(values).argmax()]
        assert found.value[row, 0] == pytest.approx(truth, rel=1e-6)
        assert per.value[row, 0] == pytest.approx(truth / SIZES[name], rel=1e-6)
    np.testing.assert_array_less(found.residual, 1e-5)


def test_too_few_lanczos_steps_are_said_to_be_too_few() -> None:
    loss, params, blocks, *_ = problem(1)
    found = from_loss.top_eigenvalue(depth=2, scale="none")(loss, params, blocks, ("bfloat16",), KEY)
    assert found.status[1, 0] == sensitivity.Status.UNCONVERGED and np.isfinite(found.value).all()
    assert found.status[2, 0] == sensitivity.Status.OK  # 1 × 1


@pytest.mark.parametrize("seed", SEEDS)
def test_logdet_exact_and_slq(seed: int) -> None:
    loss, params, blocks, matrix, _, where = problem(seed)
    for form in ("score", "raw"):
        exact = from_loss.logdet(damping=0.3, method="exact", form=form)(loss, params, blocks, LOW, KEY)
        slq = from_loss.logdet(damping=0.3, form=form, num_probes=200, depth=7)(loss, params, blocks, LOW, KEY)
        for row, name in enumerate(SIZES):
            values = np.abs(np.linalg.eigvalsh(matrix[where[name], where[name]]))
            truth = np.sum(np.log1p(values / 0.3)) if form == "score" else np.sum(np.log(values + 0.3))
            assert exact.value[row, 0] == pytest.approx(truth, rel=1e-8)
            assert abs(slq.value[row, 0] - truth) < 4 * slq.stderr[row, 0] + 1e-8
        np.testing.assert_array_equal(exact.value[:, 0], exact.value[:, 1])
        assert exact.kind == "ranking"
    each = from_loss.logdet(damping=0.3, method="exact", per_parameter=True)(loss, params, blocks, LOW, KEY)
    whole = from_loss.logdet(damping=0.3, method="exact")(loss, params, blocks, LOW, KEY)
    np.testing.assert_allclose(each.value[:, 0] * list(SIZES.values()), whole.value[:, 0])


@pytest.mark.slow
def test_a_network_agrees_with_its_dense_hessian() -> None:
    """Two matrices and a bias in one block: leaves of several shapes, a Hessian that is not constant."""
    rng = np.random.default_rng(0)
    params = {
        "one": {"kernel": jnp.asarray(rng.normal(size=(3, 4))), "bias": jnp.asarray(rng.normal(size=(1, 4)))},
        "two": {"kernel": jnp.asarray(rng.normal(size=(4, 2)))},
    }
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))

    def loss(p):
        hidden = jnp.tanh(x @ p["one"]["kernel"] + jnp.tile(p["one"]["bias"], (5, 1)))
        return jnp.mean((hidden @ p["two"]["kernel"] - y) ** 2)

    blocks = partition.by_module(params)
    found = from_loss.quadratic()(loss, params, blocks, ("bfloat16",), KEY)
    top = from_loss.top_eigenvalue(depth=16, scale="none")(loss, params, blocks, ("bfloat16",), KEY)
    for row, name in enumerate(params):
        flat, unravel = ravel_pytree(params[name])
        hessian = np.asarray(jax.hessian(lambda v, name=name, un=unravel: loss({**params, name: un(v)}))(flat))
        delta = np.concatenate(
            [
                np.ravel(np.float64(storage.round_weights(w, formats.FORMATS["bfloat16"])) - np.float64(w))
                for w in jax.tree.leaves(params[name])
            ]
        )
        assert found.value[row, 0] == pytest.approx(0.5 * delta @ hessian @ delta, rel=1e-8)
        values = np.linalg.eigvalsh(hessian)
        assert top.value[row, 0] == pytest.approx(values[np.abs(values).argmax()], rel=1e-6)


def test_a_nan_in_one_block_spoils_no_other() -> None:
    loss, params, blocks, *_ = problem(0)
    params = {**params, "b": {"kernel": params["b"]["kernel"].at[2].set(1e6)}}
    for factory in (from_loss.quadratic(), from_loss.first_order(), from_loss.trace(num_probes=2)):
        found = factory(loss, params, blocks, ("float16", "bfloat16"), KEY)
        assert found.status[1, 0] == sensitivity.Status.OVERFLOW and np.isinf(found.value[1, 0])
        assert np.isfinite(np.delete(found.value, 1, 0)).all() and np.isfinite(found.value[:, 1]).all()


def test_clear_errors() -> None:
    loss, params, blocks, *_ = problem(0)
    with pytest.raises(ValueError, match="one floating-point scalar"):
        from_loss.quadratic()(lambda p: p["a"]["kernel"], params, blocks, LOW, KEY)
    with pytest.raises(ValueError, match="at least one block"):
        from_loss.quadratic()(loss, params, (), LOW, KEY)
    with pytest.raises(ValueError, match="in one block only"):
        from_loss.quadratic()(loss, params, (*blocks, Block(name="again", paths=("a/kernel",))), LOW, KEY)
    with pytest.raises(ValueError, match="unknown path"):
        from_loss.quadratic()(loss, params, (Block(name="x", paths=("x/kernel",)),), LOW, KEY)
    with pytest.raises(ValueError, match="Unknown format"):
        from_loss.quadratic()(loss, params, blocks, ("bf16",), KEY)
    with pytest.raises(ValueError, match="num_probes"):
        from_loss.trace(num_probes=0)
    with pytest.raises(ValueError, match="per_layer"):
        from_loss.trace(method="xtrace")
    with pytest.raises(ValueError, match="scale"):
        from_loss.top_eigenvalue(scale="relative")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping"):
        from_loss.logdet(damping=0.0)
    with pytest.raises(ValueError, match="method"):
        from_loss.logdet(damping=0.1, method="sql")  # type: ignore[arg-type]
