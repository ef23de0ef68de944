"""Mosaics of confidently classified images of different classes, for the grid pointing game."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrbox.core.model_state import check_model, untouched
from attrbox.core.outputs import unwrap
from attrbox.core.renaming import renamed_arguments
from attrbox.core.validation import check, check_count, check_flag, check_images
from attrbox.engine.calling import forward
from attrbox.errors import InputError, OptionError


@dataclass(frozen=True, eq=False)
class Mosaics:
    """Grids of images, once for each of their cells: explain `images` with `targets`, and measure with `masks`.

    Attributes:
        images: [M * cells, C, H, W]; those of one mosaic follow each other and are the same.
        targets: the class of one cell each, [M * cells].
        masks: where that cell is, bool [M * cells, H, W].
        sources: which of the given images each cell shows, [M, cells].
    """

    images: Tensor
    targets: Tensor
    masks: Tensor
    sources: Tensor

    def __len__(self) -> int:
        return len(self.images)


@renamed_arguments(count="n_samples")
def mosaics(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | Sequence[int],
    *,
    grid: int = 3,
    n_samples: int = 500,
    confidence: float = 0.99,
    shrink: bool = False,
    batch_size: int = 32,
    seed: int = 0,
) -> Mosaics:
    """Build mosaics of grid x grid images, all of different classes.

    Args:
        model: takes images of any size, unless `shrink` is set.
        images: [N, C, H, W], normalised.
        labels: their classes, [N].
        grid: images a side.
        n_samples: how many mosaics.
        confidence: only images are used whose label the model gives at least this probability.
        shrink: resize the mosaics to H x W, for models that take one size only.
        batch_size: images per forward pass.
        seed: of the choice of images.

    Raises:
        InputError: labels and images do not fit, or too few classes have a confident image.
        OptionError: an option is out of range.
    """
    check_count("grid", grid)
    check_count("n_samples", n_samples)
    check_count("batch_size", batch_size)
    check_flag("shrink", shrink)
    check(0 <= confidence <= 1, "confidence", "a probability", confidence)
    if grid < 2:
        raise OptionError(f"Expected a grid of at least 2 x 2, got {grid}.")
    images = check_images(images)
    classes = torch.as_tensor(labels, device=images.device)
    if images.dim() != 4 or classes.shape != (len(images),):
        raise InputError(
            f"Expected images [N, C, H, W] and one label each, got {list(images.shape)} and {list(classes.shape)}."
        )
    sure = _probabilities(check_model(model), images, classes, batch_size) >= confidence
    pool, cells = sure.nonzero()[:, 0], grid * grid
    found = len(torch.unique(classes[pool]))
    if found < cells:
        raise InputError(
            f"A grid of {grid} x {grid} needs confident images of {cells} classes, got {len(pool)} images of {found} "
            f"with a probability of at least {confidence:g}. Pass more images, or lower confidence or grid."
        )
    generator = torch.Generator().manual_seed(seed)
    sources = torch.stack([_distinct(classes, pool, cells, generator) for _ in range(n_samples)])
    rows = [torch.cat(tuple(images[sources[:, r * grid + c]] for c in range(grid)), 3) for r in range(grid)]
    pictures = torch.cat(rows, 2)
    if shrink:
        pictures = F.interpolate(pictures, images.shape[2:], mode="bilinear", antialias=True)
    return Mosaics(
        images=pictures.repeat_interleave(cells, 0),
        targets=classes[sources].flatten(),
        masks=grid_cells(grid, *pictures.shape[2:]).to(images.device).repeat(n_samples, 1, 1),
        sources=sources,
    )


def grid_cells(grid: int, height: int, width: int) -> Tensor:
    """Where the cells of a grid are, row by row, bool [grid * grid, H, W]; each pixel is in one cell."""
    rows = torch.arange(height) * grid // height
    columns = torch.arange(width) * grid // width
    numbers = rows[:, None] * grid + columns
    return torch.stack([numbers == cell for cell in range(grid * grid)])


def _probabilities(model: nn.Module, images: Tensor, classes: Tensor, batch_size: int) -> Tensor:
    with untouched(model), torch.no_grad():
        parts = [unwrap(forward(model, part.clone())).softmax(1) for part in torch.split(images, batch_size)]
    return torch.cat(parts).gather(1, classes[:, None].long())[:, 0]


def _distinct(classes: Tensor, pool: Tensor, cells: int, generator: torch.Generator) -> Tensor:
    """Random images of the pool, no two of one class, [cells]."""
    chosen: dict[int, int] = {}
    for index in pool[torch.randperm(len(pool), generator=generator).to(pool.device)].tolist():
        chosen.setdefault(int(classes[index]), index)
        if len(chosen) == cells:
            break
    return torch.tensor(list(chosen.values()), device=pool.device)
