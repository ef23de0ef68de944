"""Models that do odd things with the batch axis get the maps of the same function written plainly."""

import pytest
import torch
from nets import FAST, images
from torch import Tensor, nn

import attrbox
from attrbox.errors import UnsupportedModelError

METHODS = [name for name in attrbox.list_methods() if attrbox.method_registry[name].for_all and name != "random"]
CAM = {"grad_cam", "grad_cam_plus_plus", "layer_cam", "guided_grad_cam"}
# Learned rules lie between the first and the last layer in order of execution, which differs between these spellings.
X = images(3, 3, 12, 12)
SIDE = images(3, 8, seed=4)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.features(x))))


class Loop(Plain):
    """Runs its layers row by row, in Python."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Loop, self).forward(row[None]) for row in x])


class Views(Plain):
    """Lays two crops of each image into the batch axis."""

    def forward(self, x: Tensor) -> Tensor:
        views = torch.stack([x[..., :10, :], x[..., 2:, :]], 1).flatten(0, 1)
        features = self.features(views).view(len(x), 2, -1).mean(1)
        return self.head(torch.tanh(self.hidden(features)))


class Crops(Plain):
    """The same, one crop after the other."""

    def forward(self, x: Tensor) -> Tensor:
        features = (self.features(x[..., :10, :]) + self.features(x[..., 2:, :])) / 2
        return self.head(torch.tanh(self.hidden(features)))


class Side(Plain):
    """Closes over another input of the batch's size, so it takes batches of that size alone."""

    def __init__(self, side: Tensor) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.features(x)) + self.side))


def built(build: type[nn.Module], *arguments: Tensor | nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return build(*arguments).double().eval()


def maps(model: nn.Module, x: Tensor, method: str, target: list[int]) -> Tensor:
    seeds = [10 + number for number in target]  # each image's own, in a batch and alone
    options = FAST.get(method, {}) | {"progress": False, "target": target, "seed": seeds}
    if method.startswith("learned"):  # whose random start depends on how many sites there are
        options["initial"] = "ones"
    return attrbox.explain(model, x, method, **options).values


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_over_the_rows(method: str) -> None:
    torch.testing.assert_close(maps(built(Loop), X, method, [0, 1, 2]), maps(built(Plain), X, method, [0, 1, 2]))


@pytest.mark.parametrize("method", METHODS)
def test_crops_in_the_batch_axis(method: str) -> None:
    if method in CAM:
        with pytest.raises(UnsupportedModelError, match="2 rows for one image: the model lays crops"):
            maps(built(Views), X, method, [0, 1, 2])
        return
    torch.testing.assert_close(maps(built(Views), X, method, [0, 1, 2]), maps(built(Crops), X, method, [0, 1, 2]))


@pytest.mark.parametrize("plugin", ["per_pixel", "shared"])
@pytest.mark.parametrize("build", [Loop, Views])
def test_learned_rules_of_rows_that_take_their_own_ways(build: type[nn.Module], plugin: str) -> None:
    """Seeded alike, images learn the same alone and together, and their rules make the same maps again."""
    options = {"progress": False, "target": [0, 1, 2], "iterations": 3, "seed": [5, 6, 7], "plugin": plugin}
    model = built(build)
    together = attrbox.explain(model, X, "learned", keep_rules=True, **options)
    for i in range(len(X)):
        one = options | {"target": i, "seed": [5 + i]}
        alone = attrbox.explain(model, X[i : i + 1], "learned", keep_rules=True, **one)
        torch.testing.assert_close(together.values[i : i + 1], alone.values)
    rules = together.details["rules"]
    again = attrbox.explain(model, X, "learned_transfer", target=[0, 1, 2], learned=rules, progress=False)
    torch.testing.assert_close(again.values, together.values)


@pytest.mark.parametrize("method", METHODS)
def test_side_inputs_of_the_size_of_the_batch(method: str) -> None:
    whole = maps(built(Side, SIDE), X, method, [0, 1, 2])
    for i in range(len(X)):
        alone = maps(built(Side, SIDE[i : i + 1]), X[i : i + 1], method, [i])
        torch.testing.assert_close(whole[i : i + 1], alone)


@pytest.mark.parametrize("method", ["saliency", "deeplift", "integrated_gradients"])
def test_side_inputs_of_more_images_than_are_run_unseen(method: str) -> None:
    """Of more than eight images one is run alone to see what it costs, which such a model does not allow."""
    x, side = images(12, 3, 12, 12), images(12, 8, seed=3)
    whole = maps(built(Side, side), x, method, [1] * 12)
    torch.testing.assert_close(whole[4:5], maps(built(Side, side[4:5]), x[4:5], method, [1]))


class NormedTokens(nn.Module):
    """A norm whose outputs are laid out as tokens: torch's own gradient of a single image is wrong there, on CPUs."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.mean = nn.Conv2d(3, 4, 3), norm, nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.first(x) * 1.0).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.mean(tokens)).mean(1))


class Rows(NormedTokens):
    """The same, row by row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Rows, self).forward(row[None]) for row in x])


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "instance": lambda: nn.InstanceNorm2d(4),
    "group": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_norms_of_single_images_laid_out_as_tokens(method: str, norm: str) -> None:
    x = images(2, 3, 7, 8)
    wanted = maps(built(NormedTokens, NORMS[norm]()), x, method, [0, 1])
    for i in range(2):
        alone = maps(built(NormedTokens, NORMS[norm]()), x[i : i + 1], method, [i])
        torch.testing.assert_close(alone, wanted[i : i + 1])
    if method not in CAM:
        torch.testing.assert_close(maps(built(Rows, NORMS[norm]()), x, method, [0, 1]), wanted)
