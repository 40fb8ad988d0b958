"""Each layer's own rounding error, carried to the output."""

from dataclasses import replace

from mpjax.arithmetic import Calibration
from mpjax.losses import OUTPUT, Loss
from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.taps import mean_over_probes, tap_ledger, tap_samples
from mpjax.sensitivity.task import ModelTask, check_probes, exactly, scorer_of


def local_rounding(
    *, num_probes: int | None = 4, loss: Loss = OUTPUT, calibration: Calibration | None = None
) -> Scorer:
    """Each layer's own rounding error, carried to the output by vector-Jacobian products: all layers and formats at once.

    Let δa be the layer in low precision on its float32 input minus the layer in float32 (weights, inputs and accumulation
    together), H the Hessian of the loss with respect to the outputs, and u random with E[u uᵀ] = H (signs, for the output
    loss); then s = uᵀ (∂f/∂a) δa has E[s²] = (J δa)ᵀ H (J δa), twice the predicted loss. First order in δa, exact in everything
    else.

    Cost: `num_probes` vector-Jacobian products per example, whatever the number of layers or formats; the local errors cost
    about one more forward pass per format. Memory: the activations of one batch, `num_probes` times for the cotangents, and one
    layer's local errors at a time.

    Source: the Gauss-Newton form of ½ δᵀHδ (Martens, arXiv 1412.1193) with sign probes (Hutchinson 1990,
    doi 10.1080/03610919008812866), taken at the layers' outputs instead of their weights.

    Args:
        num_probes: random vectors per example; None takes all rows of H^½, which makes the score exact.
        loss: one that knows its `cotangents`, unless num_probes is None.
        calibration: activation ranges for scaled formats; None: measured on the batches where they are needed.
    """
    check_probes(num_probes, loss, "local_rounding")

    def estimate(task: ModelTask) -> Scores:
        squares = (samples**2 / 2.0 for samples in tap_samples(task, num_probes, task.ranges(calibration)))
        value, stderr = mean_over_probes(task, squares, num_probes)
        estimate = replace(exactly(value, tap_ledger(task, num_probes)), stderr=stderr)
        name = f"local_rounding[{'exact' if num_probes is None else num_probes}]"
        return task.scores(name, estimate, kind="loss", overflowed=task.overflows(value))

    return scorer_of(estimate, loss, weights_only=False)
