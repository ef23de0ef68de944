"""Kill an export at random moments; after each kill the file must open, and in the end equal a whole one.

    python benchmarks/kills.py --kills 50 --images 200

Fails loudly at the first map that is not what an uninterrupted export wrote.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

import attrbox
from attrbox.journal import journal_of

METHODS = ["saliency", "deeplift", ("integrated_gradients", {"steps": 2})]


def run(path: Path, images: int, side: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    data = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))
    attrbox.export(model, data, path, METHODS, batch_size=4, progress=False)


def check(path: Path, whole: Path) -> int:
    """The samples that are done, all of which are what they should be."""
    if not path.exists():
        return 0
    with attrbox.open_maps(path) as maps, attrbox.open_maps(whole) as other:
        for label, one in maps.items():
            for row in np.flatnonzero(one.done):
                assert np.array_equal(one.numpy(int(row)), other[label].numpy(int(row))), (label, row)
        done = int(maps["saliency"].done.sum())
    assert attrbox.verify(path) == []
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attrbox"])
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder, "maps.h5"), Path(folder, "whole.h5")
        start = time.perf_counter()
        run(whole, arguments.images, arguments.side)
        seconds = time.perf_counter() - start
        kills = torn = restarts = 0
        while kills < arguments.kills:
            process = context.Process(target=run, args=(path, arguments.images, arguments.side))
            process.start()
            while process.exitcode is None and not journal_of(path).exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, seconds / 12))
            process.kill()
            process.join()
            if process.exitcode == 0:  # finished first: begin anew
                assert check(path, whole) == arguments.images
                path.unlink()
                restarts += 1
                continue
            kills += 1
            journal = journal_of(path)
            torn += journal.exists() and journal.stat().st_size > 0
            print(f"kill {kills}: {check(path, whole)} of {arguments.images} samples", flush=True)
        run(path, arguments.images, arguments.side)
        assert check(path, whole) == arguments.images
    print(
        f"{kills} kills, {torn} of them in the middle of a commit, {restarts} exports finished between them; all sound"
    )


if __name__ == "__main__":
    main()
