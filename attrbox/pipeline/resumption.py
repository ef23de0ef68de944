"""Whether an export may go on with a file: another model, other data or another target would mix two things in one.

Most of it the file tells by numbers and hashes. What these cannot tell apart (functions as targets, black boxes, what a
model computes from things that are no weights, objects as options of methods) is tried: some finished samples are
scored again, with the batch mates that they had.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attrbox.core.model_state import HALF
from attrbox.data.maps.attributes import is_named
from attrbox.data.maps.schema import dataset_name
from attrbox.data.maps.writer import Growing, Layout, Written, known_targets
from attrbox.data.samples import Batch
from attrbox.errors import FileError
from attrbox.pipeline.job import Job, device_of

_PROBES = 3  # samples that are looked at again, each with its batch
_SCORES = "random"  # a method that only scores
_FINE, _ROUGH = 1e-3, 3e-2  # rounding, relative: of single precision on the CPU; of half precision and accelerators


def check_same(growing: Growing, layout: Layout, job: Job) -> None:
    """Refuse to go on with another model, other data, another target or other settings.

    Raises:
        FileError: there is a difference, which is named.
    """
    _check_settings(growing, layout, job)
    opaque = {
        label: entry
        for label, entry in job.methods.items()
        if label in growing.methods and is_named(list(entry[1].values()))
    }
    trial = replace(job, methods={_SCORES: (_SCORES, {}), **opaque})
    for batch in _finished(growing, job):
        for sample in [*batch.flawed, *batch.samples]:
            if sample.sha256 != growing.digests[sample.row]:
                reason = sample.flaw or "its pixels are others"
                raise FileError(
                    f"The data or its preprocessing has changed since {str(growing.path)!r} was begun: sample "
                    f"{job.samples.ids[sample.row]!r} is not what it was ({reason}). Choose another path, or restore "
                    "the data."
                )
        known = known_targets(growing.targets, [sample.row for sample in batch.samples])
        result, _ = trial.explain(batch, dict.fromkeys(trial.methods, np.ones(len(job.samples), bool)), known)
        _check_results(growing, job, result)


def _check_settings(growing: Growing, layout: Layout, job: Job) -> None:
    there = dict(growing.settings)
    if callable(job.target) and " at 0x" in str(there["target"]):  # an older attrbox named some functions so
        there["target"] = layout.settings["target"]
    other = [
        f"{name} {_short(there.get(name))} there and {_short(value)} here"
        for name, value in layout.settings.items()
        if there.get(name) != value
    ]
    names = [growing.model_name, layout.header["model_name"]]
    if other and names[0] != names[1]:  # alone it is no difference
        other = ["model {} there and {} here".format(*names), *other]
    if other:
        raise FileError(
            f"{str(growing.path)!r} was made with other settings: {'; '.join(other)}. Choose another path, or give the "
            "same; Running(overwrite=True) (--overwrite) replaces the file."
        )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}..." if len(text) > 40 else text


def _finished(growing: Growing, job: Job) -> Iterator[Batch]:
    """Batches from the beginning, the middle and the end of what is finished, of the samples that could be read."""
    known = np.flatnonzero(growing.digests != "")
    if len(known):
        probes = known[np.linspace(0, len(known) - 1, _PROBES).round().astype(int)]
        batches = [known[known // job.batch_size == number] for number in np.unique(probes // job.batch_size)]
        yield from job.samples.batches([[int(row) for row in rows] for rows in batches])


def _check_results(growing: Growing, job: Job, result: Written) -> None:
    """Refuse if scores, or maps by options that are objects, are not what the file has."""
    for label, (rows, attribution) in result.maps.items():
        if attribution.coverage.random:
            continue  # the model draws other numbers in each pass
        scored = label == _SCORES
        done = np.logical_or.reduce(list(growing.done.values())) if scored else growing.done[label]
        known = [place for place, row in enumerate(rows) if done[row]]
        stored = growing.file["samples/score"] if scored else growing.file["maps"][dataset_name(label)]
        there = stored[[rows[place] for place in known]]
        here = (attribution.score if scored else attribution.values)[known]
        place = unlike(there, here, job)
        if place is None:
            continue
        name = job.samples.ids[rows[known[place]]]
        what = f"the map of {name!r} by {label!r} is another"
        if scored:
            what = f"the score of {name!r} was {there[place].tolist()} and is {here[place].tolist()} now"
        raise FileError(
            f"{changed(job) if scored else f'The options of {label!r} have'} changed since {str(growing.path)!r} was "
            f"begun: {what}. Choose another path, or give what it was made with; Running(overwrite=True) (--overwrite) "
            "replaces the file."
        )
    lost = {
        row: reason
        for row, reason in result.failed[_SCORES].items()
        if any(done[row] for done in growing.done.values())
    }
    if lost:
        row, reason = next(iter(lost.items()))
        raise FileError(
            f"{changed(job)} changed since {str(growing.path)!r} was begun: {job.samples.ids[row]!r} cannot be scored "
            f"any more ({reason}). Choose another path, or give what it was made with."
        )


def changed(job: Job) -> str:
    """What must have changed where scores have."""
    return "The target function or the model has" if callable(job.target) else "What the model computes has"


def unlike(there: NDArray[Any], here: Tensor, job: Job) -> int | None:
    """The first row in which two results of one computation differ by more than its rounding, relative to the largest
    value."""
    if there.shape != tuple(here.shape):
        return 0
    rough = job.precision or here.dtype in HALF or there.dtype == np.float16 or device_of(job.model).type != "cpu"
    one, other = there.astype(float), here.double().cpu().numpy()
    limit = (_ROUGH if rough else _FINE) * np.abs(one).max(initial=0)
    far = (np.abs(one - other) > limit).reshape(len(one), -1).any(1)
    return int(far.argmax()) if far.any() else None
