"""The learned propagation rule (Yang et al., ECCV 2020, arXiv 2010.07210) and its presets.

For each sample, the multipliers k_l = tanh(W_l * (F_l - F_l_ref)) of its non-linearities are learned, so that the map

    A = sum over channels of X * G_X,     G_X the gradient propagated with G_in = G_out * k_l

finds the pixels that matter: with masks M+ and M- made of A (`attrbox.methods.masking.generators`), a fill Y and the
    score f_c,

    L+     = f_c(X + M+ * (Y - X)) - f_c(X)          taking the supporting pixels away lowers the score
    L-     = f_c(X) - f_c(X + M- * (Y - X))          taking the opposing ones away raises it
    L      = L+ + L- + lambda (mean M+ + mean M-)

is minimised by Adam over all W_l, one independent problem per sample. The weights of the model stay as they are.

With a region (preset clean), the map is A * S^2 where A and S agree in sign, and zero elsewhere: S is DeepLIFT's map of
the same score through a Gaussian, the largest |S| of an image being 1. S says where, A says which pixels there.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrbox.errors import OptimisationWarning
from attrbox.methods.base import register_method
from attrbox.methods.context.run import Run
from attrbox.methods.learned.chain import channel_sum, regions
from attrbox.methods.learned.optimization import Learning, Learnt, learn
from attrbox.methods.learned.parameters import LearnedRules

FAST_ITERATIONS = 30
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "rank": {"mask": "rank", "fill": "random", "reference": False},
    "clean": {
        "mask": "rank",
        "fill": "random",
        "reference": False,
        "fraction": 0.2,
        "sigma_fraction": 1 / 224,
        "region_fraction": 12 / 224,
    },
}


@dataclass(frozen=True, kw_only=True)
class Learned(Learning):
    """Learns a propagation rule for every sample; see the module."""

    def together(self, run: Run) -> Tensor:
        targets = range(run.scores.shape[1])
        with torch.enable_grad():
            places = regions(run, self.region_fraction)
            found = [[learn(self, run, places[k], k, restart) for restart in range(self.restarts)] for k in targets]
        values = torch.stack([torch.stack([one.values for one in row]).mean(0) for row in found], 1)
        stopped = torch.stack([torch.stack([one.iterations for one in row]).amin(0) for row in found], 1)
        failed = torch.stack([torch.stack([one.failed for one in row]).any(0) for row in found], 1)
        if not failed.is_meta and bool(failed.any()):
            rows = (failed.any(1).nonzero().flatten() + run.rows.start).tolist()
            warnings.warn(
                f"The loss of images {rows} became NaN or infinite; they were stopped there, and their maps are those "
                "of the iteration before (details['failed']). A smaller lr, or scores without overflow, may help.",
                OptimisationWarning,
                stacklevel=2,
            )
        positive, negative = _final_masks(self, values)
        run.tell(
            loss=torch.stack([torch.stack([one.losses for one in row]).mean(0) for row in found], 1),
            iterations=stopped,
            failed=failed,
            positive_mask=positive,
            negative_mask=negative,
        )
        if self.keep_rules:
            run.tell(rules=_kept(self, found))
        return values


def _final_masks(method: Learned, values: Tensor) -> tuple[Tensor, Tensor]:
    """The masks of the maps that are returned, [n, K, ...]."""
    n, targets = values.shape[:2]
    map = channel_sum(values.flatten(0, 1))
    positive, negative = method.generator.masks(map, map.new_full((n * targets,), 1 - 1e-6))
    return tuple(mask.view(n, targets, *mask.shape[1:]) for mask in (positive, negative))  # type: ignore[return-value]


def _kept(method: Learned, found: list[list[Learnt]]) -> LearnedRules:
    """Parameters of all targets and restarts, [n, K, R, ...]; zeros, which nothing reads, where a target does not
    reach a site."""
    like = {name: values for row in found for one in row for name, values in one.parameters.items()}
    return LearnedRules(
        {
            name: torch.stack(
                [torch.stack([one.parameters.get(name, torch.zeros_like(some)) for one in row], 1) for row in found], 1
            )
            for name, some in like.items()
        },
        {
            "plugin": method.plugin,
            "kernel": method.kernel,
            "feature": method.feature,
            "reference": method.reference,
            "sigma": method.generator.sigma_fraction,
            "region": method.region_fraction,
            "modules": method.modules,
        },
    )


for _name, _preset, _summary, _aliases in (
    ("learned", "paper", "Propagation rule learned for each image, as published", ("learned_paper",)),
    ("learned_rank", "rank", "Learned rule trained on the removal curves themselves, with random fills", ()),
    ("learned_clean", "clean", "Learned rule where DeepLIFT, smoothed, agrees: the one to show people", ()),
):
    register_method(
        _name,
        summary=_summary,
        reference="Yang et al., ECCV 2020, arXiv 2010.07210",
        aliases=_aliases,
        presets=PRESETS,
        preset=_preset,
        switches={"fast": {"iterations": FAST_ITERATIONS}},
    )(Learned)
