"""Whole files of maps: verified, merged, split."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from attrbox.core.atomic_files import as_path
from attrbox.core.validation import check_count
from attrbox.data.maps.journal import replacing
from attrbox.data.maps.reader import MapsFile, open_maps
from attrbox.data.maps.schema import checksum
from attrbox.errors import FileError, InputError, OptionError, shown

# Settings that may differ between the files of a merger; a part or a whole cannot be resumed.
_OF_THE_DATA = ("samples", "data_sha256", "labels_sha256", "batch_size")


def verify(path: str | Path) -> list[str]:
    """Read every map of a file; returns what is wrong with it, nothing if it is sound.

    Each map is compared with the checksum of when it was written. Samples without a map are no damage.

    Raises:
        FileError: as for `open_maps`.
    """
    problems: list[str] = []
    with open_maps(path) as maps:
        count = maps.samples
        if len(set(maps.ids)) != count:
            problems.append("ids occur more than once")
        for label, one in maps.items():
            sums = maps.column("checksum", label)
            if one.shape[0] != count or len(one.done) != count:
                problems.append(f"{label}: {one.shape[0]} maps of {count} samples")
                continue
            for row in np.flatnonzero(one.done):
                problem = _damage(one.dataset, int(row), sums)
                if problem:
                    problems.append(f"{label}, sample {maps.ids[row]!r}: {problem}")
    return problems


def _damage(dataset: h5py.Dataset, row: int, sums: NDArray[Any] | None) -> str:
    try:
        values = dataset[row]
    except (OSError, RuntimeError) as error:
        return f"cannot be read ({error})"
    if sums is not None and checksum(values) != sums[row]:
        return "is not what was written"
    return "" if np.isfinite(values).all() else "has NaN or infinite values"


def merge(paths: Iterable[str | Path], path: str | Path, *, virtual: bool = False, overwrite: bool = False) -> Path:
    """Put files of maps together: the samples of all, or the methods of all where the samples are the same.

    Args:
        paths: files of the same methods with different samples, or of the same samples with different methods; made
            with the same model and settings.
        path: the new file. It can be read and measured as any other, but not be resumed.
        virtual: leave the maps where they are and refer to them; the files then stay together.
        overwrite: replace an existing file.

    Raises:
        FileError: a file cannot be read, or the new one cannot be written.
        InputError: the files do not belong together; what differs is named.
    """
    if isinstance(paths, str | bytes) or not isinstance(paths, Iterable):
        raise FileError(f"Expected a list of files to merge, got {shown(paths)}.")
    paths = list(paths)
    if not paths:
        raise InputError("Expected at least one file to merge, got none.")
    with ExitStack() as stack:
        parts = [stack.enter_context(open_maps(part)) for part in paths]
        first = parts[0]
        for other in parts[1:]:
            _check_settings(first, other)
        if len(parts) > 1 and all(other.ids == first.ids for other in parts):
            for other in parts[1:]:
                _check_samples(first, other)
            return _united(parts, path, virtual, overwrite)
        _check_parts(parts)
        return _concatenated([(part, np.arange(part.samples)) for part in parts], path, virtual, overwrite)


def split(path: str | Path, parts: int, *, overwrite: bool = False) -> list[Path]:
    """Cut a file of maps into files of about as many consecutive samples each, beside it: NAME-1-of-3.h5, ...

    Raises:
        FileError: the file cannot be read, or a new one cannot be written.
        OptionError: there are fewer samples than parts.
    """
    check_count("parts", parts)
    path = as_path(path)
    with open_maps(path) as maps:
        if parts > maps.samples:
            raise OptionError(f"Expected parts to be at most {maps.samples}, the number of samples, got {parts}.")
        names = [path.with_name(f"{path.stem}-{part + 1}-of-{parts}{path.suffix}") for part in range(parts)]
        pieces = np.array_split(np.arange(maps.samples), parts)
        return [_concatenated([(maps, rows)], name, False, overwrite) for name, rows in zip(names, pieces, strict=True)]


# ---------------------------------------------------------------------------------------------- what belongs together


def _check_settings(first: MapsFile, other: MapsFile) -> None:
    """Refuse files of different models, settings or options."""
    one, two = _made(first), _made(other)
    names = [name for name in one if name in two and one[name] != two[name]]
    if names:
        told = "; ".join(f"{name} {_short(one[name])} and {_short(two[name])}" for name in names)
        raise InputError(f"{str(first.path)!r} and {str(other.path)!r} do not belong together: {told}.")


def _made(maps: MapsFile) -> dict[str, Any]:
    settings = {name: value for name, value in maps.settings.items() if name not in _OF_THE_DATA}
    settings = {name: value for name, value in settings.items() if not _of_each_sample(name, value)}
    model = {"model": maps.attributes.get("model"), "weights_sha256": maps.attributes.get("weights_sha256")}
    return model | settings | {f"options of {label}": one.options for label, one in maps.items()}


def _of_each_sample(name: str, value: object) -> bool:
    """Whether a setting is a tensor with a row for each sample."""
    return name in ("target", "seed") and isinstance(value, dict) and "sha256" in value


def _check_samples(first: MapsFile, other: MapsFile) -> None:
    """Refuse files whose samples have the same ids but are not the same, or are not explained alike."""
    differs = ["random numbers"] if other.seeds != first.seeds else []
    for column, words in _TOLD.items():
        one, two = (part.file.get(f"samples/{column}") for part in (first, other))
        if one is None or two is None:
            continue
        here, there = one[...], two[...]
        if here.shape != there.shape:
            differs.append(words)
        elif here.dtype.kind == "f":
            known = np.isfinite(here) & np.isfinite(there)
            differs += [words] if not np.allclose(here[known], there[known], rtol=1e-2, atol=1e-4) else []
        else:
            known = (here != one.fillvalue) & (there != two.fillvalue)
            differs += [words] if (here[known] != there[known]).any() else []
    if differs:
        raise InputError(
            f"{str(first.path)!r} and {str(other.path)!r} do not belong together: samples of the same ids have other "
            f"{' and other '.join(differs)}. Give samples ids of their own, or export the methods with the same target."
        )


# What a sample is, and what is explained of it: column -> in words.
_TOLD = {"pixels_sha256": "pixels", "target": "targets", "score": "scores"}


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 60 else text


def _check_parts(parts: Sequence[MapsFile]) -> None:
    """Refuse files that do not have the same methods of different samples."""
    first = parts[0]
    for other in parts[1:]:
        if list(other) != list(first):
            raise InputError(
                f"Expected the same methods in each file, but {str(first.path)!r} has {', '.join(first)} and "
                f"{str(other.path)!r} has {', '.join(other)}."
            )
        mine, theirs = (
            {name: (dataset.shape[1:], dataset.dtype.kind) for name, dataset in _datasets(part.file)}
            for part in (first, other)
        )
        if mine != theirs:
            name = next(name for name in mine | theirs if mine.get(name) != theirs.get(name))
            raise InputError(f"{name!r} is not alike in {str(first.path)!r} and {str(other.path)!r}.")
    ids = [name for part in parts for name in part.ids]
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"Expected files of different samples, but {twice!r} is in more than one of them.")


# --------------------------------------------------------------------------------------------------------- the copying


def _concatenated(
    parts: Sequence[tuple[MapsFile, NDArray[Any]]], path: str | Path, virtual: bool, overwrite: bool
) -> Path:
    """The samples of all parts one after another."""
    first = parts[0][0]
    count = sum(len(rows) for _, rows in parts)
    with replacing(path, overwrite) as new, h5py.File(new, "w") as file:
        _begin(file, [part for part, _ in parts], count)
        for name, _ in _datasets(first.file):
            sources = [(part.file[name], rows) for part, rows in parts]
            if virtual and name.startswith("maps/"):
                _refer(file, name, sources, count, Path(path).parent)
            else:
                _copy(file, name, sources, count)
    return Path(path)


def _united(parts: Sequence[MapsFile], path: str | Path, virtual: bool, overwrite: bool) -> Path:
    """The methods of all parts, whose samples are the same."""
    labels = [label for part in parts for label in part]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"Expected files of different samples or of different methods, but two have {twice[0]!r}.")
    with replacing(path, overwrite) as new, h5py.File(new, "w") as file:
        _begin(file, parts, parts[0].samples)
        for part in parts:
            rows = np.arange(part.samples)
            for name, dataset in _datasets(part.file):
                if name in file:
                    continue
                if virtual and name.startswith("maps/"):
                    _refer(file, name, [(dataset, rows)], part.samples, Path(path).parent)
                else:
                    _copy(file, name, [(dataset, rows)], part.samples)
    return Path(path)


def _begin(file: h5py.File, parts: Sequence[MapsFile], count: int) -> None:
    first = parts[0]
    file.attrs.update(first.attributes)
    if settings := first.settings:
        settings |= {"samples": count, "data_sha256": None, "labels_sha256": None, "batch_size": None}
        settings |= {name: "of each sample" for name, value in settings.items() if _of_each_sample(name, value)}
        file.attrs["export"] = json.dumps(settings, ensure_ascii=False)
    file.create_group("maps", track_order=True)
    samples = file.create_group("samples")
    samples.attrs.update(first.file["samples"].attrs)
    for part in parts:
        if "classes" in part.file and "classes" not in file:
            part.file.copy("classes", file)
        for name, dataset in part.file.get("options", {}).items():
            if f"options/{name}" not in file:
                part.file.copy(dataset, file.require_group("options"), name)


def _datasets(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """All that has a row for each sample, the maps in their order."""
    for name, dataset in file["maps"].items():
        yield f"maps/{name}", dataset
    found: list[tuple[str, h5py.Dataset]] = []
    collect: Callable[[str, Any], None] = lambda name, item: (  # noqa: E731
        found.append((f"samples/{name}", item)) if isinstance(item, h5py.Dataset) else None
    )
    file["samples"].visititems(collect)
    yield from found


def _copy(file: h5py.File, name: str, sources: Sequence[tuple[h5py.Dataset, NDArray[Any]]], count: int) -> None:
    like = sources[0][0]
    filters = {key: getattr(like, key) for key in ("compression", "compression_opts", "shuffle") if like.chunks}
    new = file.create_dataset(
        name, (count, *like.shape[1:]), like.dtype, chunks=like.chunks, fillvalue=like.fillvalue, **filters
    )
    new.attrs.update(like.attrs)
    start = 0
    for dataset, rows in sources:
        if name.startswith("maps/") or name == "samples/photograph":
            for place, row in enumerate(rows, start):
                new[place] = dataset[row]
        else:
            new[start : start + len(rows)] = dataset[rows[0] : rows[-1] + 1]
        start += len(rows)


def _refer(
    file: h5py.File, name: str, sources: Sequence[tuple[h5py.Dataset, NDArray[Any]]], count: int, folder: Path
) -> None:
    like = sources[0][0]
    layout = h5py.VirtualLayout((count, *like.shape[1:]), like.dtype)
    start = 0
    for dataset, rows in sources:
        relative = os.path.relpath(dataset.file.filename, folder)  # so that all can be moved together
        layout[start : start + len(rows)] = h5py.VirtualSource(relative, dataset.name, dataset.shape, dataset.dtype)
        start += len(rows)
    new = file.create_virtual_dataset(name, layout, fillvalue=like.fillvalue)
    new.attrs.update(like.attrs)
