"""The graph of a model against hand-made ones, and against which inputs really change when one output does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import normal
from toys import drawn

from mpjax.apply import apply
from mpjax.program import graph, with_output

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

X = normal(0, 2, 4)


def linen(module, *inputs):
    return drawn(module, *(inputs or (X,)))


def dependence(model, *inputs):
    """The edges by experiment: hold every product's output, move those of one layer, see whose inputs move."""
    outputs, reference = [], []

    def record(layer, product, lhs, rhs):
        reference.append((layer.name, np.asarray(lhs)))
        outputs.append(np.asarray(product(lhs, rhs)))
        return outputs[-1]

    model.call(model.params, *inputs, override=record)
    pairs = set()
    for moved in model.names:
        operands = []

        def hold(layer, product, lhs, rhs, moved=moved, operands=operands):
            operands.append(np.asarray(lhs))
            out = outputs[len(operands) - 1]
            return out + np.float32(1 + np.arange(out.size).reshape(out.shape)) if layer.name == moved else out

        model.call(model.params, *inputs, override=hold)
        pairs |= {(moved, name) for (name, old), new in zip(reference, operands, strict=True) if (old != new).any()}
    return pairs


class Everything(nn.Module):
    """A residual, a concatenation, a shared layer and two heads."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="stem")(x))
        x = x + jnp.tanh(nn.Dense(4, name="residual")(x))
        shared = nn.Dense(4, name="shared")
        y = jnp.concatenate([shared(x), shared(jnp.tanh(shared(x)))], axis=-1)
        y = nn.Dense(4, name="joined")(nn.gelu(y))
        return nn.Dense(2, name="left")(y), nn.Dense(3, name="right")(nn.softmax(y))


def test_residual_concatenation_shared_layer_and_branches():
    model = linen(Everything())
    expected = (
        ("stem", "residual"),
        ("stem", "shared"),
        ("residual", "shared"),
        ("shared", "shared"),
        ("shared", "joined"),
        ("joined", "left"),
        ("joined", "right"),
    )
    assert graph.edges(model, X) == expected
    assert graph.edges(model, jax.ShapeDtypeStruct(X.shape, X.dtype)) == expected
    assert set(expected) == dependence(model, X)
    assert graph.edges(apply(model, {"left": "bfloat16"}), X) == expected
    assert graph.edges(with_output(model, lambda both: both[0]), X) == expected
    assert [call.layer for call in graph.calls(model, X)].count("shared") == 3
    with pytest.raises(ValueError, match=r"found none: pass one batch, \*batches\[0\]"):
        graph.edges(model)


def test_a_shared_layer_that_never_reads_itself_has_no_edge_to_itself():
    class Twins(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            shared = nn.Dense(4, name="shared")
            return nn.Dense(1, name="head")(shared(x) - shared(y))

    model = linen(Twins(), X, 2 * X)
    assert graph.edges(model, X, 2 * X) == (("shared", "head"),)


class Wild(nn.Module):
    """Dense layers on sums, products and concatenations of random earlier values; some layers are shared."""

    seed: int

    @nn.compact
    def __call__(self, x):
        rng = np.random.default_rng(self.seed)
        layers = [nn.Dense(4, name=f"d{number}") for number in range(6)]
        values = [x]
        for number in [*range(6), *rng.integers(0, 6, 3)]:
            inputs = [values[at] for at in rng.integers(0, len(values), rng.integers(1, 4))]
            join = rng.integers(0, 3)
            if join == 0:
                y = sum(inputs[1:], start=inputs[0])
            elif join == 1:
                y = jax.nn.silu(inputs[0]) * jax.jit(jnp.cos)(inputs[-1])
            else:
                y = jnp.concatenate(inputs, axis=-1).reshape(x.shape[0], -1, 4).mean(1)
            values.append(layers[number](y))
        return values[-1]


@pytest.mark.parametrize("seed", range(5))
def test_random_graphs(seed):
    model = linen(Wild(seed))
    assert set(graph.edges(model, X)) == dependence(model, X)


class Scanned(nn.Module):
    length: int

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, carry, _=None):
                x, y = carry
                y = jnp.tanh(nn.Dense(4, name="second")(nn.Dense(4, name="first")(x)))
                return (x + y, y), nn.Dense(1, name="aside")(x)

        x = nn.Dense(4, name="stem")(x)
        body = nn.scan(nn.remat(Body), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.length)
        (x, y), aside = body(name="body")((x, x), None)
        return nn.Dense(2, name="last")(y), nn.Dense(2, name="sum")(x), nn.Dense(2, name="rows")(aside[0])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_scan(length):
    model = linen(Scanned(length))
    once = {
        ("stem", "body/first"),
        ("body/first", "body/second"),
        ("stem", "body/aside"),
        ("body/second", "last"),
        ("stem", "sum"),
        ("body/second", "sum"),
        ("body/aside", "rows"),
    }
    again = {("body/second", "body/first"), ("body/second", "body/aside")}
    assert set(graph.edges(model, X)) == once | (again if length > 1 else set())
    runs = {call.layer: call.runs for call in graph.calls(model, X)}
    body = dict.fromkeys(("body/first", "body/second", "body/aside"), length)
    assert runs == dict.fromkeys(("stem", "last", "sum", "rows"), 1) | body


class Between(nn.Module):
    """Two layers, and a pure function of (a, a's input) between them and a third."""

    function: object

    @nn.compact
    def __call__(self, x):
        a, b = nn.Dense(4, name="a")(x), nn.Dense(4, name="b")(x)
        return nn.Dense(2, name="c")(self.function(a, b))


def custom(a, b):
    function = jax.custom_vjp(lambda x, y: y)
    function.defvjp(lambda x, y: (y, None), lambda rest, g: (g, g))
    return function(a, b)


def custom_jvp(a, b):
    function = jax.custom_jvp(lambda x, y: (y, x))
    function.defjvp(lambda primals, tangents: (primals[::-1], tangents[::-1]))
    return function(a, b)[0]


@pytest.mark.parametrize(
    ("function", "producers"),
    [
        (lambda a, b: b, "b"),
        (lambda a, b: jnp.concatenate([a, b], axis=-1)[:, 4:], "ab"),  # an array counts as a whole
        (jax.jit(lambda a, b: b + 1), "b"),
        (jax.checkpoint(lambda a, b: b + 1), "b"),
        (custom, "b"),
        (custom_jvp, "b"),
        (lambda a, b: jnp.where(a > 0, b, 1.0), "ab"),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda x: x, lambda x: 2 * x, b), "ab"),
        (lambda a, b: jax.lax.cond(jnp.sum(b) > 0, lambda x, y: x, lambda x, y: y, b, 2 * b), "b"),
        (lambda a, b: jax.lax.while_loop(lambda s: s[0, 0] < 9, lambda s: s + a, b), "ab"),
        (lambda a, b: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] + 1, s[2]), (0, a, b))[2], "b"),
        # without products inside, a loop counts as running any number of times
        (lambda a, b: jax.lax.fori_loop(0, 3, lambda i, s: (s[1], s[0]), (a, b))[0], "ab"),
        (lambda a, b: jax.lax.scan(lambda c, x: (c + x, x), a[0], b)[1], "b"),
        (lambda a, b: jax.lax.scan(lambda c, x: (c + x, x), a[0], b)[0][None], "ab"),
        (lambda a, b: jax.lax.scan(lambda c, x: (c, c), a[0], b, length=2)[1], "a"),
        (lambda a, b: jax.lax.map(lambda x: x + b[0], b), "b"),
        (lambda a, b: jax.lax.associative_scan(jnp.add, b), "b"),
        (lambda a, b: nn.max_pool(b[..., None], (1,), (1,))[..., 0], "b"),
        (lambda a, b: jax.lax.reduce(b, a[0, 0], jax.lax.add, (0,))[None], "ab"),
        (lambda a, b: jax.lax.custom_root(lambda x: x - b, a, lambda f, x: f(x) + x, lambda g, y: y), "ab"),
    ],
)
def test_functions_between_layers(function, producers):
    assert graph.edges(linen(Between(function)), X) == tuple((name, "c") for name in producers)


def test_layers_inside_a_branch():
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="stem")(x)
            inside = nn.Dense(4, name="inside")
            inside(x)  # linen makes parameters outside of branches alone
            x = jax.lax.cond(x[0, 0] > 0, lambda y: inside(y), lambda y: y, x)
            return nn.Dense(1, name="head")(x)

    assert graph.edges(linen(Branch()), X) == (("stem", "inside"), ("stem", "head"), ("inside", "head"))


def test_calls_have_shapes_and_products():
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.vmap(nn.Dense, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True})
            x = dense(4, name="mapped")(x)
            shared = nn.Dense(4, use_bias=False, name="shared")
            return shared(shared(x)[:, 0])

    x = jnp.ones((2, 5, 4), jnp.float32)
    calls = graph.calls(linen(Mapped(), x), x)
    assert [(call.layer, call.lhs.shape, call.runs) for call in calls] == [
        ("mapped", (2, 5, 4), 1),
        ("shared", (2, 5, 4), 1),
        ("shared", (2, 4), 1),
    ]
    first, second, _ = calls
    assert first.rhs.shape == (5, 4, 4) and first.out.shape == (5, 2, 4)  # mapped: one product with a batch axis
    assert second.rhs.shape == (4, 4) and second.product.kind == "dot"
