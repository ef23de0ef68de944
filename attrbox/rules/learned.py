"""The learned propagation rule: at each non-linearity a multiplier with parameters of its own for every sample.

Yang et al., ECCV 2020, section 3.2, in the form of the reference experiments:

    k = tanh(W * (F - F_ref)),     G_in = G_out * k

F is the feature map behind the non-linearity (or before it), F_ref the same on a reference image. A *plugin* says what
W looks like and how it meets the features:

    per_pixel      W [n, C, H, W], a Hadamard product (the paper's second architecture)
    shared         W [n, C, k, k], one number per channel, or a depthwise kernel (the first architecture)
    convolution    W [n, C, C, k, k], a standard convolution (the paper's negative result)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.core.registry import Parts
from attrbox.engine.site import ACTIVATIONS, Gradients, Rule, Site
from attrbox.errors import RuleError


@dataclass(frozen=True)
class Plugin(ABC):
    """How the parameters of a site act. Register one with `register_plugin`, and it is a value of option `plugin`."""

    kernel: int = 1

    @abstractmethod
    def shape(self, difference: Tensor) -> tuple[int, ...]:
        """Shape of one sample's parameters, for features F - F_ref [n, C, ...]."""

    @abstractmethod
    def multiplier(self, parameters: Tensor, difference: Tensor) -> Tensor:
        """k, of the features' shape."""

    def propagate(self, grad_output: Tensor, parameters: Tensor, difference: Tensor) -> Tensor:
        """G_out * k; override it if there is a faster way."""
        return grad_output * self.multiplier(parameters, difference)


plugins: Parts[Plugin] = Parts("plugin", "attrbox.plugins", Plugin)  # type: ignore[type-abstract]
register_plugin = plugins.register


class _Hadamard(torch.autograd.Function):
    """G * tanh(W * D), with its gradients in few passes over memory; W may broadcast over positions.

    Its gradients can be asked for once: they are written over what they are made of.
    """

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, parameters: Tensor, difference: Tensor) -> Tensor:
        multiplier = torch.mul(parameters, difference).tanh_()
        ctx.shape = parameters.shape
        ctx.save_for_backward(grad_output, multiplier, difference)
        return grad_output * multiplier

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, multiplier, difference = ctx.saved_tensors
        upper, own = None, None
        if ctx.needs_input_grad[1]:
            through = torch.empty_like(difference)  # in the memory layout of the parameters
            torch.mul(grad, grad_output, out=through).mul_(difference)
            own = torch.ops.aten.tanh_backward.grad_input(through, multiplier, grad_input=through)
            own = own.sum_to_size(ctx.shape)
        if ctx.needs_input_grad[0]:
            upper = multiplier.mul_(grad)
        return upper, own, None


@register_plugin("per_pixel")
@dataclass(frozen=True)
class PerPixel(Plugin):
    """tanh(W * D), W of the features' shape."""

    def shape(self, difference: Tensor) -> tuple[int, ...]:
        return tuple(difference.shape[1:])

    def multiplier(self, parameters: Tensor, difference: Tensor) -> Tensor:
        return torch.tanh(parameters * difference)

    def propagate(self, grad_output: Tensor, parameters: Tensor, difference: Tensor) -> Tensor:
        return cast(Tensor, _Hadamard.apply(grad_output, parameters, difference))


@register_plugin("shared")
@dataclass(frozen=True)
class Shared(PerPixel):
    """tanh(W * D), one number per channel; with kernel k > 1 tanh of a depthwise k x k convolution of D."""

    def shape(self, difference: Tensor) -> tuple[int, ...]:
        return (difference.shape[1], *(self.kernel,) * (difference.dim() - 2))

    def multiplier(self, parameters: Tensor, difference: Tensor) -> Tensor:
        if self.kernel == 1:
            return super().multiplier(parameters, difference)
        return torch.tanh(_convolved(parameters.flatten(0, 1).unsqueeze(1), difference))

    def propagate(self, grad_output: Tensor, parameters: Tensor, difference: Tensor) -> Tensor:
        if self.kernel == 1:
            return super().propagate(grad_output, parameters, difference)
        return grad_output * self.multiplier(parameters, difference)


@register_plugin("convolution")
@dataclass(frozen=True)
class Convolution(Plugin):
    """tanh of a standard k x k convolution of D, which mixes the channels: the paper's negative result."""

    def shape(self, difference: Tensor) -> tuple[int, ...]:
        channels = difference.shape[1]
        return (channels, channels, *(self.kernel,) * (difference.dim() - 2))

    def multiplier(self, parameters: Tensor, difference: Tensor) -> Tensor:
        return torch.tanh(_convolved(parameters.flatten(0, 1), difference))


def _convolved(weights: Tensor, difference: Tensor) -> Tensor:
    """Each sample convolved with its own kernel: the batch as groups, [1, n C, ...]."""
    dims = difference.dim() - 2
    if dims == 0:
        weights, difference = weights[..., None], difference[..., None]
    convolve = (F.conv1d, F.conv1d, F.conv2d, F.conv3d)[dims]
    n, channels = difference.shape[:2]
    groups = n * channels // weights.shape[1]
    padded = difference.reshape(1, n * channels, *difference.shape[2:])
    result = convolve(padded, weights, padding="same", groups=groups).view(difference.shape)
    return result if dims else result[..., 0]


class LearnedRule(Rule):
    """The rule with the parameters of the moment; the true derivative at sites that have none.

    Args:
        plugin: how parameters act.
        feature: "output" or "input" of the non-linearity.
        compares: whether the features on a reference are subtracted.
    """

    kinds = ACTIVATIONS

    def __init__(self, plugin: Plugin, feature: str, compares: bool) -> None:
        self.plugin = plugin
        self.feature = feature
        self.compares = compares
        self.parameters: dict[int, Tensor] = {}  # by the site's index, [n, ...]
        self.differences: dict[int, Tensor] = {}

    def needs_at(self, kind: str) -> frozenset[str]:
        return frozenset({self.feature, "derivative"} | ({"reference"} if self.compares else set()))

    @property
    def uses_reference(self) -> bool:
        return self.compares

    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        parameters = self.parameters.get(site.index)
        if parameters is None:
            return site.true_gradient(grad_output)
        difference = self.differences[site.index]
        if len(difference) > len(parameters) and parameters.shape[1] * len(parameters) == len(difference):
            parameters = parameters.flatten(0, 1)  # several rows of one image
        if parameters.shape[1:] != self.plugin.shape(difference):
            raise RuleError(
                f"The learned parameters at {site.where} have shape {list(parameters.shape[1:])} per sample, but the "
                f"features ask for {list(self.plugin.shape(difference))}. Rules carry over to images of the same size "
                "and the same model only (any size with plugin='shared')."
            )
        return self.plugin.propagate(grad_output, parameters, difference)


class Differences(LearnedRule):
    """Notes F - F_ref at the sites `wanted` and passes the true gradient: the first replay of a learned rule."""

    def __init__(self, rule: LearnedRule, wanted: frozenset[int]) -> None:
        super().__init__(rule.plugin, rule.feature, rule.compares)
        self.wanted = wanted

    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        if site.index in self.wanted:
            with torch.no_grad():
                features = site.output if self.feature == "output" else site.input
                if self.compares:
                    reference = site.reference_output if self.feature == "output" else site.reference_input
                    features = features - reference
                self.differences[site.index] = features.detach()
        return site.true_gradient(grad_output)
