"""Saliency and Gradient x Input: the plain gradient, read in two ways."""

from dataclasses import dataclass

from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check_flag
from attrbox.engine.site import Rule
from attrbox.methods.base import Method, register_method
from attrbox.methods.context.run import Run


@register_method(
    "saliency",
    summary="Absolute gradient of the score",
    reference="Simonyan, Vedaldi & Zisserman, ICLR 2014 workshop, section 3",
    reduction="max",
    units="score per unit of input",
)
@dataclass(frozen=True, kw_only=True)
class Saliency(Method):
    """|df/dx| by default; the signed gradient with `absolute=False`. The usual map takes the largest channel."""

    absolute: bool = option(True, "absolute values (as published) instead of signed ones")

    def __post_init__(self) -> None:
        check_flag("absolute", self.absolute)

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        return (None,)

    def attribute(self, run: Run) -> Tensor:
        gradient = run.gradient()
        return gradient.abs() if self.absolute else gradient


@register_method(
    "gradient_x_input",
    summary="Input times gradient",
    reference="Shrikumar et al., arXiv 1605.01713, 2016",
    aliases=("GradXIn",),
)
@dataclass(frozen=True, kw_only=True)
class GradientXInput(Method):
    """x * df/dx."""

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        return (None,)

    def attribute(self, run: Run) -> Tensor:
        return run.gradient() * run.images.unsqueeze(1)
