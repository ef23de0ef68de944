"""The SmoothGrad family: moments of the gradient over noisy copies of the image, g_k = grad f(x + noise_k).

    smoothgrad            mean_k g_k
    squared_smoothgrad    mean_k g_k^2
    vargrad               mean_k g_k^2 - (mean_k g_k)^2

The noise is Gaussian, its standard deviation `noise_fraction * (max - min)` of each image. The three share their
passes.
"""

from dataclasses import dataclass

from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check_count, check_flag, check_number
from attrbox.methods.base import Method, register_method
from attrbox.methods.context.run import Run
from attrbox.methods.context.versions import Moments, noise_key


@dataclass(frozen=True, kw_only=True)
class _Noisy(Method):
    n_samples: int = option(50, "noisy copies of each image", formerly="samples")
    noise_fraction: float = option(
        0.15, "standard deviation of the noise, as a share of the image's range (max - min)", formerly="noise"
    )

    def __post_init__(self) -> None:
        check_count("n_samples", self.n_samples)
        check_number("noise_fraction", self.noise_fraction, least=0)

    @property
    def passes(self) -> int:
        return self.n_samples


@register_method(
    "smoothgrad",
    summary="Gradient averaged over noisy copies",
    reference="Smilkov et al., arXiv 1706.03825, 2017",
    aliases=("SG",),
    units="score per unit of input",
)
@dataclass(frozen=True, kw_only=True)
class SmoothGrad(_Noisy):
    """mean_k g_k, signed; its absolute value, or times the input, by option."""

    absolute: bool = option(False, "absolute value of the mean")
    times_input: bool = option(False, "multiply the mean by the input")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("absolute", self.absolute)
        check_flag("times_input", self.times_input)

    def attribute(self, run: Run) -> Tensor:
        mean = run.versions.noise_mean(self.n_samples, self.noise_fraction)
        values = mean * run.images.unsqueeze(1) if self.times_input else mean
        return values.abs() if self.absolute else values


@dataclass(frozen=True, kw_only=True)
class _Squared(_Noisy):
    @property
    def asks(self) -> tuple[object, ...]:
        return (noise_key(self.n_samples, self.noise_fraction),)

    def moments(self, run: Run) -> Moments:
        return run.versions.noise_moments(self.n_samples, self.noise_fraction)


@register_method(
    "squared_smoothgrad",
    summary="Squared gradient averaged over noisy copies",
    reference="Hooker et al., NeurIPS 2019, section 3",
    aliases=("SQ_SG", "smoothgrad_squared"),
    units="squared score per squared unit of input",
)
@dataclass(frozen=True, kw_only=True)
class SquaredSmoothGrad(_Squared):
    """mean_k g_k^2: non-negative, so it ranks but does not tell for from against."""

    def attribute(self, run: Run) -> Tensor:
        return self.moments(run).mean_square


@register_method(
    "vargrad",
    summary="Variance of the gradient over noisy copies",
    reference="Adebayo et al., ICLR 2018 workshop",
    units="squared score per squared unit of input",
)
@dataclass(frozen=True, kw_only=True)
class VarGrad(_Squared):
    """Var_k(g_k), biased (divided by the number of samples): non-negative."""

    def attribute(self, run: Run) -> Tensor:
        return self.moments(run).variance
