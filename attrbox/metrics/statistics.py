"""What can be said of a method from the scores of some samples: means, intervals, paired tests.

Samples that are left out are NaN. Nothing here assumes normal scores.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array: TypeAlias = NDArray[np.floating[Any]]

RESAMPLES = 2000
# Indices that are drawn at once: bounds the memory of the bootstrap.
_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Paired:
    """Two methods on the same samples (Wilcoxon's signed-rank test).

    Attributes:
        first, second: labels.
        samples: that both have a score of.
        difference: mean of first - second.
        p: two-sided; 1 if the scores are all equal, NaN without samples.
        adjusted: the same after Holm's correction for all pairs that were tested.
    """

    first: str
    second: str
    samples: int
    difference: float
    p: float
    adjusted: float


def grouped_mean(values: Array, groups: NDArray[np.integer[Any]] | None = None) -> float:
    """The mean of the values that are not NaN; with groups, the mean over the groups of their means."""
    defined = ~np.isnan(values)
    if not defined.any():
        return math.nan
    if groups is None:
        return float(values[defined].mean())
    _, members = np.unique(groups[defined], return_inverse=True)
    return float((np.bincount(members, values[defined]) / np.bincount(members)).mean())


def bootstrap_interval(
    values: Array,
    groups: NDArray[np.integer[Any]] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    n_samples: int = RESAMPLES,
) -> tuple[float, float]:
    """The percentile interval of `grouped_mean` over samples drawn with replacement (Efron 1979).

    With groups, samples are drawn within their group, so that no group is ever empty.
    """
    defined = ~np.isnan(values)
    if not defined.any():
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    values = values[defined].astype(np.float64)
    parts = [values] if groups is None else [values[groups[defined] == group] for group in np.unique(groups[defined])]
    means = np.mean([_resampled_means(part, generator, n_samples) for part in parts], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(values: Array, generator: np.random.Generator, n_samples: int) -> Array:
    step = max(1, _AT_ONCE // len(values))
    sizes = [min(step, n_samples - start) for start in range(0, n_samples, step)]
    return np.concatenate([values[generator.integers(len(values), size=(s, len(values)))].mean(1) for s in sizes])


def paired_tests(scores: Mapping[str, Array]) -> list[Paired]:
    """All pairs of methods, with Holm's correction over the pairs."""
    labels = list(scores)
    pairs = [(a, b) for i, a in enumerate(labels) for b in labels[i + 1 :]]
    tested = [_wilcoxon(scores[a], scores[b]) for a, b in pairs]
    adjusted = holm([p for _, _, p in tested])
    return [
        Paired(a, b, samples, difference, p, q)
        for (a, b), (samples, difference, p), q in zip(pairs, tested, adjusted, strict=True)
    ]


def _wilcoxon(first: Array, second: Array) -> tuple[int, float, float]:
    """Samples, mean difference and p."""
    both = ~(np.isnan(first) | np.isnan(second))
    differences = first[both].astype(np.float64) - second[both]
    if not len(differences):
        return 0, math.nan, math.nan
    if not differences.any():
        return len(differences), 0.0, 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties and few samples: scipy then takes the normal approximation
        p = float(stats.wilcoxon(differences).pvalue)
    return len(differences), float(differences.mean()), p


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down procedure (Holm 1979); NaN stays and does not count."""
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=lambda i: values[i])
    adjusted, largest = list(values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * values[index]))
        adjusted[index] = largest
    return adjusted
