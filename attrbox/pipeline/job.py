"""A job: what is computed for the samples of a set, batch by batch, and what the results depend on."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from attrbox.core.hashing import architecture_hash, weights_hash
from attrbox.core.model_state import check_model, untouched
from attrbox.core.outputs import Outputs
from attrbox.core.results import Attribution
from attrbox.core.targets import Target, TargetLike, classes, top
from attrbox.data.labels import ClassNames
from attrbox.data.maps.attributes import plain
from attrbox.data.maps.schema import Columns, Compression, DType, flaws, sample_columns
from attrbox.data.maps.writer import Flags, Layout, Written
from attrbox.data.samples import Batch, Label, Sample, Samples
from attrbox.engine.calling import forward
from attrbox.errors import (
    AttrboxError,
    InputError,
    ModelError,
    NoGradientError,
    NonFiniteWarning,
    RuleError,
    TargetError,
    UnknownNameError,
    UnsupportedModelError,
    shown,
)
from attrbox.methods.base import method_registry as registry
from attrbox.methods.comparison import Comparison
from attrbox.methods.explaining import compare

Channels: TypeAlias = Literal["all", "one"]
ExportTarget: TypeAlias = "TargetLike | Literal['label']"

# What an attribution has of each sample.
_OF_EACH_SAMPLE = ("values", "target", "score", "gap", "relative_gap", "expected")
_TRIES = 8  # samples on which the model's outputs are looked at before any is explained


@dataclass(frozen=True, eq=False)
class Job:
    """What `attrbox.export` was asked for, checked.

    Attributes:
        model: what is explained.
        samples: on what.
        methods: label -> name and options.
        target: what is explained, or "label".
        seed: as it was asked for.
        streams: of random numbers, one for each sample.
        one_stream: these are all the seed itself, as version 0.1 made them.
        batch_size: samples that are read and go through the model together.
        precision, channels_last: as for `attrbox.compare`.
        channels: "all", or "one" for the map for the eye.
        dtype: in which maps are stored.
        compression: how.
        names: of the model's classes.
    """

    model: nn.Module | Callable[[Tensor], Any]
    samples: Samples
    methods: Mapping[str, tuple[str, Mapping[str, Any]]]
    target: ExportTarget
    seed: int | Sequence[int]
    streams: Sequence[int]
    batch_size: int
    precision: torch.dtype | None
    channels_last: bool
    channels: Channels
    dtype: DType
    compression: Compression | None
    names: ClassNames = ClassNames()
    one_stream: bool = False

    def layout(self, *, model_name: str, config: str | None, photographs: bool) -> Layout:
        """The file for it."""
        settings = self.settings
        described = {
            label: {"summary": registry[name].summary, "reference": registry[name].reference, "channels": self.channels}
            for label, (name, _) in self.methods.items()
        }
        return Layout(
            ids=self.samples.ids,
            sources=self.samples.sources,
            settings=settings,
            header={"model_name": model_name, "weights_sha256": settings["weights_sha256"], "config": config},
            classes=self.names.names,
            descriptions=described,
            seed=self.seed if self.one_stream and isinstance(self.seed, int) else None,
            dtype=self.dtype,
            compression=self.compression,
            photographs=photographs,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the file depends on beside the methods, for JSON."""
        module = self.model if isinstance(self.model, nn.Module) else None
        return {
            "samples": len(self.samples),
            "data_sha256": self.samples.sha256,
            "labels_sha256": self.samples.labels_sha256,
            "architecture_sha256": None if module is None else architecture_hash(module),
            "weights_sha256": None if module is None else weights_hash(module),
            "target": _told(self.target),
            "seed": self.seed if isinstance(self.seed, int) else plain(torch.tensor(self.seed)),
            "batch_size": self.batch_size,
            "precision": plain(self.precision),
            "channels_last": self.channels_last,
            "dtype": self.dtype,
            "compression": self.compression,
            "channels": self.channels,
        }

    def batches(self, pending: Mapping[str, Flags]) -> list[list[int]]:
        """The batches in which something is pending. Samples always meet the same batch mates."""
        count, size = len(self.samples), self.batch_size
        asked = np.logical_or.reduce(list(pending.values()))
        starts = range(0, count, size)
        return [list(range(i, min(i + size, count))) for i in starts if asked[i : i + size].any()]

    def explain(
        self, batch: Batch, pending: Mapping[str, Flags], known: Tensor | None
    ) -> tuple[Written, Exception | None]:
        """The maps of a batch that are pending, and the error that left a sample without one, if there was one.

        Args:
            batch: samples with their images.
            pending: label -> whether a sample is to be explained.
            known: the classes that other maps of these samples explain, [n] or [n, K].
        """
        failed = {
            label: {sample.row: sample.flaw for sample in batch.flawed if wanted[sample.row]}
            for label, wanted in pending.items()
        }
        rows = [sample.row for sample in batch.samples]
        labels = [label for label, wanted in pending.items() if wanted[rows].any()]
        result = Written([], {}, [], {}, failed)
        if batch.images is None or not labels:
            return result, None
        try:
            comparison = self._compare(batch, labels, known)
        except (InputError, ModelError, TargetError, RuleError) as error:
            if isinstance(error, NoGradientError | UnsupportedModelError):
                raise
            return self._narrowed(batch, pending, known, labels, result, error)
        return self._written(batch, labels, pending, comparison, result), None

    def _narrowed(
        self,
        batch: Batch,
        pending: Mapping[str, Flags],
        known: Tensor | None,
        labels: list[str],
        result: Written,
        error: AttrboxError,
    ) -> tuple[Written, Exception]:
        """Find the methods that fail on a batch, and then the samples; others keep their batch mates."""
        assert batch.images is not None
        if len(labels) > 1:
            whole = Batch(batch.samples, batch.images, [])
            parts = [self.explain(whole, {label: pending[label]}, known) for label in labels]
            for part, _ in sorted(parts, key=lambda part: part[1] is not None):  # scores are those of the batch
                result = joined(result, part)
            result = replace(result, maps={label: result.maps[label] for label in labels if label in result.maps})
        elif len(batch.samples) > 1:
            for place, sample in enumerate(batch.samples):
                one = Batch([sample], batch.images[place : place + 1], [])
                part, _ = self.explain(one, pending, None if known is None else known[place : place + 1])
                result = joined(result, part)
        else:
            row = batch.samples[0].row
            result.failed[labels[0]][row] = f"{type(error).__name__}: {error}"
        return result, error

    def _compare(self, batch: Batch, labels: Sequence[str], known: Tensor | None) -> Comparison:
        assert batch.images is not None
        rows = [sample.row for sample in batch.samples]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)  # the file says so, sample by sample
            return compare(
                self.model,
                batch.images.to(device_of(self.model)),
                [self.methods[label] for label in labels],
                target=self._target(batch, known),
                seed=[self.streams[row] for row in rows],
                batch_size=self.batch_size,
                precision=self.precision,
                channels_last=self.channels_last,
                progress=False,
            )

    def _target(self, batch: Batch, known: Tensor | None) -> TargetLike:
        rows = [sample.row for sample in batch.samples]
        if known is not None:
            return known if known.dim() == 1 else classes(known)
        if isinstance(self.target, str):
            return [self._class_of(sample) for sample in batch.samples]
        return of_rows(self.target, len(self.samples), rows)

    def _class_of(self, sample: Sample) -> int:
        if isinstance(sample.label, int):
            return sample.label
        name = self.samples.ids[sample.row]
        if not isinstance(sample.label, str):
            raise TargetError(
                f"Expected a class as the label of {name!r}, which is to be explained, got {shown(sample.label)}. Put "
                "images into a folder for each class, give a table of labels (Loading(labels=...), --labels), or "
                "choose another target."
            )
        try:
            return self.names.index(sample.label)
        except UnknownNameError as error:
            raise TargetError(f"Expected a class of the model as the label of {name!r}. {error}") from error

    def _written(
        self,
        batch: Batch,
        labels: Sequence[str],
        pending: Mapping[str, Flags],
        comparison: Comparison,
        result: Written,
    ) -> Written:
        rows = [sample.row for sample in batch.samples]
        attributions = dict(zip(labels, map(self._stored, comparison.values()), strict=True))
        maps: dict[str, tuple[list[int], Attribution]] = {}
        for label, attribution in attributions.items():
            wrong = flaws(attribution, self.dtype)
            result.failed[label].update({rows[i]: why for i, why in wrong.items() if pending[label][rows[i]]})
            kept = [i for i, row in enumerate(rows) if pending[label][row] and i not in wrong]
            if kept:
                maps[label] = ([rows[i] for i in kept], picked(attribution, kept))
        columns = sample_columns(
            attributions,
            predictions=comparison.predictions,
            labels=_labels([sample.label for sample in batch.samples]),
            seed=[self.streams[row] for row in rows],
        )
        del columns["id"]  # which the file has from the beginning
        if self.one_stream:
            del columns["seed"]
        columns["pixels_sha256"] = np.array([sample.sha256 for sample in batch.samples], object)
        pictures = [sample.photograph for sample in batch.samples]
        return Written(rows, columns, pictures, maps, result.failed, tuple(comparison.images.shape[1:]))

    def _stored(self, attribution: Attribution) -> Attribution:
        """A method's maps as they are kept, on the CPU."""
        values = attribution.values.detach()
        axis = attribution.score.dim()
        if self.channels == "one" and values.dim() > axis + 1:
            values = attribution.heatmap().detach().unsqueeze(axis)
        return replace(attribution, values=values.cpu())


def picked(attribution: Attribution, places: Sequence[int]) -> Attribution:
    """Some samples of a method's maps."""
    if len(places) == len(attribution):
        return attribution
    parts: dict[str, Any] = {
        name: part[torch.as_tensor(places, device=part.device)]
        for name in _OF_EACH_SAMPLE
        if (part := getattr(attribution, name)) is not None
    }
    return replace(attribution, **parts, details={})


def joined(first: Written, second: Written) -> Written:
    """Two parts of a batch as one: other samples, those of the second after those of the first, or other methods."""
    new = [place for place, row in enumerate(second.rows) if row not in first.rows]
    rows = [*first.rows, *(second.rows[place] for place in new)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    columns: Columns = {
        name: np.concatenate([first.columns[name], values[new]] if first.rows else [values])[order]
        for name, values in second.columns.items()
    }
    photographs = [*first.photographs, *(second.photographs[place] for place in new)]
    maps = dict(first.maps)
    for label, (places, attribution) in second.maps.items():
        if label in maps:
            before, whole = maps[label]
            places, attribution = [*before, *places], _appended(whole, attribution)
        maps[label] = (places, attribution)
    failed = {
        label: first.failed.get(label, {}) | second.failed.get(label, {}) for label in first.failed | second.failed
    }
    return Written(
        [rows[place] for place in order],
        columns if second.rows else first.columns,
        [photographs[place] for place in order],
        maps,
        failed,
        first.shape or second.shape,
    )


def _appended(first: Attribution, second: Attribution) -> Attribution:
    parts: dict[str, Any] = {
        name: torch.cat([getattr(first, name), getattr(second, name)])
        for name in _OF_EACH_SAMPLE
        if getattr(first, name) is not None
    }
    return replace(first, **parts, details={})


def count_classes(model: nn.Module | Callable[[Tensor], Any], samples: Samples) -> int | None:
    """How many classes a model tells apart, by its outputs on the first of the samples that it runs on.

    None if its outputs are not [N, classes], or if it runs on none of the first few.
    """
    module = check_model(model, ())
    for row in range(min(len(samples), _TRIES)):
        image = samples[row].image
        if image is None:
            continue
        try:
            with untouched(module), torch.no_grad():
                scores = Outputs(forward(module, image[None].to(device_of(model))), 1).scores
        except ModelError:
            continue
        return scores.shape[1] if scores.dim() == 2 else None
    return None


def device_of(model: object) -> torch.device:
    """Where a model is; the CPU for what has no parameters."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return tensors[0].device if tensors else torch.device("cpu")


def of_rows(target: TargetLike, count: int, rows: Sequence[int]) -> TargetLike:
    """The targets of some of `count` samples."""
    checked = Target(target, count)
    if checked.indices is None or len(checked.indices) == 1:
        return target
    chosen = checked.indices[list(rows)]
    return classes(chosen) if checked.many else chosen[:, 0]


def _told(target: ExportTarget) -> Any:
    """A target in words, for JSON."""
    if target is None:
        return "argmax"
    if isinstance(target, top):
        return {"top": target.count}
    if isinstance(target, classes):
        return {"classes": plain(torch.as_tensor(target.indices))}
    if isinstance(target, int | str) or callable(target):
        return plain(target)
    return plain(torch.as_tensor(target))


def _labels(labels: Sequence[Label | None]) -> list[int | float] | list[str] | None:
    """Labels of one kind, with -1 or an empty text where a sample has none; None if no sample has one."""
    kinds = {type(label) for label in labels if label is not None}
    if not kinds:
        return None
    if str in kinds:
        return ["" if label is None else str(label) for label in labels]
    return [label if isinstance(label, int | float) else -1 for label in labels]
