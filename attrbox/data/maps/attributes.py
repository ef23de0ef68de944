"""What a file says of its maps: methods, options and how they were made, as attributes."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from attrbox.core.hashing import tensor_bytes
from attrbox.core.results import Attribution, Provenance


def attributes_of(label: str, attribution: Attribution, description: Mapping[str, str]) -> dict[str, str]:
    """The attributes of one method's maps, as text."""
    texts = {
        "label": label,
        "method": attribution.method,
        "options": json.dumps(plain(attribution.options), ensure_ascii=False),
        "units": attribution.units,
        "reduction": attribution.reduction,
        "coverage": str(attribution.coverage),
        "precision": plain(attribution.provenance.precision) or "",
        "channels_last": attribution.provenance.channels_last,
        **description,
    }
    return {storable(name): storable(str(text)) for name, text in texts.items()}


def options_in(file: h5py.Group, dataset: h5py.Dataset) -> dict[str, Any] | None:
    """The options by which the maps of a dataset were made, tensors included; None if the file cannot tell."""
    options: dict[str, Any] = json.loads(dataset.attrs.get("options", "{}"))
    for name, value in options.items():
        if isinstance(value, dict):
            place = f"options/{value.get('sha256')}"
            if place not in file:  # of an older attrbox, or no tensor
                return None
            options[name] = torch.from_numpy(file[place][()]).to(getattr(torch, value["dtype"]))
    return options


def provenance_in(dataset: h5py.Dataset, seeds: Sequence[int]) -> Provenance:
    """How the call made the maps of a dataset, whose samples had these streams of random numbers."""
    attributes = dataset.attrs
    precision = str(attributes.get("precision", "")) or None
    return Provenance(
        seeds,
        None if precision is None else getattr(torch, precision.removeprefix("torch.")),
        str(attributes.get("channels_last", True)) == "True",
    )


def streams_in(file: h5py.Group) -> list[int]:
    """The stream of random numbers of each sample. Version 0.1 gave all samples the seed itself, an attribute."""
    samples = file["samples"]
    if "seed" in samples:
        return list(samples["seed"][()].tolist())
    seed = next((int(dataset.attrs["seed"]) for dataset in file["maps"].values() if "seed" in dataset.attrs), 0)
    return [seed] * len(samples["id"])


def plain(value: Any) -> Any:
    """A stand-in that JSON can hold: the same in any process: tensors by their SHA-256, functions by name."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.array(value))
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return {"shape": list(value.shape), "dtype": name, "sha256": hashlib.sha256(tensor_bytes(value)).hexdigest()}
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def is_named(value: Any) -> bool:
    """Whether `plain` tells only what something is called or how it prints itself, as of functions."""
    if isinstance(value, Mapping):
        return any(map(is_named, value.values()))
    if isinstance(value, list | tuple):
        return any(map(is_named, value))
    return not (value is None or isinstance(value, bool | int | float | str | np.ndarray | np.generic | Tensor))


def storable(text: str) -> str:
    """The text with what HDF5 cannot hold, NUL and lone surrogates, as backslash escapes."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
