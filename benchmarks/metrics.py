"""Speed of the metrics, as ratios from one interleaved run.

    python benchmarks/metrics.py --data FOLDER                        both tables, as Markdown
    python benchmarks/metrics.py --data FOLDER --tables curves --rounds 3

FOLDER holds photographs. "curves" measures MoRF and LeRF of ten methods in one call against the forward passes that
they need: the same number of images through the bare model under no_grad, in batches of the same size and the same
memory format (below 1: faster than those, as batch-norms are folded into convolutions). "quantus" measures MoRF and
LeRF of one method against Quantus' PixelFlipping and RegionPerturbation at the same points of the curve, on grey
images, and says how far the values are apart; Quantus (pip install quantus) is optional.
"""

import argparse
import platform
from collections.abc import Callable

import numpy as np
import torch
from engine import ratio, rounds, table
from torch import Tensor, nn

import attrbox
from attrbox.core.memory import MOST_PER_PASS
from attrbox.data.images import find_images, open_image
from attrbox.data.models.factories import efficientnet_lite0
from attrbox.data.models.loaded_model import LoadedModel

METHODS = 10


class Grey(nn.Module):
    """The model on images of one channel, so that Quantus' features, which are single numbers, are pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.expand(-1, 3, -1, -1))


def photographs(folder: str, loaded: LoadedModel, count: int) -> Tensor:
    """So many photographs of the folder, evenly spread over it."""
    paths = find_images([folder])
    chosen = paths[:: max(1, len(paths) // count)][:count]
    return torch.stack([loaded.preprocess(open_image(path)) for path in chosen])


def bare(model: nn.Module, images: Tensor, count: int) -> None:
    """`count` forward passes and nothing else, as fast as the model goes."""
    size = MOST_PER_PASS["cpu"]
    batch = images[:size].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for start in range(0, count, size):
            model(batch[: min(size, count - start)])


def curves(model: nn.Module, images: Tensor, steps: int, count: int) -> None:
    """evaluate of ten methods against the bare forward passes."""
    print(f"### MoRF and LeRF of {METHODS} methods, {len(images)} images, {steps} points, one call\n")
    generator = torch.Generator().manual_seed(0)  # what the maps show makes no difference to the time
    size = (len(images), *images.shape[2:])
    maps = {f"method {k}": torch.randn(size, generator=generator) for k in range(METHODS)}
    needed = len(images) * (1 + 2 * steps * len(maps))
    metrics = [(name, {"steps": steps}) for name in ("morf", "lerf")]
    candidates = {
        "bare": lambda: bare(model, images, needed),
        "evaluate": lambda: attrbox.evaluate(model, images, maps, metrics, target=0, controls=False, progress=False),
    }
    seconds = rounds(candidates, count)
    table(
        ["forward passes", "bare (s)", "evaluate / bare"],
        [[str(needed), f"{min(seconds['bare']):.0f}", ratio(seconds["evaluate"], seconds["bare"])]],
    )


def quantus_calls(model: nn.Module, images: Tensor, maps: Tensor, steps: int) -> dict[str, Callable[[], object]]:
    """PixelFlipping and RegionPerturbation (some regions of 8 x 8), both orders.

    A step of PixelFlipping is as many pixels as a row has, as of the published deletion curve. It always goes on to the
    end of the range, whatever part of the curve is wanted.
    """
    import quantus

    x, y = images.numpy(), torch.zeros(len(images), dtype=torch.int64).numpy()
    common = {"disable_warnings": True, "display_progressbar": False}

    def flipping(sign: int) -> Tensor:
        metric = quantus.PixelFlipping(
            features_in_step=images.shape[3], perturb_baseline=0.0, normalise=False, **common
        )
        attributions = (sign * maps)[:, None].numpy()
        found = metric(model, x, y, attributions, softmax=False, device="cpu", batch_size=len(images))
        return torch.as_tensor(np.array(found))

    def regions(order: str) -> Tensor:
        metric = quantus.RegionPerturbation(
            patch_size=8, regions_evaluation=steps, order=order, perturb_baseline=0.0, normalise=False, **common
        )
        found = metric(model, x, y, maps[:, None].numpy(), softmax=False, device="cpu", batch_size=len(images))
        return torch.as_tensor(np.array(found))

    return {
        "flipping": lambda: {"morf": flipping(1), "lerf": flipping(-1)},
        "regions": lambda: {order: regions(order) for order in ("morf", "lerf")},
    }


def quantus(model: nn.Module, images: Tensor, steps: int, count: int) -> None:
    """The same points of the curve by Quantus."""
    try:
        import quantus
    except ImportError:
        print("(Quantus is not installed: pip install quantus)")
        return
    model, images = Grey(model).eval(), images.mean(1, keepdim=True)
    cells = (images.shape[2] // 8) * (images.shape[3] // 8)
    print(f"### Against Quantus {quantus.__version__}, {len(images)} images, {steps} points\n")
    maps = attrbox.explain(model, images, "integrated_gradients", steps=8, target=0, progress=False).heatmap()
    options = {
        "flipping": {"fraction": steps / images.shape[2], "steps": steps, "relative": False},
        "regions": {"fraction": steps / cells, "steps": steps, "region": 8, "relative": False},
    }
    theirs = quantus_calls(model, images, maps, steps)
    rows = []
    for name, title in (("flipping", "PixelFlipping"), ("regions", "RegionPerturbation")):

        def ours(name: str = name) -> attrbox.Evaluation:
            metrics = [(metric, options[name]) for metric in ("morf", "lerf")]
            return attrbox.evaluate(model, images, {"m": maps}, metrics, target=0, controls=False, progress=False)

        seconds = rounds({"quantus": theirs[name], "attrbox": ours}, count)
        found, mine = theirs[name](), ours()["m"]
        gaps = []
        for metric in ("morf", "lerf"):
            curve = mine[metric].curves
            shown = curve[:, 1:] if name == "flipping" else curve[:, :1] - curve[:, 1:]
            gaps.append((shown - found[metric][:, :steps]).abs().max() / curve.abs().max())
        took = f"{sorted(seconds['attrbox'])[count // 2]:.1f}"
        rows.append([title, took, ratio(seconds["quantus"], seconds["attrbox"]), f"{max(gaps):.1e}"])
    table(
        ["Quantus' metric, both orders", "attrbox (s)", "quantus / attrbox", "largest difference, of the score"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of photographs")
    parser.add_argument("--images", type=int, default=32, help="photographs for the curves")
    parser.add_argument("--steps", type=int, default=5, help="points of each curve")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quantus-images", type=int, default=4, help="photographs for the comparison with Quantus")
    parser.add_argument("--quantus-steps", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", nargs="+", default=["curves", "quantus"], choices=["curves", "quantus"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = efficientnet_lite0()
    model = loaded.model.eval()
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, float32, EfficientNet-Lite0\n")
    if "curves" in options.tables:
        curves(model, photographs(options.data, loaded, options.images), options.steps, options.rounds)
    if "quantus" in options.tables:
        few = photographs(options.data, loaded, options.quantus_images)
        quantus(model, few, options.quantus_steps, options.rounds)


if __name__ == "__main__":
    main()
