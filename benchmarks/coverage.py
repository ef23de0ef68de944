"""Every classification model of torchvision against every method that looks inside of a model, and the peers.

    python benchmarks/coverage.py                                  all that is not in benchmarks/coverage.jsonl yet
    python benchmarks/coverage.py --models resnet18 vit_b_16       only these models
    python benchmarks/coverage.py --table > docs/coverage.md       what is there, as Markdown

Weights are random, batch-norms calibrated, images small; what is explained is each image's largest output. A cell
passes if the verdict of `attrbox.doctor` is exact (the recorded score is the model's own, the map finite and, where it
promises a sum, complete), the first image's map is the same alone as in the batch, relevance is lost only where the
audit of the method says so, and parameters and buffers are what they were; or it is refused with a reason. Peers
(captum, zennit; left out where they are not installed) run, raise, or silently give the plain gradient, and DeepLIFT
may not be complete. One line of JSON per cell, written at once: a run that was stopped goes on, and a line that is
deleted is measured anew.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import attrbox
from attrbox.core.memory import keep_pages

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))
from nets import calibrate, images

RESULTS = Path(__file__).with_suffix(".jsonl")
# The side of the images, and of those that need another. With random weights EfficientNet-V2-M is so badly conditioned
# on images of 32 pixels that contributions of 1e18 cancel to a score of 1e6.
SIDE = 64
SIDES = {"inception_v3": 96, "maxvit": 224, "vit_h_14": 56, "efficientnet_v2": 192}
# Calibrated, its norms make contributions of 1e29 at any size, which cancel: it is run as it is initialised.
NOT_CALIBRATED = ("efficientnet_b7",)
# Beyond so many parameters images are half as wide; and of transformers all but DeepLIFT runs in single precision.
LARGE, HUGE = 8e6, 400e6
# Relative to the largest value: how far a map may depend on batch mates, how much relevance may be lost unseen.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
# A completeness gap, relative to the difference of the scores, that is called one.
INCOMPLETE = 1e-3
FAMILIES = {
    "AlexNet": ("alexnet",),
    "VGG": ("vgg",),
    "ResNet": ("resnet", "resnext", "wide_resnet"),
    "DenseNet": ("densenet",),
    "GoogLeNet": ("googlenet",),
    "Inception": ("inception",),
    "SqueezeNet": ("squeezenet",),
    "MobileNet": ("mobilenet",),
    "MNASNet": ("mnasnet",),
    "ShuffleNet": ("shufflenet",),
    "EfficientNet": ("efficientnet",),
    "RegNet": ("regnet",),
    "ConvNeXt": ("convnext",),
    "ViT": ("vit",),
    "Swin": ("swin",),
    "MaxViT": ("maxvit",),
}
TRANSFORMERS = ("ViT", "Swin", "MaxViT")


def family(name: str) -> str:
    """The family of a model."""
    return next(family for family, starts in FAMILIES.items() if name.startswith(starts))


class Subject:
    """A model with random weights, two images and their classes."""

    def __init__(self, name: str) -> None:
        parameters = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        side = next((side for start, side in SIDES.items() if name.startswith(start)), SIDE)
        narrow = ("alexnet", "inception", "maxvit", "vit")  # they take no less
        if parameters > LARGE and not name.startswith(narrow):
            side //= 2
        options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if name.startswith("vit"):
            options["image_size"] = side
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, **options)
        if name.startswith("vit"):  # torchvision starts its head at 0
            nn.init.normal_(model.heads.head.weight, std=0.1)
        self.name = name
        # Batch-norms with random weights need double precision.
        self.huge = parameters > HUGE and family(name) in TRANSFORMERS
        # Of fewer samples statistics are so far from those of other images that rounding errors grow from norm to norm.
        self.model = model.eval() if name in NOT_CALIBRATED else calibrate(model, side, torch.float32, samples=8)
        self.images = images(2, 3, side, side, seed=1, dtype=torch.float32)
        self._gradients: dict[torch.dtype, Tensor] = {}
        with torch.no_grad():
            self.target = self.model(self.images).argmax(1)

    def precise_for(self, method: str) -> None:
        """Double precision, or single where memory is short and nothing is known to its last digits."""
        double = not self.huge or method.endswith("deeplift")
        self.model.to(torch.float64 if double else torch.float32)
        self.images = self.images.to(torch.float64 if double else torch.float32)

    def gradient(self) -> Tensor:
        """The plain gradient."""
        if self.images.dtype not in self._gradients:
            options = {"absolute": False, "target": self.target, "progress": False}
            self._gradients[self.images.dtype] = attrbox.explain(self.model, self.images, "saliency", **options).values
        return self._gradients[self.images.dtype]


def state(model: nn.Module) -> list[Any]:
    """A hash of each parameter and buffer."""
    return [torch.hash_tensor(tensor).view(torch.int64).item() for tensor in (*model.parameters(), *model.buffers())]


def cell(subject: Subject, method: str) -> dict[str, Any]:
    """Verdict, and where there is something to say figures and a reason, of one of attrbox's methods."""
    model, x, target = subject.model, subject.images, subject.target
    before = state(model)
    finding = attrbox.doctor(model, x, [method], target=target)[method]
    if finding.maps is None or finding.verdict != "exact":
        return {"verdict": finding.verdict, "reason": finding.reason}
    figures: dict[str, float] = {}
    if method == "deeplift":
        figures["gap"] = float(finding.maps.relative_gap.max())
    audit = {"audit": True} if "audit" in finding.maps.options else {}
    alone = attrbox.explain(model, x[:1], method, target=target[:1], progress=False, **audit)
    values, tolerance = finding.maps.values, TOLERANCE[x.dtype]
    scale = max(float(both.abs().max()) for both in (values, alone.values))
    mixing = float((values[:1] - alone.values).abs().max()) / max(scale, 1e-30)
    if mixing > tolerance:
        return {"verdict": "fails", "reason": f"depends on batch mates ({mixing:.0e})"}
    if audit:
        figures["unplaced"] = lost = unplaced(alone)
        # Constants that transformers add or join, as embeddings of positions, keep relevance, too, and are no site.
        if lost > tolerance and family(subject.name) not in TRANSFORMERS:
            return {"verdict": "fails", "reason": "the audit does not say where relevance is lost", **figures}
    if state(model) != before:
        return {"verdict": "fails", "reason": "changes the model"}
    return {"verdict": "exact", **figures}


def unplaced(maps: attrbox.Attribution) -> float:
    """Relevance that no site of the audit absorbed, relative to the largest sum of it that any site had."""
    conservation = maps.coverage.conservation
    return float((conservation.constants.abs() / conservation.arriving.abs().amax(-1)).max())


Peer = Callable[[Subject, Tensor], Tensor]


def peers() -> dict[str, Peer]:
    """Name -> map of a peer's method."""
    found: dict[str, Peer] = {}
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import captum.attr

        for name in ("DeepLift", "GuidedBackprop", "Deconvolution", "LRP"):
            found[f"captum {name}"] = lambda subject, x, name=name: getattr(captum.attr, name)(subject.model).attribute(
                x, target=subject.target
            )
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import zennit.attribution
        import zennit.canonizers
        import zennit.composites
        import zennit.torchvision

        own = {"VGG": zennit.torchvision.VGGCanonizer, "ResNet": zennit.torchvision.ResNetCanonizer}

        def canonizers(subject: Subject, x: Tensor) -> list[Any]:
            """The one for the family, or none if the model so changed computes something else: the general one takes
            it that modules run in the order in which they are listed."""
            canonizer = own.get(family(subject.name), zennit.canonizers.SequentialMergeBatchNorm)
            changed = copy.deepcopy(subject.model)
            with contextlib.suppress(RuntimeError), torch.no_grad():
                canonizer().apply(changed)
                native = subject.model(x)
                if (changed(x) - native).abs().max() <= 1e-3 * native.abs().max():
                    return [canonizer()]
            return []

        def by_zennit(subject: Subject, x: Tensor, name: str) -> Tensor:
            bounds = {"low": x.amin().expand_as(x), "high": x.amax().expand_as(x)} if name.endswith("Box") else {}
            composite = getattr(zennit.composites, name)(canonizers=canonizers(subject, x.detach()), **bounds)
            with zennit.attribution.Gradient(subject.model, composite) as attributor:
                return attributor(x, nn.functional.one_hot(subject.target, 1000).to(x))[1]

        for name in ("GuidedBackprop", "DeconvNet", "EpsilonPlus", "EpsilonAlpha2Beta1", "EpsilonGammaBox"):
            found[f"zennit {name}"] = lambda subject, x, name=name: by_zennit(subject, x, name)
    return found


def peer_cell(subject: Subject, method: str, run: Peer) -> dict[str, Any]:
    """The same of a peer's method: runs, raises, is incomplete, or gives the plain gradient (times the input)."""
    model, x, target = subject.model, subject.images, subject.target
    plain = subject.gradient()
    peers_own = copy.copy(subject)
    peers_own.model = copy.deepcopy(model)  # hooks and merged weights may stay behind where it raises
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = run(peers_own, x.clone().requires_grad_()).detach()
        except Exception as error:  # whatever a peer may raise is what is asked for
            return {"verdict": "raises", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    if not values.isfinite().all():
        return {"verdict": "not finite"}
    figures: dict[str, float] = {}
    if method.endswith("DeepLift"):
        with torch.no_grad():
            scores, baseline = (model(images).gather(1, target[:, None])[:, 0] for images in (x, torch.zeros_like(x)))
        figures["gap"] = float(((values.flatten(1).sum(1) - (scores - baseline)) / (scores - baseline)).abs().max())
        if figures["gap"] <= INCOMPLETE:
            return {"verdict": "exact", **figures}
    for gradient in (plain, plain * x):
        # With a small epsilon LRP is input x gradient on ReLU networks, as it should be.
        if not method.endswith("LRP") and (values - gradient).abs().max() <= 1e-5 * gradient.abs().max():
            return {"verdict": "gradient", **figures}
    if figures:
        return {"verdict": "incomplete", **figures}
    return {"verdict": "runs"}


def cells(name: str, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The cells of a model that are not there yet."""
    others = peers()
    wanted = [method for method in (*inside(), *others) if (name, method) not in done]
    if not wanted:
        return
    subject = Subject(name)
    for method in sorted(wanted, key=lambda method: not method.lower().endswith("deeplift")):
        subject.precise_for(method.lower())
        start = time.perf_counter()
        found = peer_cell(subject, method, others[method]) if method in others else cell(subject, method)
        seconds = time.perf_counter() - start
        yield {"model": name, "method": method, **concise(found), "seconds": round(seconds, 1)}


def concise(found: dict[str, Any]) -> dict[str, Any]:
    """Two digits of figures, the first sentence of reasons, the last name of classes."""
    shortened: dict[str, Any] = {key: float(f"{value:.1e}") for key, value in found.items() if isinstance(value, float)}
    if "reason" in found:
        shortened["reason"] = re.sub(
            r"<class '[\w.]+\.(\w+)'>", r"\1", found["reason"].split(". ")[0][:160].rstrip(".")
        )
    return found | shortened


def inside() -> list[str]:
    """The methods that the doctor tries."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    return [finding.method for finding in attrbox.doctor(net, torch.ones(1, 3, 2, 2)).findings]


PAGE = """# Coverage

Every classification model of torchvision, unedited, against every method that looks inside of a model, and the peers.
{missing}
    python benchmarks/coverage.py            runs what is not in benchmarks/coverage.jsonl yet; resumes
    python benchmarks/coverage.py --table    prints this page

{versions}. Random weights, batch-norms calibrated (but not
EfficientNet-B7's: see the script), images of {side} pixels or what a model takes, float64; beyond {large:.0f} million
parameters images of half the side; transformers beyond {huge:.0f} million float32 for all but DeepLIFT. The explained
class is each image's largest output. Peers are called as their documentation shows: zennit with its canonizer for the
family, or the one that merges batch-norms, where the canonized model still computes the same;
captum with its default baselines.

| entry | what it says |
|---|---|
| 8/8 | how many models pass: recorded pass and native one equal, map finite, complete where it promises to be, the \
same alone as in a batch, model untouched |
| refused | raises an error that gives the reason |
| exact, runs | gives a map; exact: its sum is right, too |
| raises | raises an error |
| gradient | returns the plain gradient (or its product with the input) without a word |
| gap 40 % | returns a map whose sum misses the difference of the scores by so much of it, at worst, without a word |

{table}

{notes}

Largest relative completeness gap of DeepLIFT: {gaps[0]:.0e} on convolutional models, {gaps[1]:.0e} on transformers.
Relevance that the audit of an LRP composite finds at no operation, relative to the largest sum at one: {lost[0]:.0e}
and {lost[1]:.0e}; transformers lose it to constants that they add, such as embeddings of positions, and the audit says
so.
"""


def table(path: Path) -> str:
    """The page: methods by families."""
    versions, records = read(path)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["method"], family(record["model"])), []).append(record)
    present = [name for name in FAMILIES if any(name == place for _, place in found)]
    counts = {name: len({record["model"] for record in records if family(record["model"]) == name}) for name in present}
    reasons: dict[str, int] = {}
    lines = ["| method | " + " | ".join(f"{name} ({count})" for name, count in counts.items()) + " |"]
    lines.append("|---" * (len(present) + 1) + "|")
    methods = dict.fromkeys(record["method"] for record in records)
    for method in sorted(methods, key=lambda method: (method.startswith("zennit"), " " in method, method.lower())):
        entries = [entry(found.get((method, name), []), reasons) for name in present]
        lines.append(f"| {method} | " + " | ".join(entries) + " |")
    return PAGE.format(
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        side=SIDE,
        large=LARGE / 1e6,
        huge=HUGE / 1e6,
        table="\n".join(lines),
        notes="\n".join(f"{number}. {reason}" for reason, number in reasons.items()),
        gaps=largest(records, "gap", "deeplift"),
        lost=largest(records, "unplaced"),
        missing=missing({record["model"] for record in records}),
    )


def missing(done: set[str]) -> str:
    """Which models have not been run."""
    left = [name for name in models() if name not in done]
    return f"\nNot run yet: {', '.join(left)}.\n" if left else ""


def models() -> list[str]:
    """All classifiers of torchvision."""
    return list(torchvision.models.list_models(module=torchvision.models))


def largest(records: list[dict[str, Any]], figure: str, method: str | None = None) -> list[float]:
    """On convolutional models, and on transformers."""
    found = [0.0, 0.0]
    for record in records:
        if figure in record and method in (None, record["method"]):
            kind = family(record["model"]) in TRANSFORMERS
            found[kind] = max(found[kind], record[figure])
    return found


def entry(records: list[dict[str, Any]], reasons: dict[str, int]) -> str:
    """What a method did on a family; reasons get the next numbers."""
    verdicts: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        verdicts.setdefault(record["verdict"], []).append(record)
    words = []
    for verdict, own in verdicts.items():
        word = verdict
        if verdict == "incomplete":
            gap = max(record["gap"] for record in own)
            word = f"gap {gap:.0%}" if gap < 10 else "gap > 1000%"
        if verdict == "exact" and " " not in own[0]["method"]:
            word = f"{len(own)}/{len(records)}"
        elif len(own) < len(records):
            word = f"{len(own)} {word}"
        texts = dict.fromkeys(re.sub(r"\b\d+\b", "n", record["reason"]) for record in own if "reason" in record)
        numbers = sorted(reasons.setdefault(text, len(reasons) + 1) for text in texts)
        words.append(word + (f" [{', '.join(map(str, numbers))}]" if numbers else ""))
    return ", ".join(words)


def read(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Versions of the libraries, and the cells."""
    versions, *records = map(json.loads, path.read_text().splitlines())
    return versions, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results, one line of JSON per cell")
    parser.add_argument("--models", nargs="*", help="names of torchvision.models; all if not given")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    options = parser.parse_args()
    if options.table:
        print(table(options.out), end="")
        return
    keep_pages()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not options.out.exists():
        versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "captum", "zennit")}
        options.out.write_text(json.dumps(versions) + "\n")
    _, records = read(options.out)
    done = {(record["model"], record["method"]) for record in records}
    with options.out.open("a") as file:
        for name in options.models or models():
            for record in cells(name, done):
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
                file.flush()
                print(*record.values(), flush=True)


if __name__ == "__main__":
    main()
