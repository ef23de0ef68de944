"""Grad-CAM and Guided Grad-CAM: a feature map weighted by its mean gradient.

    w_c = mean over positions of dS/dA_c,     map = relu(sum_c w_c A_c), upsampled to the image

The layer is found by itself: the last spatial feature map, which is what the last convolution became after its norm,
residual sum and activation (features.29 of VGG-16, layer4 of a ResNet); or it is named.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.site import Rule
from attrbox.errors import InputError
from attrbox.methods.base import Method, check_choice, check_flag, check_layer, option, register_method
from attrbox.methods.run import Run
from attrbox.rules.guided import GuidedBackprop

_LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_LAYER = "name of the module whose output is used; None: the last spatial feature map"
_INTERPOLATION = "upsampling to the image's size: linear (in each direction) or nearest"


@dataclass(frozen=True, kw_only=True)
class _Cam(Method):
    layer: str | None = option(None, _LAYER)
    interpolation: str = option("linear", _INTERPOLATION)

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_choice("interpolation", self.interpolation, ("linear", "nearest"))

    @property
    def layers(self) -> tuple[str | None, ...]:
        return (self.layer,)

    def weighted(self, run: Run) -> Tensor:
        """sum_c w_c A_c on the layer's own grid, [n, K, h, w]."""
        features, gradient = run.feature_map(self.layer)
        weights = gradient.flatten(3).mean(3)
        return torch.einsum("nkc,ncp->nkp", weights, features.flatten(2)).view(*weights.shape[:2], *features.shape[2:])

    def upsampled(self, run: Run, maps: Tensor) -> Tensor:
        """Maps on the images' grid, [n, K, 1, H, W]."""
        size = run.images.shape[2:]
        if len(size) != maps.dim() - 2:
            raise InputError(
                f"The feature map has {maps.dim() - 2} spatial axes, the images {len(size)}; Grad-CAM cannot lay one "
                "over the other. Name another layer."
            )
        mode = _LINEAR_MODES[len(size)] if self.interpolation == "linear" else "nearest"
        corners = False if self.interpolation == "linear" else None
        return F.interpolate(maps, size=tuple(size), mode=mode, align_corners=corners).unsqueeze(2)


@register_method(
    "grad_cam",
    summary="Last feature map weighted by its mean gradient",
    reference="Selvaraju et al., ICCV 2017, equations 1 and 2",
    aliases=("GCAM", "gradcam"),
)
@dataclass(frozen=True, kw_only=True)
class GradCam(_Cam):
    """relu(sum_c w_c A_c), [N, 1, H, W]; signed with `relu=False`."""

    relu: bool = option(True, "drop what speaks against the target (as published)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("relu", self.relu)

    def attribute(self, run: Run) -> Tensor:
        maps = self.weighted(run)
        return self.upsampled(run, maps.relu() if self.relu else maps)


@register_method(
    "guided_grad_cam",
    summary="Guided backpropagation times Grad-CAM",
    reference="Selvaraju et al., ICCV 2017, section 3.2",
    aliases=("GGCAM", "guided_gradcam"),
    reduction="max",
)
@dataclass(frozen=True, kw_only=True)
class GuidedGradCam(_Cam):
    """Guided backpropagation * upsampled relu(Grad-CAM)."""

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        return (_GUIDED,)

    def attribute(self, run: Run) -> Tensor:
        return run.gradient(_GUIDED) * self.upsampled(run, self.weighted(run).relu())


_GUIDED = GuidedBackprop()
