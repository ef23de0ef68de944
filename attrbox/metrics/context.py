"""A study: a chunk of images with the maps of all methods, and what metrics may want to know, computed once.

Metrics name the images that the model shall see (`Views`); `Study.scores_of` shows it all of them, cut into batches
that do not care which metric, method or image a view belongs to.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrbox.core.fills import FILLS
from attrbox.core.memory import backing_off
from attrbox.core.outputs import Outputs
from attrbox.core.random_streams import streams
from attrbox.core.results import Provenance
from attrbox.core.targets import Target
from attrbox.errors import InputError
from attrbox.methods.base import method_registry as registry
from attrbox.methods.context.passes import Once, Passes, Samples, Settings
from attrbox.methods.context.run import Run
from attrbox.methods.explaining import compare
from attrbox.metrics.ranking import both_ends, inverse, region_sums
from attrbox.metrics.records import Maps, Recipe, Scoring, Views, as_kept, frozen, named, pieces

# Draws of a sample's stream of random numbers, apart from each other and from those that methods use.
_TIES, _FILL = 2**40, 2**40 + 1


@dataclass(eq=False)
class Study:
    """One chunk. Metrics read it; the planner makes it and throws it away.

    Attributes:
        images: [n, C, H, W], or [n, D], [n, C, L], ...
        maps: label -> maps of these images.
        rows: which of the call's samples these are.
        seeds: the random streams of these images, one each.
        seed: for what is drawn once for all images: that of the call, or 0 if each image has its own.
        target: what is explained.
        model: in evaluation mode; None if no metric asks for it.
        indices: class indices [n, 1]; None for a target function, or if nobody knows the classes.
        masks: object masks [h, w] of each image, of the images' size or of the photographs', if there are any.
        per_pass: how many images a forward pass may take.
        batch_size: images per pass that the caller asked for, if so.
        channels_last: show [n, C, H, W] images in this memory format.
        progress: called with the number of images that the model has seen.
        once: keeps what is computed for one metric and may serve another.
        samples: the images with their random numbers and baselines.
    """

    images: Tensor
    maps: Mapping[str, Maps]
    rows: slice
    seeds: Sequence[int]
    target: Target
    model: nn.Module | None = None
    indices: Tensor | None = None
    masks: Sequence[Tensor] | None = None
    per_pass: int = 8
    batch_size: int | None = None
    channels_last: bool = True
    progress: Callable[[int], None] = lambda images: None
    seed: int = 0
    once: Once = field(default_factory=Once, repr=False)
    samples: Samples = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.samples = Samples(self.images, self.rows, self.seeds, self.target.samples)
        if self.model is not None and self.indices is None:
            self.indices = self._resolved()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> torch.Size:
        """Height and width of the images; of vectors the one axis."""
        return self.images.shape[2:] if self.images.dim() > 2 else self.images.shape[1:]

    @property
    def pixels(self) -> int:
        """How many pixels an image has."""
        return self.shape.numel()

    @property
    def classes(self) -> Tensor | None:
        """The explained class of each image, [n], if known."""
        return None if self.indices is None else self.indices[:, 0]

    # ------------------------------------------------------------------------------------------------- random numbers

    def fill(self, fill: float | str, sigma: float | None = None) -> Tensor:
        """What removed pixels show, [1 or n, C, H, W]; see `attrbox.core.fills.fill_images`."""
        return self.once(("fill", fill, sigma), lambda: self.samples.fill(fill, sigma, _FILL))

    # ------------------------------------------------------------------------------------------------------- rankings

    def order(self, region: int = 1, most: int | None = None) -> tuple[Tensor, Tensor]:
        """The pixels, or regions of `region` x `region` pixels, of each map from the largest value down and from the
        smallest up: two tensors of indices [labels, n, cells], or at least the first `most` of both.

        One order is the reverse of the other. Ties are broken at random: by the image's seed, and alike for all
        methods. A region counts by its sum.
        """

        def compute() -> tuple[Tensor, Tensor]:
            parts = [self._ordered(region_sums(maps.heatmap, region).flatten(1), most) for maps in self.maps.values()]
            return torch.stack([first for first, _ in parts]), torch.stack([last for _, last in parts])

        return self.once(("order", region, most), compute)

    def _ordered(self, values: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
        """Both orders of values [n, cells]."""
        cells = values.shape[1]
        shuffled = self.once(("ties", cells), lambda: self.samples.permutations(_TIES, cells))
        return both_ends(values, shuffled, lambda: self.once(("tie places", cells), lambda: inverse(shuffled)), most)

    def cells(self, region: int) -> int:
        """How many regions an image has."""
        return self.pixels if region == 1 else math.prod(-(-length // region) for length in self.shape)

    def spread(self, cells: Tensor, region: int) -> Tensor:
        """Cells [m, cells] as pixels that broadcast to images, [m, 1, H, W] ([m, D] for vectors)."""
        if region > 1:
            height, width = self.shape
            grid = cells.view(len(cells), -1, -(-width // region))
            grid = grid.repeat_interleave(region, 1).repeat_interleave(region, 2)
            return grid[:, None, :height, :width]
        return cells if self.images.dim() == 2 else cells.view(len(cells), 1, *self.shape)

    @property
    def by_pixel(self) -> Tensor:
        """The images with the channels last, [n, H * W, C], from which batches in that memory format are made."""
        return self.once(("by pixel",), lambda: self.images.flatten(2).transpose(1, 2).contiguous())

    # ------------------------------------------------------------------------------------------------------ the model

    @property
    def outputs(self) -> Sequence[Outputs]:
        """What the model says of the images themselves, pass by pass."""

        def compute() -> list[Outputs]:
            parts: list[Outputs] = []
            while (start := sum(part.count for part in parts)) < len(self):

                def work(size: int, start: int = start) -> Outputs:
                    return self.passes.outputs(self.images[start : start + size])

                part, self.per_pass = backing_off(self.per_pass, work)
                parts.append(part)
            return parts

        return self.once(("outputs",), compute)

    def _resolved(self) -> Tensor | None:
        """The explained classes, [n, 1]; None for a target function."""
        start, parts = 0, []
        for part in self.outputs:
            rows = slice(self.rows.start + start, self.rows.start + start + part.count)
            parts.append(self.target.resolve(part, rows))
            start += part.count
        found = [indices for indices in parts if indices is not None]
        return torch.cat(found) if found else None

    def original(self, scoring: Scoring = "logit") -> Tensor:
        """The score of each image itself, [n]."""

        def compute() -> Tensor:
            every = torch.arange(len(self), device=self.images.device)
            rows = torch.split(every, [part.count for part in self.outputs])
            return torch.cat([self._score(*each, scoring) for each in zip(self.outputs, rows, strict=True)])

        return self.once(("original", scoring), compute)

    def scores_of(self, requests: Sequence[Views]) -> list[Tensor]:
        """The scores of some views, [count] each; all share their batches."""
        total = sum(map(len, requests))
        scores = [torch.empty(len(views), dtype=self.images.dtype, device=self.images.device) for views in requests]
        start = 0
        while start < total:

            def work(size: int, start: int = start) -> int:
                shown = pieces(requests, start, start + size)
                images = [requests[index].make(part) for index, part in shown]
                outputs = self.passes.outputs(torch.cat(images) if len(images) > 1 else images[0])
                rows = torch.cat([requests[index].rows[part] for index, part in shown])
                scorings = {requests[index].scoring for index, _ in shown}
                scored = {scoring: self._score(outputs, rows, scoring) for scoring in scorings}
                done = 0
                for index, part in shown:
                    count = part.stop - part.start
                    scores[index][part] = scored[requests[index].scoring][done : done + count]
                    done += count
                return done

            done, self.per_pass = backing_off(self.per_pass, work)
            start += done
            self.progress(done)
        return scores

    @cached_property
    def passes(self) -> Passes:
        """The ways in which the model is run."""
        assert self.model is not None
        return Passes(self.model, self.images[:1], channels_last=self.channels_last)

    def _score(self, outputs: Outputs, rows: Tensor, scoring: Scoring) -> Tensor:
        indices = None if self.indices is None else self.indices[rows]
        if scoring == "accuracy" and indices is not None:
            return (outputs.scores.argmax(1) == indices[:, 0]).to(self.images.dtype)
        return self.target.score(outputs, indices, scoring)[:, 0].to(self.images.dtype)

    def explain(self, model: nn.Module, images: Tensor) -> dict[str, Maps]:
        """The maps of all methods for other images, or another model, by label.

        The target stays that of the study's images. Methods of the registry share their passes.

        Raises:
            InputError: the maps are not of the study's model, so that other maps cannot be compared with them.
        """
        explainers = {label: maps.explainer for label, maps in self.maps.items()}
        made: dict[str, Tensor] = {}
        recipes = [(label, one) for label, one in explainers.items() if isinstance(one, Recipe)]
        self.once(("of this model",), lambda: self._check_model([label for label, _ in recipes]))
        # One call for the methods whose maps were made alike.
        for provenance in {frozen(recipe.provenance): recipe.provenance for _, recipe in recipes}.values():
            alike = {label: one for label, one in recipes if frozen(one.provenance) == frozen(provenance)}
            made.update(self._compared(model, images, alike, provenance))
        for label, one in explainers.items():
            if callable(one):
                with torch.enable_grad():
                    made[label] = one(model, images, self.classes, self.seeds)
        return {
            label: replace(maps, values=as_kept(made[label].detach().to(self.images), maps, label))
            for label, maps in self.maps.items()
        }

    def _compared(
        self, model: nn.Module, images: Tensor, recipes: Mapping[str, Recipe], made: Provenance
    ) -> dict[str, Tensor]:
        distinct = {named(recipe): recipe for recipe in recipes.values()}
        listed = [(recipe.method, self._own(recipe.options)) for recipe in distinct.values()]
        compared = compare(
            model,
            images,
            listed,
            target=self.target.function if self.classes is None else self.classes,
            seed=streams(made.seed, self.target.samples)[self.rows],
            batch_size=self.batch_size,
            precision=made.precision,
            channels_last=made.channels_last,
            progress=False,
        )
        maps = dict(zip(distinct, compared.values(), strict=True))
        return {label: maps[named(recipe)].values for label, recipe in recipes.items()}

    def _own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the rows of these images, where a tensor has one for each of the call's."""
        own = dict(options)
        for name, value in options.items():
            if isinstance(value, Tensor | np.ndarray):
                one = self.shape if name == "segments" else self.images.shape[1:]
                if tuple(value.shape) == (self.target.samples, *one):
                    own[name] = value[self.rows]
        return own

    def _check_model(self, labels: Sequence[str]) -> None:
        for label in labels:
            if not bool(self.of_this_model(self.maps[label]).all()):
                raise InputError(
                    f"The maps of {label!r} explain another model: its scores differ. Explain this one, and measure "
                    "these maps."
                )

    def of_this_model(self, maps: Maps) -> Tensor:
        """Which of the maps explain the study's model, [n], by the scores that they explain; all, if those are unknown.

        Scores differ by rounding: of single precision, or of the precision in which the maps were made.
        """
        if maps.score is None or self.model is None:
            return torch.ones(len(self), dtype=torch.bool, device=self.images.device)
        explainer = maps.explainer
        precision = explainer.provenance.precision if isinstance(explainer, Recipe) else None
        share = 1e-3 if precision is None else 0.1
        return ((self.original() - maps.score).abs() <= share * self._scale()) | maps.score.isnan()

    def _scale(self) -> Tensor:
        """The largest output of each image, or of a function's scores the largest of all, [n]."""
        if self.indices is None:
            return self.original().abs().amax().expand(len(self))
        return torch.cat([part.scores.flatten(1).abs().amax(1) for part in self.outputs]).to(self.images.dtype)

    def baseline_of(self, maps: Maps) -> float | Tensor | None:
        """What a method compared each image with: a number or a tensor [1 or n, C, H, W]; None if nothing is known, or
        if it was drawn at random or made of superpixels."""
        if not isinstance(maps.explainer, Recipe):
            return None
        baseline, blur = maps.explainer.baseline, maps.explainer.blur
        if isinstance(baseline, Tensor):
            return self.as_baseline(baseline)
        if not isinstance(baseline, str):
            return baseline
        if baseline not in FILLS or baseline == "noise":
            return None
        return self.once(("fill", baseline, blur), lambda: self.samples.fill(baseline, blur))

    def as_baseline(self, baseline: Tensor) -> Tensor:
        """A tensor as a baseline of these images, [1 or n, C, H, W].

        Raises:
            InputError: its shape does not fit the images, or it is not finite.
        """
        return self.once(("baseline", id(baseline)), lambda: self.samples.baseline(baseline))

    def lost_channels(self, maps: Maps) -> bool:
        """Whether the largest channel stands for all, so that their sum cannot be told any more."""
        return maps.reduction == "max" and self.images.dim() > 2 and maps.values.shape[1] < self.images.shape[1]

    def promised(self, maps: Maps) -> Tensor | None:
        """What the values of each map should sum to by its method, [n], on the study's model.

        None if the method promises no sum, or how the maps were made is unknown. NaN for maps of another model that
        only tell what they should have summed to there.
        """
        explainer = maps.explainer
        if not isinstance(explainer, Recipe):
            if maps.expected is None:
                return None
            return torch.where(self.of_this_model(maps), maps.expected, torch.nan)
        method = registry[explainer.method].create(explainer.options)
        parts: list[Tensor] = []
        while (start := sum(map(len, parts))) < len(self):

            def work(size: int, start: int = start) -> Tensor | None:
                run = self._run(slice(start, min(start + size, len(self))), explainer.provenance)
                return method.expected(run)

            part, self.per_pass = backing_off(self.per_pass, work)
            if part is None:
                return None
            parts.append(part[:, 0].to(self.images.dtype))
        return torch.cat(parts)

    def _run(self, part: slice, made: Provenance | None = None) -> Run:
        """Some of the images as methods see them."""
        assert self.model is not None
        made = made or Provenance()
        settings = Settings(self.target, (0,), made.precision, made.channels_last)  # nothing is drawn
        rows = slice(self.rows.start + part.start, self.rows.start + part.stop)
        return Run(self.model, self.images[part], settings, rows, part.stop - part.start)
