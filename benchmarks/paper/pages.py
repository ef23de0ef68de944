"""How results become files: sections of Markdown, CSV, small PNGs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from attrbox.core.atomic_files import whole_file
from attrbox.metrics.results import write_csv

# A figure that is larger than so many bytes gets a palette.
LARGEST = 300_000


def section(title: str, text: str) -> str:
    """A section of the report."""
    return f"## {title}\n\n{text.rstrip()}\n"


def table(rows: Sequence[Mapping[str, Any]], path: Path | None = None, digits: int = 3) -> str:
    """Records of the same names as a Markdown table, and as a CSV file."""
    if path is not None:
        write_csv(path, rows)
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]

    def cell(value: Any) -> str:
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    return "\n".join([*lines, *("| " + " | ".join(cell(row[name]) for name in header) + " |" for row in rows)])


def figure(path: Path, draw: Callable[[Path], Any]) -> None:
    """What `draw` writes to a PNG file, whole or not at all; with a palette if it is large."""
    with whole_file(path) as part:
        drawn = part.with_suffix(".png")
        try:
            draw(drawn)
            if drawn.stat().st_size > LARGEST:
                with Image.open(drawn) as image:
                    image.convert("RGB").quantize().save(drawn, optimize=True)
            drawn.replace(part)
        finally:
            drawn.unlink(missing_ok=True)
