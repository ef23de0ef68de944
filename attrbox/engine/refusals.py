"""Models that no rule can be replayed on, and why."""

from attrbox.errors import OptionError, UnsupportedModelError


def checkpointed() -> UnsupportedModelError:
    """The refusal of models with activation checkpointing."""
    return UnsupportedModelError(
        "The model uses activation checkpointing, which runs parts of it again in the backward pass, where no rule "
        "sees them. Switch it off for explaining."
    )


def written_over(error: Exception) -> UnsupportedModelError:
    """The refusal of models through which autograd finds no gradient, though they run without one."""
    return UnsupportedModelError(
        "The model writes in place over activations that a gradient needs, so it runs without gradients only: torch's "
        f"autograd says {str(error).partition('. ')[0]!r}. Let it make a new tensor there (x = x + y for x += y, "
        "x.relu() for x.relu_()), or use a method without gradients (occlusion, rise, lime, kernel_shap)."
    )


def batch_statistics(module: str) -> UnsupportedModelError:
    """The refusal of batch-norms that mix the images of a batch."""
    return UnsupportedModelError(
        f"The batch-norm in {module or 'the model'!r} takes its statistics from the batch, so each image's score "
        "depends on its batch mates, and no propagation rule is defined. Let it use running statistics "
        "(track_running_stats=True, training=False); saliency and other plain-gradient methods run on it as it is."
    )


def drawn_windows(module: str) -> UnsupportedModelError:
    """The refusal of pools that draw their windows."""
    return UnsupportedModelError(
        f"The fractional max-pool in {module or 'the model'!r} draws its windows anew in each pass, so the score of an "
        "image is random, and no propagation rule is defined. Give it windows that stay (_random_samples=...); "
        "saliency and other plain-gradient methods run on it as it is."
    )


def no_feature_map(axes: int, convolutions: int) -> OptionError:
    """The refusal of Grad-CAM on models without a feature map, by what ran.

    Args:
        axes: of pixels that the images have.
        convolutions: how many ran.
    """
    if not axes:
        why = "its inputs have no axes of pixels"
    elif convolutions:
        why = f"{convolutions} convolutions ran, but none with an output of {axes} axes of pixels"
    else:
        why = "neither a convolution nor a linear layer on square patches ran where the recorder sees it"
    return OptionError(
        f"The model has no spatial feature map: {why}. Grad-CAM needs one; name it by layer=..., or use another method."
    )
