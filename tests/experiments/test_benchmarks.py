"""The benchmark problems: metrics and batching on hand-made arrays, the crops, and (slow) the models on them."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from sklearn.datasets import load_digits

from experiments.lib import assets
from experiments.models.tflite_import import load_tflite
from experiments.problems import benchmarks, digits, eyes, optimum
from mpjax.program import check_batches

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

# The iris model's points 0-15 (the lids, from the outer corner) as landmarks of the face mesh, per eye: MediaPipe's table.
LIDS = {
    "left": (33, 7, 163, 144, 145, 153, 154, 155, 133, 246, 161, 160, 159, 158, 157, 173),
    "right": (263, 249, 390, 373, 374, 380, 381, 382, 362, 466, 388, 387, 386, 385, 384, 398),
}


def _load(name, count=None):
    try:
        return benchmarks.load(name, count)
    except assets.RegistryUnreachable as error:
        pytest.skip(f"no package registry: {error}")


def _outputs(benchmark):
    """(N, K) float32 outputs."""
    run = jax.jit(lambda params, *batch: benchmark.model.call(params, *batch))
    return np.concatenate([np.asarray(run(benchmark.model.params, *batch)) for batch in benchmark.batches])


# --- metrics and batches ------------------------------------------------------------------------------------------


def test_landmark_error_is_the_mean_distance():
    reference = np.array([[0.0, 0, 1, 1, 99], [0, 0, 0, 0, 0]])
    low = reference + [[3, 4, 0, 0, 50], [0, 1, 5, 12, 0]]
    np.testing.assert_allclose(benchmarks.landmark_error(2)(low, reference), [2.5, 7.0])  # (5 + 0) / 2, (1 + 13) / 2
    low[0, 0] = np.nan
    assert np.isnan(benchmarks.landmark_error(2)(low, reference)).tolist() == [True, False]


def test_kl_error_in_closed_form():
    reference = np.log([[0.5, 0.5], [0.25, 0.75]]) + np.array([[3.0], [-7.0]])  # a constant does not matter
    low = np.log([[0.25, 0.75], [0.25, 0.75]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(benchmarks.kl_error(low, reference), [expected, 0], atol=1e-15)
    huge = benchmarks.kl_error(np.array([[0.0, 1000.0]]), np.array([[1000.0, 0.0]]))
    np.testing.assert_allclose(huge, [1000.0])


# --- regions and crops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle", [0.0, 0.3, -1.2])
def test_region_maps_crop_to_image(mirrored, angle):
    """The right edge of a crop lies half a side from the centre, in the direction of the angle; a mirrored one opposite."""
    region = eyes.Region(centre=(40.0, 30.0), side=20.0, angle=angle, mirrored=mirrored)
    matrix = region.affine(64)
    along = np.array([np.cos(angle), np.sin(angle)]) * (-1 if mirrored else 1)
    down = np.array([-np.sin(angle), np.cos(angle)])
    np.testing.assert_allclose(matrix @ [64, 32, 1], [40, 30] + 10 * along)
    np.testing.assert_allclose(matrix @ [32, 64, 1], [40, 30] + 10 * down)


def test_crop_of_an_upright_region_is_a_slice():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    region = eyes.Region(centre=(40.0, 30.0), side=16.0, angle=0.0)
    expected = image[22:38, 32:48] / np.float32(255)
    np.testing.assert_array_equal(region.crop(image, 16), expected)
    mirrored = eyes.Region(centre=(40.0, 30.0), side=16.0, angle=0.0, mirrored=True)
    np.testing.assert_array_equal(mirrored.crop(image, 16), expected[:, ::-1])


def test_crops_of_eyes_and_faces():
    result = eyes.eyes(6)
    assert result.images.shape == (6, 64, 64, 3) and result.images.dtype == result.unit.dtype == np.float32
    assert 0 <= result.images.min() and result.images.max() <= 1
    np.testing.assert_allclose(result.unit[:2], 64 / 2.3, rtol=1e-6)
    assert [region.mirrored for region in result.regions] == [False, True] * 3
    assert len({region.centre for region in result.regions}) == 6
    for number, corners in enumerate((eyes.LEFT_EYE, eyes.RIGHT_EYE)):  # the outer corner left, both at half height
        inverse = np.linalg.inv(np.vstack([result.regions[number].affine(64), [0, 0, 1]]))
        points = (np.column_stack([corners, [1, 1]]) @ inverse.T)[:, :2]
        half = 32 / 2.3
        np.testing.assert_allclose(points, [[32 - half, 32], [32 + half, 32]], atol=1e-9)
    np.testing.assert_array_equal(eyes.eyes(3).images, result.images[:3])  # more crops leave the first as they are
    assert eyes.faces(2).images.shape == (2, 192, 192, 3)


# --- the digits ---------------------------------------------------------------------------------------------------


def test_digits_split_is_disjoint_stratified_and_fixed():
    train, test = digits.split(0)
    assert len(train.labels) == digits.TRAIN and len(test.labels) == 357
    both = np.concatenate([train.images, test.images]).reshape(1797, 64)
    np.testing.assert_array_equal(np.sort(both.sum(1)), np.sort(load_digits().data.astype(np.float32).sum(1) / 16))
    assert train.images.shape == (1440, 8, 8, 1) and train.images.dtype == np.float32
    assert 0 == train.images.min() and train.images.max() == 1
    assert set(train.labels) == set(range(10))
    np.testing.assert_allclose(np.bincount(train.labels) / 1440, np.bincount(test.labels) / 357, atol=0.003)
    np.testing.assert_array_equal(digits.split(0)[0].images, train.images)
    assert not np.array_equal(digits.split(1)[0].images, train.images)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("window", [(1, 1), (2, 3)])
def test_convolution_as_products(strides, groups, window):
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.normal(size=(2, 7, 6, 5)))
    rhs = jnp.asarray(rng.normal(size=(*window, 5 // groups, 5 if groups > 1 else 4)))
    expected = lax.conv_general_dilated(
        lhs, rhs, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    result = digits.as_products(lhs, rhs, strides, "SAME", feature_group_count=groups)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_optimum_of_least_squares_in_closed_form(seed):
    rng = np.random.default_rng(seed)
    inputs, targets = rng.normal(size=(36, 20)), rng.normal(size=36)

    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2) + 0.1 * jnp.vdot(w, w)

    matrix = inputs.T @ inputs / 36 + 0.1 * np.eye(20)
    expected = np.linalg.solve(matrix, inputs.T @ targets / 36)
    data = (jnp.asarray(inputs), jnp.asarray(targets))
    result = optimum.newton(loss, jnp.asarray(rng.normal(size=20)), data, rounds=2, tolerance=1e-12)
    np.testing.assert_allclose(result.vector, expected, atol=1e-12)
    np.testing.assert_allclose(result.eigenvalues, 2 * np.linalg.eigvalsh(matrix), rtol=1e-12)
    assert result.rounds == 1
    start = jnp.asarray(rng.normal(size=20))
    vector, taken = optimum.lbfgs(lambda w: loss(w, *data), start, steps=300, tolerance=1e-9)
    np.testing.assert_allclose(vector, expected, atol=1e-8)
    assert taken == 100


def test_newton_leaves_a_saddle():
    """½y² + ¼x⁴ − ½x² has a saddle at 0, where plain Newton steps end, and minima at x = ±1 with eigenvalues 1 and 2."""

    def loss(w, _):
        return 0.5 * w[1] ** 2 + 0.25 * w[0] ** 4 - 0.5 * w[0] ** 2

    data = (jnp.zeros(1),)
    result = optimum.newton(loss, jnp.asarray([0.1, 0.5]), data, rounds=20, tolerance=1e-12)
    np.testing.assert_allclose(np.abs(result.vector), [1, 0], atol=1e-12)
    assert result.eigenvalues[0] == pytest.approx(1)
    assert abs(result.eigenvalues[1] - 2) < 7 * result.distance < 0.1  # 3x² − 1 where the last Hessian was taken


def test_weights_come_from_the_cache_and_damage_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("MPJAX_CACHE", str(tmp_path))
    weights = {"dense": {"kernel": np.arange(6.0).reshape(2, 3)}}
    runs = []

    def train(command, **options):
        runs.append((command, options))
        digits._checkpoint().save("digits_cnn", flatten_dict(weights, sep="/"), {"l2": 0.5, "run": len(runs)})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(digits.subprocess, "run", train)
    first, second = digits.trained(), digits.trained()
    assert len(runs) == 1 and first.facts == second.facts == {"l2": 0.5, "run": 1}
    command, options = runs[0]
    assert command[1:] == ["-m", "experiments.problems.digits"]
    assert options["env"]["JAX_ENABLE_X64"] == "1"
    np.testing.assert_array_equal(second.params["dense"]["kernel"], weights["dense"]["kernel"])
    (path,) = (tmp_path / "digits").iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="damaged"):
        third = digits.trained()
    assert len(runs) == 2 and third.facts["run"] == 2
    assert len(list((tmp_path / "digits").glob("*.damaged"))) == 1


def test_a_failed_training_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MPJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(digits.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    with pytest.raises(digits.TrainingError, match="exit code 3"):
        digits.trained()


def _forward(params, x):
    """The network again, with lax.conv_general_dilated; params: path -> array."""

    def conv(x, name, stride=1):
        kernel = params[f"{name}/kernel"]
        out = lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] // kernel.shape[2],
        )  # fmt: skip
        return jnp.tanh(out + params[f"{name}/bias"])

    x = conv(x, "conv_0", 2)
    x = x + conv(conv(x, "depthwise_1"), "pointwise_2")
    x = x + conv(conv(x, "depthwise_3"), "pointwise_4")
    x = conv(x, "conv_5", 2)
    x = x + conv(conv(x, "depthwise_6"), "pointwise_7")
    x = jnp.tanh(x.reshape(len(x), -1) @ params["dense_8/kernel"] + params["dense_8/bias"])
    return x @ params["dense_9/kernel"] + params["dense_9/bias"]


@pytest.fixture(scope="module")
def network():
    """The trained network, and its objective again as a function of one float64 vector."""
    trained = digits.trained()
    train, test = digits.split(trained.facts["seed"])
    paths = flatten_dict(dict(trained.params), sep="/")
    vector = jnp.concatenate([jnp.ravel(jnp.asarray(leaf)) for leaf in paths.values()])
    ends = np.cumsum([leaf.size for leaf in paths.values()])
    assert vector.dtype == jnp.float64 and all(leaf.dtype == np.float64 for leaf in paths.values())

    def unflat(w):
        return {
            name: w[end - leaf.size : end].reshape(leaf.shape)
            for (name, leaf), end in zip(paths.items(), ends, strict=True)
        }

    def objective(w, x, y):
        logits = _forward(unflat(w), x)
        picked = jnp.take_along_axis(logits - jax.nn.logsumexp(logits, axis=1, keepdims=True), y[:, None], axis=1)
        return -jnp.mean(picked) + 0.5 * trained.facts["l2"] * jnp.vdot(w, w)

    return trained, train, test, vector, unflat, objective


@pytest.mark.slow
def test_digits_gradient_is_zero_and_facts_are_true(network):
    trained, train, test, vector, unflat, objective = network
    facts = trained.facts
    x, y = jnp.asarray(train.images, jnp.float64), jnp.asarray(train.labels)
    gradient = jax.jit(jax.grad(objective))
    assert vector.size == facts["parameters"] <= 4000
    assert float(jnp.linalg.norm(gradient(vector, x, y))) < 1e-9
    rounded = vector.astype(jnp.float32).astype(jnp.float64)
    assert float(jnp.linalg.norm(gradient(rounded, x, y))) == pytest.approx(
        facts["gradient_norm_float32_weights"], rel=0.01
    )
    assert float(jnp.linalg.norm(gradient(vector, x[:64], y[:64]))) > 1e-3  # not zero over some of the examples
    value = float(objective(vector, x, y))
    assert value == pytest.approx(facts["objective"], rel=1e-12)
    assert value - 0.5 * facts["l2"] * float(vector @ vector) == pytest.approx(facts["cross_entropy"], rel=1e-9)
    again = digits.objective(unflatten_dict(unflat(vector), sep="/"), x, y, l2=facts["l2"])
    assert float(again) == pytest.approx(value, rel=1e-12)
    for part, name in ((train, "train_accuracy"), (test, "test_accuracy")):
        predicted = np.asarray(_forward(unflat(vector), jnp.asarray(part.images, jnp.float64))).argmax(1)
        assert float(np.mean(predicted == part.labels)) == pytest.approx(facts[name], abs=1e-12)
    assert facts["train_accuracy"] > 0.98 and facts["test_accuracy"] > 0.93


@pytest.mark.slow
def test_digits_hessian_is_positive_definite(network):
    trained, train, _, vector, unflat, _ = network
    chunks = (
        jnp.asarray(train.images, jnp.float64).reshape(-1, 48, 8, 8, 1),
        jnp.asarray(train.labels).reshape(-1, 48),
    )

    def objective(w, x, y):  # compared with the other one above, and quicker to differentiate
        return digits.objective(unflatten_dict(unflat(w), sep="/"), x, y, l2=trained.facts["l2"])

    @jax.jit
    def hessian(w):
        def add(total, chunk):
            product = jax.linearize(jax.grad(lambda vector: objective(vector, *chunk)), w)[1]
            return total + lax.map(product, jnp.eye(w.size), batch_size=16), None

        return lax.scan(add, jnp.zeros((w.size, w.size)), chunks)[0] / len(chunks[0])

    matrix = np.asarray(hessian(vector))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] > 0
    assert eigenvalues[0] == pytest.approx(trained.facts["smallest_eigenvalue"], rel=1e-4)
    assert eigenvalues[-1] == pytest.approx(trained.facts["largest_eigenvalue"], rel=1e-6)


@pytest.mark.slow
def test_digits_benchmark():
    whole, some = benchmarks.load("digits_cnn"), benchmarks.load("digits_cnn", 64)
    assert len(whole.model.layers) == 10 and whole.examples == digits.TRAIN and some.examples == 64
    check_batches(whole.batches), check_batches(whole.labelled)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(whole.model.params))
    np.testing.assert_array_equal(some.batches[0][0], np.concatenate([b[0] for b in whole.batches])[:64])
    train, test = digits.split(whole.facts["seed"])
    labels = np.concatenate([batch[1] for batch in whole.labelled])
    assert labels.dtype == np.int32 and labels.min() == 0 and labels.max() == 9
    np.testing.assert_array_equal(np.concatenate([batch[0] for batch in whole.labelled]), train.images)
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in test.images) <= 5  # the data set holds a few equal pictures
    outputs = _outputs(whole)
    assert outputs.shape == (1440, 10) and outputs.dtype == np.float32
    assert np.mean(outputs.argmax(1) == labels) == pytest.approx(whole.facts["train_accuracy"], abs=0.002)
    json.dumps(whole.facts, allow_nan=False)


# --- the MediaPipe models -----------------------------------------------------------------------------------------


def _half_precision_weights(benchmark):
    """Fraction of the layers' weights that float16 holds exactly."""
    weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(benchmark.model.params)])
    return float(np.mean(weights == weights.astype(np.float16).astype(np.float32)))


@pytest.mark.slow
def test_pose_benchmark():
    pose = _load("pose_landmark_full", 5)
    assert len(pose.model.layers) == 72 and pose.examples == 5
    check_batches(pose.batches)
    assert _half_precision_weights(pose) > 0.999
    assert len(set(pose.facts["crops"])) == 5
    outputs = _outputs(pose)
    assert outputs.shape == (5, 66)
    torso = np.concatenate([batch[1] for batch in pose.batches])
    landmarks = outputs.reshape(5, 33, 2)
    trunk = (landmarks[:, 11] + landmarks[:, 12] - landmarks[:, 23] - landmarks[:, 24]) / 2
    np.testing.assert_allclose(np.linalg.norm(trunk, axis=1), 1, rtol=1e-4)  # in torso units
    inside = (landmarks * torso[:, None, None] > 0) & (landmarks * torso[:, None, None] < 256)
    assert inside.mean() > 0.95


@pytest.fixture(scope="module")
def mesh():
    """(468, 2) landmarks in the photograph, by following the face model from a rough box; and the last region."""
    try:
        imported = load_tflite(assets.fetch("face_landmark"), outputs=("conv2d_20",))
    except assets.RegistryUnreachable as error:
        pytest.skip(f"no package registry: {error}")
    run = jax.jit(imported.module.apply)
    region = eyes.Region(centre=(224.0, 110.0), side=200.0, angle=0.0)
    for _ in range(7):
        out = run(imported.variables, jnp.asarray(region.crop(eyes.photograph(), 192)[None]))["conv2d_20"]
        matrix = region.affine(192)
        points = np.asarray(out, np.float64).reshape(468, 3)[:, :2] @ matrix[:, :2].T + matrix[:, 2]
        low, high = points.min(axis=0), points.max(axis=0)
        across = points[263] - points[33]
        region = eyes.Region(
            centre=tuple((low + high) / 2), side=1.5 * float(max(high - low)), angle=float(np.arctan2(*across[::-1]))
        )
    return points, region


@pytest.mark.slow
def test_written_positions_are_those_of_the_face_mesh(mesh):
    points, region = mesh
    written = [*eyes.LEFT_EYE, *eyes.RIGHT_EYE]
    np.testing.assert_allclose(written, points[[33, 133, 263, 362]], atol=1.0)  # pixels; an eye is 19 wide
    np.testing.assert_allclose(eyes.FACE_CENTRE, region.centre, atol=2)
    assert eyes.FACE_SIDE == pytest.approx(region.side, abs=4)
    assert eyes.faces(1).regions[0].angle == pytest.approx(region.angle, abs=0.03)


@pytest.mark.slow
def test_iris_benchmark(mesh):
    iris = _load("iris_landmark", 4)
    assert len(iris.model.layers) == 81 and iris.examples == 4
    check_batches(iris.batches)
    assert _half_precision_weights(iris) < 0.05  # trained and stored in float32
    outputs = _outputs(iris)
    assert outputs.shape == (4, 152)
    crops = eyes.eyes(4)
    points = outputs.reshape(4, 76, 2) * crops.unit[:, None, None]  # pixels of the crop
    assert points.min() > 0 and points.max() < 64
    for number, side in enumerate(LIDS):
        matrix = crops.regions[number].affine(64)
        lids = points[number, :16] @ matrix[:, :2].T + matrix[:, 2]
        distance = np.linalg.norm(lids - mesh[0][list(LIDS[side])], axis=1)
        assert distance.mean() < 0.1 * 19 and distance.max() < 0.2 * 19  # of an eye's width
        centre, ring = points[number, 71], points[number, 72:76]
        radius = np.linalg.norm(ring - centre, axis=1)
        assert 3 < radius.min() and radius.max() < 8
        pupil = crops.images[number, int(centre[1]) - 1 : int(centre[1]) + 2, int(centre[0]) - 1 : int(centre[0]) + 2]
        assert pupil.mean() < crops.images[number].mean() / 2  # the middle of the iris is dark


@pytest.mark.slow
def test_face_benchmark():
    face = _load("face_landmark", 2)
    assert len(face.model.layers) == 45 and face.examples == 2
    check_batches(face.batches)
    outputs = _outputs(face)
    assert outputs.shape == (2, 937)
    unit = np.concatenate([batch[1] for batch in face.batches])
    points = outputs[:, :936].reshape(2, 468, 2) * unit[:, None, None]
    assert points.min() > 0 and points.max() < 192
    assert np.linalg.norm(points[:, 263] - points[:, 33], axis=1) == pytest.approx(unit, rel=0.05)
    assert outputs[0, 936] == pytest.approx(1, abs=0.15)  # the flag's logit over its own value here
    changed = outputs.copy()
    changed[:, 936] += 1
    np.testing.assert_array_equal(face.error(changed, outputs), [0, 0])  # the metric looks at landmarks only
