"""The adapters: every kind of module that Flax has is reached, unchanged by the identity, lowered, and named alike in both."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import agree, normal, scored_as_measured
from flax import nnx
from flax.core import freeze
from refusals import refused
from toys import variables

from mpjax import compiled, cost
from mpjax.apply import apply
from mpjax.formats import parse, storage
from mpjax.program import ModelError, from_linen, from_nnx, graph

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
IMAGES, TOKENS, X = normal(0, 2, 8, 8, 4), normal(1, 2, 6, 8), normal(2, 2, 4)
IDS = jnp.array([[1, 2, 3], [4, 5, 10]])


def rngs():
    return nnx.Rngs(params=0)


def linen(module, x):
    drawn = variables(module, x)
    return drawn, from_linen(module, drawn, x)


# --- linen ------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
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


@pytest.fixture(scope="module")
def network():
    return linen(Network(), IMAGES)


def test_the_identity_changes_nothing_and_an_override_replaces_the_result(network):
    drawn, model = network
    seen = []

    def override(layer, product, lhs, rhs):
        seen.append(layer.name)
        return product(lhs, rhs)

    plain, expected = model.call(model.params, IMAGES), Network().apply(drawn, IMAGES)
    # the batch norm's factor is computed once, where the module divides each time
    np.testing.assert_allclose(plain, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(model.call(model.params, IMAGES, override=override), plain)
    attention = [f"attention/{part}" for part in ("query", "key", "value", "out")]
    assert seen == ["stem", "depthwise", *attention, "shared", "shared", "head"]
    assert model.names == ("stem", "depthwise", *attention, "shared", "head")
    tripled = lambda layer, product, x, w: product(x, w) * (3 if layer.name == "head" else 1)  # noqa: E731
    np.testing.assert_allclose(model.call(model.params, IMAGES, override=tripled), 3 * plain, rtol=1e-5, atol=1e-6)
    loss = lambda p, o: jnp.sum(model.call(p, IMAGES, override=o) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss), static_argnums=1)(model.params, None)
    tapped = jax.jit(jax.grad(jax.checkpoint(lambda p: loss(p, override))))(model.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, tapped)


def test_layers_and_other_parameters(network):
    _, model = network
    stem, depthwise, *attention, shared, head = model.layers
    assert {(layer.kind, layer.module) for layer in attention} == {("dot", "DenseGeneral")}
    assert attention[0].kernel_shape == (8, 2, 4) and attention[3].summed == (0, 1)
    assert attention[0].flops == 2 * 16 * 64 == attention[3].flops
    assert (stem.kind, stem.module, stem.kernel, stem.sources) == ("conv", "Conv", "stem/kernel", ("stem/kernel",))
    assert stem.output_shape == (2, 4, 4, 8) and stem.kernel_shape == (3, 3, 4, 8)
    assert stem.flops == 2 * 4 * 4 * 8 * 36
    assert depthwise.groups == 8 and depthwise.flops == 2 * 4 * 4 * 8 * 9
    assert shared.calls == 2 and shared.flops == 2 * 2 * 16 * 8 * 8
    assert head.flops == 2 * 8 * 5 and model.partition[0].paths == ("stem/kernel",)
    why = {other.path: other.reason for other in model.others}
    assert why["stem/bias"] == why["norm/bias"] == why["attention/query/bias"] == "bias"
    assert why["norm/scale"] == "computed into norm/scale"
    assert set(why) | {layer.kernel for layer in model.layers} == set(model.params)
    text = model.summary()
    assert text.startswith("8 layers hold 720 of ") and "attention/query" in text and "norm/scale" in text


class Experts(nn.Module):
    """A mixture of experts as people write it: two weights of its own, a router as a submodule."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.lecun_normal(batch_axis=0), (3, x.shape[-1], 16), jnp.float32)
        down = self.param("down", nn.initializers.lecun_normal(batch_axis=0), (3, 16, x.shape[-1]), jnp.float32)
        gates = nn.softmax(nn.Dense(3, name="router")(x))
        hidden = nn.gelu(jnp.einsum("btd,edh->ebth", x, up))
        return jnp.einsum("ebth,ehd,bte->btd", hidden, down, gates)


class Scanned(nn.Module):
    """Three blocks by nn.scan, each checkpointed."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return carry + nn.Dense(carry.shape[-1], name="dense")(nn.relu(carry)), None

        blocks = nn.scan(nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, name="head")(blocks(name="blocks")(x, None)[0])


ATTENTION = dict.fromkeys(("query", "key", "value", "out"), 64)
FLIPPED = nn.ConvTranspose(5, (4, 4), strides=(2, 2), transpose_kernel=True, padding="CIRCULAR")
LINEN = {
    "dense_general": (nn.DenseGeneral((2, 5), axis=(-2, -1)), TOKENS, {"DenseGeneral": 60 * 8}),
    "dense_general_batch": (nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), TOKENS, {"DenseGeneral": 2 * 8 * 5}),
    "conv_local": (nn.ConvLocal(5, (3, 3)), IMAGES, {"ConvLocal": 64 * 36 * 5}),
    "conv_transpose": (nn.ConvTranspose(5, (3, 3), strides=(2, 2)), IMAGES, {"ConvTranspose": 9 * 4 * 5}),
    "conv_transpose_flipped": (FLIPPED, IMAGES, {"ConvTranspose": 16 * 4 * 5}),
    "einsum": (nn.Einsum((8, 3, 7), "btd,dhk->bthk"), TOKENS, {"Einsum": 8 * 21}),
    "einsum_swapped": (nn.Einsum((7, 8), "btd,kd->bkt"), TOKENS, {"Einsum": 56}),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=2), TOKENS, ATTENTION),
    "experts": (Experts(), TOKENS, {"router": 24, "up": 384, "down": 384}),
    "scanned": (Scanned(), TOKENS, {"blocks/dense": 192, "head": 16}),
}
SCALED = ("dense_general", "conv_transpose_flipped", "einsum", "einsum_swapped", "experts")


@pytest.mark.parametrize("name", LINEN)
def test_linen_modules_are_reached_and_execute_what_is_emulated(name):
    module, x, expected = LINEN[name]
    drawn, model = linen(module, x)
    assert {layer.name: layer.weights for layer in model.layers} == expected
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, x), jax.jit(module.apply)(drawn, x))
    agree(model, (x,), ("bfloat16", "float8_e4m3fn", "int4_w"), least=1e-5, most=0.3, apart=0.3)
    if name == "scanned":
        blocks, head = model.layers
        assert blocks.calls == 3 and blocks.flops == 3 * 2 * 6 * 64 and blocks.kernel_shape == (3, 8, 8)
        assert head.calls == 1 and head.flops == 2 * 6 * 16
        assert blocks.summed == (1,) and head.summed == (0,)
        assert (
            "1 of them run more than once (shared, or under a scan), always in one format: blocks/" in model.summary()
        )
    if name in SCALED:  # each output channel a hundred times the one before keeps its digits
        layer, fmt = model.layers[-1], parse("int8_w")
        kernel = np.asarray(model.params[layer.kernel])
        shape = [1 if axis in layer.summed else size for axis, size in enumerate(kernel.shape)]
        factors = 100.0 ** (np.arange(np.prod(shape)) - np.prod(shape))
        scaled = jnp.asarray(kernel * factors.clip(1e-12).reshape(shape), jnp.float32)
        stored = storage.store(scaled, fmt, layer)
        weights = storage.stands_for(stored, fmt, layer.kernel_shape, layer.summed, layer.stacked)
        assert (np.abs(weights - scaled) <= np.abs(scaled).max(axis=layer.summed, keepdims=True) / 254 * 1.001).all()


def test_a_weight_that_is_used_otherwise_stays():
    class Otherwise(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], x.shape[-1]), jnp.float32)
            return nn.Dense(3, name="head")(x @ kernel + kernel[0])

    with pytest.warns(UserWarning, match="1 weights stay as they are: kernel .Otherwise: used in other ways"):
        drawn, model = linen(Otherwise(), TOKENS)
    (other,) = (other for other in model.others if other.path == "kernel")
    assert model.names == ("head",) and "kernel" in model.summary()
    assert other.reason == "used in other ways than in a product"
    np.testing.assert_array_equal(model.call(model.params, TOKENS), Otherwise().apply(drawn, TOKENS))


def test_a_jitted_inner_function_is_part_of_the_program():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="inside")(x)

    cached = jax.jit(lambda p, x: Inner().apply({"params": p}, x))

    class Outer(nn.Module):
        owner: bool = True

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="outside")(x)
            return cached(self.variables["params"] if self.owner else weights, x)

    weights = variables(Inner(), X)["params"]
    drawn = {"params": {"outside": weights["inside"], **weights}}
    Outer().apply(drawn, X)  # its trace is cached before mpjax sees the model
    model = from_linen(Outer(), drawn, X)
    assert model.names == ("outside", "inside")
    np.testing.assert_allclose(model.call(model.params, X), Outer().apply(drawn, X), rtol=1e-6)
    closed = from_linen(Outer(owner=False), {"params": {"outside": weights["inside"]}}, X)
    assert closed.names == ("outside",)
    assert [(other.shape, other.reason) for other in closed.others if other.path == "(constant)"] == [
        ((4, 4), "held constant: it is not among the params")
    ]


def test_layers_of_other_dtypes_stay_and_are_listed():
    module = nn.Dense(3, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"kernel: its product is computed in bfloat16. Nothing here can be lowered"):
        linen(module, X)
    mixed = nn.Sequential([nn.Dense(3, dtype=jnp.bfloat16), nn.Dense(2, dtype=jnp.float32)])
    with pytest.warns(UserWarning, match="1 weights stay as they are: layers_0/kernel .Dense: its product is comput"):
        drawn, model = linen(mixed, X)
    assert model.names == ("layers_1",)
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, X), jax.jit(mixed.apply)(drawn, X))


def test_several_inputs_keyword_arguments_and_collections():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, a, b, *, train, scale=1.0):
            x = nn.Dense(4, name="a")(a) + nn.Dense(4, name="b")(b)
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
            return scale * nn.Dropout(0.5, deterministic=not train)(x)

    module, other = Both(), TOKENS[..., :3]
    drawn = module.init({"params": KEY, "dropout": KEY}, TOKENS, other, train=False)
    model = from_linen(module, drawn, TOKENS, other, train=False, scale=2.0)
    assert model.names == ("a", "b")
    expected = module.apply(drawn, TOKENS, other, train=False, scale=2.0)
    np.testing.assert_array_equal(model.call(model.params, TOKENS, other), expected)
    with pytest.raises(ModelError, match="random numbers|collection"):
        from_linen(module, drawn, TOKENS, other, train=True)
    with pytest.raises(ModelError, match="cannot be called with .*Pass the inputs"):
        from_linen(module, drawn, TOKENS, train=False)


def test_an_array_as_a_keyword_is_an_input():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None):
            return nn.Dense(3)((jnp.tanh(nn.Dense(8)(x)) * mask[..., None]).mean(1))

    mask = jnp.tril(jnp.ones((2, 6)))
    drawn = variables(Net(), TOKENS, mask)
    with pytest.raises(
        ValueError, match=r"keyword 'mask' holds an array of the examples' leading axis, \(2, 6\): pass"
    ):
        from_linen(Net(), drawn, TOKENS, mask=mask)
    assert len(from_linen(Net(), drawn, TOKENS, mask).layers) == 2
    assert len(from_linen(Net(), drawn, TOKENS, mask=jnp.ones((1, 6))).layers) == 2


def test_boxed_frozen_sown_and_random_variables():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(4, name="b")(nn.relu(nn.Dense(16, kernel_init=boxed, name="a")(x)))

    boxed = Boxed().init(KEY, X)
    for given in (boxed, freeze(nn.meta.unbox(boxed))):
        model = from_linen(Boxed(), given, X)
        assert model.names == ("a", "b")
        np.testing.assert_allclose(model.call(model.params, X), Boxed().apply(boxed, X), rtol=1e-6)

    class Sown(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(6)(x)
            self.sow("intermediates", "y", y)
            return y

    net = nn.Sequential([Sown(), nn.Dense(2)])
    drawn = {"params": variables(net, X)["params"]}
    model = from_linen(net, drawn, X, mutable=["intermediates"])
    expected = net.apply(drawn, X, mutable=["intermediates"])
    assert jax.tree.structure(model.call(model.params, X)) == jax.tree.structure(expected)

    class DropDense(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return super().__call__(nn.Dropout(0.5, deterministic=False)(x))

    random = {"dropout": KEY}
    drawn = DropDense(4).init({"params": KEY, **random}, X)
    model = from_linen(DropDense(4), drawn, X, rngs=random)
    expected = DropDense(4).apply(drawn, X, rngs=random)
    np.testing.assert_allclose(model.call(model.params, X), expected, rtol=1e-6)


def test_wrong_modules_and_variables_are_refused(network):
    drawn, _ = network
    refused(
        ("'params' collection", from_linen, Network(), drawn["params"], IMAGES),
        ("at least one example input", from_linen, Network(), drawn),
        ("modules seen: .'LayerNorm'", linen, nn.LayerNorm(), X),
    )
    linear = nnx.Linear(3, 2, rngs=rngs())
    refused(
        ("Expected a linen module, found Linear.*from_nnx.*from_function", from_linen, linear, {"params": {}}, X),
        ("Expected an NNX module, found Dense.*from_linen", from_nnx, nn.Dense(2), X),
        ("found function", from_nnx, lambda x: x, X),
        kind=TypeError,
    )


# --- embeddings -------------------------------------------------------------------------------------------------------


class Text(nn.Module):
    """An embedding, and a head that is tied to it or not, or multiplies its table itself."""

    tied: str = "no"

    def setup(self):
        self.tokens, self.head = nn.Embed(11, 32), nn.Dense(11, use_bias=False)

    def __call__(self, ids):
        x = nn.tanh(self.tokens(ids))
        if self.tied == "attend":
            return self.tokens.attend(x)
        return x @ self.tokens.embedding.T if self.tied == "table" else self.head(x)


class NnxText(nnx.Module):
    def __init__(self, tied="no"):
        self.tied, self.tokens = tied, nnx.Embed(11, 32, rngs=rngs())
        self.head = nnx.Linear(32, 11, use_bias=False, rngs=rngs())

    def __call__(self, ids):
        x = nnx.tanh(self.tokens(ids))
        if self.tied == "attend":
            return self.tokens.attend(x)
        return x @ self.tokens.embedding[...].T if self.tied == "table" else self.head(x)


def text(framework, tied="no"):
    """The model of that framework, and its plain outputs."""
    if framework == "linen":
        drawn, model = linen(Text(tied=tied), IDS)
        return model, jax.jit(Text(tied=tied).apply)(drawn, IDS)
    module = NnxText(tied)
    return from_nnx(module, IDS), nnx.jit(lambda module, ids: module(ids))(module, IDS)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("tied", ["no", "attend", "table"])
def test_an_embedding_is_a_layer(framework, tied):
    model, plain = text(framework, tied)
    assert model.names == (("tokens", "head") if tied == "no" else ("tokens",))
    layer = model.layers[0]
    assert (layer.module, layer.kernel, layer.summed) == ("Embed", "tokens/embedding", (1,))
    assert (layer.kind, layer.calls) == (("lookup", 1) if tied == "no" else ("dot", 2))
    assert layer.flops == (0 if tied == "no" else 2 * 3 * 32 * 11)  # of one example; a lookup multiplies nothing
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, IDS), plain)
    assert graph.edges(model, IDS) == (("tokens", "head" if tied == "no" else "tokens"),)
    if tied == "table":
        assert {other.reason for other in model.others} <= {"not used with these inputs"}
    elif (framework, tied) in (("linen", "no"), ("nnx", "attend")):
        formats = ("bfloat16", "float8_e4m3fn", "bfloat16_w", "float8_e4m3fn_w", "int8_w", "int4_w")
        agree(model, (IDS,), formats, ("tokens",), least=1e-5, apart=1e-5 if tied == "no" else 0.3)


def test_subclasses_and_single_rows_of_embeddings():
    class Scaled(nn.Embed):
        def __call__(self, inputs):
            return super().__call__(inputs) * 2.0

    module = nn.Sequential([Scaled(12, 8), nn.Dense(3)])
    drawn, model = linen(module, IDS)
    assert model.names == ("layers_0", "layers_1") and model.layers[0].module == "Scaled"
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, IDS), jax.jit(module.apply)(drawn, IDS))
    one = nn.Sequential([nn.Embed(1, 8), nn.Dense(3)])
    assert linen(one, IDS)[1].names == ("layers_1",)  # its row is broadcast, whatever is looked up


def test_an_embedding_is_scored_costed_and_compiled(tmp_path):
    model, _ = text("linen")
    scored_as_measured(model, [(IDS,)], ("bfloat16", "int4_w"))
    batches = [(IDS,), (IDS[::-1],)]
    program = compiled.compile(apply(model, {"tokens": "bfloat16", "head": "int8_w"}), batches)
    (row, _) = program.report().rows
    assert (row["layer"], row["opcode"], row["full_copy"]) == ("tokens", "gather", None)
    assert program.weight_bytes == 2 * 11 * 32 + 11 * 32 + 4 * 11
    program = compiled.compile(apply(model, {"tokens": "int4_w"}), batches)
    (row, _) = program.report().rows
    assert row["full_copy"] is False and program.weight_bytes == 11 * 16 + 11 * 2 + 4 * 11 * 32
    loaded = compiled.load(program.export(tmp_path / "text.mpjax"))
    np.testing.assert_array_equal(loaded(IDS), program(IDS))

    tied, plain = text("linen", "attend")
    for implementation in ("rule", "auto"):
        costs = cost.measure(tied, ("bfloat16", "int8_w"), IDS, rounds=1, implementation=implementation)
        assert np.isfinite(costs.seconds).all() and costs.implementations[0, 0] == "xla"
        program = compiled.compile(apply(tied, {"tokens": "bfloat16"}), batches, implementation=implementation)
        np.testing.assert_allclose(program(IDS), plain, atol=0.1)
        assert program.implementation == {"tokens": "xla"}


# --- NNX --------------------------------------------------------------------------------------------------------------


class Nested(nnx.Module):
    """Lists and dicts of modules, one of them shared."""

    def __init__(self):
        shared = nnx.Linear(8, 8, rngs=rngs())
        self.blocks = nnx.List([shared, nnx.Linear(8, 8, rngs=rngs()), shared])
        self.heads = nnx.Dict(one=nnx.Linear(8, 2, rngs=rngs()), two=nnx.Linear(8, 3, use_bias=False, rngs=rngs()))

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.relu(block(x))
        return {"one": self.heads["one"](x), "two": self.heads["two"](x)}


class NnxScanned(nnx.Module):
    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks, self.head = make(rngs()), nnx.Linear(8, 2, rngs=rngs())

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def step(x, block):
            return x + nnx.remat(lambda block, x: block(nnx.relu(x)))(block, x)

        return self.head(step(x, self.blocks))


NESTED = {"blocks/0": 64, "blocks/1": 64, "heads/one": 16, "heads/two": 24}
NNX = {
    "linear_general": (lambda: nnx.LinearGeneral((6, 8), (2, 5), axis=(-2, -1), rngs=rngs()), {"LinearGeneral": 480}),
    "einsum": (lambda: nnx.Einsum("btd,dhk->bthk", (8, 3, 7), (3, 7), rngs=rngs()), {"Einsum": 168}),
    "conv": (lambda: nnx.Conv(8, 5, 3, strides=2, rngs=rngs()), {"Conv": 120}),
    "conv_transpose": (lambda: nnx.ConvTranspose(8, 5, 3, strides=2, rngs=rngs()), {"ConvTranspose": 120}),
    "attention": (lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs()), ATTENTION),
    "nested": (Nested, NESTED),
    "lora": (lambda: nnx.LoRALinear(8, 5, lora_rank=2, rngs=rngs()), None),
    "scanned": (NnxScanned, {"blocks": 192, "head": 16}),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx_modules_are_reached_and_execute_what_is_emulated(name):
    make, expected = NNX[name]
    module = make()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module)))
    model = from_nnx(module, TOKENS)
    assert expected is None or {layer.name: layer.weights for layer in model.layers} == expected
    out = jax.jit(model.call)(model.params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, out, nnx.jit(lambda module, x: module(x))(module, TOKENS))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(module)))
    agree(model, (TOKENS,), ("bfloat16", "int8_w"), apart=0.3)
    if name == "nested":
        assert [layer.calls for layer in model.layers] == [2, 1, 1, 1]
        assert model.layers[0].flops == 2 * 2 * 6 * 64


class Dropped(nnx.Module):
    """A network as people train it."""

    def __init__(self):
        self.layer, self.norm = nnx.Linear(4, 4, rngs=rngs()), nnx.BatchNorm(4, rngs=rngs())
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.drop(self.norm(self.layer(x)))


def test_an_nnx_module_in_training_mode_is_refused_and_statistics_are_those_of_its_making():
    module = Dropped()
    with pytest.raises(ModelError, match=r"depend on random numbers.*module\.eval"):
        from_nnx(module, X)
    module.drop.set_attributes(deterministic=True)
    with pytest.raises(ModelError, match="statistics of the batch"):
        from_nnx(module, X)
    module.eval()
    model = from_nnx(module, X)
    before = model.call(model.params, X)
    np.testing.assert_allclose(before, module(X), rtol=1e-6)
    module.norm.mean[...] = jnp.full((4,), 3.0, jnp.float32)
    np.testing.assert_array_equal(model.call(model.params, X), before)
    assert not np.array_equal(module(X), before)


def test_state_is_part_of_one_call():
    class Memory(nnx.Variable):
        pass

    class Cell(nnx.Module):
        def __init__(self):
            self.w, self.h = nnx.Param(normal(1, 4, 4, scale=0.5)), Memory(jnp.zeros((2, 4), jnp.float32))

        def __call__(self, x):
            self.h[...] = jnp.tanh(x + self.h[...] @ self.w[...])
            return self.h[...]

    class Net(nnx.Module):
        def __init__(self):
            self.cell, self.out = Cell(), nnx.Linear(4, 2, rngs=rngs())

        def __call__(self, x):
            self.cell(x)
            self.cell(x)
            return self.out(self.cell(x)), jnp.broadcast_to((self.cell.h[...] ** 2).mean(), x.shape[:1])

    model = from_nnx(Net(), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), model.call(model.params, X), Net()(X))
    assert model.names == ("cell", "out") and model.layers[0].calls == 2  # zeros times weights are known


def test_bridged_modules():
    class Net(nnx.Module):
        def __init__(self):
            self.a = nnx.bridge.ToNNX(nn.Dense(8), rngs=rngs()).lazy_init(X)
            self.b = nnx.Linear(8, 3, rngs=rngs())

        def __call__(self, x):
            return self.b(self.a(x))

    net = Net()
    model = from_nnx(net, X)
    assert len(model.layers) == 2 and "b" in model.names
    np.testing.assert_allclose(model.call(model.params, X), net(X), rtol=1e-6)
