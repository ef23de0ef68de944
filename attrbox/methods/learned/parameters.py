"""Learned rules as a thing of their own: kept, saved, averaged, and replayed on other images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attrbox.core.tensor_files import read_tensors, write_tensors
from attrbox.errors import InputError, OptionError, shown

_KIND = "learned rules"


@dataclass(frozen=True, eq=False)
class LearnedRules:
    """The parameters of learned rules, one rule per sample and target.

    Attributes:
        parameters: name of a site (`Site.name`) -> W, [N, K, R, ...], for N samples, K targets and R restarts.
        settings: `plugin`, `kernel`, `feature`, `reference`, ..., without which the parameters mean nothing, and the
            pattern `modules` of where they were learned.
    """

    parameters: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "LearnedRules":
        """The rules of some samples; an index keeps the sample's axis."""
        chosen = [rows] if isinstance(rows, int) else rows
        return replace(self, parameters={site: values[chosen] for site, values in self.parameters.items()})

    def average(self) -> "LearnedRules":
        """One rule for all: the mean of the parameters over the samples."""
        return replace(
            self, parameters={site: values.mean(0, keepdim=True) for site, values in self.parameters.items()}
        )

    @classmethod
    def joined(cls, parts: "Sequence[LearnedRules]") -> "LearnedRules":
        """The rules of all samples of several chunks.

        Raises:
            InputError: their sites or settings differ.
        """
        first = parts[0]
        for part in parts[1:]:
            if part.settings != first.settings or part.parameters.keys() != first.parameters.keys():
                raise InputError("Expected learned rules of the same model and settings, got different ones.")
        return cls({name: torch.cat([p.parameters[name] for p in parts]) for name in first.parameters}, first.settings)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; an existing one is replaced as a whole.

        Raises:
            FileError: the file cannot be written.
        """
        return write_tensors(path, self.parameters, self.settings, _KIND)

    @classmethod
    def load(cls, path: str | Path) -> "LearnedRules":
        """Read what `save` wrote.

        Raises:
            FileError: there is no such file, or it holds no learned rules.
        """
        return cls(*read_tensors(path, _KIND))

    def __repr__(self) -> str:
        shape = next(iter(self.parameters.values())).shape
        return f"<LearnedRules {len(self.parameters)} sites, {shape[0]} samples, {shape[1]} targets; {self.settings}>"


def as_rules(value: object) -> LearnedRules:
    """Learned rules, or the path of a file of them.

    Raises:
        OptionError: it is neither.
        FileError: the file cannot be read.
    """
    if isinstance(value, LearnedRules):
        return value
    if isinstance(value, str | Path):
        return LearnedRules.load(value)
    raise OptionError(
        f"Expected rules to be LearnedRules (explain(..., 'learned').details['rules']) or the path of a file that "
        f"their save() wrote, got {shown(value)}."
    )
