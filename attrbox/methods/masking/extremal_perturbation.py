"""sMask: extremal perturbations (Fong, Patrick and Vedaldi, ICCV 2019).

For each area a, the mask m that maximises the score, among smooth masks that cover a share a of the image:

    max_m  reward(m) - w_t mean((sort(m) - r_a)^2),      w_t = 300 * 1.0035^t

    preserve   f(m (x) X)                  the smallest part that the model needs
    delete     -f((1 - m) (x) X)           the smallest part without which it fails
    dual       f(m (x) X) - f((1 - m) (x) X)

m (x) X shows X where m is 1, and the most perturbed level of a pyramid of blurred (or faded) images where it is 0. r_a
is 0 for the smallest (1 - a) N values and 1 for the others. m is the smooth maximum of bumps on a coarse grid
(`attrbox.methods.masking.generators.SmoothMax`). Gradient ascent on the grid, with momentum, on images flipped at
every other iteration.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attrbox.core.fills import Pyramid, gaussian_blur
from attrbox.core.options import option
from attrbox.core.validation import check, check_choice, check_count, check_flag, check_number
from attrbox.methods.base import register_method
from attrbox.methods.context.run import Run
from attrbox.methods.masking.generators import SmoothMax, area_loss
from attrbox.methods.masking.optimization import Optimised, Problem, everyone


@register_method(
    "smask",
    summary="Smooth mask of a given area that keeps the score up (extremal perturbation)",
    reference="Fong et al., ICCV 2019",
    aliases=("extremal_perturbation", "EP"),
    units="share of the image that is shown (0 to 1), summed over the areas",
)
@dataclass(frozen=True, kw_only=True)
class SMask(Optimised):
    """The masks of all areas, added up, or the one of the best area; see the module.

    The best area is the smallest whose reward reaches the score s of the image up to `slack_fraction * |s|`; if none
    does, the one with the largest reward.

    Details: `masks` [n, K, A, 1, H, W], `areas` that they cover [n, K, A], `area_rewards` [n, K, A] of the final masks,
    `best` the index of the best area [n, K]; `loss` and `reward` [n, K, A, iterations], `iterations`, `failed`
    [n, K, A], `history` [n, K, A, S, h, w], the parameters along the way.
    """

    area_fractions: tuple[float, ...] = option(
        (0.1,), "shares of the image that the masks cover, each in (0, 1)", formerly="areas"
    )
    iterations: int = option(800, "steps of gradient ascent")
    variant: str = option("preserve", "game: preserve, delete or dual")
    combine: str = option("sum", "the map is the sum over the areas, or the mask of the best area: sum or best")
    slack_fraction: float = option(
        0.1, "what the best area may lack of the image's score, as a share of it", formerly="slack"
    )
    perturbation: str = option("blur", "what is shown where the mask is 0: blur or fade (to zero)")
    levels: int = option(8, "levels of the pyramid")
    blur: float = option(20.0, "standard deviation of the most blurred level, in pixels")
    step: int = option(7, "pixels per grid point of the mask")
    sigma: float = option(21.0, "size of a bump, in pixels")
    lr: float = option(0.01, "learning rate")
    momentum: float = option(0.9, "momentum, and its dampening")
    weight: float = option(300.0, "weight of the area at the start")
    growth: float = option(1.0035, "factor of that weight per iteration")
    jitter: bool = option(True, "flip the images left to right at every other iteration")
    smooth_fraction: float = option(
        0.0, "standard deviation of a Gaussian over the map, as a share of the shorter side", formerly="smooth"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        areas = self.area_fractions if isinstance(self.area_fractions, Sequence) else (self.area_fractions,)
        inside = [isinstance(area, float) and 0 < area < 1 for area in areas]
        check(
            bool(areas) and all(inside), "area_fractions", "shares of the image, each > 0 and < 1", self.area_fractions
        )
        object.__setattr__(self, "area_fractions", tuple(areas))
        check_choice("variant", self.variant, ("preserve", "delete", "dual"))
        check_choice("combine", self.combine, ("sum", "best"))
        check_choice("perturbation", self.perturbation, ("blur", "fade"))
        check_count("levels", self.levels)
        check(self.levels >= 2, "levels", "at least 2", self.levels)
        for name in ("blur", "sigma", "lr", "growth"):
            check_number(name, getattr(self, name), above=0)
        for name in ("weight", "smooth_fraction", "slack_fraction"):
            check_number(name, getattr(self, name), least=0)
        check_number("momentum", self.momentum, least=0, most=1)
        check_flag("jitter", self.jitter)

    @property
    def passes(self) -> int:
        return (self.iterations + 1) * len(self.area_fractions) * (2 if self.variant == "dual" else 1)

    @property
    def memory(self) -> float:
        return 2.0  # the pyramid, and masks of a few areas with their gradients

    def attribute(self, run: Run) -> Tensor:
        height, width = self.sides(run)
        problem = _Extremal(self, run)
        optimum = self.optimise(run, problem)
        shape = (len(run.images), run.scores.shape[1], len(self.area_fractions))
        whole = problem.masks(optimum.parameters)
        masks = problem.generator.cropped(whole).reshape(*shape, 1, height, width)
        rewards = problem.rewards(whole).reshape(shape)
        best = self.best(rewards, run.scores_in(problem.unit))
        run.tell(
            masks=masks,
            areas=whole.mean((1, 2)).reshape(shape),
            area_rewards=rewards,
            best=best,
            **optimum.details(shape),
        )
        if self.combine == "sum":
            values = masks.sum(2)
        else:
            values = masks.take_along_dim(best[:, :, None, None, None, None], 2).squeeze(2)
        return gaussian_blur(values, self.smooth_fraction * min(height, width), "zero")

    def best(self, rewards: Tensor, scores: Tensor) -> Tensor:
        """Index of the best area, [n, K], of rewards [n, K, A] and the images' scores [n, K]."""
        goal = (0 if self.variant == "delete" else scores) - self.slack_fraction * scores.abs()
        enough = rewards >= goal.unsqueeze(-1)
        sizes = rewards.new_tensor(self.area_fractions).expand(rewards.shape)
        smallest = sizes.masked_fill(~enough, torch.inf).argmin(-1)
        return torch.where(enough.any(-1), smallest, rewards.argmax(-1))


class _Extremal(Problem):
    """The masks of all images, targets and areas of a chunk."""

    def __init__(self, method: SMask, run: Run) -> None:
        images = run.images
        self.method, self.run = method, run
        self.targets, self.count = run.scores.shape[1], len(method.area_fractions)
        self.generator = SmoothMax(images.shape[-2:], method.step, method.sigma, images)
        self.pyramid = Pyramid.of(images, method.perturbation, method.levels, method.blur)
        self.rows, self.columns = everyone(len(images), self.targets, self.count, images)
        self.unit = run.settings.target.unit(method.score, "logit")

    def start(self) -> Tensor:
        return self.run.images.new_ones(len(self.rows), *self.generator.grid)

    def optimiser(self, leaf: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([leaf], self.method.lr, self.method.momentum, self.method.momentum)

    def masks(self, parameters: Tensor) -> Tensor:
        return self.generator.whole(parameters)

    def penalty(self, parameters: Tensor, masks: Tensor, step: int) -> Tensor:
        del parameters
        return self.method.weight * self.method.growth**step * area_loss(masks, self.method.area_fractions)

    def play(self, masks: Tensor, step: int) -> tuple[Tensor, Tensor]:
        reward, slope = self._reward(masks, self.method.jitter and step % 2 == 0, gradient=True)
        assert slope is not None
        whole = torch.zeros_like(masks)
        self.generator.cropped(whole).copy_(slope)
        return reward, whole

    def rewards(self, masks: Tensor) -> Tensor:
        """The rewards of whole masks, [m]."""
        return self._reward(masks, False, gradient=False)[0]

    def _reward(self, masks: Tensor, flip: bool, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The reward of each mask, [m], and its derivative with respect to the pixels of the cropped mask."""
        shown = self.generator.cropped(masks)
        games = {"preserve": (1,), "delete": (-1,), "dual": (1, -1)}[self.method.variant]
        reward, slope = masks.new_zeros(len(masks)), torch.zeros_like(shown) if gradient else None
        for sign in games:  # what is kept must score high, what is left when it is taken away low
            per_image = (shown if sign > 0 else 1 - shown).view(len(self.run.images), -1, *shown.shape[1:])
            versions, steps = (values.flatten(0, 1) for values in self.pyramid.at(per_image))
            versions = versions.flip(-1) if flip else versions
            scores, slopes = self.run.versions.scored(versions, self.rows, self.columns, self.unit, gradient)
            reward += sign * scores
            if slope is not None and slopes is not None:  # both signs once more: of the score and of 1 - m
                slope += ((slopes.flip(-1) if flip else slopes) * steps).sum(1)
        return reward, slope
