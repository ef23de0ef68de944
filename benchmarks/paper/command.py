"""The paper's experiments: tables as Markdown and CSV, figures as PNG.

    python benchmarks/paper --out results/paper --mnist FILE --cifar FOLDER --photographs FOLDER
    python benchmarks/paper --out results/paper --cifar FOLDER --only table2 fig9 --sweep-images 100

FILE (.npz) holds `images` uint8 [N, 28, 28] and `labels` [N], shuffled; the last fifth is the test set. The CIFAR-10
folder holds train/CLASS/*.jpg and test/CLASS/*.jpg; that of photographs, ImageNet photographs whose names begin with
the class index ("860_tobacco_shop.jpg"). Trained weights, maps and scores are kept in the output folder, each under a
name that says what it depends on: an interrupted run goes on where it stopped, and another size takes what still fits.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from attrbox.core.atomic_files import whole_file
from attrbox.core.memory import keep_pages
from paper.cost import cost
from paper.curves import fig5
from paper.kept import Kept
from paper.pictures import fig6, fig7, fig8
from paper.retraining import table1
from paper.sweeps import fig9, table2

# Name -> what makes its section of the report, and which data it needs (any of these will do).
EXPERIMENTS: dict[str, tuple[Callable[[argparse.Namespace], str], tuple[str, ...]]] = {
    "fig5": (fig5, ("mnist", "cifar", "photographs")),
    "table2": (table2, ("cifar",)),
    "fig9": (fig9, ("cifar",)),
    "table1": (table1, ("mnist", "cifar")),
    "fig6": (fig6, ("photographs",)),
    "fig7": (fig7, ("photographs",)),
    "fig8": (fig8, ("photographs",)),
    "cost": (cost, ()),
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("results/paper"), help="folder for all that is kept, tables and figures")
    add("--only", nargs="+", choices=list(EXPERIMENTS), help="experiments; default: all that there is data for")
    add("--mnist", type=Path, help="file of digits")
    add("--cifar", type=Path, help="folder of CIFAR-10")
    add("--photographs", type=Path, help="folder of ImageNet photographs")
    add(
        "--networks",
        nargs="+",
        default=["mnist_cnn", "cifar_cnn", "efficientnet_lite0"],
        help="for fig5: mnist_cnn, cifar_cnn, cifar_vgg16, and for photographs any model that attrbox loads, as "
        "efficientnet_lite0, torchvision:vgg16, torchvision:resnet18, torchvision:inception_v3; the first of these "
        "serves the pictures too",
    )
    add("--mnist-images", type=int, default=200, help="digits of fig5")
    add("--mnist-epochs", type=int, default=4, help="passes over the digits, also of each model of table1")
    add("--cifar-images", type=int, default=100, help="images of fig5")
    add("--cifar-epochs", type=int, default=3, help="passes over the 50,000 training images")
    add("--photographs-count", type=int, default=8, help="photographs of fig5 and fig6")
    add("--maps", type=Path, help="output folder of learned_quality.py on the same photographs: its maps are taken")
    add("--mask-iterations", type=int, default=300, help="of Mask on photographs; 0 leaves it out")
    add("--smask-iterations", type=int, default=200, help="of sMask on photographs (published: 800); 0 leaves it out")
    add("--sweep-images", type=int, default=25, help="images of table2 and fig9")
    add("--roar-fractions", type=float, nargs="+", default=[0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    add("--roar-seeds", type=int, default=3, help="models per cell of table1 on MNIST")
    add("--roar-iterations", type=int, default=60, help="of the learned rule on MNIST")
    add("--roar-cifar", type=int, nargs=2, default=[1000, 400], help="training and test images of table1 on CIFAR-10")
    add("--roar-cifar-epochs", type=int, default=10)
    add("--roar-cifar-seeds", type=int, default=1)
    add("--roar-cifar-iterations", type=int, default=30, help="of the learned rule on CIFAR-10")
    add("--roar-cifar-fractions", type=float, nargs="+", default=[0, 0.5, 0.7, 0.9])
    add("--misclassified", type=int, default=3, help="photographs of fig7")
    add("--composites", type=int, default=2, help="composites of fig8")
    add("--cost-networks", nargs="*", default=["efficientnet_lite0", "vgg16"], help="models of engine.py's `load`")
    add("--cost-rounds", type=int, default=3)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    keep_pages()
    torch.manual_seed(0)
    options.kept = Kept(options.out / "kept")
    for name in options.only or EXPERIMENTS:
        run, needs = EXPERIMENTS[name]
        if needs and not any(getattr(options, need) for need in needs):
            print(f"{name} left out: it needs one of {', '.join('--' + need for need in needs)}", flush=True)
            continue
        section = run(options)
        print(section, flush=True)
        with whole_file(options.out / f"{name}.md") as part:
            part.write_text(section, encoding="utf-8")
    sections = [options.out / f"{name}.md" for name in EXPERIMENTS]
    with whole_file(options.out / "report.md") as part:
        part.write_text("\n".join(path.read_text(encoding="utf-8") for path in sections if path.exists()), "utf-8")
