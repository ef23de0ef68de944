"""What is explained, sample by sample, read in batches that are known beforehand.

Image folders, torch datasets, data loaders and tensors are all `Samples`. A sample that cannot be read is one with a
flaw: it says why, and nothing is raised. `batches` reads ahead, by processes if there are workers, else by a thread.
"""

import copy
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, Subset

from attrbox.core.hashing import tensor_bytes
from attrbox.core.validation import dense
from attrbox.data.images import distinct_names, find_images, open_image
from attrbox.data.labels import ClassNames, labels_by_table, names_of_labels
from attrbox.data.maps.attributes import storable
from attrbox.errors import InputError, TargetError

Label: TypeAlias = int | float | str
SamplesLike: TypeAlias = "Samples | Dataset[Any] | DataLoader[Any] | Sequence[Any] | Tensor | str | Path"

_QUALITY = 85  # of a JPEG: at 224 x 224 about 12 kB


@dataclass(frozen=True)
class Sample:
    """One sample as it was read.

    Attributes:
        row: its place.
        image: [C, H, W] or another shape, as the model takes it; None if it cannot be had.
        label: a number or a text, if there is one.
        flaw: why the image cannot be had; empty if it can.
        sha256: of the image's dtype, shape and bytes.
        photograph: the bytes of a picture of it, for the eye.
    """

    row: int
    image: Tensor | None = None
    label: Label | None = None
    flaw: str = ""
    sha256: str = ""
    photograph: bytes = b""


@dataclass(frozen=True)
class Batch:
    """Samples read together.

    Attributes:
        samples: those that can be explained, ascending; their images are in `images` instead.
        images: [n, ...]; None if there are none.
        flawed: the others.
        mixed: whether some of these are flawed for their size alone.
    """

    samples: list[Sample]
    images: Tensor | None
    flawed: list[Sample]
    mixed: bool = False

    def of_shape(self, shape: tuple[int, ...] | None) -> "Batch":
        """The same if the images have this shape, or if any will do; otherwise all are flawed."""
        if self.images is None or shape is None or self.images.shape[1:] == shape:
            return self
        flaw = f"its image is {list(self.images.shape[1:])}, others are {list(shape)}"
        flawed = [*self.flawed, *(_flawed(sample, flaw) for sample in self.samples)]
        return Batch([], None, sorted(flawed, key=lambda sample: sample.row))


class Samples(Dataset[Sample]):
    """Anything with a length and an index, whose items are images, or images with labels.

    Args:
        items: what is read.
        ids: a name for each sample; default: "0", "1", ...
        sources: where each comes from.
        preprocess: makes a tensor of what is not one, such as a PIL image.
        collate: of a data loader; gets lists of one item.
        picture: makes a picture of an image, for `Sample.photograph`.
        fingerprint: tells this set of samples from others.
        labels: of each sample, where they are known beforehand; they take the place of those of the items.

    Attributes:
        labels_sha256: tells how labels were given and translated from other ways; None if they are those of the items.
    """

    def __init__(
        self,
        items: Any,
        ids: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        preprocess: Callable[[Any], Tensor] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        picture: Callable[[Tensor], bytes] | None = None,
        fingerprint: str = "",
        labels: Sequence[str] | None = None,
    ) -> None:
        self.items = items
        self.count = _length(items)
        self.ids = [str(row) for row in range(self.count)] if ids is None else [storable(str(name)) for name in ids]
        self.sources = None if sources is None else [storable(str(source)) for source in sources]
        self.preprocess = preprocess
        self.collate = collate
        self.picture = picture
        self.labels: Sequence[Label] | None = labels
        self.labels_sha256: str | None = None
        self._ordered = labels is not None  # folders, which their alphabetical order counts
        self._meanings: Sequence[Label] | None = None
        for what, texts in (("id", self.ids), ("source", self.sources)):
            if texts is not None and len(texts) != self.count:
                raise InputError(f"Expected one {what} for each of the {self.count} samples, got {len(texts)}.")
        if twice := [name for name, times in Counter(self.ids).items() if times > 1]:
            raise InputError(f"Expected a different id for each sample, got {twice[0]!r} more than once.")
        content = "\0".join([fingerprint, *self.ids])
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()

    def part(self, rows: Sequence[int]) -> "Samples":
        """Some of the samples, as samples of their own."""
        names = [self.ids[row] for row in rows]
        sources = None if self.sources is None else [self.sources[row] for row in rows]
        items = Subset(self.items, rows)
        part = Samples(items, names, sources, self.preprocess, self.collate, self.picture, f"part of {self.sha256}")
        part.labels = None if self.labels is None else [self.labels[row] for row in rows]
        part._meanings, part.labels_sha256 = self._meanings, self.labels_sha256
        return part

    def labeled(self, table: Mapping[str, str]) -> "Samples":
        """The same with labels by a table, file -> label (`attrbox.data.labels.read_labels`).

        Raises:
            InputError: a sample is not in the table, or several are one entry of it.
        """
        other = copy.copy(self)
        other.labels, other._ordered = labels_by_table(table, self.ids, self.sources), False
        return other

    @property
    def label_names(self) -> list[str] | None:
        """What the labels are called, each once, where that is known beforehand.

        Raises:
            InputError: these are several data sets whose labels do not mean the same.
        """
        if self.labels is not None:
            return sorted({str(label) for label in self.labels})
        return names_of_labels(self.items)

    def unlabeled(self) -> "Samples":
        """The same without labels that are numbers: they mean nothing."""
        other = copy.copy(self)
        other._meanings = ()
        return other

    def translated(self, known: ClassNames, required: bool) -> "Samples":
        """The same with the model's classes for labels, or else, if no class is required, with what labels are called.

        Raises:
            TargetError: a class is required, and a label means none, or may mean several.
        """
        names = self.label_names
        if names is None:
            return self
        meanings: list[Label] = list(names)
        try:
            meanings = list(known.indices(names, ordered=self.labels is None or self._ordered))
        except TargetError:
            if required:
                raise
        other = copy.copy(self)
        if self.labels is None:
            other._meanings = meanings
        else:
            by_name = dict(zip(names, meanings, strict=True))
            other.labels = [by_name[str(label)] for label in self.labels]
        told = json.dumps([other.labels, other._meanings], ensure_ascii=False)
        other.labels_sha256 = hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()
        return other

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Sample:
        try:
            image, label = _split(self.items[row] if self.collate is None else self.collate([self.items[row]]))
            if self.collate is not None:
                image, label = image[0], None if label is None else label[0]
            if not isinstance(image, Tensor) and self.preprocess is not None:
                image = self.preprocess(image)
            image = dense(image, "images") if isinstance(image, Tensor) else image
            flaw = _flaw(image)
        except Exception as error:  # datasets are foreign code, and files are broken in all sorts of ways
            return Sample(row, flaw=" ".join(f"{type(error).__name__}: {error}".split())[:500])
        label = self._meant(_label(label)) if self.labels is None else self.labels[row]
        if flaw:
            return Sample(row, label=label, flaw=flaw)
        image = image.detach()
        digest = hashlib.sha256(f"{image.dtype}\0{tuple(image.shape)}\0".encode())
        digest.update(tensor_bytes(image))
        picture = b"" if self.picture is None else self.picture(image)
        return Sample(row, image, label, "", digest.hexdigest(), picture)

    def _meant(self, label: Label | None) -> Label | None:
        """A label of the items in translation; None for a number that is not one of theirs."""
        if self._meanings is None or not isinstance(label, int):
            return label
        return self._meanings[label] if 0 <= label < len(self._meanings) else None

    def batches(self, rows: Sequence[list[int]], workers: int = 0) -> Iterator[Batch]:
        """Read these batches in order, the next ones while one is in use.

        Args:
            rows: the samples of each batch, ascending.
            workers: processes that read; with none a thread does.
        """
        loader = DataLoader(self, batch_sampler=rows, num_workers=workers, collate_fn=_collated)
        coming = iter(loader)
        with ThreadPoolExecutor(1, "attrbox-read") as thread:
            future = thread.submit(next, coming, None)
            while (batch := future.result()) is not None:
                future = thread.submit(next, coming, None)
                yield batch


class _Files:
    """Image files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Image.Image:
        return open_image(self.files[row])


def samples_of(
    data: SamplesLike,
    *,
    preprocess: Callable[[Any], Tensor] | None = None,
    ids: Sequence[str] | None = None,
    picture: Callable[[Tensor], bytes] | None = None,
) -> Samples:
    """The samples of an image folder or a list of files, of a torch dataset, a data loader, or a tensor [N, ...].

    Files need `preprocess`. Each is labeled by the name of its folder: the subfolder of the folder given, if all lie
    in subfolders, or the folder given itself, if there are several and all lie directly in them. Their fingerprint
    covers names and sizes; of other data, it covers ids. Items are images, tuples that begin with an image and a label,
    or mappings with "image" and "label". Of a data loader the dataset and the collating function are used.

    Raises:
        FileError: there is no such file or folder, or no image in it.
        InputError: the data has no fixed order, or is of another kind; ids do not fit it or are not unique.
    """
    paths = [data] if isinstance(data, str | Path) else data
    if isinstance(paths, list | tuple) and paths and all(isinstance(path, str | Path) for path in paths):
        return _of_files([Path(path) for path in paths], preprocess, ids, picture)
    if isinstance(data, DataLoader):
        if not isinstance(data.sampler, SequentialSampler):
            raise InputError(
                f"Expected a DataLoader that goes through its dataset in order, got one with a "
                f"{type(data.sampler).__name__}. Give the dataset itself; torch.utils.data.Subset picks samples."
            )
        return Samples(data.dataset, ids, None, preprocess, data.collate_fn, picture)
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise InputError(
            f"Expected an image folder, a torch dataset with a length and an index, a DataLoader of one or a tensor, "
            f"got {type(data).__name__}. An export that can be resumed must reach each sample by its number."
        )
    items = dense(data, "images") if isinstance(data, Tensor) else data
    return Samples(items, ids, None, preprocess, None, picture)


def _of_files(
    paths: list[Path],
    preprocess: Callable[[Any], Tensor] | None,
    ids: Sequence[str] | None,
    picture: Callable[[Tensor], bytes] | None,
) -> Samples:
    if preprocess is None:
        raise InputError(
            "Expected a function that makes the model's input of an image file, Loading(preprocess=...), for instance "
            "the transforms of the model's weights, or a model of attrbox.load_model, which brings its own."
        )
    files = find_images(paths)
    labels = _folders(paths, files)
    names = distinct_names(files) if ids is None else ids
    sizes = ",".join(str(file.stat().st_size if file.exists() else None) for file in files)
    sources = [str(file.absolute()) for file in files]
    return Samples(_Files(files), names, sources, preprocess, None, picture, sizes, labels)


def _folders(paths: Sequence[Path], files: Sequence[Path]) -> list[str] | None:
    """The name of each file's folder, if there is a folder for each class."""
    if not all(path.is_dir() for path in paths):
        return None
    roots = [next(path for path in paths if file.is_relative_to(path)) for file in files]
    below = [file.relative_to(root).parts for file, root in zip(files, roots, strict=True)]
    if all(len(parts) > 1 for parts in below):
        return [parts[0] for parts in below]
    if len(paths) > 1 and all(len(parts) == 1 for parts in below):
        return [root.absolute().name for root in roots]
    return None


@dataclass(frozen=True)
class Picture:
    """An image -> a JPEG: of colours or grey, the model's normalisation undone or, without, stretched to its range.

    What is neither [1, H, W] nor [3, H, W] has no picture.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, image: Tensor) -> bytes:
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            return b""
        image = image.float().cpu()
        if self.mean is not None and self.std is not None and len(self.mean) == len(image):
            image = image * torch.tensor(self.std)[:, None, None] + torch.tensor(self.mean)[:, None, None]
        else:
            image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
        pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=_QUALITY)
        return file.getvalue()


def _length(items: Any) -> int:
    try:
        count = len(items)
    except TypeError as error:
        raise InputError(f"Expected data with a length, got {type(items).__name__}: {error}.") from error
    if count == 0:
        raise InputError("Expected at least one sample, got none.")
    return count


def _split(item: Any) -> tuple[Any, Any]:
    """The image and, where there is one, the label."""
    if isinstance(item, Mapping):
        return item["image"], item.get("label")
    if isinstance(item, tuple | list):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _label(value: Any) -> Label | None:
    """A number or a text; anything else is no label."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item() if np.prod(value.shape) == 1 else None
    return value if isinstance(value, int | float | str) else None


def _flaw(image: Any) -> str:
    if not isinstance(image, Tensor):
        return f"a tensor was expected, not {type(image).__name__}; give a transform, or Loading(preprocess=...)"
    if not image.is_floating_point():
        return f"floating-point pixels were expected, preprocessed as the model takes them, not {image.dtype}"
    if image.dim() == 0 or image.numel() == 0:
        return f"an image was expected, not a tensor of shape {list(image.shape)}"
    return "" if bool(image.isfinite().all()) else "the image has NaN or infinite pixels"


def _collated(samples: list[Sample]) -> Batch:
    """Images of the most frequent shape and dtype in one tensor; others are flawed."""
    kinds = Counter(_kind(sample.image) for sample in samples if sample.image is not None)
    usual = kinds.most_common(1)[0][0] if kinds else None
    good = [sample for sample in samples if sample.image is not None and _kind(sample.image) == usual]
    flawed = [
        sample if sample.image is None else _flawed(sample, f"its image is {_kind(sample.image)}, others are {usual}")
        for sample in samples
        if sample.image is None or _kind(sample.image) != usual
    ]
    images = [sample.image for sample in good if sample.image is not None]
    bare = [Sample(one.row, None, one.label, "", one.sha256, one.photograph) for one in good]
    return Batch(bare, torch.stack(images) if images else None, flawed, len(kinds) > 1)


def _kind(image: Tensor) -> str:
    return f"{list(image.shape)} {str(image.dtype).removeprefix('torch.')}"


def _flawed(sample: Sample, flaw: str) -> Sample:
    return Sample(sample.row, None, sample.label, flaw)
