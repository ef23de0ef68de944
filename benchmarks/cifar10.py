"""CIFAR-10 classifiers for the benchmarks, trained on the spot.

    python benchmarks/cifar10.py --data FOLDER --out results      trains both small networks, prints their accuracy

FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg. Weights are kept in the output folder and used again.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.models import vgg16_bn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from attrbox.core.atomic_files import whole_file

MEAN, STD = 0.47, 0.25  # of all channels, so that zero is a grey
WIDTHS = {"cnn": (32, 64, 64, 128), "wide": (48, 96, 96, 160)}


def network(name: str) -> nn.Module:
    """Four convolutions with batch-norm and ReLU, two max-pools, global average: "cnn", or "wide" to transfer to; or
    "vgg16", with batch-norm and one linear layer behind its convolutions."""
    if name == "vgg16":
        return nn.Sequential(vgg16_bn().features, nn.Flatten(), nn.Linear(512, 10))
    a, b, c, d = WIDTHS[name]

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *(*block(3, a), nn.MaxPool2d(2), *block(a, b), *block(b, c), nn.MaxPool2d(2), *block(c, d)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d, 10)),
    )


def data(folder: str | Path, split: str, out: Path) -> tuple[Tensor, Tensor]:
    """All images [N, 3, 32, 32], uint8, and labels [N] of "train" or "test"; decoded once."""
    path = out / f"cifar10-{split}.pt"
    if not path.exists():
        found = ImageFolder(str(Path(folder) / split))
        pixels = torch.stack([pil_to_tensor(image) for image, _ in tqdm(found, desc=f"decode {split}")])
        with whole_file(path) as temporary:
            torch.save((pixels, torch.tensor(found.targets)), temporary)
    return torch.load(path, weights_only=True)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 pixels -> what the networks take."""
    return (pixels.float() / 255 - MEAN) / STD


def trained(name: str, folder: str | Path, out: Path, epochs: int = 6, seed: int = 0) -> nn.Module:
    """A network in evaluation mode; trained if its weights are not in `out`. SGD, one cycle, flips and shifts."""
    path = out / f"cifar10-{name}-{epochs}-{seed}.pt"
    torch.manual_seed(seed)
    model = network(name).to(memory_format=torch.channels_last)
    if not path.exists():
        pixels, labels = data(folder, "train", out)
        batch, steps = 128, epochs * (len(pixels) // 128)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, steps, pct_start=0.2)
        bar = tqdm(total=steps, desc=f"train {name}")
        for _ in range(epochs):
            for rows in torch.randperm(len(pixels)).split(batch)[: len(pixels) // batch]:
                images = normalised(pixels[rows]).contiguous(memory_format=torch.channels_last)
                images = images.flip(3) if torch.rand(()) < 0.5 else images
                across, down = torch.randint(-3, 4, (2,)).tolist()
                images = images.roll((down, across), (2, 3))
                loss = F.cross_entropy(model(images), labels[rows], label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
        bar.close()
        with whole_file(path) as temporary:
            torch.save(model.state_dict(), temporary)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, folder: str | Path, out: Path) -> float:
    """Share of the test images that are classified right."""
    pixels, labels = data(folder, "test", out)
    found = torch.cat([model(normalised(part)).argmax(1) for part in pixels.split(500)])
    return (found == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in WIDTHS:
        model = trained(name, arguments.data, arguments.out)
        print(f"{name}: {100 * accuracy(model, arguments.data, arguments.out):.1f} % of the test images")


if __name__ == "__main__":
    main()
