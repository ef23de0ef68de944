"""The doctor: what each method is worth on a model, and why.

Every method that looks inside of the model is tried on a few images:

    exact        keeps what it promises: a recorded pass equal to the native one, and where maps sum to a difference of
                 scores, a gap below `TOLERANCE`
    approximate  an operation on the way is not understood and keeps its true derivative, a sum is off, or scores depend
                 on the batch mates or on random numbers
    not tested   these images tell nothing: there are none, their scores are zero, or their maps are empty
    refused      raises, with the reason
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attrbox.core.model_state import check_model
from attrbox.core.results import Attribution
from attrbox.core.validation import dense
from attrbox.errors import AttrboxError, InputError, NonFiniteWarning
from attrbox.methods.base import method_registry as registry
from attrbox.methods.explaining import explain

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
# As few passes as methods of many need to show whether they run.
_BRIEF: Mapping[str, Any] = {"iterations": 1, "n_samples": 2, "steps": 2}


@dataclass(frozen=True)
class Finding:
    """One method on one model.

    Attributes:
        method: its name.
        verdict: "exact", "approximate", "not tested" or "refused".
        reason: why.
        maps: what it was judged by.
    """

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

    @property
    def exact(self) -> bool:
        """Whether all verdicts are exact. A method that is meant for other kinds of models may refuse this one."""
        meant = [f for f in self.findings if f.verdict != "refused" or not registry[f.method].only_for]
        return all(finding.verdict == "exact" for finding in meant)

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
    """What is exact, approximate, not tested or refused for this model, and why.

    Args:
        model: as for `attrbox.explain`; left as it was.
        images: one or a few of its inputs, [n, C, H, W]; float64, with the model in float64, makes the sharpest test.
            Without any, nothing is tested.
        methods: names; None for all that use rules or layers of the model, and the plain gradient.
        target: what is explained; default: each sample's largest output.

    Raises:
        AttrboxError: the model does not run at all, or has no such target.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"Expected images as a floating-point tensor [n, C, H, W], got {type(images).__name__}.")
    images = dense(images, "images")
    if not images.is_floating_point():
        raise InputError(f"Expected images as a floating-point tensor [n, C, H, W], got one of {images.dtype}.")
    module = check_model(model)
    names = [registry[name].name for name in methods] if methods is not None else _looking_inside()
    if images.numel() == 0:
        return Diagnosis(tuple(Finding(name, "not tested", "there are no images") for name in names))
    native = explain(module, images, "random", target=target, progress=False).score.cpu()  # nothing is recorded
    mixing = _dependence_on_mates(module, images, target, native)
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
        verdict, reason = _judged(maps, native, mixing)
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


def _dependence_on_mates(model: nn.Module, images: Tensor, target: Any, native: Tensor) -> float:
    """How much scores change, relative to the largest, when each image is alone; of one image, when it is not.

    Zero where the model takes no other number of images.
    """
    try:
        if len(images) > 1:
            other = explain(model, images, "random", target=target, batch_size=1, progress=False).score.cpu()
        else:
            pair = torch.cat([images, 0.5 * images.flip(-1)])
            mated = target if callable(target) or isinstance(target, int) else None
            native = explain(model, images, "random", target=mated, progress=False).score.cpu()
            other = explain(model, pair, "random", target=mated, progress=False).score[:1].cpu()
    except AttrboxError:
        return 0.0
    return float((other - native).abs().max() / native.abs().max().clamp_min(torch.finfo(native.dtype).tiny))


def _judged(maps: Attribution, native: Tensor, mixing: float) -> tuple[str, str]:
    """The verdict on maps, and its reason.

    Args:
        maps: of a method.
        native: the scores that they explain, by a pass in which nothing is recorded.
        mixing: how much these depend on the batch mates, relative to the largest.
    """
    if not bool(maps.values.isfinite().all()):
        return "approximate", "the map has values that are not finite"
    tolerance = TOLERANCE.get(native.dtype, 1e-2)
    largest = float(native.abs().max())
    if not largest:
        return "not tested", "every score is zero on these images. Load trained weights, or choose other images"
    error = float((maps.score.cpu() - native).abs().max()) / largest
    if error > tolerance:
        return "approximate", f"the recorded score differs from the model's own by {error:.0e}"
    if maps.coverage.random:
        return "approximate", f"the score is random: {', '.join(_tally(maps.coverage.random))} draws anew in each pass"
    if mixing > tolerance:
        return "approximate", f"scores depend on the batch mates: they change by {mixing:.0e} without them"
    if maps.coverage.unknown:
        names = ", ".join(_tally(maps.coverage.unknown))
        return "approximate", f"true derivative at {names}, which no rule knows"
    mass = maps.values.abs().flatten(maps.score.dim()).sum(-1).cpu()
    if maps.gap is not None and "baseline" in maps.options and "steps" not in maps.options:
        gap = float((maps.gap.abs().cpu() / mass).nan_to_num(0.0, posinf=float("inf")).max())  # infinite: wrongly empty
        if mass.any() or gap:
            return "exact" if gap < tolerance else "approximate", f"complete to {gap:.0e} of the map"
    if not mass.any():
        return "not tested", f"{_why_empty(maps)}. Load trained weights, or choose other images or targets"
    if maps.relative_gap is None:
        return "exact", "as defined"
    share = float(maps.relative_gap.nanmedian())
    if "steps" in maps.options:
        return "exact", f"as defined; with {maps.options['steps']} steps it is complete to {share:.0e} of the score"
    return "exact", f"biases, stabilisers and clamps absorb {share:.0%} of the score"


def _why_empty(maps: Attribution) -> str:
    if maps.expected is None or maps.expected.any():
        return "every map is zero"
    return "the score is that of the baseline" if "baseline" in maps.options else "no score is positive"


def _tally(operations: Iterable[Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for operated in operations:
        counts[operated.operation] = counts.get(operated.operation, 0) + 1
    return counts


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
