"""Every classification model of torchvision against every method that looks inside of a model, and the peers.

    python benchmarks/coverage.py --out out/coverage.jsonl                 all that is not there yet; then the table
    python benchmarks/coverage.py --out out/coverage.jsonl --models resnet18 vit_b_16
    python benchmarks/coverage.py --out out/coverage.jsonl --table         the table alone, as Markdown

Weights are random, batch-norms calibrated, images small. A cell passes if the verdict of `attrbox.doctor` is exact (the
recorded score is the model's own, the map finite and, where it promises a sum, complete), the first image's map is the
same alone as in the batch, and parameters and buffers are what they were; or it is refused with a reason. Peers
(captum, zennit; left out where they are not installed) run, raise, or silently give the plain gradient. One line of
JSON per cell, written at once: a run that was stopped goes on.
"""

import argparse
import contextlib
import json
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

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from nets import calibrate, images

# Small images that the models allow; 32 for the others.
SIDES = {
    "alexnet": 64,
    "inception_v3": 96,
    "googlenet": 64,
    "squeezenet": 48,
    "densenet": 48,
    "maxvit": 224,
    "swin": 64,
}
TARGET = 3
TOLERANCE = 1e-4


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The model with random weights, and two images."""
    side = next((side for start, side in SIDES.items() if name.startswith(start)), 32)
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit"):
        side = 56 if name.endswith("14") else 64
        options["image_size"] = side
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options)
    if name.startswith("vit"):  # torchvision starts its head at 0
        nn.init.normal_(model.heads.head.weight, std=0.1)
    return calibrate(model, side, dtype, samples=2), images(2, 3, side, side, seed=1, dtype=dtype)


def cell(model: nn.Module, x: Tensor, method: str) -> tuple[str, str]:
    """(verdict, reason) of one of attrbox's methods."""
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    finding = attrbox.doctor(model, x, [method], target=TARGET)[method]
    if finding.verdict != "exact":
        return finding.verdict, finding.reason
    if not method.startswith("learned"):  # trained by masks of the batch: seconds each
        both, alone = (attrbox.explain(model, part, method, target=TARGET).values for part in (x, x[:1]))
        error = float((both[:1] - alone).abs().max() / both.abs().max().clamp_min(1e-30))
        if error > TOLERANCE:
            return "fails", f"depends on batch mates ({error:.0e})"
    after = (*model.parameters(), *model.buffers())
    if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return "fails", "changes the model"
    return "exact", finding.reason


def peers() -> dict[str, Callable[[nn.Module, Tensor], Tensor]]:
    """Name -> map of a peer's method."""
    found: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {}
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import captum.attr as captum

        for name in ("GuidedBackprop", "Deconvolution", "DeepLift", "LRP"):
            found[f"captum {name}"] = lambda model, x, name=name: getattr(captum, name)(model).attribute(
                x, target=TARGET
            )
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from zennit import attribution, composites

        def by_zennit(model: nn.Module, x: Tensor, name: str) -> Tensor:
            bounds = {"low": torch.full_like(x, -4), "high": torch.full_like(x, 4)} if name.endswith("Box") else {}
            seed = torch.zeros(len(x), 1000, dtype=x.dtype)
            seed[:, TARGET] = 1
            with attribution.Gradient(model, getattr(composites, name)(**bounds)) as attributor:
                return attributor(x, seed)[1]

        for name in ("GuidedBackprop", "DeconvNet", "EpsilonPlus", "EpsilonAlpha2Beta1", "EpsilonGammaBox"):
            found[f"zennit {name}"] = lambda model, x, name=name: by_zennit(model, x, name)
    return found


def peer_cell(model: nn.Module, x: Tensor, method: str, run: Callable[[nn.Module, Tensor], Tensor]) -> tuple[str, str]:
    """(verdict, reason) of a peer's method: runs, raises, or gives the plain gradient or its product with the input."""
    plain = attrbox.explain(model, x, "saliency", absolute=False, target=TARGET).values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = run(model, x.clone().requires_grad_()).detach()
        except Exception as error:  # whatever a peer may raise is what is asked for
            return "raises", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    for name, gradient in (("the plain gradient", plain), ("input x gradient", plain * x)):
        # With a small epsilon LRP is input x gradient on ReLU networks, as it should be.
        if not method.endswith("LRP") and (values - gradient).abs().max() <= 1e-6 * gradient.abs().max():
            return "falls back", f"is {name}, without a word"
    return ("runs", "") if values.isfinite().all() else ("runs", "not finite")


def cells(name: str, done: set[tuple[str, str]], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The cells of a model that are not there yet."""
    others = peers()
    wanted = [f.method for f in _probe().findings] + list(others)
    wanted = [method for method in wanted if (name, method) not in done]
    if not wanted:
        return
    model, x = build(name, dtype)
    for method in wanted:
        start = time.perf_counter()
        verdict, reason = peer_cell(model, x, method, others[method]) if method in others else cell(model, x, method)
        seconds = round(time.perf_counter() - start, 2)
        yield {"model": name, "method": method, "verdict": verdict, "reason": reason, "seconds": seconds}


def _probe() -> attrbox.Diagnosis:
    """Which methods the doctor tries."""
    return attrbox.doctor(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.ones(1, 3, 2, 2))


def table(records: list[dict[str, Any]]) -> str:
    """Methods by verdict: how many models, and which are not exact."""
    lines = ["| method | verdicts | where not exact |", "|---|---|---|"]
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        verdicts = dict.fromkeys(record["verdict"] for record in own)
        counts = ", ".join(f"{sum(r['verdict'] == verdict for r in own)} {verdict}" for verdict in verdicts)
        reasons: dict[str, list[str]] = {}
        for record in own:
            if record["verdict"] not in ("exact", "runs"):
                reasons.setdefault(record["reason"][:80], []).append(record["model"])
        where = "; ".join(f"{', '.join(models[:3])}{' ...' * (len(models) > 3)}: {r}" for r, models in reasons.items())
        lines.append(f"| {method} | {counts} | {where} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of results, one line of JSON per cell")
    parser.add_argument("--models", nargs="*", help="names of torchvision.models; all if not given")
    parser.add_argument("--float32", action="store_true", help="half the memory, and completeness to single precision")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    records = [json.loads(line) for line in lines]
    done = {(record["model"], record["method"]) for record in records}
    if not options.table:
        names = options.models or torchvision.models.list_models(module=torchvision.models)
        with options.out.open("a") as file:
            for name in names:
                for record in cells(name, done, torch.float32 if options.float32 else torch.float64):
                    records.append(record)
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    print(*(record[key] for key in ("model", "method", "verdict", "seconds", "reason")), flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
