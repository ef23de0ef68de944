"""How a model is called."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from attrbox.core.memory import is_out_of_memory
from attrbox.engine.folding import Unfolded
from attrbox.engine.refusals import written_over
from attrbox.engine.single import plain_gradients
from attrbox.errors import (
    ForwardError,
    ModelError,
    OptionError,
)


def forward(model: nn.Module, images: Tensor, watching: AbstractContextManager[None] | None = None) -> Any:
    """Call the model; whatever it raises becomes a `ForwardError` (out of memory stays what it is)."""
    try:
        with plain_gradients(model), watching or contextlib.nullcontext():
            return model(images)
    except (ModelError, OptionError, Unfolded):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "is a view and is being modified inplace" in str(error):
            raise written_over(error) from error
        raise ForwardError(
            f"The model raised {type(error).__name__} on images of shape {list(images.shape)}, {images.dtype}, on "
            f"{images.device}: {error}. Check that model(images) runs on its own (size, channels, dtype, device)."
        ) from error


def is_checkpointing() -> bool:
    """Whether autograd forgets what is saved now, and will run the model's code again when it needs it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
