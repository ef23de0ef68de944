"""Whether a map predicts what perturbations do: infidelity, sensitivity-n, completeness.

A perturbation changes all channels of a pixel alike, so a map counts by the sum of its channels, and maps with and
without channels meet the same perturbations. Removed pixels show what the map was made against, its own baseline: a map
says what happens when the image becomes that one, and nothing of another. The passes through the model serve all
methods of one baseline.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attrbox.core.options import identity, option
from attrbox.core.validation import check, check_baseline, check_choice, check_count, check_flag
from attrbox.errors import InputError
from attrbox.metrics.base import Measurement, Metric, register_metric
from attrbox.metrics.context import Study
from attrbox.metrics.records import Maps, Recipe, Views
from attrbox.metrics.robustness.similarity import pearson
from attrbox.metrics.sources import Source

LOST = "of the map's channels only the largest are kept, which do not add up"
# The first draws of each sample's random numbers for perturbations.
_DRAWS = 2**42


@dataclass(frozen=True, kw_only=True)
class Perturbing(Metric):
    """Some random perturbations of each image; subclasses say which, and what follows from the change of the score."""

    baseline: float | Tensor | None = option(
        None, "what removed pixels show, a number or a tensor; None: each map's own baseline, or 0 if it has none"
    )

    needs = frozenset({"model"})

    def __post_init__(self) -> None:
        if self.baseline is not None:
            check_baseline(self.baseline)

    @property
    def removes(self) -> bool:
        """Whether perturbed pixels are removed, so that a baseline matters."""
        return True

    def baselines(self, study: Study) -> dict[str, float | Tensor]:
        """What removed pixels show, for the maps of each label: a number, or [1 or n, C, H, W]."""

        def of(maps: Maps) -> float | Tensor:
            if not self.removes:
                return 0.0
            if isinstance(self.baseline, Tensor):
                return study.as_baseline(self.baseline)
            own = study.baseline_of(maps) if self.baseline is None else self.baseline
            return 0.0 if own is None else own

        return study.once(
            ("baselines", identity(self.baseline), self.removes),
            lambda: {label: of(maps) for label, maps in study.maps.items()},
        )

    def note(self, study: Study, maps: Maps) -> str:
        """What is to be said of a score on these maps."""
        if study.lost_channels(maps):
            return LOST
        if self.baseline is None and self.removes and maps.explainer is None:
            return "nobody knows against which baseline the maps were made, so removed pixels show 0; give baseline="
        if self.baseline is None and self.removes and isinstance(maps.explainer, Recipe):
            fill = maps.explainer.baseline
            if isinstance(fill, str) and study.baseline_of(maps) is None:
                return f"the maps were made with the fill {fill!r}, but removed pixels show 0; give baseline="
        return ""

    @abstractmethod
    def count(self, study: Study) -> int:
        """How many perturbations."""

    @abstractmethod
    def weights(self, study: Study, draw: int) -> Tensor:
        """How far perturbation `draw` changes each pixel, [n, H, W]; the same each time it is asked."""

    def perturbed(self, images: Tensor, weights: Tensor, baseline: float | Tensor) -> Tensor:
        """Images [m, C, H, W] perturbed by weights [m, 1, H, W] of 0 and 1: the pixels of weight 1 are removed."""
        return torch.where(weights != 0, baseline, images)

    def views(self, study: Study) -> Sequence[Views]:
        n, device = len(study), study.images.device
        rows = torch.arange(n, device=device).repeat(self.count(study))  # draw by draw, all images of each

        def maker(baseline: float | Tensor) -> Callable[[slice], Tensor]:
            def make(part: slice) -> Tensor:
                made = []
                for draw in range(part.start // n, (part.stop - 1) // n + 1):
                    here = rows[max(part.start, draw * n) : min(part.stop, (draw + 1) * n)]
                    weights = self.weights(study, draw)[here]
                    weights = weights if study.images.dim() == 2 else weights[:, None]
                    shown = baseline[here] if isinstance(baseline, Tensor) and len(baseline) > 1 else baseline
                    made.append(self.perturbed(study.images[here], weights, shown))
                return torch.cat(made)

            return make

        return [Views(rows, maker(baseline)) for baseline in _distinct(self.baselines(study)).values()]

    def drops(self, study: Study, outputs: Sequence[Tensor]) -> Tensor:
        """f(X) - f(perturbed X) for each map's own baseline, [labels, n, draws]."""
        baselines = self.baselines(study)
        scores = dict(zip(_distinct(baselines), outputs, strict=True))
        changed = torch.stack([scores[identity(one)].view(-1, len(study)).T for one in baselines.values()])
        return study.original()[:, None] - changed

    def predicted(self, study: Study) -> Tensor:
        """What each map says of it: the sum of weights x map, [labels, n, draws]; NaN where it cannot be told."""
        known = [
            torch.full_like(maps.pixels, torch.nan) if study.lost_channels(maps) else maps.pixels
            for maps in study.maps.values()
        ]
        maps = torch.stack([pixels.flatten(1) for pixels in known])
        sums = [(maps * self.weights(study, draw).flatten(1)).sum(-1) for draw in range(self.count(study))]
        return torch.stack(sums, -1)


@register_metric(
    "infidelity",
    summary="Mean squared error with which the map predicts the effect of perturbations",
    reference="Yeh et al. 2019",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class Infidelity(Perturbing):
    """E[(b I.A - (f(X) - f(X - I)))^2],     b = E[(f(X) - f(X - I)) I.A] / E[(I.A)^2]

    Squares take pixels away: I.A is then the sum of the map over the square, which suits maps that are contributions to
    the score, such as input x gradient. Gaussian noise I suits gradients. The factor b is the optimal scale of the
    sample's map.
    """

    perturbation: str = option("square", "square (one of a random size at a random place) or gaussian (noise)")
    n_samples: int = option(50, "perturbations per image", formerly="draws")
    max_side: int = option(10, "squares have a side of 1 to so many pixels", formerly="largest")
    std: float = option(0.2, "standard deviation of the noise, in units of the images", formerly="deviation")
    scale: bool = option(True, "multiply the map by the optimal factor first")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("perturbation", self.perturbation, ("square", "gaussian"))
        check_count("n_samples", self.n_samples)
        check_count("max_side", self.max_side)
        check(0 < self.std < float("inf"), "std", "a positive number", self.std)
        check_flag("scale", self.scale)

    def count(self, study: Study) -> int:
        return self.n_samples

    def weights(self, study: Study, draw: int) -> Tensor:
        if self.perturbation == "gaussian":
            return self.std * study.samples.numbers(_DRAWS + draw, study.shape)
        numbers = study.samples.numbers(_DRAWS + draw, (1 + len(study.shape),), uniform=True)
        inside = torch.ones((1,) * (1 + len(study.shape)), dtype=torch.bool, device=numbers.device)
        for axis, length in enumerate(study.shape):
            most = min(self.max_side, *study.shape)
            side = 1 + (numbers[:, 0] * most).long().clamp_max(most - 1)
            start = (numbers[:, 1 + axis] * (length - side + 1)).long()
            place = torch.arange(length, device=numbers.device)
            here = (place >= start[:, None]) & (place < (start + side)[:, None])
            inside = inside & here.view(-1, *(length if k == axis else 1 for k in range(len(study.shape))))
        return inside.to(study.images.dtype)

    @property
    def removes(self) -> bool:
        return self.perturbation == "square"

    def perturbed(self, images: Tensor, weights: Tensor, baseline: float | Tensor) -> Tensor:
        return super().perturbed(images, weights, baseline) if self.removes else images - weights

    def measure(self, study: Study, outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        drops, predicted = self.drops(study, outputs), self.predicted(study)
        if self.scale:
            squares = (predicted**2).mean(-1, keepdim=True)
            factor = (drops * predicted).mean(-1, keepdim=True) / torch.where(squares > 0, squares, 1.0)
            predicted = factor * predicted
        errors = ((predicted - drops) ** 2).mean(-1)
        return {
            label: Measurement(errors[index], note=self.note(study, maps))
            for index, (label, maps) in enumerate(study.maps.items())
        }


@register_metric(
    "sensitivity_n",
    summary="Correlation of the map's sum over n random pixels with the drop of the score when these are removed",
    reference="Ancona et al. 2018",
)
@dataclass(frozen=True, kw_only=True)
class SensitivityN(Perturbing):
    """A curve over n; its value is the mean over those n at which both vary at all."""

    fractions: tuple[float, ...] = option(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "n as shares of the pixels", formerly="shares"
    )
    n_samples: int = option(100, "random sets of pixels for each n", formerly="subsets")

    axis = "share of pixels in the set"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "fractions", tuple(self.fractions))
        rising = all(a < b for a, b in zip((0.0, *self.fractions), self.fractions, strict=False))
        valid = bool(self.fractions) and rising and self.fractions[-1] < 1
        check(valid, "fractions", "rising numbers between 0 and 1", self.fractions)
        check_count("n_samples", self.n_samples)
        check(self.n_samples > 1, "n_samples", "at least 2, as one has no correlation", self.n_samples)

    def count(self, study: Study) -> int:
        return len(self.fractions) * self.n_samples

    def weights(self, study: Study, draw: int) -> Tensor:
        size = max(1, round(self.fractions[draw // self.n_samples] * study.pixels))
        chosen = study.samples.permutations(_DRAWS + draw, study.pixels)[:, :size]
        weights = study.images.new_zeros(len(chosen), study.pixels).scatter_(1, chosen, 1.0)
        return weights.view(-1, *study.shape)

    def measure(self, study: Study, outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        sets = (len(study), len(self.fractions), self.n_samples)
        drops = self.drops(study, outputs).reshape(-1, *sets)
        curves = pearson(self.predicted(study).view(-1, *sets), drops).to(study.images.dtype)
        fractions = study.images.new_tensor(self.fractions)
        return {
            label: Measurement(curves[index].nanmean(-1), curves[index], fractions, note=self.note(study, maps))
            for index, (label, maps) in enumerate(study.maps.items())
        }


@register_metric(
    "completeness",
    summary="How far the map is from summing to what its method promises, relatively",
    reference="Sundararajan et al. 2017",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class Completeness(Perturbing):
    """|sum A - d| / |d|: d is f(X) - f(X'), X' the map's own baseline, or f(X) where a method shares out the score.

    With a baseline, d is f(X) - f(X') for all maps, whatever they promise. Not defined where d is 0, nor without a
    baseline for a method that promises no sum.
    """

    baseline: float | Tensor | None = option(None, "X', a number or a tensor; None: what each method promises")

    def check(self, sources: Mapping[str, Source]) -> None:
        unknown = [name for name, one in sources.items() if one.explainer is None and one.expected is None]
        if unknown and self.baseline is None:
            raise InputError(
                f"The metric 'completeness' compares with what a method promises, but nobody knows how the maps of "
                f"{', '.join(unknown)} were made. Pass a Comparison, evaluate(..., explainers={{name: method}}), or a "
                "baseline: ('completeness', {'baseline': 0.0})."
            )

    def count(self, study: Study) -> int:
        return 1

    def weights(self, study: Study, draw: int) -> Tensor:
        return study.images.new_ones(len(study), *study.shape)

    def views(self, study: Study) -> Sequence[Views]:
        return () if self.baseline is None else super().views(study)

    def measure(self, study: Study, outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        unknown = torch.full((len(study),), torch.nan, dtype=study.images.dtype, device=study.images.device)
        drops = None if self.baseline is None else self.drops(study, outputs)[..., 0]
        found = {}
        for index, (label, maps) in enumerate(study.maps.items()):
            promised = study.promised(maps) if drops is None else drops[index]
            if promised is None:
                found[label] = Measurement(
                    unknown, note="its method promises no sum; give baseline= to compare with one"
                )
            elif study.lost_channels(maps):
                found[label] = Measurement(unknown, note=LOST)
            else:
                gaps = maps.pixels.flatten(1).sum(1) - promised
                found[label] = Measurement(gaps.abs() / torch.where(promised != 0, promised.abs(), torch.nan))
        return found


def _distinct(baselines: Mapping[str, float | Tensor]) -> dict[object, float | Tensor]:
    """The different ones; a number and the same tensor are one."""
    return {identity(baseline): baseline for baseline in baselines.values()}
