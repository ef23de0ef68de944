"""KernelSHAP: Shapley values of superpixels, by weighted least squares (Lundberg and Lee, NeurIPS 2017).

With v(z) the score when the superpixels z are shown and the others hidden, d of them in all and |z| shown,

    min over b of  sum_z w(z) (v(z) - v(0) - b z)^2     with   sum b = v(1) - v(0),
                   w(z) = (d - 1) / (C(d, |z|) |z| (d - |z|))

is solved by the Shapley values if the sum is over all z. If these are too many, those of the smallest and largest sizes
are still all taken, as far as they get more than one sample each; of the others some are drawn, always with their
complements, which lowers the variance (Covert and Lee, AISTATS 2021).
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check_count
from attrbox.methods.base import register_method
from attrbox.methods.context.run import Run
from attrbox.methods.perturbation.perturbing import Segmented, exact, least_squares

EXTRA = 2048  # samples beyond two per superpixel, by default


@register_method(
    "kernel_shap",
    summary="Shapley values of superpixels, by weighted least squares",
    reference="Lundberg & Lee, NeurIPS 2017",
    aliases=("SHAP",),
    units="score per superpixel",
)
@dataclass(frozen=True, kw_only=True)
class KernelShap(Segmented):
    """Works on any callable; see the module. The map has one channel: a pixel gets the value of its superpixel; these
    values sum to the difference of the scores of the image and of its fill.

    Details: `base`, the score of the fill [n, K]; `exact`, whether all z were taken [n, K]; `segments`.
    """

    n_samples: int | None = option(
        None, "images with superpixels hidden; None: 2 per superpixel and 2048 more", formerly="samples"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_samples is not None:
            check_count("n_samples", self.n_samples, least=2)

    @property
    def passes(self) -> int:
        return self.n_samples or EXTRA

    def attribute(self, run: Run) -> Tensor:
        segments, counts = self.superpixels(run)
        games = [self._coalitions(run, row, count) for row, count in enumerate(counts)]
        nobody = [shown.new_zeros(1, shown.shape[1]) for shown, _ in games]
        rows = [torch.cat([nothing, shown]) for nothing, (shown, _) in zip(nobody, games, strict=True)]
        played, whole = self.played(run, rows, segments, counts), run.scores_in(self.unit(run))
        scores, whole, *exactly = exact(played, whole, *itertools.chain.from_iterable(games))
        if scores.is_meta:
            return run.images.new_empty(*scores.shape[1:], *run.images[:, :1].shape[1:])
        base, games = scores[0], list(zip(exactly[::2], exactly[1::2], strict=True))
        values = [
            _solved(shown, weights, scores[1 : 1 + len(shown), row], base[row], whole[row])
            for row, (shown, weights) in enumerate(games)
        ]
        complete = torch.tensor(
            [len(shown) == 2**count - 2 for (shown, _), count in zip(games, counts, strict=True)], device="cpu"
        )
        run.tell(base=base.to(run.images), exact=complete.to(run.images.device)[:, None].expand(run.scores.shape))
        return self.spread(run, values, segments)

    def _coalitions(self, run: Run, row: int, d: int) -> tuple[Tensor, Tensor]:
        """Some of the superpixels, [rows, d], and their weights, [rows]; neither none nor all of them."""
        left = self.n_samples or 2 * d + EXTRA
        weights = {size: (d - 1) / (size * (d - size)) for size in range(1, d)}  # of all sets of a size together
        shells, shell_weights = [], []
        size = 1
        while size <= d - size:
            sizes = {size, d - size}
            sets = sum(math.comb(d, s) for s in sizes)
            ours = sum(weights[s] for s in sizes)
            if sets > left * ours / sum(weights.values()) * (1 + 1e-9):
                break
            for s in sizes:
                chosen = list(itertools.combinations(range(d), s))
                index = torch.tensor(chosen, device=run.images.device)
                shells.append(run.images.new_zeros(len(chosen), d).scatter_(1, index, 1))
                shell_weights.append(run.images.new_full((len(chosen),), weights.pop(s) / len(chosen)))
            left -= sets
            size += 1
        if weights:
            pairs = max(1, left // 2)
            half = [s for s in weights if s <= d - s]
            shares = run.images.new_tensor([weights[s] + (weights[d - s] if s != d - s else 0) for s in half])
            numbers = run.samples.numbers_of(row, 0, (pairs, d + 1))
            bounds = (shares / shares.sum()).cumsum(0)
            picked = torch.searchsorted(bounds, numbers[:, 0].contiguous()).clamp_max(len(half) - 1)
            sizes_drawn = torch.tensor(half, device=run.images.device)[picked]
            drawn = (numbers[:, 1:].argsort(1).argsort(1) < sizes_drawn[:, None]).to(run.images.dtype)
            shells.append(torch.cat([drawn, 1 - drawn]))
            shell_weights.append(run.images.new_full((2 * pairs,), sum(weights.values()) / (2 * pairs)))
        if not shells:  # one superpixel: there is nothing between none and all
            return run.images.new_zeros(0, d), run.images.new_zeros(0)
        return torch.cat(shells), torch.cat(shell_weights)


def _solved(shown: Tensor, weights: Tensor, scores: Tensor, base: Tensor, whole: Tensor) -> Tensor:
    """The values [K, d], which sum to `whole - base` [K]: an even share for each, plus what least squares finds in the
    directions that leave the sum as it is."""
    d = shown.shape[1]
    even = ((whole - base) / d).expand(d, -1)
    if d == 1:
        return even.T
    across: Tensor = torch.linalg.qr(torch.eye(d, dtype=shown.dtype, device=shown.device) - 1 / d)[0][:, : d - 1]
    found = least_squares(shown @ across, scores - base - shown @ even, weights)
    values: Tensor = even + across @ found
    return values.T
