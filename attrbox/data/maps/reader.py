"""Files of maps, read lazily: `with open_maps("maps.h5") as maps: maps["deeplift"][17]`."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from attrbox.core.atomic_files import as_path
from attrbox.core.results import Attribution, Coverage
from attrbox.data.labels import ClassNames
from attrbox.data.maps.attributes import options_in, provenance_in, streams_in
from attrbox.data.maps.journal import recover
from attrbox.data.maps.schema import SCHEMA
from attrbox.errors import AttrboxError, FileError, InputError, UnknownNameError, near_miss

Rows: TypeAlias = "int | str | slice | Sequence[int] | Sequence[str] | Tensor | NDArray[Any]"


class MethodMaps(Dataset[Tensor]):
    """The maps of one method, [N, C, H, W] ([N, K, C, H, W] for K targets), as a dataset; each is read when asked for.

    Indices are places, ids, slices, or lists of these. To train on images and maps together:
    `torch.utils.data.StackDataset(images, maps["deeplift"])`; workers open the file for themselves.

    Attributes:
        label: what they are called in the file.
    """

    def __init__(self, maps: "MapsFile", label: str) -> None:
        self.label = label
        self._maps = maps

    @property
    def dataset(self) -> h5py.Dataset:
        """What the file has of them."""
        return self._maps.opened(f"maps/{self._maps.names[self.label]}")

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Method, options, units, reference, ... as they were written."""
        return dict(self.dataset.attrs)

    @property
    def method(self) -> str:
        """The registry's name."""
        return str(self.attributes["method"])

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method; tensors as their shape, dtype and SHA-256."""
        return dict(json.loads(self.attributes["options"]))

    def attribution(self, rows: Sequence[int]) -> Attribution:
        """The maps of some samples with all that the file knows of them.

        Raises:
            InputError: a sample has no map, or maps explain several targets.
        """
        maps, places = self._maps, list(rows)

        def known(column: NDArray[Any] | None) -> Tensor | None:
            return None if column is None else torch.as_tensor(column[places])

        seeds = [maps.seeds[place] for place in places]
        options = options_in(maps.file, self.dataset)
        score = known(maps.column("score"))
        return Attribution(
            method=self.method,
            values=self[places],
            target=known(maps.column("target")),
            score=torch.full((len(places),), torch.nan) if score is None else score,
            options=self.options if options is None else options,
            coverage=Coverage(),
            reduction="max" if self.attributes.get("reduction") == "max" else "sum",
            expected=known(maps.column("expected", self.label)),
            relative_gap=known(maps.column("relative_gap", self.label)),
            provenance=provenance_in(self.dataset, seeds),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, ...]"""
        return tuple(self.dataset.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As it is stored."""
        dtype: np.dtype[Any] = self.dataset.dtype
        return dtype

    @property
    def done(self) -> NDArray[np.bool_]:
        """Which samples had a map when the file was opened, [N]."""
        return self._maps.done(self.label).copy()

    @property
    def failed(self) -> dict[str, str]:
        """Why samples have none: id -> reason; empty for those that nobody has tried."""
        stored = self._maps.column("failed", self.label)
        reasons = [""] * len(self) if stored is None else stored.tolist()
        rows = np.flatnonzero(~self.done)
        return {self._maps.ids[row]: reasons[row] for row in rows}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> Tensor:
        return torch.from_numpy(self.numpy(rows))

    def numpy(self, rows: Rows = slice(None)) -> NDArray[Any]:
        """The maps of some samples as an array.

        Raises:
            IndexError: there is no such place.
            UnknownNameError: there is no such id.
            InputError: a sample has no map, with the reason.
            FileError: the file is damaged.
        """
        alone = isinstance(rows, int | str | np.integer)
        if alone:
            places = [self._maps.place(rows)]  # type: ignore[arg-type]
        elif isinstance(rows, slice):
            places = list(range(*rows.indices(len(self))))
        else:
            places = [self._maps.place(row) for row in (rows.tolist() if hasattr(rows, "tolist") else rows)]  # type: ignore[union-attr]
        self._check_done(places)
        dataset = self.dataset
        try:
            if alone:
                return np.asarray(dataset[places[0]])
            found = np.empty((len(places), *self.shape[1:]), self.dtype)
            for index, place in enumerate(places):  # a map is a chunk
                dataset.read_direct(found, np.s_[place], np.s_[index])
            return found
        except OSError as error:
            raise FileError(f"Cannot read {self.label!r} from {str(self._maps.path)!r}: {error}.") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def _check_done(self, places: Sequence[int]) -> None:
        done = self._maps.done(self.label)
        missing = [place for place in places if not done[place]]
        if missing:
            name = self._maps.ids[missing[0]]
            reason = self.failed[name] or "it has not been computed yet"
            raise InputError(
                f"The file has no {self.label!r} of {len(missing)} of the {len(places)} samples asked for, first "
                f"{name!r}: {reason}. `done` tells which there are."
            )

    def __repr__(self) -> str:
        return f"<MethodMaps {self.label!r} {list(self.shape)} {self.dtype}, {int(self.done.sum())} done>"


class MapsFile(Mapping[str, MethodMaps]):
    """A file of maps, open for reading: label -> maps, in the order in which they were written.

    It can be passed on to `attrbox.evaluate`, and to other processes, which open the file for themselves.

    Attributes:
        path: of the file.

    Raises:
        FileError: there is no such file, it is broken or foreign, or a part of it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path, "the name of a file of maps")
        self._file, self._owner = self._open(), os.getpid()
        self._opened: dict[str, h5py.Dataset] = {}
        self._done: dict[str, NDArray[np.bool_]] = {}

    def _open(self) -> h5py.File:
        path = str(self.path)
        if not os.path.isfile(path):  # which raises nothing, however long the name is
            raise FileError(f"Expected a file of maps, but there is no {path!r}.")
        recover(self.path)
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise FileError(
                f"{path!r} is no HDF5 file, or a broken one ({error}). Expected a file that attrbox wrote."
            ) from error
        try:
            _check_schema(file, path)
        except BaseException as error:
            file.close()
            if isinstance(error, AttrboxError):
                raise
            raise FileError(f"{path!r} is broken ({error}). Export it again.") from error
        return file

    @property
    def file(self) -> h5py.File:
        """The HDF5 file; in a forked process one of its own."""
        if self._owner != os.getpid():
            self._file, self._owner = self._open(), os.getpid()
            self._opened.clear()
        return self._file

    def opened(self, name: str) -> h5py.Dataset:
        """A dataset of the file, opened once."""
        file = self.file  # in a forked process another
        if name not in self._opened:
            self._opened[name] = file[name]
        return self._opened[name]

    def done(self, label: str) -> NDArray[np.bool_]:
        """Which samples have a map of a method, [N]; read once, and not to be changed."""
        if label not in self._done:
            self._done[label] = self.opened(f"samples/done/{self.names[label]}")[()]
        return self._done[label]

    @cached_property
    def names(self) -> dict[str, str]:
        """label -> name of the datasets."""
        return {str(dataset.attrs.get("label", name)): name for name, dataset in self.file["maps"].items()}

    @property
    def attributes(self) -> dict[str, Any]:
        """Schema, versions, model, SHA-256 of the weights, ... as they were written."""
        return dict(self.file.attrs)

    @property
    def settings(self) -> dict[str, Any]:
        """What the maps depend on beside the methods; empty if the file was written in one go."""
        return dict(json.loads(self.attributes.get("export", "{}")))

    @cached_property
    def ids(self) -> list[str]:
        """A name for each sample."""
        found: list[str] = self.file["samples/id"].asstr()[()].tolist()
        return found

    @cached_property
    def seeds(self) -> list[int]:
        """The stream of random numbers of each sample."""
        return streams_in(self.file)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.ids)}

    @cached_property
    def samples(self) -> int:
        """How many there are."""
        return int(self.file["samples/id"].shape[0])

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, where known."""
        return self.file["classes"].asstr()[()].tolist() if "classes" in self.file else None

    def class_name(self, index: int) -> str:
        """A class by name and number, "cock (7)"; "class 7" where names are not known, empty where no class is (-1)."""
        if index < 0:
            return ""
        classes = self._classes
        return f"{classes[index]} ({index})" if classes and index < len(classes) else f"class {index}"

    @cached_property
    def labeled(self) -> NDArray[np.int64] | None:
        """The true class of each sample, [N]; -1 where its label is no class of the model. None without labels."""
        labels = self.column("label")
        if labels is None:
            return None
        if labels.dtype.kind in "iub":
            return labels.astype(np.int64)
        names = ClassNames(None if self._classes is None else tuple(self._classes))
        found = {label: names.find(label) if isinstance(label, str) else [] for label in set(labels.tolist())}
        return np.array([found[label][0] if len(found[label]) == 1 else -1 for label in labels.tolist()], np.int64)

    @cached_property
    def _classes(self) -> list[str] | None:
        return self.classes

    def column(self, name: str, label: str | None = None) -> NDArray[Any] | None:
        """What is known of the samples: "source", "label", "target", "prediction", "score", "seed", "pixels_sha256";
        with a label also "expected", "relative_gap", "checksum", "failed". None if nothing is."""
        samples = self.file["samples"]
        path = name if label is None else f"{name}/{self.names[label]}"
        if path not in samples:
            return None
        dataset = samples[path]
        values: NDArray[Any] = dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()]
        return values

    def photograph(self, sample: int | str) -> bytes:
        """A picture of a sample, the bytes of a JPEG or PNG file; empty if there is none."""
        if "photograph" not in self.file["samples"]:
            return b""
        return bytes(self.file["samples/photograph"][self.place(sample)])

    def place(self, sample: "int | str | np.integer[Any]") -> int:
        """The place of a sample, by place or id.

        Raises:
            IndexError: there is no such place.
            UnknownNameError: there is no such id.
        """
        if isinstance(sample, str):
            if sample not in self._places:
                raise UnknownNameError(
                    f"No sample {sample!r} in {str(self.path)!r}. {near_miss(sample, self.ids[:50])}"
                )
            return self._places[sample]
        place = int(sample) + (self.samples if sample < 0 else 0)
        if not 0 <= place < self.samples:
            raise IndexError(f"Expected a sample from 0 to {self.samples - 1}, got {sample}.")
        return place

    def __getitem__(self, label: str) -> MethodMaps:
        if label not in self.names:
            raise UnknownNameError(f"No maps called {label!r} in {str(self.path)!r}. {near_miss(label, self.names)}")
        return MethodMaps(self, label)

    def __contains__(self, label: object) -> bool:
        return label in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def close(self) -> None:
        """Close the file."""
        if self._owner == os.getpid():
            self._file.close()

    def __enter__(self) -> "MapsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        MapsFile.__init__(self, state["path"])

    def __repr__(self) -> str:
        return f"<MapsFile {str(self.path)!r}, {self.samples} samples: {', '.join(self)}>"


def open_maps(path: str | Path) -> MapsFile:
    """Open a file of maps for reading; a commit that was interrupted is finished first.

    While an export is still writing, what it had committed at the time of opening is seen; open again for more.

    Raises:
        FileError: there is no such file, it is broken or foreign, or a part of it is missing.
    """
    return MapsFile(path)


def _check_schema(file: h5py.File, path: str) -> None:
    if "maps" not in file or "samples/id" not in file or "samples/done" not in file or "schema" not in file.attrs:
        raise FileError(f"{path!r} is an HDF5 file, but none that attrbox wrote: /maps and /samples are missing.")
    if file.attrs["schema"] != SCHEMA:
        raise FileError(
            f"{path!r} has schema {file.attrs['schema']}, this attrbox reads {SCHEMA}. Use its own version."
        )
    for dataset in file["maps"].values():
        if dataset.is_virtual:
            for source in dataset.virtual_sources():
                part = Path(path).parent / source.file_name
                if not part.is_file():
                    raise FileError(f"{path!r} is made of shards, of which {str(part)!r} is missing. Put it there.")
