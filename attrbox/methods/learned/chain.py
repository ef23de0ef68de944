"""What learning a rule and replaying a learned one have in common: where it acts, and the map that it makes.

A = sum over channels of X * G_X,     weighed by a region, smoothed
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from attrbox.core.fills import gaussian_blur, need_images
from attrbox.core.results import Coverage, Operated
from attrbox.engine.site import FunctionInfo, Site
from attrbox.engine.tape import Tape, record
from attrbox.errors import ModelError, OptionError
from attrbox.methods.base import Method
from attrbox.methods.context.passes import in_channels_last
from attrbox.methods.context.run import Run
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.learned import Differences, LearnedRule


@dataclass(frozen=True, kw_only=True)
class Propagating(Method):
    """What learning a rule and replaying a learned one have in common."""

    @property
    def plugged(self) -> LearnedRule:
        """The rule without parameters."""
        raise NotImplementedError

    def learned_at(self, tape: Tape) -> list[Site]:
        """The sites that have parameters."""
        raise NotImplementedError

    def attribute(self, run: Run) -> Tensor:
        tape, count = recorded(self.plugged, run), len(run.images)
        sites = self.learned_at(tape)
        if count == 1 or all(s.shapes[0][0] == count and tape.rows_are_images(s.index) for s in sites):
            return self.together(run)
        # The model takes its rows one by one or in another order, lays views of them into the batch, or has another
        # axis first: parameters are of one image each.
        alone = run.one_by_one()
        maps = torch.cat([self.together(one) for one in alone])
        details = [one.told() for one in alone]
        run.tell(**{name: _joined([each[name] for each in details]) for name in details[0]})
        return maps

    def together(self, run: Run) -> Tensor:
        """The maps of a chunk whose images share their sites."""
        raise NotImplementedError

    def coverage(self, run: Run) -> Coverage:
        rule = self.plugged
        tape = recorded(rule, run)
        chosen = set(Operated.listed(self.learned_at(tape)))
        whole = tape.coverage(rule)
        left = tuple(operated for operated in whole.rule if operated not in chosen)
        return Coverage(tuple(o for o in whole.rule if o in chosen), left + whole.derivative, whole.unknown)


def _joined(parts: list[Any]) -> Any:
    """One detail of several images."""
    return torch.cat(parts) if isinstance(parts[0], Tensor) else type(parts[0]).joined(parts)


def recorded(rule: LearnedRule, run: Run) -> Tape:
    """The recorded pass on the images; one for all rules that keep the same."""
    return run.recording(rule, ("learned", rule.feature, rule.compares))


def prepared(rule: LearnedRule, modules: str | None, run: Run, k: int) -> tuple[Tape, LearnedRule, list[Site], Any]:
    """The recorded pass, the rule with its features, and the sites that get parameters."""
    tape = recorded(rule, run)
    chosen = sites_within(tape, modules)
    with run.passes.autocast_recorded():
        reference = tape.record_reference(run.samples.baseline(0.0)) if rule.compares else None
        first = Differences(rule, frozenset(site.index for site in chosen))
        score = run.score(tape)[:, k]
        tape.replay(score, [tape.images], first, reference=reference)
    # A site that no gradient passes on the way to this score has nothing to learn.
    rule.differences = first.differences
    return tape, rule, [site for site in chosen if site.index in rule.differences], reference


def sites_within(tape: Tape, modules: str | None) -> list[Site]:
    """The sites to learn at: between two layers that work on positions (convolutions, or linear layers on tokens), on
    whatever way from one to the other; where nothing lies between these, between any two layers.

    Raises:
        ModelError: there is no non-linearity between two layers.
        OptionError: no site's module matches the pattern.
    """
    sites = [site for site in tape.sites if site.kind in LearnedRule.kinds and not _guards(site)]
    if modules is not None:
        chosen = [site for site in sites if fnmatchcase(site.module, modules)]
        if not chosen:
            names = sorted({site.module or "(the model itself)" for site in sites})
            raise OptionError(
                f"No non-linearity runs in a module that matches modules={modules!r}. "
                f"Those that run: {', '.join(names) or 'none'}."
            )
        return chosen
    for with_positions in (True, False):
        between = tape.between_layers(with_positions)
        chosen = [site for site in sites if site.index in between]
        if chosen:
            return chosen
    raise ModelError(
        f"The model has no non-linearity between two layers ({tape.layers} convolutions and linear layers and "
        f"{len(sites)} non-linearities ran), where the learned rule has its place. "
        "Say where to learn: modules='*' for all, or a pattern of module names."
    )


def _guards(site: Site) -> bool:
    """Whether a site is a clamp that keeps a number away from 0, as in front of a division."""
    low, high = site.about(FunctionInfo).bounds or (0, 0)
    return not low <= 0 <= high


def channel_sum(values: Tensor) -> Tensor:
    """The sum over the channels, [n, ...]; vectors [n, D] have none."""
    return values.sum(1) if values.dim() > 2 else values


def weighed(region: Tensor | None, map: Tensor) -> Tensor:
    """A S^2 where A and S agree in sign, 0 elsewhere."""
    return map if region is None else torch.where(map * region > 0, map * region**2, 0)


def regions(run: Run, sigma: float) -> list[Tensor | None]:
    """S for each target, [n, H, W]: DeepLIFT's maps, smoothed, with a largest absolute value of 1; None without sigma.

    Raises:
        InputError: the inputs are no images.
    """
    targets = range(run.scores.shape[1])
    if not sigma:
        return [None for _ in targets]
    need_images(run.images, "A region (region_fraction > 0)")
    rule = DeepLift()
    with run.passes.autocast_recorded():
        tape = record(run.model, in_channels_last(run.images), [rule])
        reference = tape.record_reference(run.samples.baseline(0.0))
        scores = run.score(tape)
        gradients = [tape.replay(scores[:, k], [tape.images], rule, reference=reference)[0] for k in targets]
    found: list[Tensor | None] = []
    for gradient in gradients:
        map = gaussian_blur((run.images * gradient.to(run.images.dtype)).sum(1), sigma * max(run.images.shape[-2:]))
        largest = map.abs().amax((1, 2), keepdim=True)
        found.append(map / largest.clamp_min(torch.finfo(map.dtype).tiny))
    return found


def chained(
    run: Run, tape: Tape, rule: LearnedRule, reference: Any, k: int, sigma: float, region: Tensor | None
) -> Tensor:
    """X * G_X under the rule, [n, C, ...], within the region, smoothed."""
    with run.passes.autocast_recorded():
        score = run.score(tape)[:, k]
        (gradient,) = tape.replay(score, [tape.images], rule, reference=reference)
    values = tape.images.detach() * gradient
    if region is not None:
        values = values * torch.where(channel_sum(values) * region > 0, region**2, 0).unsqueeze(1)
    if sigma and values.dim() == 4:
        values = gaussian_blur(values, sigma * max(values.shape[-2:]))
    return values.to(run.images.dtype).contiguous()
