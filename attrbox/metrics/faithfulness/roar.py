"""ROAR, remove and retrain: how much a model can still learn once what a method ranks highest is gone.

For each method, share of pixels and seed: remove the highest-ranked pixels from the images of the training and the test
set, train a new model from scratch, and test it. Low accuracies speak for the method (Hooker et al. 2019). Beside the
methods stand the controls: a random order, and edges.

Every cell of this grid is kept in a small file of its own as soon as it is done. A run that was killed, or whose
trainer failed, goes on from there when it is called again with the same arguments.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from attrbox.core.atomic_files import as_path, whole_file
from attrbox.core.fills import fill_images
from attrbox.core.random_streams import mixed, numbers, permutations
from attrbox.core.validation import check, check_flag, check_images
from attrbox.data.maps.schema import dataset_name
from attrbox.errors import FileError, InputError, OptionError, TrainingError
from attrbox.metrics.faithfulness.curves import check_fill
from attrbox.metrics.figures import styles
from attrbox.metrics.records import Maps
from attrbox.metrics.results import write_csv
from attrbox.metrics.sources import Source, check_shapes, chunks, control_maps, defined_controls
from attrbox.metrics.training import ModelFactory, TrainFunction, accuracy, check_labelled, train
from attrbox.visualization.plots import save_figure

Labelled: TypeAlias = tuple[Tensor, Tensor]

# The model on the images as they are, which does not depend on the method.
WHOLE = "whole images"
# Images that are degraded at once.
_AT_ONCE = 1024


@dataclass(frozen=True)
class Cell:
    """One trained model.

    Attributes:
        method: the label; `WHOLE` at share 0.
        fraction: the share of pixels removed.
        seed: of the weights and of the training.
        accuracy: on the test images, degraded alike.
    """

    method: str
    fraction: float
    seed: int
    accuracy: float


@dataclass(frozen=True)
class Roar:
    """The accuracies of a grid.

    Attributes:
        cells: what was trained.
        methods: the labels, the controls last.
        fractions: the shares of pixels removed.
        controls: which of the methods are controls.
    """

    cells: tuple[Cell, ...]
    methods: tuple[str, ...]
    fractions: tuple[float, ...]
    controls: tuple[str, ...] = ()

    def accuracies(self, method: str, fraction: float) -> list[float]:
        """The accuracies of the seeds; at share 0 they are the same for all methods."""
        label = WHOLE if fraction == 0 else method
        return [cell.accuracy for cell in self.cells if cell.method == label and cell.fraction == fraction]

    def mean(self, method: str, fraction: float) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.accuracies(method, fraction)))

    def table(self, digits: int = 2) -> str:
        """Methods by shares as a Markdown table: percent correct, mean ± standard deviation over the seeds."""
        lines = ["| method | " + " | ".join(f"{100 * fraction:g} %" for fraction in self.fractions) + " |"]
        lines.append("|---|" + "---:|" * len(self.fractions))
        for method in self.methods:
            cells = []
            for fraction in self.fractions:
                values = 100 * np.array(self.accuracies(method, fraction))
                spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.{digits}f}{spread}")
            name = f"{method} (control)" if method in self.controls else method
            lines.append("| " + " | ".join([name, *cells]) + " |")
        return "\n".join(lines)

    def to_csv(self, path: str | Path) -> Path:
        """Write one row per trained model.

        Raises:
            FileError: the file cannot be written.
        """
        write_csv(path, [vars(cell) for cell in self.cells])
        return Path(path)

    def plot(self, path: str | Path | None = None, *, dpi: float = 130) -> Figure:
        """Accuracy over the share of pixels removed, all methods in one panel; dots are seeds, lines their means.

        Raises:
            FileError: the file cannot be written.
        """
        figure = Figure((4.6, 3.4), dpi=dpi, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        for method, style in styles(self.methods, self.controls).items():
            means = [100 * self.mean(method, fraction) for fraction in self.fractions]
            panel.plot(self.fractions, means, label=method, **style)
            for fraction in self.fractions:
                values = [100 * value for value in self.accuracies(method, fraction)]
                panel.plot([fraction] * len(values), values, ".", color=style["color"], markersize=3)
        panel.set_xlabel("share of pixels removed, then trained anew", size=7.5)
        panel.set_ylabel("test accuracy in percent (lower is better)", size=7.5)
        panel.tick_params(labelsize=7.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False)
        if path is not None:
            save_figure(figure, path)
        return figure


def roar(
    factory: ModelFactory,
    train_set: Labelled,
    test_set: Labelled,
    maps: Mapping[str, tuple[Tensor, Tensor]],
    *,
    fractions: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9),
    seeds: Sequence[int] = (0, 1, 2),
    trainer: TrainFunction | None = None,
    fill: float | str = "mean",
    controls: bool = True,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Roar:
    """Train the grid of methods x shares x seeds, or what of it is not in the folder yet.

    Args:
        factory: makes a new model each time.
        train_set, test_set: images [N, C, H, W], normalised, and classes [N].
        maps: label -> maps of the training and of the test images, [N, H, W], [N, 1, H, W] or [N, C, H, W] (their
            channels are summed); positive supports the class.
        fractions: shares of pixels to remove, of each image.
        seeds: one model each.
        trainer: function (model, images, labels, seed) -> model or None; default: `attrbox.metrics.training.Trainer()`.
        fill: what removed pixels show: "mean" (of each channel over the training images, as published), "zero", a
            number, or for each image its own "blur" or "noise".
        controls: add `random` and `sobel`; a method of the same name takes their place.
        folder: where the results are kept, one file per cell; None keeps nothing.
        progress: show a progress bar, if a terminal is there to show it.

    Returns:
        The accuracies, with a table and a figure.

    Raises:
        TrainingError: the trainer or the factory failed in some cell; the cause is the original exception. The cells
            that were done are in the folder, and the next call goes on from there.
        InputError: images, labels and maps do not fit.
        OptionError: a share, a seed or the fill is out of range.
        FileError: the folder holds another experiment, or cannot be written.
    """
    place = None if folder is None else as_path(folder, "the name of a folder")
    grid = _Grid(train_set, test_set, maps, tuple(fractions), tuple(seeds), fill, controls)
    store = None if place is None else _Store(place, grid.fingerprint())
    cells = []
    disable = None if progress else True  # None: shown on a terminal only
    for method, fraction, seed in tqdm(list(grid.cells()), desc="roar", unit="model", disable=disable):
        cell = None if store is None else store.read(method, fraction, seed)
        if cell is None:
            cell = Cell(method, fraction, seed, _measured(factory, trainer, grid, method, fraction, seed))
            if store is not None:
                store.write(cell)
        cells.append(cell)
    return Roar(tuple(cells), grid.labels, grid.fractions, grid.controls)


def _measured(
    factory: ModelFactory, trainer: TrainFunction | None, grid: "_Grid", method: str, fraction: float, seed: int
) -> float:
    """The accuracy of one cell."""
    (images, labels), (test_images, test_labels) = grid.degraded(method, fraction)
    try:
        model = train(factory, images, labels, trainer, seed=seed)
        return accuracy(model, test_images, test_labels)
    except Exception as error:  # foreign code: whatever a trainer raises
        raise TrainingError(
            f"Training failed for {method!r} at {fraction:g}, seed {seed}: {type(error).__name__}: {error}. Mend the "
            "trainer and call again: with a folder, the cells that are done stay done."
        ) from error


class _Grid:
    """The experiment, checked."""

    def __init__(
        self,
        train_set: Labelled,
        test_set: Labelled,
        maps: Mapping[str, tuple[Tensor, Tensor]],
        fractions: tuple[float, ...],
        seeds: tuple[int, ...],
        fill: float | str,
        controls: bool,
    ) -> None:
        check_fill(fill)
        check_flag("controls", controls)
        valid = bool(fractions) and all(0 <= f <= 1 for f in fractions) and len(set(fractions)) == len(fractions)
        check(valid, "fractions", "different shares of pixels from 0 to 1", fractions)
        valid = bool(seeds) and all(isinstance(s, int) for s in seeds) and len(set(seeds)) == len(seeds)
        check(valid, "seeds", "different whole numbers, at least one", seeds)
        for images, labels in (train_set, test_set):
            check_labelled(check_images(images), labels)
        if not maps:
            raise InputError("Expected the maps of at least one method, got none.")
        if WHOLE in maps:
            raise OptionError(f"The label {WHOLE!r} is taken. Rename the method.")
        self.sets = (train_set, test_set)
        self.maps = maps
        self.fractions, self.seeds, self.fill = fractions, seeds, fill
        for place, (images, _) in enumerate(self.sets):
            check_shapes({label: Source(both[place]) for label, both in maps.items()}, images)
        defined = defined_controls(train_set[0]) if controls else {}
        self._controls = {name: one for name, one in defined.items() if name not in maps}
        self.controls = tuple(self._controls)
        self.labels = (*maps, *self.controls)

    def cells(self) -> Iterator[tuple[str, float, int]]:
        """Method, share and seed of each model; seeds run slowest, so that a broken run has whole rows."""
        for seed in self.seeds:
            if 0 in self.fractions:
                yield WHOLE, 0.0, seed
            for fraction in self.fractions:
                for label in self.labels if fraction > 0 else ():
                    yield label, float(fraction), seed

    def degraded(self, method: str, fraction: float) -> tuple[Labelled, Labelled]:
        """Both sets without the highest-ranked pixels of each image."""
        if fraction == 0:
            return self.sets
        both = [
            (torch.cat([self._without(method, place, rows, fraction) for rows in _chunks(len(images))]), labels)
            for place, (images, labels) in enumerate(self.sets)
        ]
        return both[0], both[1]

    def _without(self, method: str, place: int, rows: slice, fraction: float) -> Tensor:
        images = self.sets[place][0][rows]
        # Each image of both sets has a stream of its own, whatever the chunk.
        seeds = [mixed(place, index) for index in range(rows.start, rows.stop)]
        maps = self._maps(method, place, rows, images, seeds)
        heatmap = maps.pixels.flatten(1)
        shuffled = permutations(seeds, 0, heatmap.shape[1], images.device)
        order = heatmap.gather(1, shuffled).sort(dim=1, descending=True, stable=True).indices
        taken = torch.zeros_like(heatmap, dtype=torch.bool)
        taken.scatter_(1, shuffled.gather(1, order)[:, : round(fraction * heatmap.shape[1])], True)
        taken = taken.view(images.shape) if images.dim() == 2 else taken.view(len(images), 1, *images.shape[2:])
        return torch.where(taken, self._filling(images, seeds), images)

    def _maps(self, method: str, place: int, rows: slice, images: Tensor, seeds: Sequence[int]) -> Maps:
        if method in self._controls:
            return control_maps(self._controls[method], images, seeds)
        return chunks({method: Source(self.maps[method][place])}, rows, images)[method]

    def _filling(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        if self.fill == "mean":  # of the training images: what a test image shows must not depend on itself
            whole = self.sets[0][0]
            axes = (0,) if whole.dim() == 2 else (0, *range(2, whole.dim()))
            return whole.mean(axes, keepdim=True)
        return fill_images(images, self.fill, lambda: numbers(seeds, 1, images.shape[1:], images))

    def fingerprint(self) -> dict[str, str]:
        """A hash of the data, and of each method's maps: what a kept result depends on, besides model and trainer."""
        data = hashlib.sha256(repr((self.fill, [list(images.shape) for images, _ in self.sets])).encode())
        for images, labels in self.sets:
            data.update(_bytes(images))
            data.update(_bytes(labels))
        prints = {WHOLE: data.hexdigest()}
        for label in self.labels:
            own = data.copy()
            for part in self.maps.get(label, ()):
                own.update(_bytes(part))
            prints[label] = own.hexdigest()
        return prints


class _Store:
    """A folder with one file per cell."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, str]) -> None:
        self.folder = folder
        self.fingerprint = fingerprint

    def path(self, method: str, fraction: float, seed: int) -> Path:
        """The file of a cell."""
        return self.folder / f"{dataset_name(method)} {fraction:g} {seed}.json"

    def read(self, method: str, fraction: float, seed: int) -> Cell | None:
        """A result that is there.

        Raises:
            FileError: it is of another experiment, or cannot be read.
        """
        path = self.path(method, fraction, seed)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            cell = Cell(record["method"], record["fraction"], record["seed"], float(record["accuracy"]))
            same = record["fingerprint"] == self.fingerprint[method]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(
                f"Cannot read {str(path)!r} as a result: {error}. Delete it to measure it again."
            ) from error
        if not same or (cell.method, cell.fraction, cell.seed) != (method, fraction, seed):
            raise FileError(
                f"{str(path)!r} is the result of other images, maps or fill. Choose another folder, or delete it."
            )
        return cell

    def write(self, cell: Cell) -> None:
        """Keep a result, whole or not at all."""
        record: dict[str, Any] = {**vars(cell), "fingerprint": self.fingerprint[cell.method]}
        with whole_file(self.path(cell.method, cell.fraction, cell.seed)) as part:
            part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE)]


def _bytes(values: Tensor) -> bytes:
    return torch.as_tensor(values).detach().cpu().contiguous().numpy().tobytes()
