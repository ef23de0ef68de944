"""Masks and black-box methods: cost against bare passes, speed and agreement with TorchRay, a picture.

    python benchmarks/perturbation.py --tables passes times
    python benchmarks/perturbation.py --tables torchray
    python benchmarks/perturbation.py --tables agreement --data FOLDER --images 10 --iterations 200
    python benchmarks/perturbation.py --tables areas --data FOLDER --images 2
    python benchmarks/perturbation.py --tables picture --data FOLDER --out masks.png

Ratios come from interleaved rounds, as in `benchmarks/engine.py`. TorchRay (github.com/facebookresearch/TorchRay, for
non-commercial use) is compared with if `import torchray` finds a copy of your own; without, its tables say so and are
left out. FOLDER holds photographs.
"""

import argparse
import os
import platform
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from engine import load, photographs, quietly, ratio, rounds, table
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import attrbox
from attrbox.data.images import find_images, open_image
from attrbox.data.models.factories import efficientnet_lite0

AREAS = (0.025, 0.05, 0.1, 0.2)
PICTURE = [
    "mask",
    "smask",
    ("occlusion", {"window": 32, "stride": 16}),
    ("rise", {"n_samples": 400, "center": True}),
    ("lime", {"n_samples": 250}),
    ("kernel_shap", {"n_samples": 250}),
]


def extremal_perturbation() -> Callable[..., Any] | None:
    """TorchRay's function, if the reader has it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchray.attribution.extremal_perturbation import extremal_perturbation as function
    except ImportError as error:
        print(f"(left out: TorchRay cannot be imported, {error})\n")
        return None
    return function


def passes(models: Sequence[str], count: int) -> None:
    """RISE and occlusion against forward passes on as many images, in batches as large."""
    print("### RISE and occlusion, in bare forward passes of as many images (batches of 8)\n")
    rows = []
    common = {"target": 0, "batch_size": 8, "progress": False}
    for name in models:
        model, images = load(name), photographs(name, 1)
        batch = photographs(name, 8)

        @torch.no_grad()
        def bare(model: nn.Module = model, batch: Tensor = batch) -> None:
            for _ in range(6):
                model(batch)

        candidates = {
            "bare": bare,  # 48 images
            "rise": lambda model=model, images=images: attrbox.explain(model, images, "rise", n_samples=48, **common),
            "occlusion": lambda model=model, images=images: attrbox.explain(  # 7 x 7 windows
                model, images, "occlusion", window=56, stride=28, **common
            ),
        }
        seconds = rounds(candidates, count)
        needed = {"rise": 49 / 48, "occlusion": 50 / 48}  # the image itself too
        cells = [ratio([s / needed[m] for s in seconds[m]], seconds["bare"]) for m in needed]
        rows.append([f"{name} ({statistics.median(seconds['bare']) / 48:.3f} s per image)", *cells])
    table(["model", "rise", "occlusion"], rows)


def per_iteration(call: Callable[[int], object], few: int, many: int) -> dict[str, Callable[[], object]]:
    """Candidates whose difference in seconds is the cost of `many - few` iterations, set-up and all else aside."""
    return {"few": lambda: call(few), "many": lambda: call(many)}


def times(count: int) -> None:
    """Seconds per image with published settings, from the cost of an iteration."""
    print("### Seconds per image with published settings (8 images at once; seconds per iteration times iterations)\n")
    model, images = load("efficientnet_lite0"), photographs("efficientnet_lite0", 8)
    rows = []
    # A circle to start from takes 35 forward passes more per image, but nothing per iteration.
    for method, iterations, options in (("mask", 300, {"initial": "ones"}), ("smask", 800, {})):

        def call(steps: int, method: str = method, options: dict[str, str] = options) -> object:
            return attrbox.explain(model, images, method, iterations=steps, target=0, progress=False, **options)

        seconds = rounds(per_iteration(call, 1, 4), count)
        step = statistics.median((m - f) / 3 for m, f in zip(seconds["many"], seconds["few"], strict=True))
        rows.append([method, f"{step / 8 * 1000:.0f} ms", str(iterations), f"{step / 8 * iterations:.0f} s"])
    table(["method", "an iteration, per image", "iterations", "per image"], rows)


def torchray(count: int) -> None:
    """sMask of 8 images and 4 areas against TorchRay, one image a call, all areas in it."""
    print("### sMask against TorchRay: 8 images, 4 areas; its seconds per iteration and mask over attrbox's\n")
    theirs = extremal_perturbation()
    if theirs is None:
        return
    model, images = load("efficientnet_lite0"), photographs("efficientnet_lite0", 8)

    def one_by_one(steps: int) -> None:
        for image in images:
            quietly(lambda image=image: theirs(model, image[None], 0, areas=list(AREAS), max_iter=steps))

    def together(steps: int) -> object:
        options = {"area_fractions": AREAS, "iterations": steps, "history": 0}
        return attrbox.explain(model, images, "smask", target=0, progress=False, **options)

    calls = {f"TorchRay {key}": call for key, call in per_iteration(one_by_one, 1, 3).items()}
    calls |= {f"attrbox {key}": call for key, call in per_iteration(together, 1, 3).items()}
    seconds = rounds(calls, count)
    steps = {
        name: [(m - f) / 2 for m, f in zip(seconds[f"{name} many"], seconds[f"{name} few"], strict=True)]
        for name in ("TorchRay", "attrbox")
    }
    cells = [f"{statistics.median(steps[name]) / 32 * 1000:.0f} ms" for name in steps]
    table(
        ["TorchRay, a mask", "attrbox, a mask", "times as fast"], [[*cells, ratio(steps["TorchRay"], steps["attrbox"])]]
    )


def chosen(folder: str, count: int) -> tuple[Any, Tensor]:
    """EfficientNet-Lite0 with its preprocessing, and some photographs from all over the folder."""
    loaded = efficientnet_lite0()
    paths = find_images([folder])
    paths = paths[len(paths) // (2 * count) :: max(1, len(paths) // count)][:count]
    return loaded, torch.stack([loaded.preprocess(open_image(path)) for path in paths])


def agreement(folder: str, count: int, iterations: int) -> None:
    """Rank correlation of the masks of both, and the rewards that they reach.

    How far rewards swing by themselves, TorchRay says on the same images with noise of a thousandth of their deviation.
    """
    from scipy.stats import spearmanr

    print(f"### sMask against TorchRay: masks of area 0.1 after {iterations} iterations\n")
    theirs = extremal_perturbation()
    if theirs is None:
        return
    loaded, images = chosen(folder, count)
    targets = loaded.predict(images)[0]
    maps = attrbox.explain(loaded.model, images, "smask", target=targets, iterations=iterations)
    late = slice(-max(1, iterations // 10), None)
    noise = 1e-3 * images.std() * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def run(image: Tensor, target: int) -> tuple[Tensor, float]:
        mask, curve = quietly(lambda: theirs(loaded.model, image[None], target, areas=[0.1], max_iter=iterations))
        return mask.flatten(), curve[0, 0, late].mean().item()

    def rank(a: Tensor, b: Tensor) -> float:
        return float(spearmanr(a.flatten().numpy(), b.flatten().numpy()).statistic)

    rows, columns = [], []
    for index, target in enumerate(tqdm(targets.tolist(), desc="TorchRay")):
        (mask, reward), (again, shaken) = (run(image, target) for image in (images[index], (images + noise)[index]))
        mine = maps.details["reward"][index, 0, late].mean().item()
        ranks = rank(mask, maps.values[index]), rank(mask, again)
        area = maps.details["areas"][index, 0].item()
        columns.append((*ranks, mine - reward, shaken - reward, area))
        shown = (f"{ranks[0]:.3f}", f"{ranks[1]:.3f}", f"{reward:.2f}", f"{mine:.2f}", f"{shaken:.2f}", f"{area:.4f}")
        rows.append([loaded.class_name(target), *shown])
    means = [statistics.mean(column) for column in zip(*columns, strict=True)]
    spreads = [statistics.stdev(column) if len(columns) > 1 else 0.0 for column in zip(*columns, strict=True)]
    differences = [f"{means[k]:+.2f} (sd {spreads[k]:.2f})" for k in (2, 3)]
    rows.append(["mean, and of differences", f"{means[0]:.3f}", f"{means[1]:.3f}", "", *differences, f"{means[4]:.4f}"])
    header = ["class", "rank correlation", "TorchRay with noise", "reward, TorchRay", "attrbox", "TorchRay with noise"]
    table([*header, "area, attrbox"], rows)


def areas(folder: str, count: int) -> None:
    """The areas that masks cover in the end (means of soft masks, the margin around the image included)."""
    print("### Areas of sMask after 800 iterations\n")
    loaded, images = chosen(folder, count)
    targets = loaded.predict(images)[0]
    found = attrbox.explain(loaded.model, images, "smask", target=targets, area_fractions=AREAS).details["areas"]
    names = [loaded.class_name(target) for target in targets.tolist()]
    rows = [
        [name, *(f"{area:.4f}" for area in row)] for name, row in zip(names, found.flatten(1).tolist(), strict=True)
    ]
    table(["asked for", *map(str, AREAS)], rows)


def picture(folder: str, count: int, out: str) -> None:
    """The maps of all methods of this page on some photographs."""
    loaded, images = chosen(folder, count)
    result = attrbox.compare(loaded.model, images, PICTURE)
    names = [loaded.class_name(index) for index in result.predictions.tolist()]
    result.plot(out, titles=names, photographs=loaded.photographs(images))
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)
    print(result.table())


TABLES = ["passes", "times", "torchray", "agreement", "areas", "picture"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["efficientnet_lite0", "resnet18"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", nargs="+", default=["passes", "times", "torchray"], choices=TABLES)
    parser.add_argument("--data", help="folder of photographs, for agreement, areas and picture")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=800)
    parser.add_argument("--out", default="masks.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, torch {torch.__version__}\n")
    if "passes" in options.tables:
        passes(options.models, options.rounds)
    if "times" in options.tables:
        times(options.rounds)
    if "torchray" in options.tables:
        torchray(options.rounds)
    if {"agreement", "areas", "picture"} & set(options.tables) and not options.data:
        parser.error("agreement, areas and picture need --data FOLDER")
    if "agreement" in options.tables:
        agreement(options.data, options.images, options.iterations)
    if "areas" in options.tables:
        areas(options.data, options.images)
    if "picture" in options.tables:
        picture(options.data, options.images, options.out)


if __name__ == "__main__":
    main()
