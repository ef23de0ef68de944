"""A file of maps that grows batch by batch, by commits: what was committed stays readable, come what may."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from attrbox.core.atomic_files import whole_file
from attrbox.core.results import Attribution
from attrbox.data.maps.attributes import storable, streams_in
from attrbox.data.maps.journal import Journal, Transactions
from attrbox.data.maps.schema import (
    SCHEMA,
    Columns,
    Compression,
    DType,
    create_columns,
    create_datasets,
    dataset_name,
    origin,
    write_header,
    write_samples,
)
from attrbox.errors import AttrboxError, FileError, InputError

Flags = NDArray[np.bool_]
_PICTURE = h5py.vlen_dtype(np.uint8)


@dataclass(frozen=True)
class Written:
    """What a batch adds.

    Attributes:
        rows: samples of which columns are known, ascending.
        columns: of these.
        photographs: of these.
        maps: label -> samples, ascending, and their maps.
        failed: label -> sample -> why it has no map.
        shape: of each image.
    """

    rows: list[int]
    columns: Columns
    photographs: list[bytes]
    maps: dict[str, tuple[list[int], Attribution]] = field(default_factory=dict)
    failed: dict[str, dict[int, str]] = field(default_factory=dict)
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How a file of maps is made.

    Attributes:
        ids: the samples.
        sources: where they come from, if known.
        settings: what the maps depend on beside the methods; compared on resuming.
        header: arguments of `write_header`.
        classes: names of the classes, if known.
        descriptions: label -> summary and reference.
        seed, dtype, compression: as for `create_datasets`.
        photographs: whether there are pictures of the samples.
    """

    ids: Sequence[str]
    sources: Sequence[str] | None
    settings: Mapping[str, Any]
    header: Mapping[str, str | None]
    classes: Sequence[str] | None
    descriptions: Mapping[str, Mapping[str, str]]
    seed: int | None
    dtype: DType
    compression: Compression | None
    photographs: bool

    def create(self, journal: Journal, first: Written, overwrite: bool) -> None:
        """Make the file, without samples, in the shape of these. Either the whole file appears, or nothing changes."""
        with whole_file(journal.path, overwrite, locked=True) as part:
            with h5py.File(part, "w") as file:
                write_header(file, **self.header)
                file.attrs["export"] = json.dumps(self.settings, ensure_ascii=False)
                if self.classes:
                    file["classes"] = [storable(name) for name in self.classes]
                self.add(file, first)
                file["samples"].attrs["image_shape"] = first.shape
                file["samples/id"] = np.array(self.ids, object)
                if self.sources is not None:
                    file["samples/source"] = np.array(self.sources, object)
                if self.photographs:
                    file.create_dataset("samples/photograph", (len(self.ids),), _PICTURE)
            journal.forget()  # it may be of a file that was here before

    def add(self, file: h5py.File, first: Written) -> None:
        """Make room for the methods of which there are maps."""
        maps = {label: attribution for label, (_, attribution) in first.maps.items()}
        create_datasets(
            file,
            len(self.ids),
            maps,
            first.columns,
            descriptions=self.descriptions,
            seed=self.seed,
            dtype=self.dtype,
            compression=self.compression,
        )
        for label in maps:
            texts = h5py.string_dtype()
            file["samples"].create_dataset(f"failed/{dataset_name(label)}", (len(self.ids),), texts)


class Growing(AbstractContextManager["Growing"]):
    """An existing file of maps, open for adding to it.

    Attributes:
        settings: as in `Layout`.
        model_name: what the model is called.
        methods: label -> name and options.
        image_shape: of each sample's image.
        done, failed: label -> whether a sample has a map, and whether it is known that it cannot have one.
        targets: the explained classes, -1 where nothing is known; None for a function.
        digests: the SHA-256 of each sample's pixels, empty where nothing is known.
        waiting: the same as `Written.failed`, of methods that have no map at all yet.

    Raises:
        FileError: the file is broken, foreign, or of another schema.
    """

    def __init__(self, journal: Journal) -> None:
        self.path = journal.path
        self.waiting: dict[str, dict[int, str]] = {}
        with ExitStack() as opened:
            self._raw = opened.enter_context(Transactions(journal))
            try:
                self.file = opened.enter_context(h5py.File(self._raw, "r+"))
                opened.callback(self._raw.discard)
                self._read()
            except AttrboxError:
                raise
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                raise FileError(
                    f"{str(self.path)!r} is no file of maps, or a broken one ({error}). Choose another path, or "
                    "replace it: Running(overwrite=True) (--overwrite)."
                ) from error
            self._opened = opened.pop_all()

    def _read(self) -> None:
        attributes = dict(self.file.attrs)
        if "maps" not in self.file or "samples" not in self.file or "schema" not in attributes:
            raise FileError(f"{str(self.path)!r} is an HDF5 file, but none of attrbox. Choose another path.")
        if attributes["schema"] != SCHEMA:
            raise FileError(
                f"{str(self.path)!r} has schema {attributes['schema']}, this attrbox writes schema {SCHEMA}. Choose "
                "another path."
            )
        if "export" not in attributes:
            raise FileError(
                f"{str(self.path)!r} was written in one go, so it cannot be continued. Choose another path."
            )
        self.settings: dict[str, Any] = json.loads(attributes["export"])
        self.model_name = str(attributes.get("model", ""))
        samples = self.file["samples"]
        names = {dataset.attrs["label"]: name for name, dataset in self.file["maps"].items()}
        self.methods = {label: _made(self.file["maps"][name]) for label, name in names.items()}
        self.image_shape = tuple(int(size) for size in samples.attrs["image_shape"])
        self.done: dict[str, Flags] = {label: samples["done"][name][()] for label, name in names.items()}
        self.failed: dict[str, Flags] = {
            label: samples["failed"][name].asstr()[()] != "" for label, name in names.items()
        }
        self.targets: NDArray[Any] | None = samples["target"][()] if "target" in samples else None
        self.streams = None if "seed" in samples else streams_in(self.file)
        self.digests: NDArray[Any] = samples["pixels_sha256"].asstr()[()]

    def note_resumption(self) -> None:
        """Remember that the file was continued, when and by which versions."""
        before = json.loads(self.file.attrs.get("resumed", "[]"))
        self.file.attrs["resumed"] = json.dumps([*before, origin()])

    def write(self, layout: Layout, batch: Written) -> None:
        """Add what a batch brought, and commit it.

        Raises:
            FileError: it cannot be written; the file keeps what was committed before, and takes no more.
        """
        with self._committing():
            new = {label: entry for label, entry in batch.maps.items() if label not in self.methods}
            if new:
                layout.add(self.file, replace(batch, maps=new))
                for label in new:
                    name = dataset_name(label)
                    self.methods[label] = _made(self.file["maps"][name])
                    self.done[label] = np.zeros(len(layout.ids), bool)
                    self.failed[label] = np.zeros(len(layout.ids), bool)
            samples = self.file["samples"]
            columns = self._fitting(batch.columns)
            create_columns(self.file, len(layout.ids), columns)  # labels may begin with a later batch
            write_samples(self.file, batch.rows, {}, columns)
            if "photograph" in samples:
                for row, picture in zip(batch.rows, batch.photographs, strict=True):
                    samples["photograph"][row] = np.frombuffer(picture, np.uint8)
            for label, (rows, attribution) in batch.maps.items():
                for row in rows:
                    if self.failed[label][row]:
                        samples["failed"][dataset_name(label)][row] = ""
                write_samples(self.file, rows, {label: attribution}, {})
                self.done[label][rows] = True
                self.failed[label][rows] = False
            for label, reasons in batch.failed.items():
                self.waiting.setdefault(label, {}).update(reasons)
            for label in self.waiting.keys() & self.methods.keys():
                for row, reason in self.waiting.pop(label).items():
                    samples["failed"][dataset_name(label)][row] = storable(reason)
                    self.failed[label][row] = True

    def _fitting(self, columns: Columns) -> Columns:
        """The columns in the kinds that the file has: numbers become texts among texts.

        Raises:
            InputError: labels of another kind, which the file could not hold, or not as they are.
        """
        fitting = dict(columns)
        for name in columns.keys() & self.file["samples"].keys():
            here, there = columns[name], self.file["samples"][name].dtype
            if there.kind == "O" and here.dtype.kind != "O":
                fitting[name] = np.array([str(value) for value in here.tolist()], object)
            elif not np.can_cast(here.dtype, there, "same_kind"):
                raise InputError(
                    f"Expected every {name} to be of one kind, but the file began with {there} and {here.tolist()[:3]} "
                    "came later. Give the data labels of one kind: all numbers, or all texts."
                )
        return fitting

    @contextmanager
    def _committing(self) -> Iterator[None]:
        try:
            yield
            self.file.flush()
            self._raw.commit()
        except BaseException as error:
            self._raw.discard()
            refused = isinstance(error, AttrboxError) and not isinstance(error, FileError)
            if isinstance(error, OSError | RuntimeError | ValueError) and not refused:
                raise FileError(
                    f"Cannot write {str(self.path)!r} any further ({error}). What was finished before is in the file; "
                    "make space, check permissions, and run the same again to go on."
                ) from error
            raise

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        self._opened.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


class Output(AbstractContextManager["Output"]):
    """Where batches go: a file that is there, or one that appears with the first map.

    Attributes:
        growing: the file; None as long as there is none.
        failed: label -> sample -> why it has no map, of what came through here.
        maps: how many came.
    """

    def __init__(self, journal: Journal, layout: Layout, growing: Growing | None, overwrite: bool) -> None:
        self.growing = growing
        self.failed: dict[str, dict[int, str]] = {}
        self.maps = 0
        self._journal, self._layout, self._overwrite = journal, layout, overwrite

    def write(self, batch: Written) -> None:
        """Add a batch, and commit it.

        Raises:
            FileError: as for `Growing.write`.
        """
        for label, reasons in batch.failed.items():
            self.failed.setdefault(label, {}).update(reasons)
        if self.growing is None:
            if not batch.maps:
                return
            self._layout.create(self._journal, batch, self._overwrite)
            self.growing = Growing(self._journal)
            batch = replace(batch, failed={label: dict(reasons) for label, reasons in self.failed.items()})
        self.growing.write(self._layout, batch)
        self.maps += sum(len(rows) for rows, _ in batch.maps.values())

    def close(self) -> None:
        """Close the file, if there is one."""
        if self.growing is not None:
            self.growing.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def _made(dataset: h5py.Dataset) -> tuple[str, dict[str, Any]]:
    return str(dataset.attrs["method"]), json.loads(dataset.attrs["options"])


def known_targets(targets: NDArray[Any] | None, rows: Sequence[int]) -> torch.Tensor | None:
    """The classes that these samples' maps explain, [n] or [n, K]; None unless all are known."""
    if targets is None:
        return None
    known = torch.as_tensor(targets[list(rows)])
    return known if bool((known >= 0).all()) else None
