"""Maps computed again from what a file says of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrbox.data.maps.attributes import options_in
from attrbox.data.maps.reader import MapsFile, MethodMaps
from attrbox.data.maps.writer import Written, known_targets
from attrbox.data.models.loaded_model import LoadedModel
from attrbox.data.samples import Samples, SamplesLike
from attrbox.errors import InputError
from attrbox.methods.base import method_registry as registry
from attrbox.pipeline.job import ExportTarget, Job
from attrbox.pipeline.resumption import changed, unlike
from attrbox.pipeline.samples_given import samples_given


def recompute(
    maps: MapsFile,
    sample: int | str,
    model: nn.Module | LoadedModel | Callable[[Tensor], Any],
    data: SamplesLike,
    *,
    target: ExportTarget = None,
    preprocess: Callable[[Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The maps of one sample once more, by what the file tells of how they were made; bit-equal on the same machine.

    The sample goes through the model with the batch mates that it had.

    Args:
        maps: an open file that `export` wrote.
        sample: its id or place.
        model, data, preprocess: as they were for `export`.
        target: only if it was a function.

    Returns:
        label -> map [C, H, W] ([K, C, H, W] for K targets), in the file's dtype, of the methods that have one.

    Raises:
        InputError: the file does not tell enough (it was merged or split, or options are tensors), the data or the
            model are not what they were, or the sample cannot be explained.
    """
    settings = maps.settings
    if not settings.get("batch_size"):
        raise InputError(f"{str(maps.path)!r} does not tell how its batches were made: not a file of attrbox.export.")
    loaded = model if isinstance(model, LoadedModel) else None
    samples = data if isinstance(data, Samples) else samples_given(data, loaded, preprocess, None, False)
    job = Job(
        model=model.model if isinstance(model, LoadedModel) else model,
        samples=samples,
        methods={label: (one.method, _known_options(one)) for label, one in maps.items()},
        target=target,
        seed=maps.seeds,
        streams=maps.seeds,
        batch_size=settings["batch_size"],
        precision=settings["precision"] and getattr(torch, settings["precision"].removeprefix("torch.")),
        channels_last=settings["channels_last"],
        channels=settings["channels"],
        dtype=settings["dtype"],
        compression=settings["compression"],
    )
    row = maps.place(sample)
    unasked = ("target", "seed", "labels_sha256")  # which the file has for each sample
    other = [name for name, value in job.settings.items() if name not in unasked and settings[name] != value]
    pending = {
        label: one.done & (np.arange(len(samples)) // job.batch_size == row // job.batch_size)
        for label, one in maps.items()
    }
    if other or not any(wanted[row] for wanted in pending.values()):
        raise InputError(
            f"{str(maps.path)!r} was made otherwise: {', '.join(other)} differ."
            if other
            else f"The file has no map of the sample {maps.ids[row]!r}."
        )
    (batch,) = samples.batches(job.batches(pending))
    known = known_targets(maps.column("target"), [one.row for one in batch.samples])
    result, error = job.explain(batch, pending, known)
    if row in result.rows and not _scored_alike(maps, job, result):
        raise InputError(
            f"{changed(job)} changed since {str(maps.path)!r} was made: {maps.ids[row]!r} has another score."
        )
    found = {
        label: attribution.values[rows.index(row)].to(getattr(torch, job.dtype))
        for label, (rows, attribution) in result.maps.items()
        if row in rows
    }
    if not found:
        raise error or InputError(f"The sample {maps.ids[row]!r} cannot be explained any more.")
    return found


def _scored_alike(maps: MapsFile, job: Job, result: Written) -> bool:
    stored = maps.column("score")
    random = any(attribution.coverage.random for _, attribution in result.maps.values())
    return (
        stored is None or random or unlike(stored[result.rows], torch.from_numpy(result.columns["score"]), job) is None
    )


def _known_options(one: MethodMaps) -> dict[str, Any]:
    options = options_in(one.dataset.file, one.dataset)
    if options is None:
        raise InputError(f"The options of {one.label!r} are tensors that the file does not keep. Explain it anew.")
    return registry[one.method].current(options, warn=False)
