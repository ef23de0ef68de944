"""Scores kept in the file of the maps that they are of.

/scores/LABEL/METRIC/{values, curves, fractions}     one row per sample of the file, NaN for those not measured
attributes: label, metric, better, options (JSON), axis, seed, control
"""

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from attrbox.data.maps.attributes import plain, storable
from attrbox.data.maps.journal import Journal, Transactions
from attrbox.data.maps.reader import MapsFile
from attrbox.data.maps.schema import dataset_name
from attrbox.errors import FileError
from attrbox.metrics.results import Evaluation
from attrbox.metrics.scores import Score


def write_scores(path: str | Path, evaluation: Evaluation, rows: Sequence[int], samples: int) -> None:
    """Add scores to a file of maps; those by the same metric of the same maps are replaced. All are written, or none.

    Args:
        path: the file.
        evaluation: scores of some of its samples.
        rows: which these are.
        samples: how many samples the file has.

    Raises:
        FileError: another process is writing the file, or it cannot be written.
    """
    with Journal(path) as journal, Transactions(journal) as raw:
        try:
            with h5py.File(raw, "r+") as file:
                for label, scores in evaluation.items():
                    for metric, score in scores.items():
                        name = f"scores/{dataset_name(label)}/{dataset_name(metric)}"
                        if name in file:
                            del file[name]
                        group = file.create_group(name)
                        _write(group, score, rows, samples)
                        group.attrs.update(label=storable(label), control=label in evaluation.controls)
                        group.attrs["name"] = storable(metric)
                file.flush()
                raw.commit()
                raw.discard()
        except (OSError, RuntimeError, ValueError) as error:
            raise FileError(f"Cannot write the scores into {str(path)!r} ({error}). It is as it was.") from error


def read_scores(maps: MapsFile) -> Evaluation | None:
    """The scores in a file, of all its samples; None if there are none."""
    if "scores" not in maps.file:
        return None
    found: dict[str, dict[str, Score]] = {}
    controls = []
    for metrics in maps.file["scores"].values():
        for group in metrics.values():
            label = str(group.attrs["label"])
            found.setdefault(label, {})[str(group.attrs["name"])] = _read(group)
            if group.attrs["control"] and label not in controls:
                controls.append(label)
    shared = [metric for metric in next(iter(found.values())) if all(metric in scores for scores in found.values())]
    ordered = [label for label in maps if label in found] + [label for label in found if label not in maps]
    return Evaluation(
        {label: {metric: found[label][metric] for metric in shared} for label in ordered}, tuple(controls)
    )


def _write(group: h5py.Group, score: Score, rows: Sequence[int], samples: int) -> None:
    def spread(part: Tensor) -> np.ndarray:
        whole = np.full((samples, *part.shape[1:]), np.nan)
        whole[list(rows)] = part.detach().double().cpu().numpy()
        return whole

    group["values"] = spread(score.values)
    if score.curves is not None and score.fractions is not None:
        group["curves"] = spread(score.curves)
        group["fractions"] = score.fractions.detach().double().cpu().numpy()
    if score.groups is not None:
        group["groups"] = spread(score.groups)
    group.attrs.update(
        metric=score.metric,
        better=score.better,
        options=json.dumps(plain(score.options), ensure_ascii=False),
        axis=score.axis,
        seed=score.seed,
        note=storable(score.note),
    )


def _read(group: h5py.Group) -> Score:
    part = {name: torch.from_numpy(group[name][()]) for name in ("curves", "fractions", "groups") if name in group}
    return Score(
        metric=str(group.attrs["metric"]),
        values=torch.from_numpy(group["values"][()]),
        better=group.attrs["better"],
        options=json.loads(group.attrs["options"]),
        curves=part.get("curves"),
        fractions=part.get("fractions"),
        axis=str(group.attrs["axis"]),
        groups=part.get("groups"),
        seed=int(group.attrs["seed"]),
        note=str(group.attrs.get("note", "")),
    )
