"""Image files: find them, open them, name them."""

import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from attrbox.core.atomic_files import as_path
from attrbox.errors import FileError, InputError, PassedOverWarning, shown

T = TypeVar("T")

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})

# Photographs that scikit-image ships, and whose subjects ImageNet has names for.
PHOTOGRAPHS = ("chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "camera.png")


def find_images(paths: Iterable[str | Path] | str | Path) -> list[Path]:
    """The image files among and under some paths, links to files and folders included.

    An image that is a link to nothing is among them: reading it tells why it cannot be had.

    Raises:
        FileError: a path does not exist, or a folder holds no image or cannot be listed.
        InputError: there are no paths.

    Warns:
        PassedOverWarning: a link leads back into itself, or to nothing and may have been a folder.
    """
    found: dict[Path, None] = {}
    if isinstance(paths, str | Path):
        paths = [paths]
    elif not isinstance(paths, Iterable):
        raise InputError(f"Expected image files or folders, got {shown(paths)}.")
    for given in paths:
        path = as_path(given, "the name of an image file or a folder")
        if os.path.isdir(path):  # which raises nothing, however long the name is
            passed: list[str] = []
            inside = sorted(_inside(path, frozenset(), passed))
            if passed:
                warnings.warn(
                    f"Passed over {len(passed)} entries of the folder {str(path)!r}: {'; '.join(passed[:5])}. Mend or "
                    "remove them.",
                    PassedOverWarning,
                    stacklevel=3,
                )
            if not inside:
                raise FileError(
                    f"Expected images in the folder {str(path)!r}, got none of {', '.join(sorted(SUFFIXES))}."
                )
            found.update(dict.fromkeys(inside))
        elif os.path.isfile(path):
            found[path] = None
        else:
            raise _dead_link(path) or FileError(
                f"Expected an image or a folder of images, but there is no {str(path)!r}."
            )
    if not found:
        raise InputError("Expected at least one image file or folder, got none.")
    return list(found)


def _inside(folder: Path, above: frozenset[Path], passed: list[str]) -> Iterator[Path]:
    """The images in a folder and its subfolders; what else may have been one is told to `passed`.

    Args:
        folder: that is searched.
        above: the real paths of folders that led to it.
        passed: gets texts.
    """
    here = Path(os.path.realpath(folder))
    if here in above:
        passed.append(f"{str(folder)!r} is a link to {str(here)!r}, in which it lies")
        return
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise FileError(
            f"Cannot list the folder {str(folder)!r} ({error.strerror}). Make it readable, or move it elsewhere."
        ) from error
    for entry in entries:
        is_image = entry.suffix.lower() in SUFFIXES
        if entry.is_dir():
            yield from _inside(entry, above | {here}, passed)
        elif is_image and (entry.is_file() or _dead_link(entry)):
            yield entry
        elif is_image:
            passed.append(f"{str(entry)!r} is no file")
        elif not entry.suffix and (dead := _dead_link(entry)):
            passed.append(str(dead).split(". ")[0])


def _dead_link(path: Path) -> FileError | None:
    """What is wrong with a link that leads to nothing; None if it leads to something, or if there is no link."""
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return FileError(
        f"{str(path)!r} is a link to {os.readlink(path)!r}, which cannot be found. Mend the link, or remove it."
    )


def open_image(path: str | Path) -> Image.Image:
    """An image as RGB: turned the way up that its camera noted (EXIF), what is transparent laid over white.

    Raises:
        FileError: the file cannot be read as an image.
    """
    path = as_path(path, "the name of an image file")
    if dead := _dead_link(path):
        raise dead
    try:
        with Image.open(path) as opened:
            return as_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # decoders raise all sorts of things on broken files
        raise FileError(
            f"Cannot read {str(path)!r} as an image ({type(error).__name__}: {error}). Expected a picture such as "
            "JPEG or PNG; open it elsewhere to see whether it is damaged."
        ) from error


def demo_photographs() -> list[Path]:
    """Files of real photographs: a cat, a cup of coffee, a motorcycle, a rocket, and a camera on a tripod.

    They come inside of scikit-image (extra `demo`): nothing is downloaded.

    Raises:
        FileError: scikit-image is not installed, or comes without them.
    """
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise FileError("The demo's photographs come with scikit-image. Install the extra: pip install 'attrbox[demo]'")
    paths = [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileError(f"This scikit-image comes without {', '.join(missing)}. Install scikit-image 0.22 or newer.")
    return paths


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB; what is transparent is laid over white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert("RGB") would clip
        grey = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.uint8(np.clip(grey / 257, 0, 255).round())).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


def distinct_names(files: list[Path]) -> list[str]:
    """Short names that differ: "cat", or "left/cat" and "right/cat", or "cat.jpg" and "cat.png"; never ".."."""
    stems = [Path(os.path.abspath(file)).with_suffix("") for file in files]
    names = {stem: stem.name for stem in stems}
    for depth in range(2, max(len(stem.parts) for stem in stems)):
        doubles = _doubles(names.values())
        names = {stem: "/".join(stem.parts[-depth:]) if name in doubles else name for stem, name in names.items()}
    whole = _doubles(stems)  # differ in their suffixes only
    whole |= {stem for stem in stems if stem.name in (".", "..")}  # of "...png"
    return [names[stem] + (file.suffix if stem in whole else "") for stem, file in zip(stems, files, strict=True)]


def _doubles(items: Iterable[T]) -> set[T]:
    return {item for item, count in Counter(items).items() if count > 1}
