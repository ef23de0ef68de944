"""A case: a network and the images that it is explained on."""

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cifar10
import learned_quality
import numpy as np
import torch
from torch import Tensor, nn

import attrbox
from attrbox.data.models.loaded_model import LoadedModel
from attrbox.data.models.loading import load_model
from attrbox.metrics.training import Trainer, accuracy, train
from paper.kept import Kept, digest

# Maps are made and kept so many at a time.
BLOCK = 500


@dataclass(frozen=True, eq=False)
class Case:
    """A network and images.

    Attributes:
        name: for files and headings.
        model: in evaluation mode.
        images: [N, C, H, W], as the model takes them.
        batch: images per pass; None leaves it to attrbox.
        note: how good the network is.
        made: folder with maps of these images, and more in the same order, that learned_quality.py made.
    """

    name: str
    model: nn.Module
    images: Tensor
    batch: int | None = None
    note: str = ""
    made: Path | None = None

    @cached_property
    def targets(self) -> Tensor:
        """The predicted classes, [N]: what is explained."""
        with torch.no_grad():
            return torch.cat([self.model(part).argmax(1) for part in self.images.split(self.batch or 8)])

    def some(self, rows: slice) -> "Case":
        """The same with some of the images."""
        return Case(self.name, self.model, self.images[rows], self.batch, self.note)

    def heatmaps(
        self, kept: Kept, label: str, method: str, options: dict[str, Any], targets: Tensor | None = None
    ) -> Tensor:
        """The maps of one method, [N, H, W]; of the predicted classes, or of others."""
        path = None if self.made is None else self.made / f"maps-{label}.pt"
        if targets is None and path is not None and path.exists():
            found = torch.load(path, weights_only=True)
            if len(found) < len(self.images):
                raise SystemExit(f"{path} has {len(found)} maps, fewer than --photographs-count {len(self.images)}.")
            return found[: len(self.images)]
        targets = self.targets if targets is None else targets
        model = digest(self.model)

        def explained(start: int) -> Tensor:
            rows = slice(start, start + BLOCK)
            images, wanted = self.images[rows], targets[rows]

            def compute() -> Tensor:
                maps = attrbox.explain(
                    self.model, images, method, target=wanted, batch_size=self.batch, progress=False, **options
                )
                return maps.heatmap().clone()

            depends = (model, images, wanted, method, sorted(options.items()))
            name = f"maps {self.name} {len(images)} {label}"
            return kept(name if start == 0 else f"{name} from {start}", depends, compute)

        return torch.cat([explained(start) for start in range(0, len(self.images), BLOCK)])


# --------------------------------------------------------------------------------------------------------------- MNIST


def mnist_network() -> nn.Module:
    """Two convolutions with ReLU and max-pool, one linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 49, 10)),
    )


def mnist_data(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test set, images normalised; the last fifth of the file is the test set."""
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    images = (images[:, None].float() / 255 - 0.1307) / 0.3081
    first = len(images) - len(images) // 5
    return (images[:first], labels[:first]), (images[first:], labels[first:])


def mnist(options: argparse.Namespace) -> Case:
    """The network on the first test images."""
    train_set, test_set = mnist_data(options.mnist)
    trainer = Trainer(epochs=options.mnist_epochs)

    def compute() -> dict[str, Tensor]:
        return train(mnist_network, *train_set, trainer).state_dict()

    model = mnist_network().eval()
    model.load_state_dict(options.kept("weights mnist_cnn", (trainer, *train_set, repr(model)), compute))
    note = f"{100 * accuracy(model, *test_set):.1f} % of {len(test_set[0]):,} test images right"
    return Case("mnist_cnn", model, test_set[0][: options.mnist_images], 100, note)


# --------------------------------------------------------------------------------------------------------------- CIFAR


def cifar(options: argparse.Namespace, name: str = "cifar_cnn") -> Case:
    """A network on test images, in an order that has nothing to do with the classes."""
    model = cifar10.trained(name.removeprefix("cifar_"), options.cifar, cifar_folder(options), options.cifar_epochs)
    images, labels = cifar_data(options, "test")
    right = options.kept(f"accuracy {name}", (model, images, labels), lambda: accuracy(model, images, labels))
    note = f"{100 * right:.1f} % of {len(images):,} test images right"
    return Case(name, model, images[: options.cifar_images], 50, note)


def cifar_folder(options: argparse.Namespace) -> Path:
    """Where the decoded images and the weights are kept."""
    return options.kept.folder / f"cifar {digest(str(options.cifar.resolve()))}"


def cifar_data(options: argparse.Namespace, split: str) -> tuple[Tensor, Tensor]:
    """The images of "train" or "test", normalised and shuffled, and their classes."""
    pixels, labels = cifar10.data(options.cifar, split, cifar_folder(options))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    if split == "train":
        order = order[: options.roar_cifar[0]]
    return cifar10.normalised(pixels[order]), labels[order]


# --------------------------------------------------------------------------------------------------------- photographs


@dataclass(frozen=True, eq=False)
class Photographs:
    """All photographs of the folder, in the order of learned_quality.py.

    Attributes:
        loaded: the network.
        images: [N, 3, H, W].
        labels: their classes, [N].
        made: folder with maps of the first of them, if there is one.
    """

    loaded: LoadedModel
    images: Tensor
    labels: Tensor
    made: Path | None = None

    def first(self, count: int) -> Case:
        """The network on so many."""
        return Case(self.loaded.name, self.loaded.model, self.images[:count], made=self.made)

    def case(self, rows: slice | Tensor) -> Case:
        """The network on any of them."""
        return Case(self.loaded.name, self.loaded.model, self.images[rows])


def photographs(options: argparse.Namespace, name: str | None = None) -> Photographs:
    """The photographs for one network; default: the first that is not for smaller images."""
    name = name or photograph_networks(options)[0]
    loaded = load_model(name)
    if loaded.preprocess is None:
        raise SystemExit(f"{loaded.name} does not say how it wants its photographs.")
    images, labels = learned_quality.photographs(str(options.photographs), loaded.preprocess)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    made = options.maps if name == "efficientnet_lite0" else None  # the network of learned_quality.py
    return Photographs(loaded, images[order], labels[order], made)


def photograph_networks(options: argparse.Namespace) -> list[str]:
    """Those of the networks that are for photographs."""
    chosen = [name for name in options.networks if name.split("_")[0] not in ("mnist", "cifar")]
    return chosen or ["efficientnet_lite0"]
