"""Quality of the learned rule on a CIFAR-10 network; how many iterations it needs; how far learned rules carry.

    python benchmarks/learned_cifar10.py --data FOLDER --out results                         all tables
    python benchmarks/learned_cifar10.py --data FOLDER --out results --tables transfer --images 40

FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg. The network has four convolutions (`cifar10.py`, "cnn"); the other
model is the same, trained from another seed. Removal curves are those of `learned_quality.py`, on test images that both
classify right, as many of each class. Trained networks, maps and scores are kept in the output folder.

"iterations" lets each preset stop early, and run in bfloat16. "transfer" replays the rule that was learned for one
image on others, and for one class on another class of the same image.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import cifar10
import torch
from quality import CONTROLS, ELSEWHERE, HAND_CRAFTED, LEARNED, SMOOTHED, Subject, mean, scores, table
from torch import Tensor
from tqdm import tqdm

import attrbox
from attrbox.core.memory import keep_pages
from attrbox.methods.learned.parameters import LearnedRules

STOPS = (5, 10, 20, 30, 60, 120)


def subject(folder: str, out: Path, count: int, epochs: int) -> Subject:
    """The networks and `count` test images, as many of each class, in the order of the classes."""
    model, other = (cifar10.trained("cnn", folder, out, epochs, seed) for seed in (0, 1))
    pixels, labels = cifar10.data(folder, "test", out)
    images = cifar10.normalised(pixels)
    right = (scores(model, images, 500).argmax(1) == labels) & (scores(other, images, 500).argmax(1) == labels)
    rows = torch.cat([(right & (labels == k)).nonzero()[: count // 10, 0] for k in range(10)])
    return Subject(model, other, images[rows], labels[rows], out, f"cifar10-{len(rows)}")


def iterations(subject: Subject) -> str:
    """The presets, stopped early."""
    methods = {
        f"{name}, {count} iterations": (name, {"iterations": count, "keep_rules": False})
        for name in LEARNED
        for count in STOPS
    }
    methods |= {
        f"{name}, 30 iterations, bfloat16": (
            name,
            {"iterations": 30, "keep_rules": False, "precision": torch.bfloat16},
        )
        for name in LEARNED
    }
    return subject.table([], methods)


def transfer(subject: Subject, preset: str) -> str:
    """Where the rule comes from, and what the map is worth that it makes."""
    model, images, targets = subject.model, subject.images, subject.targets
    n, each = len(images), len(images) // 10
    place = torch.arange(n)
    same = place // each * each + (place + 1) % each  # the next image of the class
    rival = scores(model, images, 500).topk(2).indices[:, 1]

    def learned(classes: Tensor) -> LearnedRules:
        return attrbox.explain(model, images, preset, target=classes).details["rules"]

    def means(members: Callable[[int], Tensor]) -> LearnedRules:
        return LearnedRules.joined([own[members(index)].average() for index in range(n)])

    own = learned(targets)
    sources = {
        "itself": own,
        "another image of its class": own[same],
        "an image of another class": own[(place + each) % n],
        "the mean of all others of its class": means(lambda i: place[(place // each == i // each) & (place != i)]),
        "the mean of all images of other classes": means(lambda i: place[place // each != i // each]),
        "itself, learned for the second-best class": learned(rival),
    }
    rows = []
    for source, rules in tqdm(sources.items(), desc=f"transfer of {preset}"):
        found = subject.curves(f"{preset} from {source}", ("learned_transfer", {"learned": rules}))
        rows.append([source, *(mean(found[name]) for name in ("MoRF zero", "LeRF zero", "MoRF blur", ELSEWHERE))])
    return table(["rule learned on", "MoRF zero", "LeRF zero", "MoRF blur", ELSEWHERE], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for networks, maps and scores")
    parser.add_argument("--images", type=int, default=100, help="test images, a multiple of 10")
    parser.add_argument("--epochs", type=int, default=4, help="of training")
    parser.add_argument("--tables", nargs="+", default=["curves", "iterations", "transfer"])
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    keep_pages()
    chosen = subject(arguments.data, out, arguments.images, arguments.epochs)
    for name, model in (("network", chosen.model), ("other model", chosen.other)):
        print(f"{name}: {100 * cifar10.accuracy(model, arguments.data, out):.1f} % of the test images")
    report = []
    if "curves" in arguments.tables:
        text = chosen.table([*CONTROLS, *HAND_CRAFTED, SMOOTHED, *LEARNED])
        report.append(f"### CIFAR-10, {len(chosen.images)} images\n\n{text}")
    if "iterations" in arguments.tables:
        report.append(f"### Stopped early\n\n{iterations(chosen)}")
    if "transfer" in arguments.tables:
        report += [f"### Transfer of {name}\n\n{transfer(chosen, name)}" for name in ("learned_rank", "learned_clean")]
    print("\n".join(report))
    (out / "cifar10.md").write_text("\n".join(report))


if __name__ == "__main__":
    main()
