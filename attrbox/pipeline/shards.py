"""An export by several processes: each writes its share of the samples as a file of its own, a shard.

Shares are cut between batches, so that each sample meets the batch mates that it has in a single process: the maps are
the same, bit by bit. Processes do not talk to each other. Whoever finishes last finds all shards complete and joins
them by a file that refers to them; one that died is started again alone.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed

from attrbox.data.maps.journal import is_being_written
from attrbox.data.maps.merge import merge
from attrbox.data.maps.reader import open_maps
from attrbox.errors import BusyError, FileError, InputError, OptionError, shown


@dataclass(frozen=True)
class Shard:
    """Share `index`, from 0, of `count`.

    Raises:
        OptionError: there is no such share.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise OptionError(f"Expected a shard from 0 to {self.count - 1}, got {self.index} of {self.count}.")

    @classmethod
    def current(cls) -> "Shard | None":
        """That of this process, by torch.distributed or what torchrun told; None if it is alone."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            index, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        else:
            return None
        return cls(index, count) if count > 1 else None

    @classmethod
    def parsed(cls, text: str) -> "Shard":
        """ "1/8", the first of eight.

        Raises:
            OptionError: the text has another form.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise OptionError(f"Expected a shard as K/N, the first of eight as 1/8, got {shown(text)}.")
        return cls(int(index) - 1, int(count))

    def rows(self, samples: int, batch_size: int) -> list[int]:
        """The samples of this share.

        Raises:
            InputError: there are fewer batches than shares.
        """
        batches = -(-samples // batch_size)
        if batches < self.count:
            raise InputError(
                f"Expected at least {self.count} batches for {self.count} processes, got {batches} of {batch_size} "
                "samples. Use fewer processes, or a smaller batch_size."
            )
        share = np.array_split(np.arange(batches), self.count)[self.index]
        return list(range(int(share[0]) * batch_size, min(samples, int(share[-1] + 1) * batch_size)))

    def path(self, whole: Path) -> Path:
        """Where this share goes."""
        return whole.with_name(f"{whole.stem}-{self.index + 1}-of-{self.count}{whole.suffix}")

    def check(self, whole: Path) -> None:
        """Refuse a file at the place of the whole that is not made of shards.

        Raises:
            FileError: there is one.
        """
        if whole.exists():
            with open_maps(whole) as maps:
                if not all(one.dataset.is_virtual for one in maps.values()):
                    raise FileError(f"{str(whole)!r} exists, and is not made of shards. Choose another path.")

    def join(self, whole: Path, labels: Sequence[str]) -> bool:
        """Join all shards, if they are complete; returns whether the whole is there."""
        paths = [Shard(index, self.count).path(whole) for index in range(self.count)]
        if not all(path.exists() and not is_being_written(path) and _complete(path, labels) for path in paths):
            return False
        with suppress(BusyError):  # another process is joining
            if not (whole.exists() and _content(whole) == [entry for path in paths for entry in _content(path)]):
                merge(paths, whole, virtual=True, overwrite=True)
        return True


def _complete(path: Path, labels: Sequence[str]) -> bool:
    """Whether each sample has a map of each method, or a reason why not."""
    with open_maps(path) as maps:
        return all(label in maps and all(maps[label].failed.values()) for label in labels)


def _content(path: Path) -> list[tuple[str, str, int]]:
    """What tells whether shards have changed since they were joined: the checksums of all maps."""
    with open_maps(path) as maps:
        sums = {label: maps.column("checksum", label) for label in maps}
        return [
            (name, label, -1 if values is None else int(values[row]))
            for row, name in enumerate(maps.ids)
            for label, values in sums.items()
        ]
