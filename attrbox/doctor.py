"""The doctor: what each method is worth on a model, and why.

Every method that looks inside of the model is tried on a few images:

    exact        keeps what it promises: a recorded pass equal to the native one, and where maps sum to a difference of
                 scores, a gap below `TOLERANCE`
    approximate  an operation on the way is not understood and keeps its true derivative, or a sum is off
    refused      raises, with the reason
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attrbox.compare import explain
from attrbox.engine.recorder import forward
from attrbox.errors import AttrboxError, InputError, NonFiniteWarning
from attrbox.guard import check_model, untouched
from attrbox.methods.base import methods as registry
from attrbox.shapes import Attribution
from attrbox.targets import unwrap

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
# As few passes as methods of many need to show whether they run.
_BRIEF: Mapping[str, Any] = {"iterations": 1, "samples": 2, "steps": 2}


@dataclass(frozen=True)
class Finding:
    """One method on one model. `verdict` is "exact", "approximate" or "refused"; `maps` what it was judged by."""

    method: str
    verdict: str
    reason: str
    maps: Attribution | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        findings: one for each method.
        operations: non-linear operations that rules know, with how often each runs.
        unknown: those that they do not.
    """

    findings: tuple[Finding, ...]
    operations: Mapping[str, int] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, method: str) -> Finding:
        return next(finding for finding in self.findings if finding.method == registry[method].name)

    def table(self) -> str:
        """The findings as a Markdown table, below what the model is made of."""
        lines = [f"Non-linear operations: {_counted(self.operations)}."]
        if self.unknown:
            lines.append(f"Not understood: {_counted(self.unknown)}.")
        lines += ["", "| method | verdict | reason |", "|---|---|---|"]
        lines += [f"| {finding.method} | {finding.verdict} | {finding.reason} |" for finding in self.findings]
        return "\n".join(lines)


def doctor(model: nn.Module, images: Tensor, methods: Iterable[str] | None = None, target: Any = None) -> Diagnosis:
    """What is exact, approximate or refused for this model, and why.

    Args:
        model: as for `attrbox.explain`; left as it was.
        images: one or a few of its inputs, [n, C, H, W]; float64, with the model in float64, makes the sharpest test.
        methods: names; None for all that use rules or layers of the model, and the plain gradient.
        target: what is explained; default: each sample's largest output.

    Raises:
        AttrboxError: the model does not run at all.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise InputError(f"Expected images as a floating-point tensor [n, C, H, W], got {type(images).__name__}.")
    module = check_model(model)
    with untouched(module), torch.no_grad():
        native = unwrap(forward(module, images.clone()))
    names = [registry[name].name for name in methods] if methods is not None else _looking_inside()
    operations: dict[str, int] = {}
    unknown: dict[str, int] = {}
    findings = []
    for name in names:
        options = {key: value for key, value in _BRIEF.items() if key in {i.name for i in registry[name].options}}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NonFiniteWarning)  # the verdict says so
                maps = explain(module, images, name, target=target, progress=False, **options)
        except AttrboxError as error:
            findings.append(Finding(name, "refused", " ".join(str(error).split())))
            continue
        verdict, reason = _judged(maps, native)
        findings.append(Finding(name, verdict, reason, maps))
        known = _tally((*maps.coverage.rule, *maps.coverage.derivative))
        operations = {key: max(operations.get(key, 0), known.get(key, 0)) for key in {**operations, **known}}
        unknown |= _tally(maps.coverage.unknown)
    return Diagnosis(tuple(findings), operations, unknown)


def _looking_inside() -> list[str]:
    """Methods that treat the model's operations or layers, and the plain gradient that all others share."""
    found = ["saliency"]
    for name, spec in registry.items():
        if not spec.required:
            method = spec.create({})
            if method.rules not in ((), (None,)) or method.layers:
                found.append(name)
    return found


def _judged(maps: Attribution, native: Tensor) -> tuple[str, str]:
    if not bool(maps.values.isfinite().all()):
        return "approximate", "the map has values that are not finite"
    if maps.target is not None and native.dim() == 2:
        expected = native.gather(1, maps.target.view(len(native), -1)).view(maps.score.shape)
        error = float(
            (maps.score - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(native.dtype).tiny)
        )
        if error > TOLERANCE.get(native.dtype, 1e-2):
            return "approximate", f"the recorded score differs from the model's own by {error:.0e}"
    if maps.coverage.unknown:
        names = ", ".join(_tally(maps.coverage.unknown))
        return "approximate", f"true derivative at {names}, which no rule knows"
    if maps.gap is None or maps.relative_gap is None:
        return "exact", "as defined"
    gap = float((maps.gap.abs() / maps.values.abs().flatten(1).sum(1).clamp_min(1e-30)).max())
    if "baseline" in maps.options and "steps" not in maps.options:
        sharp = gap < TOLERANCE.get(maps.values.dtype, 1e-2)
        return "exact" if sharp else "approximate", f"complete to {gap:.0e} of the map"
    if bool(maps.relative_gap.isnan().all()):
        return "exact", "an empty map, as no score is positive"
    return "exact", f"biases, stabilisers and clamps absorb {float(maps.relative_gap.nanmedian()):.0%} of the score"


def _tally(operations: Iterable[Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for operated in operations:
        counts[operated.operation] = counts.get(operated.operation, 0) + 1
    return counts


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
