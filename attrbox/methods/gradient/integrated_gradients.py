"""Integrated gradients: the gradient averaged along the straight path from a baseline."""

from dataclasses import dataclass

from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check_baseline, check_choice, check_count
from attrbox.methods.base import Method, register_method
from attrbox.methods.context.run import Run
from attrbox.methods.context.versions import quadratures


@register_method(
    "integrated_gradients",
    summary="Gradient averaged along the path from a baseline, times the difference",
    reference="Sundararajan, Taly & Yan, ICML 2017, equation 1",
    aliases=("IG",),
)
@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(Method):
    """(x - x0) * sum_k w_k grad f(x0 + a_k (x - x0)).

    Nodes at the ends of the path (quadrature "right", "trapezoid") meet the kinks at an all-zero baseline, where
    gradients of ReLU networks vanish; the other two have none there.
    """

    steps: int = option(50, "points on the path")
    quadrature: str = option("gauss_legendre", "gauss_legendre, midpoint, right (right Riemann sum) or trapezoid")
    baseline: float | Tensor = option(0.0, "a number, or a tensor [C, H, W] or [N, C, H, W]")

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_choice("quadrature", self.quadrature, tuple(quadratures))
        check_baseline(self.baseline)

    @property
    def passes(self) -> int:
        return self.steps

    def attribute(self, run: Run) -> Tensor:
        gradient = run.versions.path_gradient(self.steps, self.quadrature, self.baseline)
        return gradient * (run.images - run.samples.baseline(self.baseline)).unsqueeze(1)

    def expected(self, run: Run) -> Tensor:
        return run.scores - run.baseline_scores(self.baseline)
