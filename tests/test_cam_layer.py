"""The layer that the CAM family takes by itself lies on the way to the explained output."""

import pytest
import torch
import torch.nn.functional as F
from nets import images
from torch import Tensor, nn

import attrbox

X = images(2, 3, 16, 16)
CAM = ["grad_cam", "grad_cam_plus_plus", "layer_cam", "guided_grad_cam"]


class Heads(nn.Module):
    """A trunk, and a branch of convolutions that `use` says what to do with."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head, self.other = nn.Linear(8, 5), nn.Sequential(nn.Conv2d(8, 5, 3), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        x = self.body(x)
        scores = self.head(x.mean((2, 3)))
        other = self.other(x)
        if self.use == "tuple":
            return scores, other.mean((2, 3))
        if self.use == "dictionary":
            return {"out": scores, "aux": F.interpolate(other, scale_factor=2)}
        return scores


def net(use: str) -> nn.Module:
    torch.manual_seed(0)
    return Heads(use).double().eval()


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("use", ["nothing", "tuple", "dictionary"])
@pytest.mark.parametrize("method", CAM)
def test_not_in_a_branch_that_the_scores_do_not_depend_on(method: str, use: str, size: int | None) -> None:
    options = {"target": [1, 2], "batch_size": size, "progress": False}
    wanted = attrbox.explain(net(use), X, method, layer="body.3", **options).values
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(attrbox.explain(net(use), X, method, **options).values, wanted)
    beside = attrbox.compare(net(use), X, ["deeplift", method, "saliency"], **options)[method].values
    torch.testing.assert_close(beside, wanted)
