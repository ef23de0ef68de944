"""`explain` and `compare`: check, plan, run chunk by chunk, collect.

The plan is short, because a `Run` keeps what it has computed: the forward pass is recorded once for the rules of all
methods, those that replay it come first, and then it is forgotten before the passes over paths and noise begin.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attrbox.core.dense_tensors import dense
from attrbox.core.half_precision import HALF, wide
from attrbox.core.memory import backing_off, images_per_pass
from attrbox.core.model_state import check_model, untouched
from attrbox.core.random_streams import check_seeds
from attrbox.core.results import Attribution, Coverage, Provenance
from attrbox.core.targets import Target, TargetLike
from attrbox.data.maps.schema import write_maps
from attrbox.engine.randomness import drawing, random_operations
from attrbox.errors import (
    InputError,
    ModelError,
    NonFiniteError,
    NonFiniteWarning,
    OptionError,
    TargetError,
    UnsupportedModelError,
    at_work,
    shown,
)
from attrbox.methods.base import Method, MethodSpec, choose
from attrbox.methods.base import method_registry as registry
from attrbox.methods.context.chunk import Settings
from attrbox.methods.context.finite import check_scores, first_site, non_finite_rows, told
from attrbox.methods.context.run import Run
from attrbox.visualization.plots import plot_comparison

MethodLike: TypeAlias = "str | tuple[str, Mapping[str, Any]]"


def list_methods() -> list[str]:
    """Names of all methods, plug-ins included; `attrbox.method_registry[name]` tells more about each."""
    return list(registry)


def explain(
    model: nn.Module | Callable[[Tensor], Any],
    images: Tensor,
    method: str,
    *,
    target: TargetLike = None,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    precision: torch.dtype | None = None,
    channels_last: bool = True,
    progress: bool = True,
    strict: bool = False,
    **options: Any,
) -> Attribution:
    """Attribution maps of one method.

    Args:
        model: any `nn.Module` that maps images to scores; run in evaluation mode and left as it was. For methods
            without gradients (`occlusion`, `rise`, `lime`, `kernel_shap`) any callable: a tensor of images to scores,
            a tensor or an array.
        images: [N, C, H, W], as the model takes them (normalised); also [N, D], [N, C, L], [N, C, D, H, W]. Images and
            models in float16 or bfloat16 are explained in float32, of the same numbers; so are scores and maps.
        method: a name of `list_methods()` or an alias.
        target: what is explained (`attrbox.core.targets`); default: each sample's largest output.
        seed: for methods that draw numbers. One seed gives every image the same stream; a sequence of N gives each its
            own. A map depends on its image and its seed, not on its batch mates or the chunk.
        batch_size: images per forward pass; default: by memory, and halved when memory runs out.
        precision: `torch.bfloat16` or `torch.float16` for automatic mixed precision; for a model in half precision too.
            As the range of float16 holds no relevance, only passes over paths, noise and masks are in float16.
        channels_last: run many-pass methods on [N, C, H, W] images in this memory format, which is faster; results
            differ by rounding.
        progress: show a progress bar on long work, if a terminal is there to show it.
        strict: refuse the model where the method leaves an operation to the true derivative because the engine does not
            understand it, instead of naming it in the coverage; and refuse maps that are NaN or infinite, instead of
            warning of them (`NonFiniteWarning`).
        **options: the method's own (`attrbox.method_registry[method].options`).

    Returns:
        The maps, the explained classes and scores, the coverage and, where defined, the completeness gap.

    Raises:
        AttrboxError: see `attrbox.errors`; nothing is changed then either.
    """
    spec = registry[method]
    chosen = {spec.name: (spec, spec.create(options))}
    call = _Call(target, seed, batch_size, precision, channels_last, progress, strict)
    return _run(model, images, chosen, call)[spec.name]


def compare(
    model: nn.Module | Callable[[Tensor], Any],
    images: Tensor,
    methods: Sequence[MethodLike],
    *,
    target: TargetLike = None,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    precision: torch.dtype | None = None,
    channels_last: bool = True,
    progress: bool = True,
    strict: bool = False,
) -> "Comparison":
    """Attribution maps of several methods that share their passes through the model.

    Args:
        model, images, target, seed, batch_size, precision, channels_last, progress, strict: as for `explain`.
        methods: names, or pairs of a name and its options. A name that comes twice is told apart by its
            options, as in "integrated_gradients(steps=100)", or else by a number, as in "saliency #2".

    Returns:
        A mapping from those names to `Attribution`s, with timings, a figure and an HDF5 file on demand.

    Raises:
        AttrboxError: see `attrbox.errors`; nothing is changed then either.
    """
    chosen = choose(registry, methods)
    return _run(model, images, chosen, _Call(target, seed, batch_size, precision, channels_last, progress, strict))


@dataclass(frozen=True, eq=False)
class Comparison(Mapping[str, Attribution]):
    """The maps of several methods, by label, in the order asked for.

    Attributes:
        attributions: label -> maps.
        images: what was explained, [N, ...].
        predictions: the class of the largest output of each image, [N]; None if the outputs are not [N, classes].
        seed: the seed of the call.
        timings: seconds by label; "forward pass" is the recorded one that the methods shared, and what methods share
            beyond it counts for the first that asks.
    """

    attributions: dict[str, Attribution]
    images: Tensor
    predictions: Tensor | None
    timings: dict[str, float] = field(default_factory=dict)
    seed: int | Sequence[int] = 0

    def __getitem__(self, label: str) -> Attribution:
        if label in self.attributions:
            return self.attributions[label]
        return self.attributions[registry[label].name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.attributions)

    def __len__(self) -> int:
        return len(self.attributions)

    def table(self) -> str:
        """Methods, seconds, largest relative gap and coverage, as a Markdown table."""
        lines = ["| method | seconds | relative gap | non-linear operations |", "|---|---:|---:|---|"]
        for label, maps in self.attributions.items():
            gap = (
                ""
                if maps.relative_gap is None
                else f"{maps.relative_gap.nan_to_num(nan=float('inf')).max().item():.1e}"
            )
            lines.append(f"| {label} | {self.timings[label]:.2f} | {gap} | {maps.coverage} |")
        if "forward pass" in self.timings:
            lines.append(f"| (recorded forward pass, shared) | {self.timings['forward pass']:.2f} | | |")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None, **options: Any) -> Any:
        """A figure with one row per image and one column per method; see
        `attrbox.visualization.plots.plot_comparison`."""
        return plot_comparison(self.images, self.attributions, path, **options)

    def to_hdf5(self, path: str | Path, **options: Any) -> Path:
        """Write the maps to an HDF5 file; options as for `attrbox.data.maps.schema.write_maps`."""
        specs = {label: registry[maps.method] for label, maps in self.attributions.items()}
        described = {label: {"summary": spec.summary, "reference": spec.reference} for label, spec in specs.items()}
        known = {"predictions": self.predictions, "descriptions": described, "seed": self.seed}
        return write_maps(path, self.attributions, **(known | options))

    def __repr__(self) -> str:
        return "<Comparison\n" + "\n".join(f"  {maps!r}" for maps in self.attributions.values()) + ">"


# ------------------------------------------------------------------------------------------------------ the planner


_Chosen: TypeAlias = dict[str, tuple[MethodSpec, Method]]


@dataclass(frozen=True)
class _Call:
    """The arguments that `explain` and `compare` have in common."""

    target: TargetLike
    seed: int | Sequence[int]
    batch_size: int | None
    precision: torch.dtype | None
    channels_last: bool
    progress: bool
    strict: bool

    def __post_init__(self) -> None:
        if self.precision not in (None, torch.bfloat16, torch.float16):
            raise OptionError(
                f"Expected precision to be None, torch.bfloat16 or torch.float16, got {shown(self.precision)}."
            )
        size = self.batch_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise OptionError(f"Expected batch_size to be a whole number >= 1, or None, got {shown(size)}.")


def _run(given: object, images: Tensor, chosen: _Chosen, call: _Call) -> Comparison:
    with torch.inference_mode(False):
        return _run_outside_of_inference_mode(given, images, chosen, call)


def _run_outside_of_inference_mode(given: object, images: Tensor, chosen: _Chosen, call: _Call) -> Comparison:
    differentiating = [label for label, (_, method) in chosen.items() if method.needs_gradients]
    dtype = getattr(images, "dtype", None)
    model = check_model(given, differentiating, dtype)
    images = check_images(images).detach()
    images = images.clone() if images.is_inference() else images  # the clone is an ordinary tensor
    count = len(images)
    target = Target(call.target, count)
    seeds = check_seeds(call.seed, count)
    # Methods that replay the recorded pass go first, so that its memory is free when the others begin.
    order = sorted(chosen, key=lambda label: not _replays(chosen[label][1]))
    used = [method for _, method in chosen.values()]
    rules = list(dict.fromkeys(rule for method in used for rule in method.rules))
    layers = list(dict.fromkeys(layer for method in used for layer in method.layers))
    asked = frozenset(key for method in used for key in method.asks)
    replays = sum(len(method.rules) + len(method.layers) for method in used)
    chunks: list[_Chunk] = []
    passes = [method.passes_on(images) for method in used]
    with untouched(model, dtype in HALF), _bar(count * sum(passes), call.progress) as bar:
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


def _bar(total: int, progress: bool) -> Any:
    disable = None if progress else True  # None: shown on a terminal only
    return tqdm(total=total, desc="attribution", unit="pass", delay=1, leave=False, disable=disable)


def check_images(images: object) -> Tensor:
    """Return `images` if they are a batch of finite floating-point numbers; in float32 if they came in half precision,
    written out if they are sparse.

    Raises:
        InputError: they are not.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"Expected images as a torch.Tensor [N, C, H, W], got {type(images).__name__}.")
    images = dense(images, "images")
    if not images.is_floating_point():
        raise InputError(
            f"Expected floating-point images, preprocessed as the model takes them, got {images.dtype}. "
            "For 8-bit pixels: images.float() / 255, then the model's mean and standard deviation."
        )
    if images.dim() < 2:
        raise InputError(
            f"Expected a batch, [N, C, H, W] or another shape that begins with N, got {list(images.shape)}."
        )
    if images.numel() == 0:
        raise InputError(f"Expected at least one image and one pixel, got {list(images.shape)}.")
    # One pass over memory; only if it fails is the sum's own overflow told from a bad pixel.
    if not images.is_meta and not bool(images.sum().isfinite()) and not bool(images.isfinite().all()):
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise InputError(f"Expected finite pixels, got NaN or infinity in images {bad[:10]}. Mend or leave out these.")
    return wide(images)


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


def _explain_chunk(run: Run, chosen: _Chosen, order: list[str], bar: Any, strict: bool) -> _Chunk:
    """All methods on one chunk."""
    clock = _Clock(run.images.device)
    with at_work(run.rows, "scored"), drawing(run.images.device) as drawn:
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
    chosen: _Chosen, chunks: list[_Chunk], model: nn.Module, images: Tensor, settings: Settings
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


def _collect(chosen: _Chosen, chunks: list[_Chunk], images: Tensor, target: Target, call: _Call) -> Comparison:
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
