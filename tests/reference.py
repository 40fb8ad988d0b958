"""Slow, obvious oracles in float64 NumPy. Nothing of mpjax or jax is used here."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def finite_difference_hessian(loss: Callable[[Floats], float], x: Floats, step: float = 1e-4) -> Floats:
    """(n, n) by second central differences; error about step² and 1e-16 / step²."""
    n = len(x)
    eye = step * np.eye(n)
    hessian = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            a = loss(x + eye[i] + eye[j]) - loss(x + eye[i] - eye[j])
            b = loss(x - eye[i] + eye[j]) - loss(x - eye[i] - eye[j])
            hessian[i, j] = (a - b) / (4 * step**2)
    return hessian


def linear_regression_hessian(x: Floats) -> Floats:
    """Of ½‖Xw - y‖²: XᵀX."""
    return x.T @ x


def logistic_regression_hessian(x: Floats, w: Floats) -> Floats:
    """Of Σ log(1 + exp(xᵢᵀw)) - yᵢ xᵢᵀw: Xᵀ diag(p (1 - p)) X."""
    p = 1 / (1 + np.exp(-x @ w))
    return x.T @ np.diag(p * (1 - p)) @ x


def symmetric_with_eigenvalues(eigenvalues: Floats, seed: int) -> Floats:
    """A dense symmetric matrix with this spectrum, in a random basis."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return basis @ np.diag(eigenvalues) @ basis.T


def quadratic_forms(matrix: Floats, function: Callable[[Floats], Floats], vectors: Floats) -> Floats:
    """(m,) vᵀ f(A) v of the rows of `vectors`, A symmetric, f applied to its eigenvalues."""
    eigenvalues, basis = np.linalg.eigh(matrix)
    return ((vectors @ basis) ** 2) @ function(eigenvalues)
