"""Grad-CAM and Guided Grad-CAM: a feature map weighted by its mean gradient.

    w_c = mean over positions of dS/dA_c,     map = relu(sum_c w_c A_c), upsampled to the image

    Grad-CAM++   w_c = sum a relu(g),   a = g^2 / (2 g^2 + sum_positions(A_c) g^3),   g = dS/dA_c
    Layer-CAM    map = relu(sum_c relu(g) A_c)

The layer is found by itself: the last spatial feature map, which is what the last convolution became after its norm,
residual sum and activation (features.29 of VGG-16, layer4 of a ResNet), or the tokens of a transformer without class
and register tokens (`attrbox.engine.feature_maps`); or it is named. It lies on the way to the explained scores. What
the model returns is no feature map: of a segmentation net it is the one before the convolution that makes the logits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check_choice, check_flag, check_layer
from attrbox.engine.site import Rule
from attrbox.errors import InputError
from attrbox.methods.base import Method, register_method
from attrbox.methods.context.run import Run
from attrbox.rules.guided import GuidedBackprop

_LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_LAYER = "name of the module whose output is used; None: the last spatial feature map"
_INTERPOLATION = "upsampling to the image's size: linear (in each direction) or nearest"


@dataclass(frozen=True, kw_only=True)
class Upsampled(Method):
    """Maps on a grid of the model's own, brought to the images' size."""

    interpolation: str = option("linear", _INTERPOLATION)

    def __post_init__(self) -> None:
        check_choice("interpolation", self.interpolation, ("linear", "nearest"))

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


@dataclass(frozen=True, kw_only=True)
class _Cam(Upsampled):
    layer: str | None = option(None, _LAYER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)

    @property
    def layers(self) -> tuple[str | None, ...]:
        return (self.layer,)

    def located(self, run: Run, relu: bool) -> Tensor:
        """The map on the images' grid, [n, K, 1, H, W]."""
        total: Tensor | None = None
        for features, gradient, counts in run.feature_maps(self.layer):
            map = self.weighted(features, gradient)
            map = self.upsampled(run, map.relu() if relu else map)
            chosen = counts.view(*counts.shape, *(1,) * (map.dim() - 2))
            total = map if total is None else torch.where(chosen, map, total)
        assert total is not None
        return total

    def weighted(self, features: Tensor, gradient: Tensor) -> Tensor:
        """sum_c w_c A_c on the layer's own grid, [n, K, h, w]."""
        weights = self.weights(features, gradient)
        return torch.einsum("nkc,ncp->nkp", weights, features.flatten(2)).view(*weights.shape[:2], *features.shape[2:])

    def weights(self, features: Tensor, gradient: Tensor) -> Tensor:
        """w_c, [n, K, C], of the features [n, C, ...] and the gradient [n, K, C, ...]."""
        del features
        return gradient.flatten(3).mean(3)


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
        return self.located(run, self.relu)


@register_method(
    "grad_cam_plus_plus",
    summary="Last feature map weighted by its positive gradients, each position by how much of the score it explains",
    reference="Chattopadhay et al., WACV 2018, equations 5 and 19",
    aliases=("gradcam++", "grad_cam++"),
)
@dataclass(frozen=True, kw_only=True)
class GradCamPlusPlus(GradCam):
    """relu(sum_c w_c A_c) with the weights of Grad-CAM++, [N, 1, H, W]."""

    def weights(self, features: Tensor, gradient: Tensor) -> Tensor:
        g = gradient.flatten(3)
        whole = features.flatten(2).sum(2)[:, None, :, None]
        below = 2 + whole * g  # g^2 cancelled
        return torch.where(below == 0, 0.0, g.relu() / below.masked_fill(below == 0, 1.0)).sum(3)


@register_method(
    "layer_cam",
    summary="Last feature map weighted by its positive gradient, position by position",
    reference="Jiang et al., IEEE TIP 2021, equations 5 and 6",
    aliases=("layercam",),
)
@dataclass(frozen=True, kw_only=True)
class LayerCam(GradCam):
    """relu(sum_c relu(dS/dA_c) A_c), [N, 1, H, W]."""

    def weighted(self, features: Tensor, gradient: Tensor) -> Tensor:
        return (gradient.relu() * features[:, None]).sum(2)


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
        return run.gradient(_GUIDED) * self.located(run, relu=True)


_GUIDED = GuidedBackprop()
