"""Files appear whole or not at all, also where the power fails."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attrbox.errors import AttrboxError, FileError, shown


def as_path(path: object, what: str = "the name of a file") -> Path:
    """Return `path` as a Path, if it can be one.

    Raises:
        FileError: it is something else than a text or a path, is empty, or has a NUL in it.
    """
    try:
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    except TypeError:  # of a class of its own
        text = None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise FileError(f"Expected {what} as a text or a pathlib.Path, such as 'maps.h5', got {shown(path)}.")
    return Path(text)


@contextmanager
def whole_file(path: str | Path, overwrite: bool = True, locked: bool = False) -> Iterator[Path]:
    """A new file beside `path`, which takes its place if all goes well and is removed otherwise.

    Args:
        path: the name of the file; missing folders are made.
        overwrite: replace a file of that name.
        locked: nobody else can be writing it, so what a killed process left of one is taken over.

    Raises:
        FileError: the file exists and may not be replaced, is a folder, or cannot be written.
    """
    path = as_path(path)
    part = path.with_name(f".attrbox-{path.name if locked else uuid.uuid4().hex}.part")
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"Expected the name of a file to write, but {str(path)!r} is a folder or a device.")
        if path.exists() and not overwrite:
            raise FileError(f"The file {str(path)!r} exists already. Choose another name, or pass overwrite=True.")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "r+b") as file:  # a name must not become durable before what it names
            os.fsync(file.fileno())
        os.replace(part, path)
        settle(path.parent)
    except AttrboxError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # h5py raises any of these
        raise FileError(
            f"Cannot write {str(path)!r}: {error}. Check its folder, permissions and free space."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def settle(folder: Path) -> None:
    """Make durable which files a folder has, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
