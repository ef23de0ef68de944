"""Kill an export at random moments; after each kill the file must open, and in the end equal a whole one.

    python benchmarks/kills.py --kills 50 --images 200

Half of the kills come at any moment, the others lie in wait for a commit that is being applied, or for the last batch
and what comes after it. Fails loudly at the first map that is not what an uninterrupted export wrote.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

import attrbox
from attrbox.data.maps.journal import journal_of, lock_of

METHODS = ["saliency", "deeplift", ("integrated_gradients", {"steps": 2})]


def run(path: Path, images: int, side: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    data = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))
    attrbox.export(model, data, path, METHODS, running=attrbox.Running(batch_size=4), progress=False)


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


def committed(path: Path) -> int:
    """Where the superblock says that the file ends; a batch in the making lies behind."""
    with path.open("rb") as file:
        head = file.read(48)
    place = 40 if head[8] < 2 else 28
    return int.from_bytes(head[place : place + 8], "little")


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
    counts = dict.fromkeys(("torn", "behind", "before", "whole", "missed"), 0)
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder, "maps.h5"), Path(folder, "whole.h5")
        journal, lock = journal_of(path), lock_of(path)
        start = time.perf_counter()
        run(whole, arguments.images, arguments.side)
        seconds = time.perf_counter() - start
        kills = 0
        for moment in itertools.cycle(["any", "commit", "any", "end"]):
            if kills == arguments.kills:
                break
            process = context.Process(target=run, args=(path, arguments.images, arguments.side))
            process.start()
            while process.exitcode is None and not lock.exists():
                time.sleep(0.001)
            if moment == "end":
                while process.exitcode is None and size(path) < size(whole) - 100_000:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.1))
            else:
                time.sleep(rng.uniform(0, seconds / 12))
            while moment == "commit" and process.exitcode is None and not size(journal):
                time.sleep(0.0001)
            process.kill()
            process.join()
            if process.exitcode == 0:  # finished first: begin anew
                assert check(path, whole) == arguments.images
                assert not journal.exists()
                path.unlink()
                counts["missed"] += 1
                continue
            kills += 1
            counts["torn"] += size(journal) > 0
            counts["behind"] += path.exists() and size(path) > committed(path)
            counts["before"] += not path.exists()
            done = check(path, whole)
            print(f"kill {kills}, {moment}: {done} of {arguments.images} samples", flush=True)
            if done == arguments.images:
                run(path, arguments.images, arguments.side)  # finds nothing left to do
                assert check(path, whole) == arguments.images
                path.unlink()
                counts["whole"] += 1
        run(path, arguments.images, arguments.side)
        assert check(path, whole) == arguments.images
        assert sorted(os.listdir(folder)) == ["maps.h5", "whole.h5"], os.listdir(folder)
    print(
        f"{kills} kills, all sound: {counts['torn']} within a commit, {counts['behind']} with a batch half written, "
        f"{counts['whole']} after the last map, {counts['before']} before there was a file; {counts['missed']} exports "
        "finished before they could be killed"
    )


if __name__ == "__main__":
    main()
