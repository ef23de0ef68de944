"""Measure the maps of a file, some samples at a time, so that neither maps nor images need fit into memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attrbox.core.hashing import weights_hash
from attrbox.core.progress import progress_bar
from attrbox.core.random_streams import streams
from attrbox.data.maps.reader import MapsFile
from attrbox.errors import InputError
from attrbox.metrics.evaluation import evaluate
from attrbox.metrics.results import Evaluation
from attrbox.metrics.scores import Score
from attrbox.pipeline.config import Config
from attrbox.pipeline.from_config import model_of, samples_for

_AT_ONCE = 64  # samples


def measure(
    maps: MapsFile, config: Config, most: int | None = None, another: bool = False
) -> tuple[Evaluation, list[int]]:
    """The scores of a file's maps, by the metrics of a config, and the samples that were measured.

    Args:
        maps: an open file.
        config: names the model, the images and the metrics.
        most: measure the first of the samples only.
        another: the model need not be the one that was explained.

    Raises:
        InputError: model or images are not those of the file, or there is nothing to measure.
        AttrboxError: as for `attrbox.evaluate`.
    """
    loaded = model_of(config)
    stored = maps.attributes.get("weights_sha256")
    if stored and not another and weights_hash(loaded.model) != stored:
        raise InputError(
            f"The model {loaded.name!r} has other weights than the one that {str(maps.path)!r} explains. Name another "
            "model on purpose with --model."
        )
    samples = samples_for(config, loaded)
    if samples.ids != maps.ids:
        raise InputError(f"The images are not those of {str(maps.path)!r}, by their names. Say where they are: --data.")
    done = np.logical_and.reduce([one.done for one in maps.values()])
    rows = [int(row) for row in np.flatnonzero(done)[:most]]
    if not rows:
        raise InputError(f"No sample of {str(maps.path)!r} has a map of every method. Finish the export first.")
    digests = maps.column("pixels_sha256")
    parts: list[Evaluation] = []
    seeds = streams(config.run.seed, maps.samples)
    groups = [rows[i : i + _AT_ONCE] for i in range(0, len(rows), _AT_ONCE)]
    with progress_bar("evaluate", len(rows)) as bar:
        for group, batch in zip(groups, samples.batches(groups, config.run.workers), strict=True):
            changed = [one.row for one in batch.flawed] + [
                one.row for one in batch.samples if digests is not None and one.sha256 != digests[one.row]
            ]
            if (changed and not another) or batch.images is None or batch.flawed:
                name = maps.ids[changed[0]]
                raise InputError(
                    f"The image of {name!r} is not what was explained, or cannot be read. Say where: --data."
                )
            parts.append(
                evaluate(
                    loaded.model,
                    batch.images.to(next(loaded.model.parameters()).device),
                    {label: maps[label].attribution(group) for label in maps},
                    config.chosen_metrics,
                    seed=[seeds[row] for row in group],
                    batch_size=config.run.batch_size,
                )
            )
            bar.update(len(group))
    return _joined(parts), rows


def _joined(parts: Sequence[Evaluation]) -> Evaluation:
    first = parts[0]
    scores = {
        label: {metric: _one([part[label][metric] for part in parts]) for metric in metrics}
        for label, metrics in first.items()
    }
    return Evaluation(scores, first.controls)


def _one(scores: Sequence[Score]) -> Score:
    if len(scores) == 1:
        return scores[0]
    first = scores[0]
    parts: Mapping[str, Tensor] = {
        name: torch.cat([getattr(score, name) for score in scores])
        for name in ("values", "curves", "groups")
        if getattr(first, name) is not None
    }
    details = {name: torch.cat([score.details[name] for score in scores]) for name in first.details}
    return replace(first, **parts, details=details)  # type: ignore[arg-type]
