"""One problem: the parameters of a rule for one target of each sample, learned by Adam.

Per iteration this takes one chain of gradients, two forward and backward passes on masked images, and the gradient of
the chain for the parameters, as dear as a forward pass: three native passes of the batch. The forward pass on the
images and on the reference is done once.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrbox.core.fills import fill_images
from attrbox.core.options import option
from attrbox.core.outputs import Outputs
from attrbox.core.validation import check, check_choice, check_count, check_flag, check_number
from attrbox.engine.site import Site
from attrbox.engine.tape import Tape
from attrbox.errors import NoGradientError
from attrbox.methods.context.passes import in_channels_last
from attrbox.methods.context.run import Run
from attrbox.methods.learned.chain import Propagating, chained, channel_sum, prepared, recorded, sites_within, weighed
from attrbox.methods.masking.generators import MaskGenerator, masks
from attrbox.rules.learned import LearnedRule, plugins

FILLS = ("zero", "blur", "noise")
# Draws of a sample's stream of random numbers, apart for each purpose; a restart has a stretch of its own.
_PER_RESTART = 1_000_000
_NOISE, _PARAMETERS, _CHOICES = 0, 500_000, 900_000
WINDOW = 10  # iterations over which a loss is averaged to see whether it is flat


@dataclass(frozen=True, kw_only=True)
class Learning(Propagating):
    """The options of the learned rule."""

    preset: str = option("paper", "where the defaults come from: paper, rank or clean")
    iterations: int = option(60, "steps of Adam")
    fast: bool = option(False, "the fewest iterations that keep the preset's quality (30), unless iterations are given")
    lr: float = option(0.2, "learning rate of Adam")
    decay: bool = option(False, "let the learning rate fall to zero along half a cosine")
    plugin: str = option("per_pixel", "parameters of the rule: per_pixel, shared (one per channel) or convolution")
    kernel: int = option(1, "side of the kernel of the plugins shared (depthwise) and convolution; odd")
    feature: str = option("output", "what the parameters meet: output or input of the non-linearity")
    reference: bool = option(True, "subtract the features of an all-zero image")
    initial: str = option("normal", "start of the parameters: normal (0, 1) or ones")
    modules: str | None = option(
        None, "pattern of module names to learn at; None: from the first to the last layer on positions or tokens"
    )
    mask: str = option("sigmoid", "mask generator: sigmoid, gaussian or rank")
    sharpness: float = option(10.0, "s, slope of the sigmoid masks")
    center_positive: float = option(0.75, "c+, centre of the positive sigmoid mask on the scaled map (0.5 is zero)")
    center_negative: float = option(0.25, "c-, centre of the negative sigmoid mask")
    sigma_fraction: float | None = option(
        None,
        "standard deviation of a Gaussian over the map, as a share of the image's longer side; None: the mask's own",
        formerly="sigma",
    )
    region_fraction: float = option(
        0.0,
        "weigh the map by the square of DeepLIFT's, smoothed, and drop what that contradicts; standard deviation of "
        "that Gaussian, as a share of the image's longer side; 0: do not",
        formerly="region",
    )
    fraction: float = option(0.05, "largest share of pixels that a rank mask takes away")
    temperature: float = option(
        0.3, "softness of the rank masks, in gaps between the values at half and twice the rank"
    )
    weight: float = option(0.1, "lambda, weight of the masks' size in the loss (sigmoid and gaussian masks)")
    fill: str = option("zero", "what masked pixels show: zero, blur, noise, or random (one of them per iteration)")
    game: str = option("delete", "positive mask: delete (its pixels are taken away) or preserve (all others are)")
    sign_aware: bool = option(True, "learn from the negative mask too")
    score: str = option("logit", "what the masks change: logit (the model's output), log_prob or prob")
    restarts: int = option(1, "learn so many times from different starts and average the maps")
    tolerance: float = option(0.0, "stop a sample when its loss changes less than this, relatively, in 10 steps")
    keep_rules: bool = option(True, "keep the learned parameters in details['rules']")

    def __post_init__(self) -> None:
        for name in ("iterations", "kernel", "restarts"):
            check_count(name, getattr(self, name))
        check(self.kernel % 2 == 1, "kernel", "an odd number", self.kernel)
        for name in ("fast", "decay", "reference", "sign_aware", "keep_rules"):
            check_flag(name, getattr(self, name))
        for name in ("lr", "sharpness", "temperature"):
            check_number(name, getattr(self, name), above=0)
        for name in ("weight", "tolerance"):
            check_number(name, getattr(self, name), least=0)
        check_number("center_positive", self.center_positive)
        check_number("center_negative", self.center_negative)
        check_number("fraction", self.fraction, above=0, most=1)
        check_number("region_fraction", self.region_fraction, least=0, most=0.5)
        if self.sigma_fraction is not None:
            check_number("sigma_fraction", self.sigma_fraction, least=0, most=0.5)
        check_choice("feature", self.feature, ("output", "input"))
        check_choice("initial", self.initial, ("normal", "ones"))
        check_choice("fill", self.fill, (*FILLS, "random"))
        check_choice("game", self.game, ("delete", "preserve"))
        check_choice("score", self.score, ("logit", "log_prob", "prob"))
        check(self.modules is None or isinstance(self.modules, str), "modules", "a pattern or None", self.modules)
        _ = plugins[self.plugin], masks[self.mask]  # unknown names raise

    @property
    def passes(self) -> int:
        return 3 * self.iterations * self.restarts

    @property
    def memory(self) -> float:
        # Features and their differences, parameters, their gradients and Adam's moments, multipliers and gradients.
        return 8.0 if self.plugin == "per_pixel" else 5.0

    @property
    def plugged(self) -> LearnedRule:
        return LearnedRule(plugins[self.plugin].make(self.kernel), self.feature, self.reference)

    def learned_at(self, tape: Tape) -> list[Site]:
        return sites_within(tape, self.modules)

    @property
    def generator(self) -> MaskGenerator:
        """The mask generator with its options set."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(MaskGenerator)}
        return masks[self.mask].make(**{name: value for name, value in own.items() if value is not None})


def part(name: str) -> Any:
    """A label for torch's profiler: what `benchmarks/learned.py` breaks an iteration down into."""
    return torch.profiler.record_function(f"learned: {name}")


@dataclass
class Learnt:
    """The result of one run over all samples of a chunk, for one target and one restart."""

    values: Tensor  # [n, C, ...]
    losses: Tensor  # [n, iterations]
    iterations: Tensor  # [n]
    failed: Tensor  # [n]
    parameters: dict[str, Tensor]  # site -> [n, ...]


def learn(method: Learning, run: Run, region: Tensor | None, k: int, restart: int) -> Learnt:
    """Learn a rule for target k of each sample of the chunk; a restart has random numbers of its own."""
    tape, rule, sites, reference = prepared(method.plugged, method.modules, run, k)
    images = tape.images.detach()
    n = len(images)
    first = restart * _PER_RESTART
    parameters = _start(method, run, rule, sites, first + _PARAMETERS)
    rule.parameters = parameters
    leaves = list(parameters.values())
    fused = not images.is_meta and images.device.type in ("cpu", "cuda")
    adam = torch.optim.Adam(leaves, lr=method.lr, fused=fused)
    draws = run.samples.numbers(first + _CHOICES, (method.iterations, 2), uniform=True).expand(n, -1, -1)
    game = _Game(method, run, images, k)
    losses = images.new_zeros(n, method.iterations)
    alive = torch.ones(n, dtype=torch.bool, device=images.device)
    failed = torch.zeros_like(alive)
    iterations = torch.full((n,), method.iterations, device=images.device)
    generator = method.generator

    all_alive = True
    for step in range(method.iterations):
        with run.passes.autocast_recorded(), part("chain"):
            score = run.score(tape)[:, k]
            (gradient,) = tape.replay(score, [tape.images], rule, reference=reference, create_graph=True)
        map = generator.smoothed(weighed(region, channel_sum(images * gradient)))
        positive, negative = generator.masks(map, draws[:, step, 0])
        loss, surrogate = game.play(positive, negative, first + step, draws[:, step, 1])
        if generator.sized:
            size = positive.flatten(1).mean(1) + (negative.flatten(1).mean(1) if method.sign_aware else 0)
            loss = loss + method.weight * size.detach()
            surrogate = surrogate + method.weight * size.sum()
        losses[:, step] = loss
        finite = loss.isfinite()
        stop = alive & ~finite
        failed |= stop
        if method.tolerance and step + 1 >= 2 * WINDOW:
            last = losses[:, step + 1 - WINDOW : step + 1].mean(1)
            before = losses[:, step + 1 - 2 * WINDOW : step + 1 - WINDOW].mean(1)
            stop |= alive & ((last - before).abs() <= method.tolerance * before.abs())
        # One look at the device per iteration, against tens of launches of convolutions: not measurable.
        if not images.is_meta and bool(stop.any()):
            iterations[stop] = step
            alive = alive & ~stop
            all_alive = False
            if not bool(alive.any()):
                run.settings.progress(3 * n * (method.iterations - step))
                losses[:, step + 1 :] = torch.nan
                break
        with part("double backward"):
            adam.zero_grad()
            if not surrogate.requires_grad:
                raise NoGradientError(
                    "The map does not depend on what the rule learns: no gradient of the score passes through an "
                    "activation with a learned rule. Look for a factor of 0 in the model, or use another method."
                )
            # `backward` gives each gradient the memory layout of its parameter; fused optimizers walk both as one.
            torch.autograd.backward(surrogate, inputs=leaves)
        held = None if all_alive else [leaf.detach()[~alive] for leaf in leaves]
        if method.decay:
            adam.param_groups[0]["lr"] = method.lr * (1 + math.cos(math.pi * step / method.iterations)) / 2
        with part("optimiser"):
            adam.step()
        if held is not None:  # stopped samples keep their parameters, whatever the moments of Adam say
            with torch.no_grad():
                for leaf, old in zip(leaves, held, strict=True):
                    leaf[~alive] = old
        run.settings.progress(3 * n)
    for leaf in leaves:
        leaf.requires_grad_(False)
    values = chained(run, tape, rule, reference, k, generator.sigma_fraction, region)
    names = {index: tape.sites[index].name for index in parameters}
    learnt = {names[index]: leaf.detach() for index, leaf in parameters.items()}
    return Learnt(values, losses, iterations, failed, learnt)


def _start(method: Learning, run: Run, rule: LearnedRule, sites: list[Site], draw: int) -> dict[int, Tensor]:
    """Parameters to begin with, by site; every sample has its own stream of numbers."""
    parameters = {}
    for site in sites:
        difference = rule.differences[site.index]
        shape = rule.plugin.shape(difference)
        if len(difference) > len(run.images):  # several rows of one image
            shape = (len(difference) // len(run.images), *shape)
        if method.initial == "ones":
            start = difference.new_ones((len(run.images), *shape))
        else:
            numbers = run.samples.numbers(draw + site.index, shape).to(difference.dtype)
            start = numbers.expand(len(run.images), *shape).clone()
        if start.shape == difference.shape and start.dim() == 4:
            last = difference.is_contiguous(memory_format=torch.channels_last)
            start = start.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        parameters[site.index] = start.requires_grad_()
    return parameters


class _Game:
    """Takes pixels away and sees what the score does."""

    def __init__(self, method: Learning, run: Run, images: Tensor, k: int) -> None:
        self.method = method
        self.run = run
        self.images = images
        self.k = k
        self._kept: dict[str, Tensor] = {}
        with torch.no_grad():
            self.score = self._score(
                run.passes.returned(recorded(method.plugged, run).output, len(images)), run.indices
            )

    def play(self, positive: Tensor, negative: Tensor, draw: int, choice: Tensor) -> tuple[Tensor, Tensor]:
        """L+ + L- [n], without gradient, and a number whose gradient with respect to the masks is that of its sum."""
        images, both = self.images, self.method.sign_aware
        with torch.no_grad():
            change = self._fill(draw, choice) - images
            opened = 1 - positive if self.method.game == "preserve" else positive
            taken = torch.cat([opened, negative]) if both else opened
            taken = taken.detach().unsqueeze(1) if images.dim() > 2 else taken.detach()
            changes = change.repeat(2, *(1,) * (change.dim() - 1)) if both else change
            originals = images.repeat(2, *(1,) * (images.dim() - 1)) if both else images
            masked = in_channels_last(torch.addcmul(originals, taken, changes))
        scores, gradients = self._passes(masked)
        slopes = channel_sum(gradients * changes)  # of the score with respect to what is taken
        n = len(images)
        sign = -1 if self.method.game == "preserve" else 1
        # Taking pixels away must lower the score (delete); keeping them alone must not (preserve).
        loss = sign * (scores[:n] - self.score)
        surrogate = (positive * slopes[:n]).sum()
        if both:
            loss = loss + self.score - scores[n:]
            surrogate = surrogate - (negative * slopes[n:]).sum()
        return loss, surrogate

    def _passes(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        run, indices = self.run, self.run.indices
        scores, gradients = [], []
        for start in range(0, len(masked), run.versions.per_pass):
            some = masked[start : start + run.versions.per_pass]
            rows = (torch.arange(start, start + len(some), device=some.device)) % len(self.images)
            with run.passes.autocast(), part("masked forward"):
                tape = run.passes.plain(some)
                output = run.passes.returned(tape.output, len(some))
                score = self._score(output, None if indices is None else indices[rows])
            scores.append(score.detach().to(masked.dtype))
            with part("masked backward"):
                gradients.append(tape.replay(score, [tape.images], keep=False)[0])
        return torch.cat(scores), torch.cat(gradients)

    def _score(self, output: Outputs, indices: Tensor | None) -> Tensor:
        return self.run.settings.target.score(output, indices, self.method.score)[:, self.k]

    def _fill(self, draw: int, choice: Tensor) -> Tensor:
        """What the masked pixels of this iteration show, [1 or n, C, ...]."""
        if self.method.fill != "random":
            return self._shown(self.method.fill, draw)
        number = (choice * len(FILLS)).long().view(-1, *(1,) * (self.images.dim() - 1))
        zero, blur, noise = (self._shown(fill, draw) for fill in FILLS)
        return zero * (number == 0) + blur * (number == 1) + noise * (number == 2)

    def _shown(self, fill: str, draw: int) -> Tensor:
        """One fill; those that are the same in every iteration are kept."""
        if fill == "noise":
            return fill_images(self.images, fill, lambda: self.run.samples.normal(draw + _NOISE))
        if fill not in self._kept:
            self._kept[fill] = fill_images(self.images, fill, lambda: self.images)
        return self._kept[fill]
