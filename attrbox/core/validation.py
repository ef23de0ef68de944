"""Checks of options, images and scores: each raises an error that tells what was expected and what came."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attrbox.core.fills import FILLS
from attrbox.core.model_state import wide
from attrbox.errors import InputError, NonFiniteError, OptionError, shown


def check(valid: bool, name: str, wanted: str, value: object) -> None:
    """Raise `OptionError` unless `valid`."""
    if not valid:
        raise OptionError(f"Expected {name} to be {wanted}, got {shown(value)}.")


def check_count(name: str, value: object, least: int = 1) -> None:
    """A whole number of at least so many."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
    check(valid, name, f"a whole number >= {least}", value)


def check_number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> None:
    """A finite number within bounds."""
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {least:g}"] * (least > -math.inf)
    bounds += [f"<= {most:g}"] * (most < math.inf)
    inside = valid and above < float(value) <= most and float(value) >= least  # type: ignore[arg-type]
    check(inside, name, f"a number {' and '.join(bounds)}".strip(), value)


def check_flag(name: str, value: object) -> None:
    """True or False."""
    check(isinstance(value, bool), name, "True or False", value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    check(value in choices, name, " or ".join(repr(choice) for choice in choices), value)


def check_layer(value: object) -> None:
    """A module's name, or None for the last feature map."""
    check(
        value is None or isinstance(value, str), "layer", "the name of a module (model.named_modules()), or None", value
    )


def check_baseline(value: object, name: str = "baseline") -> None:
    """A number or a tensor; its shape is checked against the images later."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    valid = number or isinstance(value, Tensor)
    check(valid, name, "a finite number, or a tensor of shape [C, H, W], [1, C, H, W] or [N, C, H, W]", value)


def check_fill(value: object, further: tuple[str, ...] = ()) -> None:
    """One of the words for a fill, or a baseline."""
    if isinstance(value, str):
        check_choice("fill", value, (*FILLS, *further))
    else:
        check_baseline(value, "fill")


def check_images(images: object) -> Tensor:
    """Return `images` if they are a batch of finite floating-point numbers.

    Half precision and floats of 8 bits become float32; sparse images are written out.

    Raises:
        InputError: they are not.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"Expected images as a torch.Tensor [N, C, H, W], got {type(images).__name__}.")
    images = wide(dense(images, "images"))
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
    return images


def dense(tensor: Tensor, what: str) -> Tensor:
    """The same numbers in the usual layout; no copy, where the tensor is in it.

    Args:
        tensor: of any layout: sparse (COO, CSR, CSC, BSR, BSC), of oneDNN, quantized.
        what: what it is, in words, for the message.

    Raises:
        InputError: it is nested, so that it has no shape.
    """
    if tensor.is_nested:
        raise InputError(
            f"Expected {what} as one tensor with one size for all, got a nested tensor. Resize or pad its parts to "
            "one size (torch.nested.to_padded_tensor), or pass them one by one."
        )
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def check_scores(model: nn.Module, scores: Tensor, start: int) -> None:
    """Refuse images whose explained score is NaN or infinite: nothing can be said about these.

    Args:
        model: what returned them.
        scores: [n, K].
        start: the number of the first image.

    Raises:
        NonFiniteError: there are some.
    """
    if bool(scores.isfinite().all()):
        return
    bad = (~scores.isfinite()).any(1).nonzero().flatten() + start
    weights = sum(not bool(p.isfinite().all()) for p in model.parameters() if p.is_floating_point())
    cause = (
        f"{weights} of its parameters have values that are not finite; load other weights."
        if weights
        else "Leave these images out, scale them as the model expects, or run it in a wider dtype."
    )
    raise NonFiniteError(
        f"Expected finite scores, but the model (or the target function) returned NaN or infinity for the images "
        f"{some(bad.tolist())}. {cause}"
    )


def some(rows: Sequence[int]) -> str:
    """Numbers of images, the first ten of them."""
    return f"{list(rows[:10])}{' ...' if len(rows) > 10 else ''}"


def non_finite_rows(values: Tensor) -> Tensor:
    """Whether the maps of each image have a value that is not finite, [n]."""
    return ~torch.isfinite(values).flatten(1).all(1)
