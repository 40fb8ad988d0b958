"""The adapters: the identity override changes nothing, each product is reached, what was not is refused or listed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpjax.program import ModelError, Product, check_batches, from_linen, from_nnx, with_output

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 8, 8, 3), jnp.float32)


class Linen(nn.Module):
    """Conv, depthwise conv, batch norm, attention, a shared Dense, a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
        shared = nn.Dense(8, name="shared")
        x = shared(nn.relu(shared(x))).mean(1)
        return nn.Dense(5, use_bias=False, name="head")(x)


class Nnx(nnx.Module):
    """Conv and Linear, nested in a list."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, use_bias=False, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x)).mean((1, 2))
        for block in self.blocks:
            x = self.norm(block(x))
        return x


@pytest.fixture(scope="module")
def linen():
    variables = Linen().init(KEY, IMAGES)
    return variables, from_linen(Linen(), variables, IMAGES)


@pytest.fixture(scope="module")
def nnx_module():
    module = Nnx(nnx.Rngs(0))
    return module, from_nnx(module, IMAGES)


def recording(seen):
    def override(layer, product, lhs, rhs):
        seen.append((layer.name, product.kind, lhs.shape, rhs.shape))
        return product(lhs, rhs)

    return override


def test_linen_identity_override_changes_nothing(linen):
    variables, model = linen
    seen = []
    expected = Linen().apply(variables, IMAGES)
    # the batch norm's factor is computed once, where the module divides each time
    np.testing.assert_allclose(model.call(model.params, IMAGES), expected, rtol=1e-6, atol=1e-7)
    plain = model.call(model.params, IMAGES)
    np.testing.assert_array_equal(model.call(model.params, IMAGES, override=recording(seen)), plain)
    attention = [f"attention/{each}" for each in ("query", "key", "value", "out")]
    assert [name for name, *_ in seen] == ["stem", "depthwise", *attention, "shared", "shared", "head"]
    assert model.names == ("stem", "depthwise", *attention, "shared", "head")


def test_nnx_identity_override_changes_nothing(nnx_module):
    module, model = nnx_module
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module)))
    seen = []
    np.testing.assert_allclose(model.call(model.params, IMAGES), module(IMAGES), rtol=1e-6, atol=1e-7)
    plain = model.call(model.params, IMAGES)
    np.testing.assert_array_equal(model.call(model.params, IMAGES, override=recording(seen)), plain)
    assert [name for name, *_ in seen] == ["stem", "blocks/0", "blocks/1"] == list(model.names)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module)))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert module.stem.conv_general_dilated is jax.lax.conv_general_dilated


def test_layers_say_what_they_are(linen):
    _, model = linen
    stem, depthwise, *attention, shared, head = model.layers
    assert {(each.kind, each.module) for each in attention} == {("dot", "DenseGeneral")} and attention[
        0
    ].kernel_shape == (8, 2, 4)
    assert attention[0].flops == 2 * 16 * 64 == attention[3].flops and attention[3].summed == (0, 1)
    assert (stem.kind, stem.module, stem.kernel, stem.sources) == ("conv", "Conv", "stem/kernel", ("stem/kernel",))
    assert stem.output_shape == (2, 4, 4, 8) and stem.kernel_shape == (3, 3, 3, 8)
    assert stem.flops == 2 * 4 * 4 * 8 * 27
    assert depthwise.groups == 8 and depthwise.flops == 2 * 4 * 4 * 8 * 9
    assert shared.calls == 2 and shared.flops == 2 * 2 * 16 * 8 * 8
    assert head.flops == 2 * 8 * 5
    assert model.partition[0].paths == ("stem/kernel",)


def test_others_are_listed_with_the_reason(linen):
    _, model = linen
    why = {each.path: each.reason for each in model.others}
    assert why["stem/bias"] == "bias"
    assert why["norm/scale"] == "computed into norm/scale" and why["norm/bias"] == "bias"
    assert why["attention/query/bias"] == "bias"
    kernels = {layer.kernel for layer in model.layers}
    assert set(why) | kernels == set(model.params)
    text = model.summary()
    assert (
        text.startswith("8 layers hold 648 of ")
        and "attention/query" in text
        and "norm/scale" in text
        and "8.0 MFLOP" not in text
    )


def test_the_override_replaces_the_result(linen):
    variables, model = linen
    scaled = {**variables["params"]}
    scaled["head"] = {"kernel": 3 * scaled["head"]["kernel"]}
    found = model.call(
        model.params,
        IMAGES,
        override=lambda layer, product, x, w: product(x, w) * (3 if layer.name == "head" else 1),
    )
    expected = Linen().apply({**variables, "params": scaled}, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_jit_vmap_and_remat_pass_through(linen):
    _, model = linen
    loss = lambda p, o: jnp.sum(model.call(p, IMAGES, override=o) ** 2)  # noqa: E731
    plain = jax.grad(loss)(model.params, None)
    tapped = jax.jit(jax.grad(jax.checkpoint(lambda p: loss(p, recording([])))))(model.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, tapped)


@pytest.mark.parametrize("transform", ["scan", "remat"])
def test_scan_and_remat(transform):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return jnp.tanh(nn.Dense(4, name="dense")(x)), None

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x):
            if transform == "scan":
                body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="body")
            else:
                body = nn.remat(Body)(name="body")
            return body(x, None)[0]

    x = jax.random.normal(KEY, (2, 4), jnp.float32)
    variables = Whole().init(KEY, x)
    model = from_linen(Whole(), variables, x)
    assert model.names == ("body/dense",)
    np.testing.assert_array_equal(model.call(model.params, x, override=recording([])), Whole().apply(variables, x))
    halved = model.call(model.params, x, override=lambda layer, product, x, w: 0.5 * product(x, w))
    assert not np.allclose(halved, Whole().apply(variables, x))


def test_a_jitted_inner_function_is_part_of_the_program():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="inside")(x)

    x = jnp.ones((2, 4), jnp.float32)
    cached = jax.jit(lambda p, x: Inner().apply({"params": p}, x))

    class Outer(nn.Module):
        own: bool = True

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="outside")(x)
            return cached(self.variables["params"] if self.own else weights, x)

    weights = Inner().init(KEY, x)["params"]
    variables = {"params": {"outside": weights["inside"], **weights}}
    Outer().apply(variables, x)  # its trace is cached before mpjax sees the model
    model = from_linen(Outer(), variables, x)
    assert model.names == ("outside", "inside")
    np.testing.assert_allclose(model.call(model.params, x), Outer().apply(variables, x), rtol=1e-6)
    closed = from_linen(Outer(own=False), {"params": {"outside": weights["inside"]}}, x)
    assert closed.names == ("outside",)
    assert [(each.shape, each.reason) for each in closed.others if each.path == "(constant)"] == [
        ((4, 4), "held constant: it is not among the params")
    ]


def test_layers_of_other_dtypes_stay_and_say_so():
    x = jnp.ones((2, 4), jnp.float32)
    module = nn.Dense(3, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"kernel: its product is computed in bfloat16. Nothing here can be lowered"):
        from_linen(module, module.init(KEY, x), x)
    mixed = nn.Sequential([nn.Dense(3, dtype=jnp.bfloat16), nn.Dense(2, dtype=jnp.float32)])
    variables = mixed.init(KEY, x)
    with pytest.warns(
        UserWarning, match="1 weights stay as they are: layers_0/kernel .Dense: its product is computed in"
    ):
        model = from_linen(mixed, variables, x)
    assert model.names == ("layers_1",)
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, x), jax.jit(mixed.apply)(variables, x))


def test_scanned_layers_count_all_their_weights():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return nn.Dense(4, name="dense")(x), None

    body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = jnp.ones((2, 4), jnp.float32)
    (layer,) = from_linen(body, body.init(KEY, x, None), x, None).layers
    assert layer.weights == 48 and layer.kernel_shape == (3, 4, 4)


def test_product_call_and_accumulation():
    x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    dims = (((1,), (0,)), ((), ()))
    plain = Product(kind="dot", function=jax.lax.dot_general, dimension_numbers=dims)
    assert plain.multiply(x, w, accumulate="float32").dtype == jnp.float32


def test_with_output_adds_a_head(linen):
    _, model = linen
    scaled = with_output(model, lambda out, factor: out * factor[:, None])
    factor = jnp.array([1.0, 2.0], jnp.float32)
    np.testing.assert_array_equal(
        scaled.call(model.params, IMAGES, factor), model.call(model.params, IMAGES) * factor[:, None]
    )
    assert scaled.names == model.names


def test_clear_errors(linen):
    variables, model = linen
    with pytest.raises(ValueError, match="'params' collection"):
        from_linen(Linen(), variables["params"], IMAGES)
    with pytest.raises(ValueError, match="at least one example input"):
        from_linen(Linen(), variables)
    with pytest.raises(ValueError, match="no layer that multiplies its own weights with activations"):
        norm = nn.LayerNorm()
        from_linen(norm, norm.init(KEY, IMAGES), IMAGES)
    with pytest.raises(ValueError, match="float32 weights, found none at all"):
        from_linen(Linen(), {"params": {}}, IMAGES)
    with pytest.raises(ValueError, match="float32 weights, found only int8"):
        integers = jax.tree.map(lambda leaf: leaf.astype(jnp.int8), variables["params"])
        from_linen(Linen(), {**variables, "params": integers}, IMAGES)
    with pytest.raises(KeyError, match="stem"):
        model.layer("stemm")


def test_what_is_no_module_of_that_kind_is_told_where_to_go():
    with pytest.raises(TypeError, match="Expected a linen module, found Linear.*from_nnx.*from_function"):
        from_linen(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), {"params": {}}, IMAGES)
    with pytest.raises(TypeError, match="Expected an NNX module, found Dense.*from_linen"):
        from_nnx(nn.Dense(2), IMAGES)
    with pytest.raises(TypeError, match="found function"):
        from_nnx(lambda x: x, IMAGES)


class Dropped(nnx.Module):
    """A network as people train it."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layer, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.layer(x)))


def test_an_nnx_module_in_training_mode_is_refused():
    x, module = jnp.ones((3, 4), jnp.float32), Dropped()
    with pytest.raises(ModelError, match=r"depend on random numbers.*module\.eval"):
        from_nnx(module, x)
    module.drop.set_attributes(deterministic=True)
    with pytest.raises(ModelError, match="statistics of the batch"):
        from_nnx(module, x)
    module.eval()
    model = from_nnx(module, x)
    np.testing.assert_allclose(model.call(model.params, x), module(x), rtol=1e-6)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "non-empty"),
        ([jnp.ones((2, 3))], "expected a tuple"),
        ([(jnp.ones((2, 3)), jnp.ones((3,)))], "leading axis"),
        ([(jnp.ones((0, 3)),)], "leading axis"),
        ([(jnp.ones((2, 3)),), (jnp.ones((1, 3)),)], "equal shape"),
    ],
)
def test_bad_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        check_batches(batches)
