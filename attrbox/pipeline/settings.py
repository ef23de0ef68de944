"""How `export` reads, stores and runs: three groups of settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attrbox.core.validation import check_choice, check_count
from attrbox.data.maps.schema import Compression, DType, check_storage
from attrbox.pipeline.job import Channels
from attrbox.pipeline.shards import Shard


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How samples are read, and what is known of them.

    Attributes:
        preprocess: an image of the data that is no tensor -> a tensor as the model takes it.
        ids: a name for each sample; default: file names, or "0", "1", ...
        labels: a table of labels, file -> class by name, WordNet id or number: a CSV file, or a mapping. Default: the
            names of the folders in which images lie, or what a dataset has. Folder names, and numbers that a dataset
            has names for (`classes`), are looked up among the model's classes; other numbers are classes as they are.
        workers: processes that read. Default: those of the DataLoader, or none: a thread then reads ahead.
    """

    preprocess: Callable[[Any], Tensor] | None = None
    ids: Sequence[str] | None = None
    labels: str | Path | Mapping[str, str] | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers not in (None, 0):
            check_count("workers", self.workers)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What the file holds.

    Attributes:
        dtype: of the maps: "float32", "float64", "float16".
        compression: "gzip", "lzf" or None. Gradients are noise to these: a tenth is saved, at a multiple of the time.
        channels: "all", or "one" for the map for the eye ([N, 1, H, W]: channels summed, or their largest).
        thumbnails: keep a small picture of each sample, for reports.
        model_name: what the model is called.
        config: text that is kept in the file.
    """

    dtype: DType = "float32"
    compression: Compression | None = None
    channels: Channels = "all"
    thumbnails: bool = True
    model_name: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        check_storage(self.dtype, self.compression)
        check_choice("channels", self.channels, ("all", "one"))


@dataclass(frozen=True, kw_only=True)
class Running:
    """How the work is done, and what becomes of a file that is there.

    Attributes:
        batch_size: images that are read and go through the model together, fewer where memory runs out. Default: what
            the file began with, or what pays on the device (`attrbox.core.memory.MOST_PER_PASS`).
        precision, channels_last: as for `attrbox.explain`.
        resume: go on with an existing file; False refuses it.
        retry: try again the samples that had no map.
        keep_both: write a method that the file has with other options, too, under a name with its options.
        overwrite: replace an existing file.
        shard: the share of this process (`attrbox.pipeline.shards`): it goes to NAME-1-of-8.h5, ..., and the last to
            finish joins them at the path. Default: by torch.distributed, if it is initialised, or as torchrun told.
    """

    batch_size: int | None = None
    precision: torch.dtype | None = None
    channels_last: bool = True
    resume: bool = True
    retry: bool = False
    keep_both: bool = False
    overwrite: bool = False
    shard: Shard | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)


# Group -> its class; and the names of today of what had another one.
GROUPS = {"loading": Loading, "storage": Storage, "running": Running}
FORMERLY = {"photographs": "thumbnails", "beside": "keep_both"}
