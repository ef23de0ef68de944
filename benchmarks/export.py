"""What an export costs beside computing, reading beside bare h5py, and the size of the file.

    python benchmarks/export.py --images 64 --rounds 9 --maps 1000

Saliency on ResNet-18 (random weights), images decoded in memory. In each round the candidates run once each in random
order; ratios are taken within the round, and their median, first and third quartile printed.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision
from PIL import Image

import attrbox
from attrbox.data.models.loaded_model import Preprocess
from attrbox.data.samples import samples_of

EXPORTS: dict[str, dict[str, object]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "lzf": {"compression": "lzf"},
    "gzip": {"compression": "gzip"},
    "photographs": {"thumbnails": True},
}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(candidates: dict[str, Callable[[], object]], baseline: str, count: int) -> None:
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    seconds = []
    for _ in range(count):
        order = list(candidates)
        random.shuffle(order)
        times = {name: timed(candidates[name]) for name in order}
        seconds.append(times[baseline])
        for name in candidates:
            ratios[name].append(times[name] / times[baseline])
    print(f"{baseline}: {np.median(seconds):.3f} s")
    for name, values in ratios.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        print(f"| {name} | {middle:.3f} ({low:.3f}-{high:.3f}) |")


def writing(arguments: argparse.Namespace, folder: Path) -> None:
    model = torchvision.models.resnet18(weights=None).eval().to(arguments.device)
    images = torch.randn(arguments.images, 3, arguments.side, arguments.side)
    size = arguments.batch_size
    path = folder / "maps.h5"

    def compute() -> None:
        for start in range(0, len(images), size):
            part = images[start : start + size].to(arguments.device)
            attrbox.compare(model, part, ["saliency"], batch_size=size, progress=False)["saliency"].values.cpu()

    def export(**options: object) -> Callable[[], object]:
        storage = attrbox.Storage(**({"thumbnails": False} | options))  # type: ignore[arg-type]
        running = attrbox.Running(batch_size=size, overwrite=True)
        return lambda: attrbox.export(
            model, images, path, ["saliency"], storage=storage, running=running, progress=False
        )

    candidates = {"computing alone": compute}
    candidates |= {f"export, {name}": export(**EXPORTS[name]) for name in arguments.exports}
    compute()
    rounds(candidates, "computing alone", arguments.rounds)
    raw = images.numel() * 4
    for name, work in list(candidates.items())[1:]:
        work()
        print(f"| {name} | {path.stat().st_size / raw:.3f} of raw float32 |")


def decoding(arguments: argparse.Namespace, folder: Path) -> None:
    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for index in range(arguments.images):
        pixels = np.kron(rng.integers(0, 255, (25, 33, 3), np.uint8), np.ones((15, 15, 1), np.uint8))
        Image.fromarray(pixels).save(pictures / f"{index}.jpg")
    samples = samples_of(pictures, preprocess=Preprocess(256, arguments.side))
    size = arguments.batch_size
    batches = [list(range(i, min(i + size, len(samples)))) for i in range(0, len(samples), size)]
    for workers in arguments.workers:
        seconds = timed(lambda workers=workers: [None for _ in samples.batches(batches, workers)])
        print(f"| decoding, {workers} workers | {len(samples) / seconds:.1f} images/s |")


def reading(arguments: argparse.Namespace, folder: Path) -> None:
    """Random maps of a file whose pages are cached, and of a bare array of the same chunks."""
    count = min(arguments.maps, 2000)
    path, bare = folder / "read.h5", folder / "bare.h5"
    values = torch.randn(count, 3, arguments.side, arguments.side)
    identity = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(values[0].numel(), 1)).eval()
    attrbox.export(identity, values, path, ["random"], storage=attrbox.Storage(thumbnails=False), progress=False)
    with h5py.File(bare, "w") as file:
        file.create_dataset("maps", values.shape, "f4", chunks=(1, *values.shape[1:]))[:] = values.numpy()
    order = np.random.default_rng(0).integers(0, count, arguments.maps).tolist()
    with attrbox.open_maps(path) as maps, h5py.File(bare) as file:
        one, array = maps["random"], file["maps"]
        candidates = {
            "h5py, bare array": lambda: [array[row] for row in order],
            "attrbox, one by one": lambda: [one[row] for row in order],
            "attrbox, lists of 32": lambda: [one[order[i : i + 32]] for i in range(0, len(order), 32)],
        }
        for work in candidates.values():
            work()
        rounds(candidates, "h5py, bare array", arguments.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=["writing", "decoding", "reading"])
    parser.add_argument("--exports", nargs="*", default=list(EXPORTS), choices=list(EXPORTS), help="kinds of writing")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--maps", type=int, default=1000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random.seed(0)
    for name in arguments.tables:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n{name}")
            {"writing": writing, "decoding": decoding, "reading": reading}[name](arguments, Path(folder))


if __name__ == "__main__":
    main()
