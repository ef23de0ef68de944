"""HDF5 files of maps, schema 1.

    /maps/LABEL                  [N, C or 1, H, W] ([N, K, C, H, W] for K targets), one map a chunk, compressed; in the
                                 order asked for; attributes: label, method, options (JSON), units, reduction, coverage,
                                 seed, precision, channels_last, and what `descriptions` has to say (summary, reference)
    /options/SHA256              options that are tensors, under the hash by which `options` names them
    /samples/id                  text [N]; and, where known, source, label, target, prediction, score: [N] or [N, K]
    /samples/seed                [N], the stream of random numbers of each sample; in files of version 0.1 an attribute
                                 of the maps instead, one for all samples
    /samples/expected/LABEL      [N] or [N, K], for methods whose maps should sum to something: to what
    /samples/relative_gap/LABEL  [N] or [N, K], how far they are from it
    /samples/done/LABEL          bool [N]
    /samples/checksum/LABEL      CRC-32 of each map's bytes as they are stored (little-endian), [N]
    / (attributes)               schema, created (UTC), versions of attrbox, torch, h5py and python; where known,
                                 model, weights_sha256, config

and, in files of `attrbox.export`, which are written over hours and may be cut off,

    /samples/failed/LABEL        text [N]: why a sample has no map; empty if it has one, or if nobody has tried
    /samples/pixels_sha256       text [N]: of what the model saw
    /samples/photograph          [N] pictures for the eye, each the bytes of a JPEG or PNG file
    /classes                     text [classes], their names where known
    / (attributes)               export: what the maps depend on beside the methods (JSON), compared on resuming;
                                 resumed: when and by which versions the file was continued (JSON)

Where nothing is known of a sample, whole numbers are -1, others NaN, texts empty.

`write_maps` writes a file in one go. It is made of `write_header`, `create_datasets` and `write_samples`, which work on
an open file, batch by batch if need be. Text that HDF5 cannot hold (NUL, lone surrogates) is written as a backslash
escape, `\\x00`; a label is percent-encoded where HDF5 would take it for a path (`dataset_name`).
"""

import platform
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attrbox.core.random_streams import streams
from attrbox.core.results import Attribution
from attrbox.data.maps.attributes import attributes_of, plain, storable
from attrbox.data.maps.journal import replacing
from attrbox.errors import InputError, OptionError, shown

SCHEMA = 1

DType: TypeAlias = Literal["float16", "float32", "float64"]
Compression: TypeAlias = Literal["gzip", "lzf"]
Columns: TypeAlias = dict[str, NDArray[Any]]

_DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_FILTERS: dict[str | None, dict[str, Any]] = {
    "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},  # higher levels cost time, not bytes
    "lzf": {"compression": "lzf", "shuffle": True},
    None: {},
}
_TEXT = h5py.string_dtype()
_EMPTY: dict[str, Any] = {"i": -1, "f": np.nan}  # what stands where nothing is known, by kind


def write_maps(
    path: str | Path,
    attributions: Mapping[str, Attribution],
    *,
    predictions: Tensor | None = None,
    labels: Tensor | Sequence[int | float] | Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    descriptions: Mapping[str, Mapping[str, str]] | None = None,
    model_name: str | None = None,
    weights_sha256: str | None = None,
    config: str | None = None,
    seed: int | Sequence[int] | None = None,
    dtype: DType = "float32",
    compression: Compression | None = "gzip",
    overwrite: bool = False,
) -> Path:
    """Write the maps of some images to a new file. Either the whole file appears, or nothing changes.

    Args:
        path: where; missing folders are made.
        attributions: label -> maps, all of the same samples and targets.
        predictions: the model's class for each sample, [N].
        labels: the true class of each sample, numbers or names.
        ids: a name for each sample; default: "0", "1", ...
        sources: where each sample came from, for instance a file name.
        descriptions: label -> {"summary": ..., "reference": ...}, further attributes of the maps.
        model_name: what the model is called.
        weights_sha256: see `weights_hash`.
        config: the configuration that led to the maps, as text.
        seed: of the call, or one per sample; default: as the maps say.
        dtype: of the maps: "float32", "float64", or "float16", which is refused for maps out of its range.
        compression: "gzip", "lzf" (faster, larger) or None.
        overwrite: replace an existing file.

    Returns:
        The path.

    Raises:
        FileError: the file exists already, or cannot be written.
        InputError: maps and samples do not fit each other, or the maps do not fit `dtype`.
        OptionError: an unknown dtype or compression, or a seed beyond 64 bits.
    """
    columns = sample_columns(attributions, predictions=predictions, labels=labels, ids=ids, sources=sources, seed=seed)
    with replacing(path, overwrite) as part, h5py.File(part, "w") as file:
        write_header(file, model_name=model_name, weights_sha256=weights_sha256, config=config)
        create_datasets(
            file,
            len(columns["id"]),
            attributions,
            columns,
            descriptions=descriptions,
            dtype=dtype,
            compression=compression,
        )
        write_samples(file, range(len(columns["id"])), attributions, columns)
    return Path(path)


def sample_columns(
    attributions: Mapping[str, Attribution],
    *,
    predictions: Tensor | None = None,
    labels: Tensor | Sequence[int | float] | Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
) -> Columns:
    """What is known of each sample, by the names of `/samples`; arguments as for `write_maps`.

    Raises:
        InputError: not all have the same number of samples, or the maps explain different targets.
        OptionError: a seed beyond 64 bits.
    """
    first = _common(attributions)
    count = len(first)
    known = {
        "id": [str(index) for index in range(count)] if ids is None else [str(name) for name in ids],
        "source": None if sources is None else [str(source) for source in sources],
        "label": labels,
        "target": first.target,
        "prediction": predictions,
        "score": first.score,
        "seed": seed_column(streams(first.provenance.seed if seed is None else seed, count)),
    }
    return {name: _column(name, values, count) for name, values in known.items() if values is not None}


def write_header(
    file: h5py.File, *, model_name: str | None = None, weights_sha256: str | None = None, config: str | None = None
) -> None:
    """Write the root attributes; arguments as for `write_maps`."""
    file.attrs["schema"] = SCHEMA
    texts = {**origin(), "model": model_name, "weights_sha256": weights_sha256, "config": config}
    file.attrs.update({name: storable(text) for name, text in texts.items() if text is not None})


def origin() -> dict[str, str]:
    """When something is created (UTC), and by which versions."""
    try:
        own = version("attrbox")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "0"
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "attrbox": own,
        "torch": torch.__version__,
        "h5py": h5py.__version__,
        "python": platform.python_version(),
    }


def create_datasets(
    file: h5py.File,
    count: int,
    attributions: Mapping[str, Attribution],
    columns: Columns,
    *,
    descriptions: Mapping[str, Mapping[str, str]] | None = None,
    seed: int | None = None,
    dtype: DType = "float32",
    compression: Compression | None = "gzip",
) -> None:
    """Make room for `count` samples, none of which is done. Columns that are there already stay.

    Args:
        file: open for writing, without maps of these labels.
        count: samples that the file will hold.
        attributions: the maps of some of them; shapes and attributes are taken from these.
        columns: the same samples' `sample_columns`.
        descriptions, dtype, compression: as for `write_maps`.
        seed: the one stream of all samples, in a file that version 0.1 began.

    Raises:
        OptionError: an unknown dtype or compression, or a seed beyond 64 bits.
    """
    check_storage(dtype, compression)
    maps = file["maps"] if "maps" in file else file.create_group("maps", track_order=True)
    samples = file.require_group("samples")
    for label, attribution in attributions.items():
        name = dataset_name(label)
        chunk = (1,) * attribution.score.dim() + tuple(attribution.values.shape[attribution.score.dim() :])
        shape = (count, *attribution.values.shape[1:])
        dataset = maps.create_dataset(name, shape, dtype, chunks=chunk, **_FILTERS[compression])
        dataset.attrs.update(attributes_of(label, attribution, (descriptions or {}).get(label, {})))
        if seed is not None:
            dataset.attrs["seed"] = seed_column([seed])[0]
        samples.create_dataset(f"done/{name}", (count,), bool)
        samples.create_dataset(f"checksum/{name}", (count,), "uint32")
        for kind, column in _sums(attribution):
            samples.create_dataset(f"{kind}/{name}", (count, *column.shape[1:]), "float64", fillvalue=np.nan)
        for value in attribution.options.values():
            if isinstance(value, Tensor | np.ndarray):
                place = f"options/{plain(value)['sha256']}"
                if place not in file:
                    file[place] = _array(torch.as_tensor(value))
    create_columns(file, count, columns)


def create_columns(file: h5py.File, count: int, columns: Columns) -> None:
    """Make room for these columns of `count` samples; those that are there already stay."""
    samples = file.require_group("samples")
    for name, values in columns.items():
        if name not in samples:
            dtype, empty = (_TEXT, None) if values.dtype == object else (values.dtype, _EMPTY.get(values.dtype.kind))
            samples.create_dataset(name, (count, *values.shape[1:]), dtype, fillvalue=empty)


def write_samples(
    file: h5py.File, rows: Sequence[int], attributions: Mapping[str, Attribution], columns: Columns
) -> None:
    """Write some samples into a file that `create_datasets` prepared, and mark them as done.

    Args:
        file: open for writing.
        rows: the samples' places, ascending.
        attributions: their maps.
        columns: their `sample_columns`.

    Raises:
        InputError: the maps do not fit the file's dtype.
    """
    if not rows:
        return
    samples = file["samples"]
    places = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else list(rows)
    for name, values in columns.items():
        samples[name][places] = values
    for label, attribution in attributions.items():
        name = dataset_name(label)
        dataset = file["maps"][name]
        values = _as_dtype(label, attribution, dataset.dtype.name)
        for row, value in zip(rows, values, strict=True):
            dataset[row] = value
        samples["checksum"][name][places] = np.array([checksum(value) for value in values], np.uint32)
        for kind, column in _sums(attribution):
            if f"{kind}/{name}" in samples:  # older files do not have all
                samples[kind][name][places] = _array(column)
        samples["done"][name][places] = True  # last: what is marked is there


def check_storage(dtype: str, compression: str | None) -> None:
    """Refuse what `write_maps` does not know.

    Raises:
        OptionError: an unknown dtype or compression.
    """
    if dtype not in _DTYPES:
        raise OptionError(f"Expected dtype to be one of {', '.join(map(repr, _DTYPES))}, got {shown(dtype)}.")
    if compression not in _FILTERS:
        raise OptionError(f"Expected compression to be 'gzip', 'lzf' or None, got {shown(compression)}.")


def checksum(values: NDArray[Any]) -> int:
    """CRC-32 of a map's bytes, little-endian."""
    return zlib.crc32(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)


def flaws(attribution: Attribution, dtype: str) -> dict[int, str]:
    """The samples whose maps should not be stored as `dtype`, and why: they are not finite, or would be lost."""
    flat = attribution.values.detach().flatten(1)
    finite = flat.isfinite().all(1)
    found = {int(row): "the map has NaN or infinite values" for row in (~finite).nonzero().flatten()}
    if dtype == "float16":
        lost = _lost_by_half(attribution).reshape(len(flat), -1).any(1)
        found |= {int(row): "the map does not fit float16; use float32" for row in (lost & finite).nonzero().flatten()}
    return found


def dataset_name(label: str) -> str:
    """The name of a label's datasets: "/" becomes "%2F", "%" becomes "%25", a lone "." becomes "%2E".

    Raises:
        InputError: the label is empty.
    """
    if not label:
        raise InputError("Expected a label for each method's maps, got an empty one. Give it a name.")
    return storable("%2E" if label == "." else label.replace("%", "%25").replace("/", "%2F"))


# ------------------------------------------------------------------------------------------------------ what is stored


def _common(attributions: Mapping[str, Attribution]) -> Attribution:
    """The first of the maps, of whose samples and targets the others are, too."""
    if not attributions:
        raise InputError("Expected the maps of at least one method, got none.")
    label, first = next(iter(attributions.items()))
    for other_label, other in attributions.items():
        if other.values.is_meta or other.score.is_meta:
            raise InputError(f"Expected maps with data, but those of {other_label!r} are on the meta device.")
        if other.score.shape != first.score.shape or len(other) != len(first):
            raise InputError(
                f"Expected maps of the same samples and targets, but {label!r} has scores of shape "
                f"{list(first.score.shape)} and {other_label!r} of {list(other.score.shape)}. Write them to two files."
            )
        if not _same(first.target, other.target):
            raise InputError(f"{label!r} and {other_label!r} explain different targets. Write them to two files.")
    return first


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is other or one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())


def _column(name: str, values: Any, count: int) -> NDArray[Any]:
    """An array of numbers, or of texts as objects, with one row per sample."""
    array = _array(values) if isinstance(values, Tensor) else np.asarray(values)
    if array.shape[:1] != (count,):
        raise InputError(f"Expected one {name} for each of the {count} samples, got an array of {list(array.shape)}.")
    if array.dtype.kind == "U" and array.ndim == 1:
        return np.array([storable(str(text)) for text in values], dtype=object)
    if array.dtype.kind not in "iufb":
        raise InputError(f"Expected each sample's {name} to be a number or a text, got an array of {array.dtype}.")
    return array


def _array(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    return np.asarray(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)


def seed_column(seeds: Sequence[int]) -> NDArray[Any]:
    """The seeds as 64-bit numbers."""
    for dtype in (np.int64, np.uint64):
        limits = np.iinfo(dtype)
        if all(limits.min <= one <= limits.max for one in seeds):
            return np.array(seeds, dtype)
    raise OptionError(f"Expected seeds of 64 bits at most, all signed or all unsigned, got {list(seeds)[:5]}.")


def _as_dtype(label: str, attribution: Attribution, dtype: str) -> NDArray[Any]:
    """The maps as they are stored, unless half precision would lose them."""
    values = attribution.values.detach()
    if dtype == "float16" and bool(_lost_by_half(attribution).any()):
        limits = torch.finfo(torch.float16)
        size = _size(attribution)
        raise InputError(
            f"The maps of {label!r} do not fit float16: largest values from {size.min():.1e} to {size.max():.1e}, "
            f"expected {limits.tiny:.1e} to {limits.max:.1e}. Use dtype='float32'."
        )
    return np.asarray(values.cpu().to(_DTYPES[dtype]))


def _lost_by_half(attribution: Attribution) -> Tensor:
    """Which maps half precision cannot hold, [N] or [N, K].

    Numbers below the smallest normal one, 2^-14, are spaced evenly. As long as a map's largest value is above, the
    others are rounded as finely as that one; a map that lies below altogether would lose its digits, or vanish.
    """
    limits = torch.finfo(torch.float16)
    size = _size(attribution)
    return ((size > 0) & (size < limits.tiny)) | (size > limits.max)


def _sums(attribution: Attribution) -> list[tuple[str, Tensor]]:
    """What is kept of the sum of each map."""
    kinds = {"expected": attribution.expected, "relative_gap": attribution.relative_gap}
    return [(kind, column) for kind, column in kinds.items() if column is not None]


def _size(attribution: Attribution) -> Tensor:
    """The largest absolute value of each map, [N] or [N, K]."""
    values = attribution.values.detach()
    return values.abs().flatten(attribution.score.dim()).nan_to_num(nan=0, posinf=0).amax(-1)
