"""The TFLite importer against LiteRT, on the published files.

The limit is 1e-4: largest difference over the largest absolute value of an output.  Where it does NOT hold
for the pose model, measured over all 72 crops and 32 images of white noise, one image at a time:

- ``Identity_2`` (mask logits of up to 1700) misses it on 37 of 72 crops and 32 of 32 noise images against
  XNNPACK. LiteRT with XNNPACK misses it against LiteRT without on 39 and 32: one fp32 rounding of every
  weight moves this output by up to 7e-4.  Only its rms difference is held to 1e-4 here (worst seen: 6e-6 on
  crops, 4e-5 on noise).
- ``Identity`` misses it on 3 of 32 noise images (LiteRT against itself: 4), ``Identity_4`` on 3 (3),
  ``Identity_1`` on 16 of 28 (15).  So on noise the median image is held to the limit, against LiteRT without
  XNNPACK.

On crops the other four outputs hold it on all 72, and iris and face hold it on noise.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tflite
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from experiments.lib import assets
from experiments.models import tflite_import
from experiments.models.tflite_import import TFLiteError, load_tflite
from experiments.problems.data import pose_crops

LIMIT = 1e-4  # of the largest absolute value of an output


def _fetch(name):
    try:
        return assets.fetch(name)
    except assets.RegistryUnreachable as error:
        pytest.skip(f"no package registry: {error}")


def _litert(path, images, resolver=OpResolverType.AUTO):
    """Output name -> (N, …), one image at a time."""
    interpreter = Interpreter(model_path=str(path), experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    rows: dict[str, list] = {}
    for image in images:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        for output in interpreter.get_output_details():
            rows.setdefault(output["name"], []).append(interpreter.get_tensor(output["index"])[0])
    return {name: np.stack(values) for name, values in rows.items()}


def _errors(path, model, images, resolver=OpResolverType.AUTO):
    """Output name -> (largest, rms) difference from LiteRT per image, relative to its largest value."""
    expected = _litert(path, images, resolver)
    apply = jax.jit(model.module.apply)
    rows = [apply(model.variables, jnp.asarray(image[None])) for image in images]
    errors = {}
    assert set(rows[0]) == set(model.outputs)
    for name in model.outputs:
        assert {row[name].dtype for row in rows} == {jnp.dtype("float32")}
        value = np.concatenate([row[name] for row in rows])
        assert value.shape == expected[name].shape
        # Where LiteRT gives exactly 0 (a sigmoid far below), any difference at all counts as enormous.
        scale = np.maximum(np.abs(expected[name]).reshape(len(images), -1).max(1), np.finfo(np.float32).tiny)
        difference = (value - expected[name]).reshape(len(images), -1).astype(np.float64)
        errors[name] = np.abs(difference).max(1) / scale, np.sqrt((difference**2).mean(1)) / scale
    return errors


def _noise(shape, count=2, seed=0):
    return np.random.default_rng(seed).random((count, *shape[1:]), np.float32)


# --- the published files --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers"), [("iris_landmark", 81), ("face_landmark", 45)])
def test_published_files(name, layers):
    path = _fetch(name)
    model = load_tflite(path)
    assert len(model.layers) == layers
    for name, (largest, _) in _errors(path, model, _noise(model.input_shape)).items():
        assert largest.max() <= LIMIT, name


@pytest.fixture(scope="module")
def face():
    return _fetch("face_landmark")


@pytest.fixture(scope="module")
def pose_path():
    return _fetch("pose_landmark_full")


@pytest.mark.slow
def test_pose_on_noise_and_crops(pose_path):
    model = load_tflite(pose_path)
    assert len(model.layers) == 96
    assert model.input_shape == (1, 256, 256, 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.variables)) == 3_169_489
    for name, (largest, rms) in _errors(pose_path, model, pose_crops().evaluation.images[::8]).items():
        assert (rms if name == "Identity_2" else largest).max() <= LIMIT, name
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    for name, (largest, rms) in _errors(pose_path, model, _noise(model.input_shape, count=8), plain).items():
        assert np.median(rms if name == "Identity_2" else largest) <= LIMIT, name


@pytest.mark.slow
def test_pose_landmarks_alone(pose_path):
    whole, pruned = load_tflite(pose_path), load_tflite(pose_path, outputs=("Identity",))
    assert len(pruned.layers) == 72
    assert pruned.outputs == ("Identity",)
    assert set(pruned.layers) < set(whole.layers)  # pruning renames nothing
    for name in pruned.layers:
        np.testing.assert_array_equal(
            pruned.variables["params"][name]["kernel"], whole.variables["params"][name]["kernel"]
        )
    largest, _ = _errors(pose_path, pruned, pose_crops().evaluation.images[::8])["Identity"]
    assert largest.max() <= LIMIT


def test_every_layer_is_called_once_with_its_own_parameters(face):
    model = load_tflite(face, outputs=("conv2d_20",))
    called = []

    def record(call, arguments, options, context):
        if isinstance(context.module, nn.Conv):
            called.append("/".join(context.module.path))
        return call(*arguments, **options)

    with nn.intercept_methods(record):
        jax.eval_shape(model.module.apply, model.variables, jnp.zeros(model.input_shape, jnp.float32))
    assert tuple(called) == model.layers
    made = jax.eval_shape(model.module.init, jax.random.key(0), jnp.zeros(model.input_shape, jnp.float32))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), dict(model.variables)
    )
    assert hash(model.module) == hash(load_tflite(face, outputs=("conv2d_20",)).module)


def test_flax_s_own_dtype_reaches_every_layer(face):
    wide, low = load_tflite(face), load_tflite(face, dtype=jnp.bfloat16)
    x = jnp.asarray(_noise(wide.input_shape))
    exact = jax.jit(wide.module.apply)(wide.variables, x)
    for name, value in jax.jit(low.module.apply)(low.variables, x).items():
        assert value.dtype == jnp.bfloat16 and exact[name].dtype == jnp.float32
        np.testing.assert_allclose(np.float32(value), exact[name], atol=0.05 * float(jnp.abs(exact[name]).max()))


def test_misuse(face, monkeypatch):
    with pytest.raises(TFLiteError, match="no output 'mop'. Known: conv2d_20, conv2d_30"):
        load_tflite(face, outputs=("mop",))
    model = load_tflite(face)
    with pytest.raises(ValueError, match=r"input of shape \(1, 9, 10, 3\), expected \(N, 192, 192, 3\)"):
        model.module.apply(model.variables, jnp.zeros((1, 9, 10, 3), jnp.float32))
    monkeypatch.setitem(tflite_import._KINDS, tflite.BuiltinOperator.ADD, "SIN")
    with pytest.raises(TFLiteError, match="sin_00: this operator cannot be imported"):
        load_tflite(face)
