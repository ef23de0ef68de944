"""`export`: maps of any number of samples into one HDF5 file, which a killed run leaves readable and ready to go on.

Samples are cut into the same batches in every run. A thread or processes read the next ones while the methods explain
one batch and another thread writes the last; a batch is committed as a whole (`attrbox.data.maps.journal`).
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attrbox.core.atomic_files import as_path
from attrbox.core.memory import MOST_PER_PASS
from attrbox.core.model_state import check_model
from attrbox.core.options import choose
from attrbox.core.progress import progress_bar
from attrbox.core.random_streams import streams
from attrbox.core.renaming import grouped_arguments
from attrbox.core.targets import Target
from attrbox.data.labels import read_labels
from attrbox.data.maps.journal import Journal
from attrbox.data.maps.writer import Flags, Growing, Output, known_targets
from attrbox.data.models.loaded_model import LoadedModel
from attrbox.data.samples import Batch, Samples, SamplesLike
from attrbox.errors import FileError, InputError, TargetError, shown
from attrbox.methods.base import method_registry as registry
from attrbox.methods.comparison import MethodLike
from attrbox.pipeline.job import ExportTarget, Job, device_of, of_rows
from attrbox.pipeline.resumption import check_same
from attrbox.pipeline.samples_given import labelled, samples_given, understood
from attrbox.pipeline.settings import FORMERLY, GROUPS, Loading, Running, Storage
from attrbox.pipeline.shards import Shard

_QUEUE = 2  # batches that may wait to be written


@dataclass(frozen=True)
class Summary:
    """What an export did.

    Attributes:
        path: the file; of a shard, its own.
        samples: how many the data has.
        images: samples that this run explained.
        maps: maps that it made.
        done: label -> samples with a map, of this and earlier runs.
        failed: sample -> why it got no map of some method in this run.
        seconds: how long it took.
        whole: the file that joins all shards, if this was one and the others are complete.
    """

    path: Path
    samples: int
    images: int
    maps: int
    done: Mapping[str, int]
    failed: Mapping[str, str]
    seconds: float
    whole: Path | None = None

    @property
    def complete(self) -> bool:
        """Whether every sample has a map of every method."""
        return all(count == self.samples for count in self.done.values())

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.maps} new maps of {self.images} images in {self.seconds:.1f} s"]
        if self.images > self.seconds:
            lines[0] += f", {self.images / self.seconds:.1f} images/s"
        elif self.images:
            lines[0] += f", {self.seconds / self.images:.1f} s per image"
        lines += [f"  {label}: {count} of {self.samples} samples" for label, count in self.done.items()]
        lines += [f"  no map of {name!r}: {reason}" for name, reason in list(self.failed.items())[:10]]
        if len(self.failed) > 10:
            lines.append(f"  ... nor of {len(self.failed) - 10} more; the file tells why")
        lines += [f"{self.whole}: joins all shards"] if self.whole else []
        return "\n".join(lines)


@grouped_arguments(GROUPS, FORMERLY)
def export(
    model: nn.Module | LoadedModel | Callable[[Tensor], Any],
    data: SamplesLike,
    path: str | Path,
    methods: Sequence[MethodLike],
    *,
    target: ExportTarget = None,
    seed: int | Sequence[int] = 0,
    loading: Loading = Loading(),
    storage: Storage = Storage(),
    running: Running = Running(),
    progress: bool = True,
) -> Summary:
    """Write the maps of all samples to an HDF5 file (layout: `attrbox.data.maps.schema`); the same call goes on after
    a kill.

    A sample that cannot be read, or whose map is not finite, is left out with its reason, and the rest goes on.

    Args:
        model: as for `attrbox.explain`, or a `LoadedModel`, which brings its preprocessing and class names.
        data: a torch dataset, an ordered `DataLoader`, an image folder, a list of files, or a tensor [N, C, H, W];
            see `attrbox.data.samples.samples_of`.
        path: the file. If it exists, what is missing there is added.
        methods: as for `attrbox.compare`; they share their passes through the model.
        target: as for `attrbox.explain`, or "label" for the label of each sample.
        seed: as for `attrbox.explain`; places are those in the whole data, of all shards.
        loading: how samples are read, their names and labels (`attrbox.Loading`).
        storage: what the file holds, such as its dtype (`attrbox.Storage`).
        running: size of batches, precision, shards, and what becomes of a file that is there (`attrbox.Running`).
        progress: show a progress bar; where there is no terminal, a line a minute.

    Raises:
        FileError: the file is broken, foreign, of another model, target, data or settings (which is named), or is being
            written by another process; or it cannot be written any further, and keeps what it has.
        InputError: the data cannot be used, or no sample could be explained; there is no new file then.
        AttrboxError: as for `attrbox.compare`.
    """
    began = time.perf_counter()
    path = as_path(path, "the name of the file to write")
    chosen = choose(registry, methods)
    if isinstance(target, str) and target != "label":
        raise TargetError(
            f"Expected a class number, 'label' or another target of attrbox.explain, got {shown(target)}."
        )
    loaded = model if isinstance(model, LoadedModel) else None
    module = model.model if isinstance(model, LoadedModel) else model
    check_model(module, [label for label, (_, method) in chosen.items() if method.needs_gradients])
    batch_size, workers = running.batch_size, loading.workers
    if isinstance(data, DataLoader):
        batch_size = batch_size or data.batch_size
        workers = data.num_workers if workers is None else workers
    if isinstance(data, Samples):
        samples = data
    else:
        samples = samples_given(data, loaded, loading.preprocess, loading.ids, storage.thumbnails)
    if (labels := loading.labels) is not None:
        samples = samples.labeled(labels if isinstance(labels, Mapping) else read_labels(labels))
    samples, names = understood(samples, loaded, module, target)
    seeds = streams(seed, len(samples))
    if not isinstance(target, str):
        Target(target, len(samples))  # of the right length
    shard, whole = running.shard or Shard.current(), path
    if shard:
        shard.check(whole)
        batch_size, path = batch_size or _usual_batch(module), shard.path(whole)
        rows = shard.rows(len(samples), batch_size)
        if not isinstance(target, str):
            target = of_rows(target, len(samples), rows)
        seeds = tuple(seeds[row] for row in rows)
        seed = seed if isinstance(seed, int) else seeds
        samples = samples.part(rows)
    with Journal(path) as journal, contextlib.ExitStack() as stack:
        growing = _existing(journal, running)
        if growing:
            stack.enter_context(growing)
        job = Job(
            model=module,
            samples=samples,
            methods=labelled(chosen, methods, growing, running.keep_both),
            target=target,
            seed=seed,
            streams=seeds if growing is None else growing.streams or seeds,
            one_stream=growing is not None and growing.streams is not None,
            batch_size=batch_size or (growing.settings["batch_size"] if growing else _usual_batch(module)),
            precision=running.precision,
            channels_last=running.channels_last,
            channels=storage.channels,
            dtype=storage.dtype,
            compression=storage.compression,
            names=names,
        )
        layout = job.layout(
            model_name=storage.model_name or (loaded.name if loaded else _name(module)),
            config=storage.config,
            photographs=storage.thumbnails,
        )
        if growing:
            check_same(growing, layout, job)
        with Output(journal, layout, growing, running.overwrite) as output:
            images = _run(job, output, workers or 0, running.retry, progress)
            flags = output.growing.done if output.growing else {}
            done = {label: int(flags[label].sum()) if label in flags else 0 for label in (*flags, *job.methods)}
    joined = shard is not None and shard.join(whole, list(job.methods))
    failed = {samples.ids[row]: reason for reasons in output.failed.values() for row, reason in reasons.items()}
    seconds = time.perf_counter() - began
    return Summary(path, len(samples), images, output.maps, done, failed, seconds, whole if joined else None)


# ----------------------------------------------------------------------------------------------------- what is checked


def _existing(journal: Journal, running: Running) -> Growing | None:
    """The file to go on with, if there is one."""
    if running.overwrite or not journal.path.exists():
        return None
    if not running.resume:
        raise FileError(
            f"{str(journal.path)!r} exists already. Choose another path, resume=True or overwrite=True in Running."
        )
    return Growing(journal)


def _usual_batch(model: object) -> int:
    return MOST_PER_PASS.get(device_of(model).type, 32)


def _name(model: object) -> str:
    return str(getattr(model, "__name__", type(model).__name__))


# ------------------------------------------------------------------------------------------------------------ the work


def _run(job: Job, output: Output, workers: int, retry: bool, progress: bool) -> int:
    """Read, explain and write all that is pending; returns how many images were explained."""
    there = output.growing
    pending = _pending(job, there, retry)
    batches = job.batches(pending)
    if there and batches:
        there.note_resumption()
    shape = there.image_shape if there else None
    untried = {label for label in pending if there is None or label not in there.methods}
    explained, count = 0, len(job.samples)
    writing: deque[Future[None]] = deque()
    bar = progress_bar("export", count, count - sum(map(len, batches)), progress)
    with bar, ThreadPoolExecutor(1, "attrbox-write") as thread:
        for rows, batch in zip(batches, job.samples.batches(batches, workers), strict=True):
            if shape is None:
                shape = _first_shape(batch)
            batch = batch.of_shape(shape)
            known = known_targets(there.targets if there else None, [sample.row for sample in batch.samples])
            result, error = job.explain(batch, pending, known)
            if error and not explained and untried - result.maps.keys():  # not one sample's fault, it seems
                raise error
            explained += len(result.rows)
            writing.append(thread.submit(output.write, result))
            while len(writing) > _QUEUE or (writing and writing[0].done()):
                writing.popleft().result()
            bar.update(len(rows))
        while writing:
            writing.popleft().result()
    if output.growing is None:
        reason = next(iter(next(iter(output.failed.values())).values()))
        raise InputError(f"None of the {count} samples could be explained. The first: {reason}.")
    return explained


def _pending(job: Job, growing: Growing | None, retry: bool) -> dict[str, Flags]:
    """label -> whether a sample is still to be explained."""
    pending = {}
    for label in job.methods:
        if growing and label in growing.done:
            tried = growing.done[label] if retry else growing.done[label] | growing.failed[label]
            pending[label] = ~tried
        else:
            pending[label] = np.ones(len(job.samples), bool)
    return pending


def _first_shape(batch: Batch) -> tuple[int, ...] | None:
    """The shape of the first images. There is no file yet, so data of mixed sizes can be refused altogether."""
    if batch.mixed:
        raise InputError(
            f"Expected images of one size, but {batch.flawed[0].flaw}. Give a transform that resizes and crops to a "
            "fixed size (Loading(preprocess=...), or the dataset's own)."
        )
    return None if batch.images is None else tuple(batch.images.shape[1:])
