"""`attrbox report`: one HTML page about a file of maps."""

from pathlib import Path
from typing import Annotated

import typer

from attrbox.pipeline.commands.options import MapsPath, say


def report(
    file: MapsPath,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default: beside the file.")] = None,
    n_samples: Annotated[int, typer.Option(min=1, help="At most so many, evenly spread.")] = 48,
    side: Annotated[int, typer.Option(min=8, help="Largest side of the maps on the page, in pixels.")] = 112,
) -> None:
    """One self-contained HTML page: every method on each sample, overlays, filters, curves and tables of the scores.

    It works without a network. Exit status 2 if the file cannot be read or the page not be written.

    Example: `attrbox report maps.h5 --out report.html`
    """
    from attrbox.pipeline.report.page import write_report

    say(f"Wrote {write_report(file, out or file.with_suffix('.html'), n_samples=n_samples, side=side)}.")
