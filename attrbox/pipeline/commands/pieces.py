"""`attrbox merge` and `attrbox split`: files of maps put together and cut."""

from pathlib import Path
from typing import Annotated

import typer

from attrbox.pipeline.commands.options import MapsPath, say

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of maps of one model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new file.")],
    virtual: Annotated[bool, typer.Option("--virtual", help="Refer to the maps where they are; no copy.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Files of maps into one: the samples of all, or the methods of all where the samples are the same.

    What does not belong together is refused, and told. Exit status 2 if there is no new file.

    Example: `attrbox merge monday.h5 tuesday.h5 --out maps.h5`
    """
    from attrbox.data.maps.merge import merge

    say(f"Wrote {merge(files, out, virtual=virtual, overwrite=overwrite)}.")


def split(
    file: MapsPath,
    parts: Annotated[int, typer.Argument(metavar="PARTS", help="How many.")],
    overwrite: Overwrite = False,
) -> None:
    """A file of maps into several of about as many samples each, beside it.

    Exit status 2 if there are no new files.

    Example: `attrbox split maps.h5 3` writes maps-1-of-3.h5, maps-2-of-3.h5, maps-3-of-3.h5
    """
    from attrbox.data.maps.merge import split

    for path in split(file, parts, overwrite=overwrite):
        say(f"Wrote {path}.")
