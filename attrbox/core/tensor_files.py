"""Named tensors with settings in one safetensors file, which holds tensors and text only: loading it runs no code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attrbox.core.atomic_files import as_path, whole_file
from attrbox.errors import FileError


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], kind: str, locked: bool = False
) -> Path:
    """Write a file of some kind, such as "patterns"; an existing one is replaced as a whole (`locked`: `whole_file`).

    Raises:
        FileError: the file cannot be written.
    """
    stored = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    data = save(stored, metadata={"format": _format(kind), "settings": json.dumps(dict(settings))})
    with whole_file(path, locked=locked) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and settings of a file that `write_tensors` wrote.

    Raises:
        FileError: there is no such file, or it holds something else.
    """
    path = as_path(path, f"the name of a file of {kind}")
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise FileError(f"Cannot read {kind} from {path}: {error}.") from error
    if about.get("format") != _format(kind):
        raise FileError(
            f"Expected a file of {kind} that attrbox wrote, got {path} of format {about.get('format', 'unknown')!r}."
        )
    return tensors, json.loads(about["settings"])


def _format(kind: str) -> str:
    return f"attrbox {kind} 1"
