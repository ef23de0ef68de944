"""`evaluate`: check, cut into chunks, let every metric measure every method, join.

Metrics name the images they want the model to see, and all these go through the model in shared batches: several
methods, several orders and several metrics cost the forward passes that they need, and no more.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from attrbox.core.memory import images_per_pass
from attrbox.core.model_state import HALF, check_model, surroundings, untouched
from attrbox.core.options import choose
from attrbox.core.progress import passing_bar
from attrbox.core.random_streams import streams
from attrbox.core.targets import Target, TargetLike, classes, top
from attrbox.core.validation import check_count, check_flag, check_images, dense
from attrbox.engine.calling import forward
from attrbox.errors import InputError, OptionError, at_work, shown
from attrbox.metrics.base import Measurement, Metric, metric_registry as registry
from attrbox.metrics.context import Study
from attrbox.metrics.results import Evaluation
from attrbox.metrics.scores import Score
from attrbox.metrics.sources import (
    Control,
    ExplainerLike,
    MapsLike,
    Source,
    check_shapes,
    chunks,
    control_maps,
    defined_controls,
    known_target,
    read,
)

MetricLike: TypeAlias = "str | tuple[str, Mapping[str, Any]]"

# Bytes that the rankings of a chunk's maps may take.
_RANKINGS = 2**28


def evaluate(
    model: nn.Module | None,
    images: Tensor,
    maps: MapsLike,
    metrics: Sequence[MetricLike] = ("morf", "lerf"),
    *,
    target: TargetLike = None,
    masks: Tensor | Sequence[Tensor] | None = None,
    explainers: Mapping[str, ExplainerLike] | None = None,
    controls: bool = True,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    channels_last: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Measure the maps of several methods, beside the controls `random` and `sobel` (edges).

    Args:
        model: what was explained, or another model that is to be measured on the same maps; run in evaluation mode and
            left as it was. None, if no metric asks for one.
        images: what was explained, [N, C, H, W]; also [N, D], [N, C, L], [N, C, D, H, W].
        maps: a `Comparison`, a file of maps that is open for reading (`attrbox.open_maps`, or `h5py.File`), or a
            mapping from names to maps [N, H, W], [N, 1, H, W] or [N, C, H, W].
        metrics: names of `list_metrics()`, or pairs of a name and options. A name that comes twice is told apart by its
            options, as in "morf(fill=blur)", or else by a number, as in "morf #2".
        target: the explained class, one or for each image, or a function. Default: what the maps say, else each image's
            largest output.
        masks: object masks, of the images' size, [N, H, W], or each of its photograph's size, [h, w]; what is not zero
            is the object. For localisation metrics; `attrbox.metrics.localization.annotations` makes them of boxes.
        explainers: how maps of a plain mapping were made, for metrics that explain again or compare with the map's
            own baseline: a method's name, (name, options), or a function (model, images, target, seeds) -> maps.
        controls: add the controls; a method of the same name takes their place.
        seed: for ties, noise and draws, and for the intervals. From one seed each image gets a stream of its own, by
            its place in the call; a sequence of N names the streams. A score depends on its image and stream, not on
            its batch mates or the chunk.
        batch_size: images per forward pass; default: by memory, and halved when memory runs out.
        channels_last: show the model images in this memory format, which is faster; results differ by rounding.
        progress: show a progress bar on long work, if a terminal is there to show it.

    Returns:
        A mapping from methods to metrics to `Score`s, with tables, tests and a figure.

    Raises:
        AttrboxError: see `attrbox.errors`; nothing is changed then either.
    """
    chosen = choose(registry, metrics)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    for name, flag in (("controls", controls), ("channels_last", channels_last), ("progress", progress)):
        check_flag(name, flag)
    half = getattr(images, "dtype", None) in HALF
    with torch.inference_mode(False):
        images = check_images(images).detach()
        images = images.clone() if images.is_inference() else images  # the clone is an ordinary tensor
    sources = read(maps, explainers)
    check_shapes(sources, images)
    defined = defined_controls(images)
    extra = {name: one for name, one in defined.items() if controls and name not in sources}
    plan = _Plan(
        images=images,
        sources=sources,
        controls=extra,
        metrics={label: metric for label, (_, metric) in chosen.items()},
        target=_target(target, sources, len(images)),
        seeds=streams(seed, len(images)),
        seed=seed if isinstance(seed, int) else 0,
        masks=_masks(masks, images),
        batch_size=batch_size,
        channels_last=channels_last,
        progress=progress,
        half=half,
    )
    plan.check(model)
    measured = plan.run(model)
    with torch.inference_mode(False):
        scores = {
            label: {
                name: Score.joined(
                    [part[name][label] for part in measured],
                    metric=spec.name,
                    better=spec.better,
                    options=spec.settings(metric),
                    axis=metric.axis,
                    seed=seed if isinstance(seed, int) else 0,
                )
                for name, (spec, metric) in chosen.items()
            }
            for label in (*sources, *extra)
        }
    return Evaluation(scores, tuple(label for label in scores if label in defined))


# ------------------------------------------------------------------------------------------------------ what is checked


def _target(target: TargetLike, sources: Mapping[str, Source], count: int) -> Target:
    """What is explained: what the caller says, or the maps."""
    if isinstance(target, classes | top):
        raise InputError(f"Metrics take one target for each image, got {shown(target)}. Evaluate target by target.")
    given = Target(target, count)
    if given.function is not None:
        return given
    known = known_target(sources)
    if known is None:
        return given
    if given.indices is not None and not torch.equal(given.indices.flatten().expand(count), known.long()):
        raise InputError("The maps explain other targets than those given. Leave the target out, or explain these.")
    return Target(known, count)


def _masks(masks: Tensor | Sequence[Tensor] | None, images: Tensor) -> list[Tensor] | None:
    if masks is None:
        return None
    if isinstance(masks, Tensor):
        masks = dense(masks, "object masks")
    if len(masks) != len(images):
        raise InputError(f"Expected one object mask for each of the {len(images)} images, got {len(masks)}.")
    masks = [dense(mask, "object masks") if isinstance(mask, Tensor) else mask for mask in masks]
    for index, mask in enumerate(masks):
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() == 0:
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"Expected object masks as tensors [h, w], got {got} for image {index}.")
    return [mask.to(images.device) != 0 for mask in masks]


# ------------------------------------------------------------------------------------------------------- the planner


@dataclass(frozen=True, eq=False)
class _Plan:
    """A call, checked."""

    images: Tensor
    sources: Mapping[str, Source]
    controls: Mapping[str, Control]
    metrics: Mapping[str, Metric]
    target: Target
    seeds: Sequence[int]
    seed: int
    masks: Sequence[Tensor] | None
    batch_size: int | None
    channels_last: bool
    progress: bool
    half: bool

    def check(self, model: nn.Module | None) -> None:
        """Refuse metrics that lack what they need, before anything is computed."""
        for label, metric in self.metrics.items():
            if "model" in metric.needs or "methods" in metric.needs:
                if model is None:
                    raise InputError(f"The metric {label!r} needs the model, got None.")
                check_model(model)
            if "masks" in metric.needs and self.masks is None:
                raise InputError(f"The metric {label!r} needs the objects: evaluate(..., masks=...), [N, H, W].")
            if "methods" in metric.needs:
                mute = [name for name, source in self.sources.items() if source.explainer is None]
                if mute:
                    raise InputError(
                        f"The metric {label!r} explains again, but nobody knows how the maps of {', '.join(mute)} were "
                        "made. Pass a Comparison, or evaluate(..., explainers={name: method or function})."
                    )
            metric.check(self.sources)

    def run(self, model: nn.Module | None) -> list[dict[str, Mapping[str, Measurement]]]:
        """What each metric says of each label, chunk by chunk."""
        count = len(self.images)
        labels = len(self.sources) + len(self.controls)
        size = max(1, _RANKINGS // (labels * self.images[0].numel() * 4))
        measured = []
        guard = contextlib.nullcontext() if model is None else untouched(model, self.half)
        with (
            surroundings(self.images),
            guard,
            torch.no_grad(),
            passing_bar("evaluation", None, "image", self.progress) as bar,
        ):
            per_pass = self._per_pass(model)
            for start in range(0, count, size):
                rows = slice(start, min(start + size, count))
                with at_work(rows, "scored"):
                    study = self._study(model, rows, per_pass, bar.update)
                measured.append(self._measure(study, bar))
                per_pass = study.per_pass
        return measured

    def _per_pass(self, model: nn.Module | None) -> int:
        if self.batch_size is not None or model is None:
            return self.batch_size or 1
        one = self.images[:1]
        with torch.enable_grad():
            return images_per_pass(one, lambda few: forward(model, few), wanted=2**30)

    def _study(self, model: nn.Module | None, rows: slice, per_pass: int, progress: Callable[[int], Any]) -> Study:
        images = self.images[rows]
        seeds = self.seeds[rows]
        maps = chunks(self.sources, rows, images)
        maps |= {label: control_maps(one, images, seeds) for label, one in self.controls.items()}
        known = self.target.indices
        indices = None if known is None else known.expand(self.target.samples, -1)[rows].to(images.device)
        return Study(
            images=images,
            maps=maps,
            rows=rows,
            seeds=seeds,
            seed=self.seed,
            target=self.target,
            model=model,
            indices=indices if model is None else None,
            masks=None if self.masks is None else self.masks[rows],
            per_pass=per_pass,
            batch_size=self.batch_size,
            channels_last=self.channels_last,
            progress=progress,
        )

    def _measure(self, study: Study, bar: Any) -> dict[str, Mapping[str, Measurement]]:
        requests = {label: metric.views(study) for label, metric in self.metrics.items()}
        if bar.total is None:  # the other chunks will ask for as much per image
            asked = sum(len(views) for some in requests.values() for views in some)
            bar.total = asked * len(self.images) // len(study)
        with at_work(study.rows, "scored"):
            scores = iter(study.scores_of([views for some in requests.values() for views in some]))
        measured = {}
        for label, metric in self.metrics.items():
            outputs = [next(scores) for _ in requests[label]]
            with at_work(study.rows, f"measured by {label!r}"):
                measured[label] = metric.measure(study, outputs)
            _check_measured(label, measured[label], study)
        return measured


def _check_measured(label: str, measured: Mapping[str, Measurement], study: Study) -> None:
    """A metric keeps its contract."""
    if measured.keys() != study.maps.keys():
        raise OptionError(
            f"The metric {label!r} must measure {', '.join(study.maps)}, got measurements of {', '.join(measured)}."
        )
    for method, one in measured.items():
        if one.values.shape != (len(study),):
            raise OptionError(
                f"The metric {label!r} must return one value per image, [{len(study)}], got "
                f"{list(one.values.shape)} for {method!r}."
            )
