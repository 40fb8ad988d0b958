"""Every kind of module that Flax has, linen and NNX: reached, unchanged by the identity, lowered, and named alike."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpjax import apply, emulate, evaluation, models, search, sensitivity
from mpjax.formats import FLOAT32, parse

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
    """A weight that is used otherwise: normed before the product."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 5), jnp.float32)
        return nn.Dense(3, name="head")(x @ (kernel / jnp.linalg.norm(kernel, axis=0)))


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
    return variables, models.from_linen(module, variables, x, **kwargs)


@pytest.mark.parametrize("name", LINEN)
def test_linen_modules_are_reached_and_unchanged_by_the_identity(name):
    module, x, expected = LINEN[name]
    variables, model = linen(module, x)
    assert {layer.name: (layer.weights,) for layer in model.layers} == expected
    out = model.call(model.params, x)
    np.testing.assert_allclose(
        out, module.apply(variables, x), atol=1e-6
    )  # op by op here, jnp.einsum as a program there
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
    calibration = emulate.calibrate(model, [(x,)])
    mixed = apply.apply(model, assignment, calibration=calibration)
    found = jax.jit(mixed.call)(mixed.params, x)
    override = emulate.in_format({layer: parse(fmt) for layer in model.names}, calibration=calibration)
    expected = model.call(model.params, x, override=override)
    exact = model.call(model.params, x)
    scale = float(jnp.abs(exact).max())
    error = float(jnp.abs(expected - exact).max()) / scale
    assert 1e-5 < error < 0.3
    # order of sums, and roundings that it flips; slices of a scanned layer share one float8 scale, emulated each has its own
    slack = 2.0 if (name, fmt) == ("scanned", "float8_e4m3fn") else 0.3
    np.testing.assert_allclose(found, expected, atol=max(2e-6, slack * error) * scale)
    assert found.dtype == jnp.float32


def test_each_run_under_a_scan_is_counted_once():
    _, model = linen(Scanned(), TOKENS)
    blocks, head = model.layers
    assert blocks.calls == 3 and blocks.flops == 3 * 2 * 6 * 64 and blocks.kernel_shape == (3, 8, 8)
    assert head.calls == 1 and head.flops == 2 * 6 * 16
    assert blocks.summed == (1,) and head.summed == (0,)


def test_output_channels_keep_their_own_scales():
    """Each channel a hundred times the one before: one scale for all would round the small ones to nothing."""
    for name in ("dense_general", "conv_transpose_flipped", "einsum", "einsum_swapped", "experts"):
        module, x, _ = LINEN[name]
        _, model = linen(module, x)
        layer = model.layers[-1]
        assert layer.summed is not None, name
        kernel = model.params
        for key in layer.kernel.split("/"):
            kernel = kernel[key]
        free = [axis for axis in range(kernel.ndim) if axis not in layer.summed]
        size = np.prod([kernel.shape[axis] for axis in free])
        factors = (100.0 ** np.arange(size) / 100.0**size).reshape(
            [kernel.shape[a] if a in free else 1 for a in range(kernel.ndim)]
        )
        scaled = jnp.asarray(kernel * factors.clip(1e-12), jnp.float32)
        params = jax.tree.map(lambda leaf, k=kernel, s=scaled: s if leaf is k else leaf, model.params)
        mixed = apply.apply(replace(model, params=params), {layer.name: "int8_w"})
        bound = {"rtol": 0, "atol": 0}
        weights = apply._multiplied_out(model, {layer.name: parse("int8_w")}, mixed.params)
        for key in layer.kernel.split("/"):
            weights = weights[key]
        bound = np.abs(scaled).max(axis=layer.summed, keepdims=True) / 254 * 1.001
        assert (np.abs(weights - scaled) <= bound).all(), name


def test_a_weight_that_is_used_otherwise_stays_and_says_why():
    with pytest.warns(UserWarning, match="1 weights stay in float32.*kernel .Norm: used in other ways"):
        variables, model = linen(Norm(), TOKENS)
    assert model.names == ("head",)
    (other,) = (each for each in model.others if each.path == "kernel")
    assert other.reason == "used in other ways than in a product" and "kernel" in models.summary(model)
    np.testing.assert_array_equal(model.call(model.params, TOKENS), Norm().apply(variables, TOKENS))


def test_an_embedding_is_named():
    class Text(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(4, name="head")(nn.Embed(11, 8, name="tokens")(ids))

    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    _, model = linen(Text(), ids)
    assert model.names == ("head",)
    assert [(each.path, each.reason) for each in model.others if each.reason != "bias"] == [
        ("tokens/embedding", "looked up, not multiplied")
    ]
    assert model.layers[0].flops == 2 * 3 * 32  # of one example


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
    model = models.from_linen(module, variables, TOKENS, other, train=False, scale=2.0)
    assert model.names == ("a", "b")
    expected = module.apply(variables, TOKENS, other, train=False, scale=2.0)
    np.testing.assert_array_equal(model.call(model.params, TOKENS, other), expected)
    with pytest.raises(models.ModelError, match="random numbers|collection"):
        models.from_linen(module, variables, TOKENS, other, train=True)
    with pytest.raises(models.ModelError, match="cannot be called with .*Pass the inputs"):
        models.from_linen(module, variables, TOKENS, train=False)


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
    model = models.from_nnx(module, x)
    if expected is not None:
        assert {layer.name: layer.weights for layer in model.layers} == expected
    out = jax.jit(model.call)(model.params, x)
    jax.tree.map(np.testing.assert_array_equal, out, nnx.jit(lambda module, x: module(x))(module, x))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(module)))
    assert type(module).__call__ is type(make()).__call__ and not hasattr(module, "mpjax_through")
    zeroed = model.call(model.params, x, override=lambda layer, product, lhs, rhs: 0 * product(lhs, rhs))
    assert not all(map(np.array_equal, jax.tree.leaves(zeroed), jax.tree.leaves(out)))


@pytest.mark.parametrize("name", NNX)
@pytest.mark.parametrize("fmt", ["bfloat16", "int8_w"])
def test_nnx_modules_execute_what_is_emulated(name, fmt):
    make, x, _ = NNX[name]
    model = models.from_nnx(make(), x)
    mixed = apply.apply(model, dict.fromkeys(model.names, fmt))
    found = jax.tree.leaves(jax.jit(mixed.call)(mixed.params, x))
    override = emulate.in_format({layer: parse(fmt) for layer in model.names})
    expected = jax.tree.leaves(model.call(model.params, x, override=override))
    exact = jax.tree.leaves(model.call(model.params, x))
    for a, b, c in zip(found, expected, exact, strict=True):
        error = float(jnp.abs(b - c).max())
        assert error > 0
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(c).max()) + 0.3 * error)


def test_a_shared_nnx_module_is_one_layer_that_runs_twice():
    model = models.from_nnx(Nested(rngs()), TOKENS)
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
    one = models.from_linen(module, variables, TOKENS)
    twin = NnxEncoder(rngs())
    graphdef, params, rest = nnx.split(twin, nnx.Param, ...)
    nnx.replace_by_pure_dict(params, variables["params"])
    two = models.from_nnx(nnx.merge(graphdef, params, rest), TOKENS)
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
