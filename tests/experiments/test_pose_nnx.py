"""The pose model as an NNX module: the same layers, numbers, scores and assignment as in linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.lib import assets, metrics
from experiments.models.tflite_import import ACTIVATIONS, LAYERS, compute, load_tflite
from experiments.problems import data
from mpjax import compiled, evaluation, search, sensitivity
from mpjax.apply import apply
from mpjax.program import from_linen, from_nnx, with_output

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("relaxed_promotion")]

FORMAT, TOLERANCE = "bfloat16", 0.1


class PReLU(nnx.Module):
    def __init__(self, slope):
        self.slope = nnx.Param(slope)

    def __call__(self, x):
        return jnp.where(x >= 0, x, self.slope[...].reshape(1, 1, 1, -1) * x)


class Twin(nnx.Module):
    """The operators of a graph, with the weights of its linen module."""

    def __init__(self, graph, params):
        self.graph = graph
        for op in graph.ops:
            if op.kind == "PRELU":
                setattr(self, op.name, PReLU(params[op.name]["slope"]))
            elif op.kind in LAYERS:
                setattr(self, op.name, self.layer(dict(op.settings), params[op.name]))

    @staticmethod
    def layer(settings, params):
        features, inputs = settings.pop("features"), params["kernel"].shape[-2] * settings["feature_group_count"]
        layer = nnx.Conv(inputs, features, **settings, rngs=nnx.Rngs(0))
        for name, value in params.items():
            getattr(layer, name)[...] = value
        return layer

    def __call__(self, x):
        values = {self.graph.input: x}
        for op in self.graph.ops:
            inputs = [values[index] for index in op.inputs]
            layer = getattr(self, op.name, None)
            values[op.output] = ACTIVATIONS[op.activation](layer(*inputs) if layer else compute(op, inputs))
        return {name: values[index] for name, index in self.graph.outputs}


@pytest.fixture(scope="module")
def crops():
    try:
        path, calibration = assets.fetch("pose_landmark_full"), data.pose_crops().calibration
    except assets.RegistryUnreachable as error:
        pytest.skip(f"no package registry: {error}")
    images = [(jnp.asarray(calibration.images[i : i + 2]),) for i in (0, 10)]
    return path, images


def drift(low, exact):
    """NME, as the pose experiment has it."""
    xy, truth = map(data.landmarks_xy, (low, exact))
    return metrics.nme(xy, truth, data.torso(truth))


def test_linen_and_nnx_agree_on_the_pose_model(crops):
    path, batches = crops
    imported = load_tflite(path, outputs=("Identity",))
    linen = from_linen(imported.module, imported.variables, *batches[0])
    twin = Twin(imported.module.graph, imported.variables["params"])
    other = from_nnx(twin, *batches[0])
    assert linen.names == other.names == imported.layers and len(linen.names) == 72
    for one, two in zip(linen.layers, other.layers, strict=True):
        assert (one.kernel, one.kind, one.kernel_shape, one.flops) == (
            two.kernel,
            two.kind,
            two.kernel_shape,
            two.flops,
        )
    results = []
    for model in (linen, other):
        landmarks = with_output(model, lambda outputs: outputs["Identity"])
        scores = sensitivity.local_rounding(num_probes=2)(landmarks, batches, (FORMAT,), jax.random.key(0))
        evaluate = evaluation.Evaluation(landmarks, batches, (FORMAT,), drift)
        everything = evaluate(search.Assignment.uniform(model.names, FORMAT)).value
        problem = search.Problem(layers=model.names, formats=(FORMAT,), penalty=scores.value)
        result = search.solve(problem, search.binary(), evaluate=evaluate, tolerance=TOLERANCE * everything)
        program = compiled.compile(apply(landmarks, result.assignment), batches)
        results.append((scores.value, result.assignment, everything, program(*batches[1])))
    (scores, assignment, everything, outputs), (scores_2, assignment_2, everything_2, outputs_2) = results
    np.testing.assert_allclose(scores, scores_2, rtol=1e-5)
    assert assignment == assignment_2 and 0 < len(assignment.lowered) < 72
    assert everything == pytest.approx(everything_2, rel=1e-5)
    np.testing.assert_array_equal(outputs, outputs_2)
