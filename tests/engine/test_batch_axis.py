"""Rows of an activation are images, or are known not to be; maps do not depend on how many images there are."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import FAST, images, seeded
from torch import Tensor, nn

import attrbox
from attrbox.core.model_state import untouched
from attrbox.engine.tape import record

Function = Callable[[Tensor], Tensor]


class Tokens(nn.Module):
    """Tokens first, as torch's transformers and recurrent nets take them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 8), nn.Linear(8, 5)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(F.unfold(x, 2, stride=2).permute(2, 0, 1))).mean(0))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Linear(6, 5)


class Unbatched(Layers):
    """Convolutions on one image at a time, without a batch axis: rows are channels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([self.second(self.first(row).relu()).relu().mean((1, 2)) for row in x]))


class Routed(Layers):
    """Rows sorted by what they show, and put back in the end."""

    def forward(self, x: Tensor) -> Tensor:
        order = x.detach().mean((1, 2, 3)).argsort(descending=True)
        x = self.head(self.second(self.first(x[order]).relu()).relu().mean((2, 3)))
        return x[order.argsort()]


class Turned(Layers):
    """Channels first for a while."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).transpose(0, 1).relu().transpose(0, 1)
        return self.head(self.second(x).relu().mean((2, 3)))


class Plain(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


MODELS = {model.__name__: model for model in (Tokens, Unbatched, Routed, Turned, Plain)}
METHODS = ["learned", "learned_rank", "learned_clean", "grad_cam", "layer_cam", "deeplift", "lrp_epsilon"]


@pytest.mark.parametrize("count", [4, 9])  # as many as there are channels, and tokens
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_maps_are_those_of_each_image_alone(name: str, method: str, count: int) -> None:
    model, x = seeded(MODELS[name]), images(count, 3, 6, 6)
    options = FAST.get(method, {}) | {"progress": False}
    if "cam" in method:
        if name in ("Tokens", "Unbatched"):
            pytest.skip("there is no map with a row for each image")
        options["relu"] = False
    together = attrbox.explain(model, x, method, target=1, seed=list(range(5, 5 + count)), **options).values
    for row in range(0, count, 3):
        alone = attrbox.explain(model, x[row : row + 1], method, target=1, seed=[5 + row], **options).values
        torch.testing.assert_close(together[row : row + 1], alone)


STEPS: dict[str, tuple[Function, bool]] = {
    "identity": (lambda x: x, True),
    "there and back": (lambda x: x.transpose(0, 2).transpose(2, 0), True),
    "permuted": (lambda x: x.permute(1, 0, 2, 3).permute(1, 0, 2, 3), True),
    "tokens first": (lambda x: x.flatten(2).permute(2, 0, 1).permute(1, 2, 0).unflatten(2, x.shape[2:]), True),
    "rows into the batch": (lambda x: x.reshape(-1, x.shape[2], x.shape[3]).reshape(x.shape), True),
    "through one axis": (
        lambda x: x.permute(1, 0, 2, 3).flatten(0, 1).view(-1, *x.shape[:1], 4, 4).transpose(0, 1),
        True,
    ),
    "heads": (lambda x: torch.stack([x, 2 * x]).unbind(0)[1], True),
    "part of stacked": (lambda x: torch.stack([x, 2 * x])[1], True),
    "channels picked": (lambda x: x[:, [1, 0, 2]], True),
    "turned": (lambda x: x.flip(2), True),
    "rolled": (lambda x: x.roll((1, 1), (2, 3)), True),
    "joined": (lambda x: torch.cat([x, x], 1)[:, :3], True),
    "einsum": (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.eye(3).to(x)), True),
    "flipped": (lambda x: x.flip(0), False),
    "all rolled": (lambda x: x.roll(1, 0), False),
    "sorted": (lambda x: x.sort(0).values, False),
    "routed": (lambda x: x[torch.arange(len(x)).flip(0)], False),
    "picked": (lambda x: x.index_select(0, torch.arange(len(x)).flip(0)), False),
    "joined again": (lambda x: torch.cat([x[1:], x[:1]]), False),
    "channels first": (lambda x: x.transpose(0, 1), False),
}


@pytest.mark.parametrize("name", STEPS)
def test_where_the_images_lie(name: str) -> None:
    function, rows = STEPS[name]

    class Stepped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x).relu().mean((2, 3))

    x = images(3, 3, 4, 4)  # as many images as channels
    rule = attrbox.method_registry["guided_backprop"].create({}).rules[0]
    with untouched(Stepped().eval()) as model:
        tape = record(model, x, [rule])
    assert tape.rows_are_images(tape.sites[-1].index) == rows
