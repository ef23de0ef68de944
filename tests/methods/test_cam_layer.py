"""The layer that the CAM family takes by itself lies on the way to the explained output."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from nets import images
from torch import Tensor, nn

import attrbox
from attrbox.engine.feature_maps import Follower, Grid
from attrbox.errors import PartialMapWarning

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


class Dense(nn.Module):
    """A score for each pixel, with skip connections, and what `end` makes of it."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end = end
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(10, 8, 3, padding=1), nn.ReLU())
        self.logits, self.aux = nn.Conv2d(8, 5, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        near = self.down(x)
        far = self.inner(F.max_pool2d(near, 2))
        logits = self.logits(self.up(torch.cat([near, F.interpolate(far, scale_factor=2)], 1)))
        match self.end:
            case "softmax":
                return logits.softmax(1)
            case "larger":
                return F.interpolate(logits, scale_factor=2, mode="bilinear")
            case "channels last":
                return logits.movedim(1, -1).contiguous().movedim(-1, 1)
            case "dictionary":
                return {
                    "out": F.interpolate(logits, scale_factor=2),
                    "aux": F.interpolate(self.aux(far), scale_factor=4),
                }
            case "pooled":
                return logits.mean((2, 3))
        return logits


@pytest.mark.parametrize(
    ("end", "part", "layer"),
    [
        ("logits", None, "up.1"),
        ("softmax", None, "up.1"),
        ("larger", None, "up.1"),
        ("channels last", None, "up.1"),
        ("dictionary", "out", "up.1"),
        ("dictionary", "aux", "inner.1"),
        ("pooled", None, "logits"),  # a classifier: its last map is what it pools
    ],
)
@pytest.mark.parametrize("method", CAM)
def test_what_the_model_returns_is_no_feature_map(method: str, end: str, part: str | None, layer: str) -> None:
    def target(out: Tensor | dict[str, Tensor]) -> Tensor:
        scores = out[part] if isinstance(out, dict) and part is not None else out
        assert isinstance(scores, Tensor)
        return scores[:, 1] if scores.dim() == 2 else scores[:, 1, 4:9, 4:9].mean((1, 2))

    torch.manual_seed(0)
    model = Dense(end).double().eval()
    for size in (None, 1):
        wanted = attrbox.explain(model, X, method, target=target, layer=layer, batch_size=size, progress=False).values
        found = attrbox.explain(model, X, method, target=target, batch_size=size, progress=False).values
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(found, wanted)


class Joined(nn.Module):
    """Two heads of convolutions behind one trunk, their classes in one output: 0 and 1 of the first, 2 to 4 of both."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.near = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.Sigmoid())
        self.far = nn.Sequential(nn.Conv2d(6, 5, 3, stride=2), nn.Sigmoid())
        self.first, self.second = nn.Linear(4, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        first, second = self.first(self.near(x).mean((2, 3))), self.second(self.far(x).mean((2, 3)))
        return torch.cat([first, second], 1)


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("method", CAM)
def test_heads_joined_to_one_output(method: str, size: int | None) -> None:
    torch.manual_seed(0)
    model = Joined().double().eval()
    layers = {0: "near.1", 1: "near.1", 3: "far.1"}
    explained = lambda k: attrbox.explain(model, X, method, target=k, layer=layers[k], progress=False)  # noqa: E731
    alone = {k: explained(k).values for k in layers}
    for targets in ([0, 3], [3, 1], [0, 1], [3, 3]):
        maps = attrbox.explain(model, X, method, target=targets, batch_size=size, progress=False).values
        torch.testing.assert_close(maps, torch.stack([alone[k][i] for i, k in enumerate(targets)]))
    maps = attrbox.explain(model, X, method, target=attrbox.classes([3, 0]), progress=False).values
    torch.testing.assert_close(maps, torch.stack([alone[3], alone[0]], 1))
    if method == "grad_cam":
        assert all(values.abs().sum() > 0 for values in alone.values())


class Patches(nn.Module):
    """A patch embedding by a linear layer, and blocks on tokens: [n, T, C], [n, h, w, C] or [n, C, T] with Conv1d."""

    def __init__(self, layout: str, prefix: int = 0) -> None:
        super().__init__()
        self.layout, self.prefix = layout, prefix
        self.embed, self.norm = nn.Linear(3 * 16, 12), nn.LayerNorm(12)
        self.up, self.down, self.mix = nn.Linear(12, 24), nn.Linear(24, 12), nn.Conv1d(12, 12, 3, padding=1)
        self.token, self.head = nn.Parameter(torch.zeros(1, prefix, 12)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)  # [n, h, w, 48]
        if self.layout != "grid":
            x = x.flatten(1, 2)
        x = self.embed(x)
        if self.prefix:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        if self.layout == "convolved":
            x = x + self.mix(x.mT).mT
        self.seen = x
        x = x[:, self.prefix :]
        return self.head(x.mean(tuple(range(1, x.dim() - 1))))


@pytest.mark.parametrize(("layout", "prefix"), [("tokens", 0), ("tokens", 1), ("grid", 0), ("convolved", 0)])
def test_linear_patch_embeddings(layout: str, prefix: int) -> None:
    torch.manual_seed(0)
    model, x = Patches(layout, prefix).double().eval(), images(2, 3, 16, 24)
    maps = attrbox.explain(model, x, "grad_cam", target=1, interpolation="nearest", relu=False, progress=False).values
    model(x)
    tokens = model.seen.flatten(1, -2)[:, prefix:]
    weights = model.head.weight[1] / tokens.shape[1]  # the mean gradient of each channel
    grid = (tokens @ weights).view(2, 1, 4, 6)
    torch.testing.assert_close(maps, F.interpolate(grid, (16, 24), mode="nearest").detach())


class Sequence(nn.Module):
    """Flattens an image and convolves it along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.flatten(2)).relu().mean(2))


def test_what_ran_is_said_where_there_is_no_map() -> None:
    with pytest.raises(attrbox.errors.OptionError, match="1 convolutions ran, but none with an output of 2 axes"):
        attrbox.explain(Sequence().double().eval(), X, "grad_cam", progress=False)
    with pytest.raises(attrbox.errors.OptionError, match="no axes of pixels"):
        attrbox.explain(nn.Linear(4, 2).double().eval(), images(2, 4), "grad_cam", progress=False)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).double().eval()
    with pytest.raises(attrbox.errors.OptionError, match="neither a convolution nor a linear layer on square patches"):
        attrbox.explain(dense, X, "grad_cam", progress=False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net("nothing")

        def forward(self, x: Tensor) -> Tensor:
            body = torch.utils.checkpoint.checkpoint(self.inner.body, x, use_reentrant=reentrant)
            return self.inner.head(body.mean((2, 3)))

    wanted = attrbox.explain(net("nothing"), X, "grad_cam", target=1, progress=False).values
    if reentrant:
        with pytest.raises(attrbox.errors.UnsupportedModelError, match="checkpointing"):
            attrbox.explain(Checkpointed().eval(), X, "grad_cam", target=1, progress=False)
    else:
        got = attrbox.explain(Checkpointed().eval(), X, "grad_cam", target=1, progress=False).values
        torch.testing.assert_close(got, wanted)


def test_an_activation_of_more_axes_is_no_row_of_tokens() -> None:
    follower = Follower((2, 3, 16, 16))
    follower.see("conv2d", torch.zeros(2, 8, 3, 3, requires_grad=True) * 1)
    assert follower.grid_of(torch.zeros(2, 10, 5)) == Grid((3, 3), 1, last=True)
    assert follower.grid_of(torch.zeros(2, 5, 10)) == Grid((3, 3), 1)
    assert follower.grid_of(torch.zeros(2, 9, 2, 7)) is None  # 9 heads, say
    assert follower.grid_of(torch.zeros(4, 10, 5)) is None


@pytest.mark.parametrize("method", CAM)
def test_a_part_of_the_model_is_called_a_part(method: str) -> None:
    """Of the mean of two networks, the last feature map is one's."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = net("nothing"), net("nothing")

        def forward(self, x: Tensor) -> Tensor:
            return (self.one(x) + self.other(x)) / 2

    with pytest.warns(PartialMapWarning, match="a part of the model only"):
        attrbox.explain(Mean().eval(), X, method, target=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attrbox.explain(net("nothing"), X, method, target=1, progress=False)


class ClassToken(nn.Module):
    """A transformer with its class token before or behind the others."""

    def __init__(self, first: bool, extra: int) -> None:
        super().__init__()
        self.first, self.extra = first, extra
        self.patches, self.token = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
        self.registers = nn.Parameter(torch.randn(1, extra, 32))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        token, registers = self.token.expand(len(x), -1, -1), self.registers.expand(len(x), -1, -1)
        parts = [token, registers, tokens] if self.first else [tokens, token, registers]
        tokens = self.block(self.block(torch.cat(parts, 1)))
        return self.head(tokens[:, 0 if self.first else 16])


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("method", [*CAM, "attention_rollout", "gradient_rollout"])
def test_class_tokens_may_stand_at_the_end(method: str, extra: int) -> None:
    found = []
    for first in (True, False):
        torch.manual_seed(0)
        model = ClassToken(first, extra).double().eval()
        found.append(attrbox.explain(model, X, method, target=1, progress=False).values)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("channels", [4, 16, 20, 32, 40])
@pytest.mark.parametrize("method", ["grad_cam", "layer_cam"])
def test_grids_of_as_many_channels_as_positions(method: str, channels: int) -> None:
    """4 x 4 positions, their channels before, behind, or before tokens."""

    class Laid(nn.Module):
        def __init__(self, layout: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layout = layout
            self.patches, self.head, self.bias = (
                nn.Conv2d(3, channels, 4, 4),
                nn.Linear(channels, 5),
                torch.randn(channels),
            )

        def forward(self, x: Tensor) -> Tensor:
            x, bias = self.patches(x), self.bias.to(x)
            if self.layout == "tokens":
                x, bias = x.flatten(2), bias[:, None]
            elif self.layout == "channels last":
                x = x.permute(0, 2, 3, 1)
            else:
                bias = bias[:, None, None]
            x = x + bias
            x = x + x.tanh()
            return self.head(x.mean({"tokens": 2, "channels last": (1, 2)}.get(self.layout, (2, 3))))

    maps = [
        attrbox.explain(Laid(layout).double().eval(), X, method, target=1, progress=False, relu=False).values
        for layout in ("maps", "tokens", "channels last")
    ]
    torch.testing.assert_close(maps[1], maps[0])
    torch.testing.assert_close(maps[2], maps[0])


class Scales(nn.Module):
    """Two scales, each with a class token that looks at its tokens once; the last norm is behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(3, 16, 2, 2), nn.Conv2d(3, 16, 4, 4)
        self.token, self.norm, self.place = nn.Parameter(torch.randn(1, 1, 16)), nn.LayerNorm(16), nn.Conv2d(16, 16, 1)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(32, 5)

    def scale(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).mT], 1)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed)[0]
        grid = tokens[:, 1:].mT.unflatten(2, x.shape[2:])  # a convolution between the attention and the end
        tokens = torch.cat([tokens[:, :1], self.place(grid).flatten(2).mT], 1)
        return self.norm(tokens)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.scale(self.near(x)), self.scale(self.far(x))], 1))


@pytest.mark.filterwarnings("ignore::attrbox.errors.PartialMapWarning")
@pytest.mark.parametrize("method", CAM)
def test_a_map_is_not_of_what_the_class_token_leaves_behind(method: str) -> None:
    torch.manual_seed(0)
    model = Scales().double().eval()
    options = {} if method == "guided_grad_cam" else {"relu": False}
    together = attrbox.explain(model, X, method, target=1, progress=False, **options).values
    assert (together.flatten(1) != 0).any(1).all() or method == "guided_grad_cam"
    alone = [attrbox.explain(model, x[None], method, target=1, progress=False, **options).values for x in X]
    torch.testing.assert_close(together, torch.cat(alone))
