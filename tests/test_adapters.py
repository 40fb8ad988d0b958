"""Every kind of module that Flax has, linen and NNX: reached, unchanged by the identity, lowered, and named alike."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpjax import compiled, cost, emulation, evaluation, search, sensitivity
from mpjax.apply import apply
from mpjax.formats import FLOAT32, parse, storage
from mpjax.program import ModelError, from_linen, from_nnx, graph

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 8, 8, 4), jnp.float32)
TOKENS = jax.random.normal(KEY, (2, 6, 8), jnp.float32)


class Experts(nn.Module):
    """A mixture of experts as people write it: two weights of its own, a router as a submodule."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.lecun_normal(batch_axis=0), (3, x.shape[-1], 16), jnp.float32)
        down = self.param("down", nn.initializers.lecun_normal(batch_axis=0), (3, 16, x.shape[-1]), jnp.float32)
        gates = nn.softmax(nn.Dense(3, name="router")(x))
        hidden = nn.gelu(jnp.einsum("btd,edh->ebth", x, up))
        return jnp.einsum("ebth,ehd,bte->btd", hidden, down, gates)


class Norm(nn.Module):
    """A weight that is normed before the product."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 5), jnp.float32)
        return nn.Dense(3, name="head")(x @ (kernel / jnp.linalg.norm(kernel, axis=0)))


class Otherwise(nn.Module):
    """A weight that is multiplied, and also added."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], x.shape[-1]), jnp.float32)
        return nn.Dense(3, name="head")(x @ kernel + kernel[0])


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


LINEN = {
    "dense_general": (nn.DenseGeneral((2, 5), axis=(-2, -1)), TOKENS, {"DenseGeneral": (60 * 8,)}),
    "dense_general_batch": (nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), TOKENS, {"DenseGeneral": (2 * 8 * 5,)}),
    "conv_local": (nn.ConvLocal(5, (3, 3)), IMAGES, {"ConvLocal": (64 * 36 * 5,)}),
    "conv_transpose": (nn.ConvTranspose(5, (3, 3), strides=(2, 2)), IMAGES, {"ConvTranspose": (9 * 4 * 5,)}),
    "conv_transpose_flipped": (
        nn.ConvTranspose(5, (4, 4), strides=(2, 2), transpose_kernel=True, padding="CIRCULAR"),
        IMAGES,
        {"ConvTranspose": (16 * 4 * 5,)},
    ),
    "einsum": (nn.Einsum((8, 3, 7), "btd,dhk->bthk"), TOKENS, {"Einsum": (8 * 21,)}),
    "einsum_swapped": (nn.Einsum((7, 8), "btd,kd->bkt"), TOKENS, {"Einsum": (56,)}),
    "attention": (
        nn.MultiHeadDotProductAttention(num_heads=2),
        TOKENS,
        dict.fromkeys(("query", "key", "value", "out"), (64,)),
    ),
    "experts": (Experts(), TOKENS, {"router": (24,), "up": (384,), "down": (384,)}),
    "scanned": (Scanned(), TOKENS, {"blocks/dense": (192,), "head": (16,)}),
}


def linen(module, x, **kwargs):
    variables = module.init(jax.random.key(1), x)
    # biases that matter
    variables = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(KEY, w.shape, w.dtype) if w.ndim == 1 else w, variables
    )
    return variables, from_linen(module, variables, x, **kwargs)


@pytest.mark.parametrize("name", LINEN)
def test_linen_modules_are_reached_and_unchanged_by_the_identity(name):
    module, x, expected = LINEN[name]
    variables, model = linen(module, x)
    assert {layer.name: (layer.weights,) for layer in model.layers} == expected
    out = model.call(model.params, x)
    np.testing.assert_allclose(out, module.apply(variables, x), atol=1e-6)
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, x), jax.jit(module.apply)(variables, x))
    zeroed = model.call(model.params, x, override=lambda layer, product, lhs, rhs: 0 * product(lhs, rhs))
    assert not np.array_equal(zeroed, out)


@pytest.mark.parametrize("name", LINEN)
@pytest.mark.parametrize(
    "fmt",
    [
        "bfloat16",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("float16_acc16", "float8_e4m3fn")),
        "int4_w",
    ],
)
def test_linen_modules_execute_what_is_emulated(name, fmt):
    module, x, _ = LINEN[name]
    _, model = linen(module, x)
    assignment = dict.fromkeys(model.names, fmt)
    calibration = emulation.calibrate(model, [(x,)])
    mixed = apply(model, assignment, calibration=calibration)
    found = jax.jit(mixed.call)(mixed.params, x)
    override = emulation.in_format({layer: parse(fmt) for layer in model.names}, calibration=calibration)
    expected = model.call(model.params, x, override=override)
    exact = model.call(model.params, x)
    scale = float(jnp.abs(exact).max())
    error = float(jnp.abs(expected - exact).max()) / scale
    assert 1e-5 < error < 0.3
    # order of sums, and roundings that it flips
    np.testing.assert_allclose(found, expected, atol=max(2e-6, 0.3 * error) * scale)
    assert found.dtype == jnp.float32


def test_each_run_under_a_scan_is_counted_once():
    _, model = linen(Scanned(), TOKENS)
    blocks, head = model.layers
    assert blocks.calls == 3 and blocks.flops == 3 * 2 * 6 * 64 and blocks.kernel_shape == (3, 8, 8)
    assert head.calls == 1 and head.flops == 2 * 6 * 16
    assert blocks.summed == (1,) and head.summed == (0,)
    assert (
        "1 of them run more than once (shared, or under a scan), always in one format: blocks/dense." in model.summary()
    )


def test_output_channels_keep_their_own_scales():
    """Each channel a hundred times the one before: one scale for all would round the small ones to nothing."""
    for name in ("dense_general", "conv_transpose_flipped", "einsum", "einsum_swapped", "experts"):
        module, x, _ = LINEN[name]
        _, model = linen(module, x)
        layer = model.layers[-1]
        assert layer.summed is not None, name
        kernel = model.params[layer.kernel]
        free = [axis for axis in range(kernel.ndim) if axis not in layer.summed]
        size = np.prod([kernel.shape[axis] for axis in free])
        factors = (100.0 ** np.arange(size) / 100.0**size).reshape(
            [kernel.shape[a] if a in free else 1 for a in range(kernel.ndim)]
        )
        scaled = jnp.asarray(kernel * factors.clip(1e-12), jnp.float32)
        mixed = apply(replace(model, params=model.params | {layer.kernel: scaled}), {layer.name: "int8_w"})
        stored, fmt = mixed.params[layer.kernel], parse("int8_w")
        weights = storage.stands_for(stored, fmt, layer.kernel_shape, layer.summed, layer.stacked)
        bound = np.abs(scaled).max(axis=layer.summed, keepdims=True) / 254 * 1.001
        assert (np.abs(weights - scaled) <= bound).all(), name


def test_a_weight_that_is_used_otherwise_stays_and_says_why():
    with pytest.warns(UserWarning, match="1 weights stay as they are: kernel .Otherwise: used in other ways"):
        variables, model = linen(Otherwise(), TOKENS)
    assert model.names == ("head",)
    (other,) = (each for each in model.others if each.path == "kernel")
    assert other.reason == "used in other ways than in a product" and "kernel" in model.summary()
    np.testing.assert_array_equal(model.call(model.params, TOKENS), Otherwise().apply(variables, TOKENS))


def test_a_weight_that_is_computed_is_what_a_format_rounds():
    variables, model = linen(Norm(), TOKENS)
    assert model.names == ("Norm", "head") and model.layers[0].sources == ("kernel",)
    kernel = variables["params"]["kernel"]
    np.testing.assert_allclose(model.params["kernel"], kernel / jnp.linalg.norm(kernel, axis=0), rtol=1e-6)
    assert "1 of their weights are computed from parameters, once: Norm (of kernel)" in model.summary()
    np.testing.assert_allclose(model.call(model.params, TOKENS), Norm().apply(variables, TOKENS), rtol=2e-6, atol=1e-6)


# --- embeddings ---------------------------------------------------------------------------------------------------

IDS = jnp.array([[1, 2, 3], [4, 5, 10]])
LOOKUP_FORMATS = ("bfloat16", "float16_acc16", "float8_e4m3fn", "bfloat16_w", "float8_e4m3fn_w", "int8_w", "int4_w")


class Text(nn.Module):
    """An embedding, and a head that is tied to it or not, or uses its table behind mpjax's back."""

    tied: str = "no"
    words: int = 12
    width: int = 32

    def setup(self):
        self.tokens, self.head = nn.Embed(self.words, self.width), nn.Dense(self.words, use_bias=False)

    def __call__(self, ids):
        x = nn.tanh(self.tokens(ids))
        if self.tied == "attend":
            return self.tokens.attend(x)
        return x @ self.tokens.embedding.T if self.tied == "table" else self.head(x)


class NnxText(nnx.Module):
    def __init__(self, tied="no", words=12, width=32):
        self.tied = tied
        self.tokens, self.head = (
            nnx.Embed(words, width, rngs=rngs()),
            nnx.Linear(width, words, use_bias=False, rngs=rngs()),
        )

    def __call__(self, ids):
        x = nnx.tanh(self.tokens(ids))
        if self.tied == "attend":
            return self.tokens.attend(x)
        return x @ self.tokens.embedding[...].T if self.tied == "table" else self.head(x)


def text(framework, tied="no", words=12, width=32):
    """The model of that framework, and its plain call."""
    if framework == "linen":
        module = Text(tied=tied, words=words, width=width)
        variables, model = linen(module, IDS)
        return model, jax.jit(module.apply)(variables, IDS)
    module = NnxText(tied, words, width)
    return from_nnx(module, IDS), nnx.jit(lambda module, ids: module(ids))(module, IDS)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("tied", ["no", "attend"])
def test_an_embedding_is_a_layer(framework, tied):
    model, plain = text(framework, tied)
    assert model.names == (("tokens",) if tied == "attend" else ("tokens", "head"))
    layer = model.layers[0]
    assert (layer.module, layer.kernel, layer.summed) == ("Embed", "tokens/embedding", (1,))
    assert layer.kind == ("dot" if tied == "attend" else "lookup")
    assert layer.calls == (2 if tied == "attend" else 1)
    assert layer.flops == (2 * 3 * 32 * 12 if tied == "attend" else 0)  # of one example; a lookup multiplies nothing
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, IDS), plain)
    assert graph.edges(model, IDS) == (("tokens", "head" if tied == "no" else "tokens"),)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_a_table_that_the_model_multiplies_itself_is_reached(framework):
    model, plain = text(framework, "table")
    assert model.names == ("tokens",) and model.layers[0].calls == 2  # the head is not called
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, IDS), plain)
    assert {each.reason for each in model.others} <= {"not used with these inputs"}


@pytest.mark.parametrize(
    ("words", "width"), [(11, 32), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((12, 32), (12, 8)))]
)
@pytest.mark.parametrize("fmt", LOOKUP_FORMATS)
def test_lookups_execute_what_is_emulated(fmt, words, width):
    for framework, tied in (("linen", "no"), ("nnx", "attend")):
        model, plain = text(framework, tied, words, width)
        calibration = emulation.calibrate(model, [(IDS,)])
        mixed = apply(model, {"tokens": fmt}, calibration=calibration)
        found = jax.jit(mixed.call)(mixed.params, IDS)
        override = emulation.in_format({"tokens": parse(fmt)}, calibration=calibration)
        expected = model.call(model.params, IDS, override=override)
        error = float(jnp.abs(expected - plain).max())
        assert error > 0
        np.testing.assert_allclose(found, expected, atol=(1e-6 if tied == "no" else 0.3 * error) + 1e-6)
        if fmt == "float16_acc16" or tied != "no":
            continue
        table = model.params["tokens/embedding"]
        rounded = storage.round_weights(table, parse(fmt), (1,))  # the oracle: the whole table, then the rows
        rows = jnp.tanh(rounded[IDS]) @ model.params["head/kernel"]
        np.testing.assert_allclose(expected, rows, atol=2e-6)


@pytest.mark.parametrize("fmt", ["int8_w", "int4_w", "float8_e4m3fn_w", "bfloat16_w"])
def test_rows_of_a_stored_table(fmt):
    fmt = parse(fmt)
    for shape in ((12, 64), (11, 32), (6, 7), (256, 32)):
        table = jax.random.normal(KEY, shape, jnp.float32)
        stored, scale = storage.quantize(table, fmt, (1,))
        ids = jnp.array([[0, shape[0] - 1, -1], [5, 3, shape[0] + 2], [-2, -shape[0], -shape[0] - 1]])
        rows = storage.dequantize_rows(stored, scale, fmt, shape, ids)
        expected = jnp.take(storage.round_weights(table, fmt, (1,)), ids, axis=0)
        np.testing.assert_array_equal(rows, expected)
        assert np.isnan(rows[1, 2]).all() and np.isnan(rows[2, 2]).all()  # as jnp.take says of rows outside
        narrow = storage.dequantize_rows(stored, scale, fmt, shape, jnp.arange(6, dtype=jnp.uint8))
        np.testing.assert_array_equal(narrow, storage.round_weights(table, fmt, (1,))[:6])


class Scaled(nn.Embed):
    """An embedding that does more than look up."""

    def __call__(self, inputs):
        return super().__call__(inputs) * 2.0


class NnxScaled(nnx.Embed):
    def __call__(self, inputs):
        return super().__call__(inputs) * 2.0


def test_a_subclass_that_does_more_than_look_up_is_reached():
    module = nn.Sequential([Scaled(12, 8), nn.Dense(3)])
    variables, model = linen(module, IDS)
    assert model.names == ("layers_0", "layers_1") and model.layers[0].module == "Scaled"
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, IDS), jax.jit(module.apply)(variables, IDS))
    twin = nnx.Sequential(NnxScaled(12, 8, rngs=rngs()), nnx.Linear(8, 3, rngs=rngs()))
    model = from_nnx(twin, IDS)
    assert model.names == ("layers/0", "layers/1")
    np.testing.assert_allclose(model.call(model.params, IDS), twin(IDS), atol=1e-6)


def test_a_lifted_embedding_is_one_layer_and_one_of_a_single_row_none():
    lifted = nn.vmap(nn.Embed, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
    module = nn.Sequential([lifted(12, 8), nn.Dense(3)])
    variables, model = linen(module, jnp.stack([IDS, IDS]))
    assert model.names == ("layers_0", "layers_1") and model.layers[0].kernel_shape == (2, 12, 8)
    both = jnp.stack([IDS, IDS])
    np.testing.assert_allclose(model.call(model.params, both), module.apply(variables, both), atol=1e-6)
    for fmt in ("bfloat16", "int8_w", "int4_w"):
        mixed = apply(model, {"layers_0": fmt})
        expected = model.call(model.params, both, override=emulation.in_format({"layers_0": parse(fmt)}))
        np.testing.assert_allclose(mixed.call(mixed.params, both), expected, atol=1e-6)
        assert not np.array_equal(expected, model.call(model.params, both))
    one = nn.Sequential([nn.Embed(1, 8), nn.Dense(3)])
    assert linen(one, IDS)[1].names == ("layers_1",)  # its row is broadcast, whatever is looked up


def test_a_model_keeps_the_statistics_that_its_module_had():
    class Normed(nnx.Module):
        def __init__(self):
            self.layer, self.norm = nnx.Linear(8, 4, rngs=rngs()), nnx.BatchNorm(4, rngs=rngs())

        def __call__(self, x):
            return self.norm(self.layer(x))

    module = Normed()
    module.eval()
    model = from_nnx(module, TOKENS)
    before = model.call(model.params, TOKENS)
    module.norm.mean[...] = jnp.full((4,), 3.0, jnp.float32)
    np.testing.assert_array_equal(model.call(model.params, TOKENS), before)
    assert not np.array_equal(module(TOKENS), before)


@pytest.mark.parametrize("implementation", ["rule", "auto"])
def test_a_tied_model_is_costed_and_compiled_in_every_way(implementation):
    model, plain = text("linen", "attend")
    costs = cost.measure(model, ("bfloat16", "int8_w"), IDS, rounds=1, implementation=implementation)
    assert np.isfinite(costs.seconds).all() and costs.implementations[0, 0] == "xla"
    program = compiled.compile(
        apply(model, {"tokens": "bfloat16"}), [(IDS,), (IDS[::-1],)], implementation=implementation
    )
    np.testing.assert_allclose(program(IDS), plain, atol=0.1)
    assert program.implementation == {"tokens": "xla"}


def test_an_embedding_is_scored_searched_and_costed(tmp_path):
    formats = ("bfloat16", "int4_w")
    model, _ = text("linen")
    found = sensitivity.local_rounding(num_probes=None)(model, [(IDS,)], formats, KEY)
    truth = sensitivity.measured()(model, [(IDS,)], formats, KEY)
    np.testing.assert_allclose(found.value, truth.value, rtol=0.2)
    assert (truth.value > 0).all()
    costs = cost.measure(model, formats, IDS, rounds=1)
    assert np.isfinite(costs.seconds).all() and (costs.weight_bytes[0, 1:] < costs.weight_bytes[0, 0]).all()
    program = compiled.compile(apply(model, {"tokens": "bfloat16", "head": "int8_w"}), [(IDS,), (IDS[::-1],)])
    (row, _) = program.report().rows
    assert (row["layer"], row["opcode"], row["full_copy"]) == ("tokens", "gather", None)
    assert program.weight_bytes == 2 * 12 * 32 + 12 * 32 + 4 * 12
    program = compiled.compile(apply(model, {"tokens": "int4_w"}), [(IDS,), (IDS[::-1],)])
    (row, _) = program.report().rows
    assert row["full_copy"] is False and program.weight_bytes == 12 * 16 + 12 * 2 + 4 * 12 * 32
    loaded = compiled.load(program.export(tmp_path / "text.mpjax"))
    np.testing.assert_array_equal(loaded(IDS), program(IDS))


def test_several_inputs_keyword_arguments_and_collections():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, a, b, *, train, scale=1.0):
            x = nn.BatchNorm(use_running_average=not train, name="norm")(
                nn.Dense(4, name="a")(a) + nn.Dense(4, name="b")(b)
            )
            return scale * nn.Dropout(0.5, deterministic=not train)(x)

    module, other = Both(), TOKENS[..., :3]
    variables = module.init({"params": KEY, "dropout": KEY}, TOKENS, other, train=False)
    model = from_linen(module, variables, TOKENS, other, train=False, scale=2.0)
    assert model.names == ("a", "b")
    expected = module.apply(variables, TOKENS, other, train=False, scale=2.0)
    np.testing.assert_array_equal(model.call(model.params, TOKENS, other), expected)
    with pytest.raises(ModelError, match="random numbers|collection"):
        from_linen(module, variables, TOKENS, other, train=True)
    with pytest.raises(ModelError, match="cannot be called with .*Pass the inputs"):
        from_linen(module, variables, TOKENS, train=False)


# --- NNX ----------------------------------------------------------------------------------------------------------


class NnxExperts(nnx.Module):
    def __init__(self, rngs):
        make = nnx.initializers.lecun_normal(batch_axis=0)
        self.up = nnx.Param(make(rngs.params(), (3, 8, 16), jnp.float32))
        self.down = nnx.Param(make(rngs.params(), (3, 16, 8), jnp.float32))
        self.router = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        gates = nnx.softmax(self.router(x))
        hidden = nnx.gelu(jnp.einsum("btd,edh->ebth", x, self.up[...]))
        return jnp.einsum("ebth,ehd,bte->btd", hidden, self.down[...], gates)


class Nested(nnx.Module):
    """Lists and dicts of modules, one of them shared."""

    def __init__(self, rngs):
        shared = nnx.Linear(8, 8, rngs=rngs)
        self.blocks = nnx.List([shared, nnx.Linear(8, 8, rngs=rngs), shared])
        self.heads = nnx.Dict(one=nnx.Linear(8, 2, rngs=rngs), two=nnx.Linear(8, 3, use_bias=False, rngs=rngs))

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.relu(block(x))
        return {"one": self.heads["one"](x), "two": self.heads["two"](x)}


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def step(x, block):
            return x + nnx.remat(lambda block, x: block(nnx.relu(x)))(block, x)

        return self.head(step(x, self.blocks))


def rngs():
    return nnx.Rngs(params=0)


NNX = {
    "linear_general": (
        lambda: nnx.LinearGeneral((6, 8), (2, 5), axis=(-2, -1), rngs=rngs()),
        TOKENS,
        {"LinearGeneral": 480},
    ),
    "einsum": (lambda: nnx.Einsum("btd,dhk->bthk", (8, 3, 7), (3, 7), rngs=rngs()), TOKENS, {"Einsum": 168}),
    "conv_transpose": (
        lambda: nnx.ConvTranspose(4, 5, (3, 3), strides=(2, 2), rngs=rngs()),
        IMAGES,
        {"ConvTranspose": 180},
    ),
    "attention": (
        lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs()),
        TOKENS,
        dict.fromkeys(("query", "key", "value", "out"), 64),
    ),
    "experts": (lambda: NnxExperts(rngs()), TOKENS, {"router": 24, "up": 384, "down": 384}),
    "nested": (
        lambda: Nested(rngs()),
        TOKENS,
        {"blocks/0": 64, "blocks/1": 64, "heads/one": 16, "heads/two": 24},
    ),
    "lora": (lambda: nnx.LoRALinear(8, 5, lora_rank=2, rngs=rngs()), TOKENS, None),
    "scanned": (lambda: NnxScanned(rngs()), TOKENS, {"blocks": 192, "head": 16}),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx_modules_are_reached_and_unchanged_by_the_identity(name):
    make, x, expected = NNX[name]
    module = make()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module)))
    model = from_nnx(module, x)
    if expected is not None:
        assert {layer.name: layer.weights for layer in model.layers} == expected
    out = jax.jit(model.call)(model.params, x)
    jax.tree.map(np.testing.assert_array_equal, out, nnx.jit(lambda module, x: module(x))(module, x))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(module)))
    zeroed = model.call(model.params, x, override=lambda layer, product, lhs, rhs: 0 * product(lhs, rhs))
    assert not all(map(np.array_equal, jax.tree.leaves(zeroed), jax.tree.leaves(out)))


@pytest.mark.parametrize("name", NNX)
@pytest.mark.parametrize("fmt", ["bfloat16", "int8_w"])
def test_nnx_modules_execute_what_is_emulated(name, fmt):
    make, x, _ = NNX[name]
    model = from_nnx(make(), x)
    mixed = apply(model, dict.fromkeys(model.names, fmt))
    found = jax.tree.leaves(jax.jit(mixed.call)(mixed.params, x))
    override = emulation.in_format({layer: parse(fmt) for layer in model.names})
    expected = jax.tree.leaves(model.call(model.params, x, override=override))
    exact = jax.tree.leaves(model.call(model.params, x))
    for a, b, c in zip(found, expected, exact, strict=True):
        error = float(jnp.abs(b - c).max())
        assert error > 0
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(c).max()) + 0.3 * error)


def test_a_shared_nnx_module_is_one_layer_that_runs_twice():
    model = from_nnx(Nested(rngs()), TOKENS)
    assert [layer.calls for layer in model.layers] == [2, 1, 1, 1]
    assert model.layers[0].flops == 2 * 2 * 6 * 64


# --- the same network in both -------------------------------------------------------------------------------------


class LinenEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for number in range(2):
            attended = nn.MultiHeadDotProductAttention(num_heads=2, name=f"attention_{number}")(x)
            x = nn.LayerNorm(name=f"norm_{number}")(x + attended)
            x = x + nn.Dense(8, name=f"down_{number}")(nn.gelu(nn.Dense(16, name=f"up_{number}")(x)))
        return x


class NnxEncoder(nnx.Module):
    def __init__(self, rngs):
        for number in range(2):
            setattr(self, f"attention_{number}", nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs))
            setattr(self, f"norm_{number}", nnx.LayerNorm(8, rngs=rngs))
            setattr(self, f"up_{number}", nnx.Linear(8, 16, rngs=rngs))
            setattr(self, f"down_{number}", nnx.Linear(16, 8, rngs=rngs))

    def __call__(self, x):
        for number in range(2):
            attention, norm, up, down = (
                getattr(self, f"{each}_{number}") for each in ("attention", "norm", "up", "down")
            )
            x = norm(x + attention(x))
            x = x + down(nnx.gelu(up(x)))
        return x


def test_linen_and_nnx_agree_in_names_scores_and_assignment():
    module = LinenEncoder()
    variables = module.init(KEY, TOKENS)
    one = from_linen(module, variables, TOKENS)
    twin = NnxEncoder(rngs())
    graphdef, params, rest = nnx.split(twin, nnx.Param, ...)
    nnx.replace_by_pure_dict(params, variables["params"])
    two = from_nnx(nnx.merge(graphdef, params, rest), TOKENS)
    assert one.names == two.names and len(one.names) == 12
    np.testing.assert_allclose(one.call(one.params, TOKENS), two.call(two.params, TOKENS), atol=1e-6)
    found = []
    for model in (one, two):
        scores = sensitivity.local_rounding(num_probes=4)(model, [(TOKENS,)], ("bfloat16",), KEY)
        problem = search.Problem(layers=model.names, formats=("bfloat16",), penalty=scores.value)
        drift = evaluation.Evaluation(model, [(TOKENS,)], ("bfloat16",), lambda low, exact: np.abs(low - exact).max(1))
        result = search.solve(problem, search.binary(), evaluate=drift, tolerance=0.01)
        found.append((scores.value, result.assignment))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    assert found[0][1] == found[1][1]
    assert FLOAT32.name in found[0][1].values() or len(found[0][1].lowered) == 12
