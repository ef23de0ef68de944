"""`explain` and `compare`, the calls that make maps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attrbox.core.options import choose
from attrbox.core.results import Attribution
from attrbox.core.targets import TargetLike
from attrbox.methods.base import method_registry as registry
from attrbox.methods.comparison import Comparison, MethodLike
from attrbox.methods.planner import Call, run_methods


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
        seed: for methods that draw numbers. From one seed each image gets a stream of its own, by its place in the
            call; a sequence of N names the streams. A map depends on its image and stream, not on its batch mates or
            the chunk.
        batch_size: images per forward pass; default: by memory, and halved when memory runs out.
        precision: `torch.bfloat16` or `torch.float16` for automatic mixed precision; for a model in half precision too.
            A `torch.autocast` around the call counts as this.
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
    call = Call(target, seed, batch_size, precision, channels_last, progress, strict)
    return run_methods(model, images, chosen, call).attributions[spec.name]


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
    return run_methods(
        model, images, chosen, Call(target, seed, batch_size, precision, channels_last, progress, strict)
    )
