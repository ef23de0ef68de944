"""Labels and the classes that they mean: names, WordNet ids and numbers of a model's classes; tables of labels.

The third folder of a data set is not the third class of a model. So a label is looked up among the model's classes by
what it is called, and only where a model's classes have no names does the order of as many labels stand for theirs.
"""

import csv
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set as AbstractSet
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePath
from typing import Any

import torchvision
from torch.utils.data import ConcatDataset, Subset

from attrbox.core.atomic_files import as_path
from attrbox.errors import FileError, InputError, TargetError, UnknownNameError, nearest

_SYNSETS = Path(__file__).with_name("imagenet_synsets.txt")
_WORDNET_ID = re.compile(r"(n\d{8})(?![^\W_])")  # also n01514668_cock
# Names that lists of ImageNet's classes give to two of them; torchvision calls one of each pair otherwise.
_SHARED = {"crane": (134, 517), "maillot": (638, 639)}
_HEADERS = ({"file", "filename", "image", "path", "id"}, {"label", "class", "target", "name", "wnid", "index"})


@cache
def imagenet_categories() -> tuple[str, ...]:
    """The names of the 1,000 classes of ImageNet."""
    return tuple(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """Their WordNet ids, in the same order."""
    return tuple(_SYNSETS.read_text(encoding="ascii").split())


@dataclass(frozen=True)
class ClassNames:
    """What the classes of a model are called.

    Attributes:
        names: one per class; None where they are not known.
        count: how many classes there are; None where that is not known either.
    """

    names: tuple[str, ...] | None = None
    count: int | None = None

    @cached_property
    def _of_imagenet(self) -> bool:
        return self.names == imagenet_categories()

    @cached_property
    def _folded(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.names or ()):
            found.setdefault(_folded(name), []).append(index)
        return found

    def find(self, text: str) -> list[int]:
        """All classes that a text may mean: by name, whatever its case and punctuation, by WordNet id, or by number."""
        folded = _folded(text)
        named = self._folded.get(folded, [])
        if self._of_imagenet:
            named = [*_SHARED.get(folded, named)]
            wordnet_id = _WORDNET_ID.match(text)
            if wordnet_id and wordnet_id[1] in imagenet_synsets():
                named = [imagenet_synsets().index(wordnet_id[1])]
        if named or not text.isdecimal():
            return named
        return [int(text)] if self.count is None or int(text) < self.count else []

    def index(self, text: str) -> int:
        """The class that a text means.

        Raises:
            UnknownNameError: it means none, or may mean several.
        """
        found = self.find(text)
        if len(found) == 1:
            return found[0]
        raise UnknownNameError(self._why_not(text, found))

    def indices(self, labels: Sequence[str], *, ordered: bool = False) -> list[int]:
        """The class that each label of a set means.

        A label that may mean several classes means the one that no other label of the set is called.

        Args:
            labels: all labels of the set, each once.
            ordered: they are in the order in which their data set counts them. If they are as many as the classes, and
                the names of the classes say nothing else, they then stand for the classes in their order.

        Raises:
            TargetError: a label means no class, or may mean several.
        """
        names = self.names or ()
        exact = {label: names.index(label) for label in labels if label in names}
        found = [self.find(label) for label in labels]
        claimed = {one[0] for one in found if len(one) == 1} | set(exact.values())
        found = [_unclaimed(one, claimed - {exact.get(label)}) for label, one in zip(labels, found, strict=True)]
        meant = [one[0] if len(one) == 1 else None for one in found]
        whole = ordered and len(labels) == self.count
        in_order = whole and all(index in (None, place) for place, index in enumerate(meant))
        known = [index for index in meant if index is not None]
        if len(known) == len(labels):
            if whole and self.names is None and not in_order:
                raise TargetError(
                    f"The {len(labels)} labels {_listed(labels)} are the numbers of the model's classes, but their "
                    "alphabetical order, in which data sets of folders count them, is another. Fill the numbers with "
                    "zeros to one length, or give a table of labels (Loading(labels=...), --labels)."
                )
            return known
        if in_order and (self.names is None or 2 * len(known) > len(labels)):
            return list(range(len(labels)))
        bad = [(label, one) for label, one in zip(labels, found, strict=True) if len(one) != 1]
        raise TargetError(
            f"Expected labels that are classes of the model, but {len(bad)} of {len(labels)} cannot be told: "
            f"{_listed([label for label, _ in bad])}. {self._why_not(*bad[0])} Call the labels (folders) by the names "
            "or numbers of the model's classes, or by WordNet ids for those of ImageNet; or give a table of labels "
            "(Loading(labels=...), --labels)."
        )

    def assumed(self, labels: Sequence[str]) -> "ClassNames":
        """These names; of 1,000 unnamed classes those of ImageNet, if all labels are names or WordNet ids of these."""
        imagenet = ClassNames(imagenet_categories(), 1000)
        if self.names is not None or self.count != 1000 or all(label.isdecimal() for label in labels):
            return self
        return imagenet if all(imagenet.find(label) for label in labels) else self

    def _why_not(self, text: str, found: Sequence[int]) -> str:
        if found:
            told = [f"{index} ({self._told(index)})" for index in found]
            return f"The classes {list(found)} may all be called {text!r}: {', '.join(told)}. Give one's number."
        if self.names is None:
            count = "" if self.count is None else f" {self.count}"
            return f"The{count} classes of the model have no names. Give a number instead of {text!r}."
        near = nearest(text.replace("_", " "), self.names)
        return f"No class is called {text!r}. {near}Give a name, or a number from 0 to {len(self.names) - 1}."

    def _told(self, index: int) -> str:
        assert self.names is not None
        return f"{self.names[index]}, {imagenet_synsets()[index]}" if self._of_imagenet else self.names[index]


def _folded(text: str) -> str:
    """A text without case, accents' encodings and punctuation: "Jack-o'-lantern" and "jack_o_lantern" are alike."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "")
    return " ".join(re.findall(r"[^\W_]+", plain)) or text


def _unclaimed(found: list[int], claimed: AbstractSet[int | None]) -> list[int]:
    left = [index for index in found if index not in claimed]
    return left if len(found) > 1 and len(left) == 1 else found


def _listed(labels: Sequence[str], most: int = 5) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(map(repr, labels[:most])) + more


# ----------------------------------------------------------------------------------------------- where labels come from


def names_of_labels(items: Any) -> list[str] | None:
    """What the labels 0, 1, ... of a data set are called, where it says so: `classes` as of torchvision's data sets, or
    the names of a `ClassLabel`; None where its labels are what its author made of them.

    Raises:
        InputError: it joins data sets that call their labels differently.
    """
    if isinstance(items, Subset):
        return names_of_labels(items.dataset)
    if isinstance(items, ConcatDataset):
        parts = [names_of_labels(part) for part in items.datasets]
        if any(part != parts[0] for part in parts):
            raise InputError(
                "Expected data sets whose labels mean the same, but those that were joined call them differently. "
                "Export them one by one, or give the classes themselves as the target."
            )
        return parts[0]
    if getattr(items, "target_transform", None) is not None:
        return None
    features = getattr(items, "features", None)
    if isinstance(features, Mapping):
        return _texts(getattr(features.get("label"), "names", None))
    return _texts(getattr(items, "wnids", None)) or _texts(getattr(items, "classes", None))


def _texts(names: Any) -> list[str] | None:
    """A list of texts, or of tuples that begin with one; None for anything else."""
    if not isinstance(names, list | tuple) or not names:
        return None
    first = [name[0] if isinstance(name, tuple) and name else name for name in names]
    return first if all(isinstance(name, str) for name in first) else None


def read_labels(path: str | Path) -> dict[str, str]:
    """The table of labels in a CSV file of two columns: a file, and the name, WordNet id or number of its class.

    A header is left out. Files are named by as much of their path as tells them apart, also without suffix.

    Raises:
        FileError: it cannot be read, has rows of another form, or labels a file twice.
    """
    table: dict[str, str] = {}
    path = as_path(path, "the name of a table of labels")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file, strict=True), 1):
                cells = [cell.strip() for cell in row]
                if not any(cells):
                    continue
                if not table and number == 1 and len(cells) == 2:
                    header = all(cell.casefold() in words for cell, words in zip(cells, _HEADERS, strict=True))
                    if header:
                        continue
                if len(cells) != 2 or not all(cells):
                    raise FileError(
                        f"Expected two columns, file and label, in line {number} of {str(path)!r}, got {row}. Put "
                        'quotes round a label with a comma: a.jpg,"crane, bird".'
                    )
                name = _relative(cells[0])
                if table.setdefault(name, cells[1]) != cells[1]:
                    raise FileError(f"{str(path)!r} labels {cells[0]!r} twice, as {table[name]!r} and {cells[1]!r}.")
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"Cannot read the labels in {str(path)!r} ({error}). Expected a CSV file.") from error
    if not table:
        raise FileError(f"Expected rows of file and label in {str(path)!r}, got none.")
    return table


def labels_by_table(table: Mapping[str, str], ids: Sequence[str], sources: Sequence[str] | None) -> list[str]:
    """The label of each sample by a table of files.

    Raises:
        InputError: a sample is not in the table, or several are one entry of it.
    """
    used: dict[str, str] = {}
    labels, missing = [], []
    for name, source in zip(ids, sources or ids, strict=True):
        keys = (key for text in (source, name) for key in _endings(text))
        key = next((key for key in keys if key in table), None)
        if key is None:
            missing.append(name)
            continue
        if used.setdefault(key, name) != name:
            raise InputError(
                f"The table of labels has one entry, {key!r}, for {used[key]!r} and {name!r}. Give more of their paths."
            )
        labels.append(table[key])
    if missing:
        raise InputError(
            f"Expected a label for each of the {len(ids)} samples, but the table has none for {len(missing)} of them: "
            f"{_listed(missing)}."
        )
    return labels


def _relative(text: str) -> str:
    return PurePath(text.replace("\\", "/")).as_posix().lstrip("/")


def _endings(text: str) -> Iterable[str]:
    """A path, with and without its suffix, then ever less of its beginning."""
    parts = PurePath(_relative(text)).parts
    for start in range(len(parts)):
        ending = "/".join(parts[start:])
        yield ending
        yield ending.removesuffix(PurePath(ending).suffix)
