"""The torch side of experiments/peers_curvature: the same networks, and PyHessian and curvlinops as their users call them.

Importing this module needs torch, pyhessian and curvlinops (`pip install 'mpjax[peers]'`); nothing else in the project does.
torch works in its default memory layout and its default (eager) mode.

What was seen of the peers (PyHessian 0.1, curvlinops 3.0.1, torch 2.13):

- PyHessian knows the trace of the whole model only: per layer means one `hessian` object per layer, all other parameters
  frozen. `trace` stops as soon as two running means agree to `tol` or the running mean is negative, so a given number of
  probes is only certain with `tol=-inf`.
- curvlinops differentiates forward over reverse (`jvp` of `jacrev`). Through torch's own LayerNorm that derivative is silently
  wrong with respect to the scale, in float64, too (`jvp` of `grad` is right), so it gets a LayerNorm that is written out.
"""

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch  # type: ignore[import-not-found, unused-ignore]
from curvlinops import (  # type: ignore[import-not-found, unused-ignore]
    HessianLinearOperator,
    hutchinson_diag,
    hutchinson_trace,
    hutchpp_trace,
    xtrace,
)
from pyhessian import hessian  # type: ignore[import-not-found, unused-ignore]
from pyhessian.utils import hessian_vector_product  # type: ignore[import-not-found, unused-ignore]

Tree = Mapping[str, Mapping[str, np.ndarray]]  # layer -> leaf name -> values, in Flax's names and layout
Tensors = Sequence[Any]  # one tensor per parameter, in the order of `Twin.parameters`

warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True", category=UserWarning)


def gelu(x: Any) -> Any:
    """GELU in its tanh form, which is Flax's default."""
    return torch.nn.functional.gelu(x, approximate="tanh")


class Cnn(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """The twin of `peers_curvature.Cnn`, on inputs (N, C, H, W)."""

    def __init__(self, spec: Any, inputs: int) -> None:
        super().__init__()

        def conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> Any:
            return torch.nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups)

        self.layers = torch.nn.ModuleDict()
        self.layers["stem"] = conv(inputs, spec.stem, 3, 2)
        self.layers["conv"] = conv(spec.stem, spec.width, 3)
        before = spec.width
        self.residual = []
        for i, (after, stride) in enumerate(spec.blocks):
            wide = spec.expansion * before
            self.layers[f"expand{i}"] = conv(before, wide, 1)
            self.layers[f"depthwise{i}"] = conv(wide, wide, 3, stride, wide)
            self.layers[f"project{i}"] = conv(wide, after, 1)
            self.residual.append(after == before and stride == 1)
            before = after
        self.layers["last"] = conv(before, spec.last, 1)
        self.layers["head"] = torch.nn.Linear(spec.last, spec.classes)

    def forward(self, x: Any) -> Any:
        layer = self.layers
        x = gelu(layer["conv"](gelu(layer["stem"](x))))
        for i, residual in enumerate(self.residual):
            y = gelu(layer[f"depthwise{i}"](gelu(layer[f"expand{i}"](x))))
            y = layer[f"project{i}"](y)
            x = x + y if residual else y
        return layer["head"](gelu(layer["last"](x)).mean((2, 3)))


class Norm(torch.nn.LayerNorm):  # type: ignore[misc, unused-ignore]
    """LayerNorm as Flax has it; torch's own, or written out."""

    written_out = False

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Any) -> Any:
        if not self.written_out:
            return super().forward(x)
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class Mlp(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """The twin of `peers_curvature.Mlp`, on inputs (N, D)."""

    def __init__(self, spec: Any, inputs: int) -> None:
        super().__init__()
        self.blocks = spec.blocks
        self.layers = torch.nn.ModuleDict()
        self.layers["embed"] = torch.nn.Linear(inputs, spec.width)
        for i in range(spec.blocks):
            self.layers[f"norm{i}"] = Norm(spec.width)
            self.layers[f"up{i}"] = torch.nn.Linear(spec.width, 4 * spec.width)
            self.layers[f"down{i}"] = torch.nn.Linear(4 * spec.width, spec.width)
        self.layers["norm"] = Norm(spec.width)
        self.layers["head"] = torch.nn.Linear(spec.width, spec.classes)

    def forward(self, x: Any) -> Any:
        layer = self.layers
        x = layer["embed"](x)
        for i in range(self.blocks):
            y = gelu(layer[f"up{i}"](layer[f"norm{i}"](x)))
            x = x + layer[f"down{i}"](y)
        return layer["head"](layer["norm"](x))


def _to_torch(values: np.ndarray) -> np.ndarray:
    """Flax's layout to torch's: (H, W, I, O) to (O, I, H, W), (I, O) to (O, I); vectors stay."""
    return np.ascontiguousarray(np.transpose(values, (3, 2, 0, 1)) if values.ndim == 4 else values.T)


def _to_flax(values: np.ndarray) -> np.ndarray:
    return np.transpose(values, (2, 3, 1, 0)) if values.ndim == 4 else values.T


class Twin:
    """A network with given weights and one batch in torch, with a mean cross-entropy.

    Args:
        spec: the Flax module.
        params: its parameters as NumPy arrays, layer -> {"kernel" or "scale", "bias"}.
        inputs: (N, H, W, C) or (N, D), as the Flax module takes them.
        labels: (N,) classes.
        layers: names of the layers whose traces are asked for.

    Raises:
        ValueError: a parameter without its like in torch, or of another shape.
    """

    def __init__(self, spec: Any, params: Tree, inputs: np.ndarray, labels: np.ndarray, layers: Sequence[str]) -> None:
        kinds: dict[str, Any] = {"Cnn": Cnn, "Mlp": Mlp}
        self.model = kinds[type(spec).__name__](spec, inputs.shape[-1])
        self.model.to(getattr(torch, str(inputs.dtype)))
        self.names = {  # (layer, Flax's name) -> parameter
            (name, leaf): getattr(module, "bias" if leaf == "bias" else "weight")
            for name, module in self.model.layers.items()
            for leaf in params[name]
        }
        if len(self.names) != sum(1 for _ in self.model.parameters()):
            raise ValueError(f"The torch network has other parameters than {sorted(params)}.")
        with torch.no_grad():
            for (name, leaf), parameter in self.names.items():
                values = _to_torch(np.asarray(params[name][leaf]))
                if tuple(parameter.shape) != values.shape:
                    raise ValueError(f"{name}/{leaf}: {values.shape} does not fit torch's {tuple(parameter.shape)}.")
                parameter.copy_(torch.tensor(values))
        self.parameters = list(self.model.parameters())
        self.written_out = copy.deepcopy(self.model)  # for curvlinops, see above
        for module in self.written_out.modules():
            if isinstance(module, Norm):
                module.written_out = True
        x = np.transpose(inputs, (0, 3, 1, 2)) if inputs.ndim == 4 else inputs
        self.batch = (torch.tensor(np.ascontiguousarray(x)), torch.tensor(np.asarray(labels, np.int64)))
        self.criterion = torch.nn.CrossEntropyLoss()
        self.layers = tuple(layers)

    # ---- passes

    def loss(self) -> Any:
        """The mean cross-entropy of the batch."""
        return self.criterion(self.model(self.batch[0]), self.batch[1])

    def logits(self) -> np.ndarray:
        """(N, classes)."""
        with torch.no_grad():
            return self.model(self.batch[0]).numpy()

    def gradient(self) -> Tensors:
        """Gradient of the loss."""
        return torch.autograd.grad(self.loss(), self.parameters)

    def tensors(self, tree: Tree) -> Tensors:
        """A tree in Flax's layout as tensors, in the order of the parameters."""
        by_id = {
            id(parameter): torch.tensor(_to_torch(np.asarray(tree[name][leaf])))
            for (name, leaf), parameter in self.names.items()
        }
        return [by_id[id(parameter)] for parameter in self.parameters]

    def tree(self, tensors: Tensors) -> dict[str, dict[str, np.ndarray]]:
        """The inverse of `tensors`."""
        by_id = dict(zip(map(id, self.parameters), tensors, strict=True))
        values: dict[str, dict[str, np.ndarray]] = {}
        for (name, leaf), parameter in self.names.items():
            values.setdefault(name, {})[leaf] = _to_flax(by_id[id(parameter)].detach().numpy())
        return values

    @contextmanager
    def only(self, layer: str) -> Iterator[list[Any]]:
        """Within it only that layer's parameters are differentiated."""
        chosen = list(self.model.layers[layer].parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(any(parameter is other for other in chosen))
        try:
            yield chosen
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(True)

    # ---- PyHessian

    def pyhessian(self) -> Any:
        """PyHessian's object: one gradient with its graph, of the parameters that are not frozen."""
        self.model.zero_grad()  # the constructor adds to gradients that are there
        return hessian(self.model, self.criterion, data=self.batch, cuda=False)

    def pyhessian_hvp(self, vector: Tensors, graph: Any = None) -> Tensors:
        """One Hessian-vector product, with the gradient and its graph unless an object that has them is given."""
        graph = graph or self.pyhessian()
        return hessian_vector_product(graph.gradsH, graph.params, vector)

    def pyhessian_trace(self, probes: int) -> np.ndarray:
        """Samples of the whole model's trace, one per probe."""
        return np.asarray(self.pyhessian().trace(maxIter=probes, tol=float("-inf")))

    def pyhessian_layer_traces(self, probes: int) -> tuple[np.ndarray, float]:
        """(K, L) samples of each layer's trace, one call per layer; and the seconds that the L constructors took."""
        columns, setup = [], 0.0
        for layer in self.layers:
            with self.only(layer):
                start = time.perf_counter()
                matrix = self.pyhessian()
                setup += time.perf_counter() - start
                columns.append(matrix.trace(maxIter=probes, tol=float("-inf")))
        return np.asarray(columns).T, setup

    def pyhessian_top_eigenvalue(self, iterations: int, tolerance: float) -> tuple[float, int]:
        """Top eigenvalue by power iteration, and the number of products it took."""
        matrix = self.pyhessian()
        products = 0
        plain = self.model.zero_grad

        def counted(*args: Any, **kwargs: Any) -> None:  # PyHessian calls it once per product
            nonlocal products
            products += 1
            plain(*args, **kwargs)

        self.model.zero_grad = counted
        try:
            values, _ = matrix.eigenvalues(maxIter=iterations, tol=tolerance, top_n=1)
        finally:
            del self.model.zero_grad
        return float(values[0]), products

    # ---- curvlinops

    def operator(self, layers: Sequence[str] | None = None) -> Any:
        """The Hessian of these layers' parameters (None: of all), without the constructor's own determinism check."""
        model = self.written_out
        groups = [model] if layers is None else [model.layers[layer] for layer in layers]
        parameters = [parameter for group in groups for parameter in group.parameters()]
        return HessianLinearOperator(model, self.criterion, parameters, [self.batch], check_deterministic=False)

    def curvlinops_trace(self, method: str, probes: int) -> float:
        """The whole model's trace: "hutchinson", "hutch++" or "xtrace", with that many products."""
        estimators = {"hutchinson": hutchinson_trace, "hutch++": hutchpp_trace, "xtrace": xtrace}
        return float(estimators[method](self.operator(), probes))

    def curvlinops_layer_traces(self, probes: int) -> np.ndarray:
        """(L,) traces, one operator per layer and all of its probes at once, as `hutchinson_trace` takes them."""
        return np.asarray([float(hutchinson_trace(self.operator([layer]), probes)) for layer in self.layers])

    def curvlinops_joint_traces(self, probes: int) -> np.ndarray:
        """(L,) traces from joint probes: the `hutchinson_diag` of all layers' Hessian, summed per layer."""
        sizes = [sum(p.numel() for p in self.model.layers[layer].parameters()) for layer in self.layers]
        parts = hutchinson_diag(self.operator(self.layers), probes).split(sizes)
        return np.asarray([float(part.sum()) for part in parts])

    def curvlinops_top_eigenvalue(self, tolerance: float) -> tuple[float, int]:
        """Top eigenvalue by SciPy's `eigsh` on the exported operator, and the number of products it took."""
        exported = self.operator().to_scipy(dtype=np.dtype(str(self.batch[0].dtype).removeprefix("torch.")))
        products = 0

        def matvec(x: np.ndarray) -> np.ndarray:
            nonlocal products
            products += 1
            return exported.matvec(x)

        counted = scipy.sparse.linalg.LinearOperator(exported.shape, matvec=matvec, dtype=exported.dtype)
        start = torch.randn(exported.shape[0]).numpy()
        values = scipy.sparse.linalg.eigsh(counted, k=1, which="LM", tol=tolerance, v0=start, return_eigenvectors=False)
        return float(values[0]), products


def versions() -> dict[str, str]:
    """Versions of what the peers are made of."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "pyhessian", "curvlinops-for-pytorch")}


def seed(number: int) -> None:
    """Seeds torch's global generator, which both peers draw from."""
    torch.manual_seed(number)


def use_threads(count: int) -> None:
    """How many threads torch's operations take."""
    torch.set_num_threads(count)
