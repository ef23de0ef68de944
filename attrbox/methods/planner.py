"""The planner: check, plan, run chunk by chunk, collect.

The plan is short, because a `Run` keeps what it has computed: the forward pass is recorded once for the rules of all
methods, those that replay it come first, and then it is forgotten before the passes over paths and noise begin."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from attrbox.core.memory import backing_off, images_per_pass
from attrbox.core.model_state import HALF, check_model, drawing, surroundings, untouched
from attrbox.core.progress import passing_bar
from attrbox.core.random_streams import streams
from attrbox.core.results import Attribution, Coverage, Provenance
from attrbox.core.targets import Target, TargetLike
from attrbox.core.validation import check_count, check_flag, check_images, check_scores, non_finite_rows
from attrbox.engine.randomness import random_operations
from attrbox.errors import (
    ModelError,
    NonFiniteError,
    NonFiniteWarning,
    OptionError,
    TargetError,
    UnsupportedModelError,
    at_work,
    shown,
)
from attrbox.methods.base import Method, MethodSpec
from attrbox.methods.comparison import Comparison
from attrbox.methods.context.finite import first_site, told
from attrbox.methods.context.passes import Settings
from attrbox.methods.context.run import Run

Chosen: TypeAlias = dict[str, tuple[MethodSpec, Method]]


@dataclass(frozen=True)
class Call:
    """The arguments that `explain` and `compare` have in common."""

    target: TargetLike
    seed: int | Sequence[int]
    batch_size: int | None
    precision: torch.dtype | None
    channels_last: bool
    progress: bool
    strict: bool

    def __post_init__(self) -> None:
        for name in ("channels_last", "progress", "strict"):
            check_flag(name, getattr(self, name))
        if self.precision not in (None, torch.bfloat16, torch.float16):
            raise OptionError(
                f"Expected precision to be None, torch.bfloat16 or torch.float16, got {shown(self.precision)}."
            )
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)


def run_methods(given: object, images: Tensor, chosen: Chosen, call: Call) -> Comparison:
    """The maps of the chosen methods, with checks of the model, the images and the target."""
    with surroundings(images) as autocast:
        if call.precision is None and autocast in (torch.bfloat16, torch.float16):
            call = replace(call, precision=autocast)
        return _run_undisturbed(given, images, chosen, call)


def _run_undisturbed(given: object, images: Tensor, chosen: Chosen, call: Call) -> Comparison:
    differentiating = [label for label, (_, method) in chosen.items() if method.needs_gradients]
    dtype = getattr(images, "dtype", None)
    model = check_model(given, differentiating, dtype)
    images = check_images(images).detach()
    images = images.clone() if images.is_inference() else images  # the clone is an ordinary tensor
    count = len(images)
    target = Target(call.target, count)
    seeds = streams(call.seed, count)
    # Methods that replay the recorded pass go first, so that its memory is free when the others begin.
    order = sorted(chosen, key=lambda label: not _replays(chosen[label][1]))
    used = [method for _, method in chosen.values()]
    rules = list(dict.fromkeys(rule for method in used for rule in method.rules))
    layers = list(dict.fromkeys(layer for method in used for layer in method.layers))
    asked = frozenset(key for method in used for key in method.asks)
    replays = sum(len(method.rules) + len(method.layers) for method in used)
    chunks: list[_Chunk] = []
    passes = [method.passes_on(images) for method in used]
    with untouched(model, dtype in HALF), passing_bar("attribution", count * sum(passes), "pass", call.progress) as bar:
        settings = Settings(target, seeds, call.precision, call.channels_last, bar.update)
        size = call.batch_size or _images_per_pass(model, images, settings, used, bool(differentiating))
        start = 0
        while start < count:

            def work(size: int, start: int = start) -> _Chunk:
                rows = slice(start, min(start + size, count))
                run = Run(model, images[rows], settings, rows, size, rules, layers, replays > 1, asked)
                return _explain_chunk(run, chosen, order, bar, call.strict)

            chunk, size = backing_off(size, work)
            chunks.append(chunk)
            start += len(chunk.scores)
        bad = _check_finite(chosen, chunks, model, images, settings)
    for text in bad.values():
        if call.strict:
            raise NonFiniteError(text)
        warnings.warn(text, NonFiniteWarning, stacklevel=4)
    return _collect(chosen, chunks, images, target, call)


def _images_per_pass(
    model: nn.Module, images: Tensor, settings: Settings, methods: list[Method], differentiating: bool
) -> int:
    """How many images a pass takes; all of the call, no more and no less, if the model takes no other number."""
    try:
        return images_per_pass(
            images,
            (lambda few: Run(model, few, settings, slice(0, 1), 1).bare_forward()) if differentiating else None,
            wanted=len(images) * max(1, *(method.passes_on(images) for method in methods)),
            held=max(method.memory for method in methods),
        )
    except (ModelError, TargetError):
        if len(images) == 1:
            raise
        Run(model, images, settings, slice(0, len(images)), len(images)).bare_forward()  # what fails here is told
        return len(images)


def _replays(method: Method) -> bool:
    return bool(method.rules or method.layers)


@dataclass
class _Chunk:
    scores: Tensor
    indices: Tensor | None
    predictions: Tensor | None
    values: dict[str, Tensor] = field(default_factory=dict)
    expected: dict[str, Tensor | None] = field(default_factory=dict)
    coverage: dict[str, Coverage] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)


def _explain_chunk(run: Run, chosen: Chosen, order: list[str], bar: Any, strict: bool) -> _Chunk:
    """All methods on one chunk."""
    clock = _Clock(run.images.device)
    with at_work(run.rows, "scored"), drawing(run.model, run.images.device) as drawn:
        scores = run.scores
    random = random_operations(run.model, run.images) if drawn.any else ()
    if scores.device.type == "cpu":  # elsewhere the host would wait for it: at the end of the call
        check_scores(run.model, scores, run.rows.start)
    chunk = _Chunk(scores, run.indices, run.predictions)
    chunk.seconds["forward pass"] = clock.lap()
    held = any(_replays(method) for _, method in chosen.values())
    done = bar.n
    for label in order:
        method = chosen[label][1]
        if held and not _replays(method):
            run.release()
            held = False
        run.replayed.clear()
        with at_work(run.rows, f"explained by {label!r}"):
            values = method.attribute(run)
            expected, coverage = method.expected(run), method.coverage(run)
        if values.shape[:2] != scores.shape:
            raise OptionError(
                f"The method {label!r} must return maps of shape [n, K, ...] with n, K = {list(scores.shape)}, "
                f"got {list(values.shape)}."
            )
        chunk.values[label] = values.detach()
        chunk.details[label] = run.told()
        chunk.expected[label], chunk.coverage[label] = expected, replace(coverage, random=random)
        if strict and chunk.coverage[label].unknown:
            raise _not_understood(label, chunk.coverage[label])
        chunk.seconds[label] = clock.lap()
        done += method.passes_on(run.images) * len(scores)
        bar.update(done - bar.n)
    return chunk


def _check_finite(
    chosen: Chosen, chunks: list[_Chunk], model: nn.Module, images: Tensor, settings: Settings
) -> dict[str, str]:
    """What is wrong with the maps of each method, if some are NaN or infinite. One look at the device for all.

    Raises:
        NonFiniteError: the scores are.
    """
    scores = torch.cat([chunk.scores for chunk in chunks])
    bad = torch.stack(
        [non_finite_rows(scores), *(torch.cat([non_finite_rows(c.values[label]) for c in chunks]) for label in chosen)]
    )
    if bad.is_meta or not bool(bad.any()):
        return {}
    check_scores(model, scores, 0)
    found = {}
    for (label, (_, method)), rows in zip(chosen.items(), bad[1:].cpu(), strict=True):
        if bool(rows.any()):
            first = int(rows.long().argmax())
            run = Run(model, images[first : first + 1], settings, slice(first, first + 1), 1)
            where = first_site(run, method) if method.needs_gradients else None
            found[label] = told(label, rows.nonzero().flatten().tolist(), where)
    return found


def _not_understood(label: str, coverage: Coverage) -> UnsupportedModelError:
    names = ", ".join(dict.fromkeys(str(operated) for operated in coverage.unknown))
    return UnsupportedModelError(
        f"The model has non-linear operations that the engine does not understand, so {label!r} would take their true "
        f"derivative: {names}. Write them with operations that it knows (attrbox doctor lists them), choose a method "
        "without rules, or accept the true derivative with strict=False."
    )


def _collect(chosen: Chosen, chunks: list[_Chunk], images: Tensor, target: Target, call: Call) -> Comparison:
    """Join the chunks of a call."""
    many = target.many or chunks[0].scores.shape[1] > 1

    def joined(parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole if many else whole.squeeze(1)

    scores = joined([chunk.scores for chunk in chunks])
    indices = (
        None if chunks[0].indices is None else joined([chunk.indices for chunk in chunks if chunk.indices is not None])
    )
    attributions = {}
    provenance = Provenance(call.seed, call.precision, call.channels_last)
    for label, (spec, method) in chosen.items():
        values = joined([chunk.values[label] for chunk in chunks])
        expected = gap = relative = None
        if chunks[0].expected[label] is not None:
            expected = joined([wanted for chunk in chunks if (wanted := chunk.expected[label]) is not None])
            gap = values.flatten(scores.dim()).sum(-1) - expected
            relative = gap.abs() / expected.abs()
        attributions[label] = Attribution(
            method=spec.name,
            values=values,
            target=indices,
            score=scores,
            options=spec.settings(method),
            coverage=Coverage.joined([chunk.coverage[label] for chunk in chunks]),
            gap=gap,
            relative_gap=relative,
            details={
                name: _joined_detail([chunk.details[label][name] for chunk in chunks], joined)
                for name in chunks[0].details[label]
            },
            reduction=spec.reduction,
            units=spec.units,
            expected=expected,
            provenance=provenance,
        )
    predictions = None
    if chunks[0].predictions is not None:
        predictions = torch.cat([chunk.predictions for chunk in chunks if chunk.predictions is not None])
    labels = ("forward pass", *chosen)
    seconds = {label: sum(chunk.seconds[label] for chunk in chunks) for label in labels}
    return Comparison(attributions, images, predictions, seconds, call.seed)


def _joined_detail(parts: list[Any], joined: Callable[[list[Tensor]], Tensor]) -> Any:
    """One detail of a method, over all chunks."""
    if isinstance(parts[0], Tensor):
        return joined(parts)
    join = getattr(type(parts[0]), "joined", None)
    return parts if join is None else join(parts)


class _Clock:
    """Seconds between laps, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._now()

    def lap(self) -> float:
        now = self._now()
        seconds, self._last = now - self._last, now
        return seconds

    def _now(self) -> float:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type == self._device.type:
            torch.accelerator.synchronize(self._device)  # once per method and chunk
        return time.perf_counter()
