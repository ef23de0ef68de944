"""Nodes and weights for integrals over [0, 1]."""

from collections.abc import Callable
from typing import Any

import numpy as np


def _midpoint(steps: int) -> tuple[Any, Any]:
    return (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)


def _gauss_legendre(steps: int) -> tuple[Any, Any]:
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return (nodes + 1) / 2, weights / 2


def _right(steps: int) -> tuple[Any, Any]:
    return np.arange(1, steps + 1) / steps, np.full(steps, 1 / steps)


def _trapezoid(steps: int) -> tuple[Any, Any]:
    if steps == 1:
        return _midpoint(1)
    weights = np.full(steps, 1 / (steps - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, steps), weights


# Nodes and weights on [0, 1]; the weights of each sum to 1.
quadratures: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "midpoint": _midpoint,
    "gauss_legendre": _gauss_legendre,
    "right": _right,
    "trapezoid": _trapezoid,
}
