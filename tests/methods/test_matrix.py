"""Every method x layout of the images x precision x chunk: the maps of the plain contiguous call.

One net with pools, concatenated branches and a depth-wise convolution, and a transformer for the methods that are made
for these. A layout changes only how the same values lie in memory.
"""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from nets import FAST, TRANSFORMERS, calibrate, images, seeded
from torch import Tensor, nn

import attrbox

ROLLOUTS = {"attention_rollout", "gradient_rollout"}
METHODS = attrbox.list_methods()
TARGET = [1, 2, 0]
SIDE = 16


class Mixed(nn.Module):
    """Max, average and overlapping pools, branches that are joined, a depth-wise convolution, a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, (1, 3), padding=(0, 1))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        y = F.relu(self.depthwise(x))
        pooled = F.avg_pool2d(y, 3, 1, 1)
        x = torch.cat([self.left(y).sigmoid(), F.relu(self.right(y)), pooled], 1)
        return self.head(x.flatten(2).amax(-1))


def _spaced(x: Tensor) -> Tensor:
    """Every second column of a larger tensor, behind an offset."""
    larger = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 9.0)
    larger[..., 1::2] = x
    return larger[..., 1::2]


# How a batch lies in memory; the values stay what they are.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "spaced": _spaced,
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "one image, expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "gray, expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}
# Of the largest value of a map. Optimizers that follow signs, and ranks of pixels, turn rounding into steps.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-3, torch.bfloat16: 0.05}
CHUNKS = ((1, None), (2, 1), (3, 2))  # images in the call, and in each chunk


@cache
def model(method: str, dtype: torch.dtype) -> nn.Module:
    if method in ROLLOUTS:
        return TRANSFORMERS["vit"]().to(dtype)
    net = calibrate(seeded(Mixed), SIDE, dtype)
    net.head.weight.data.abs_()  # so that no method has an empty map
    return net


@cache
def required(method: str, dtype: torch.dtype) -> dict[str, object]:
    """Options without which a method cannot run."""
    if method.startswith("pattern"):
        data = images(40, 3, SIDE, SIDE, seed=3, dtype=dtype)
        return {"patterns": attrbox.fit_patterns(model(method, dtype), data, progress=False)}
    if method == "learned_transfer":
        x = images(1, 3, SIDE, SIDE, dtype=dtype)
        options = {"iterations": 2, "progress": False}
        return {"learned": attrbox.explain(model(method, dtype), x, "learned", **options).details["rules"]}
    return {}


def maps(net: nn.Module, x: Tensor, method: str, **settings: object) -> Tensor:
    options = FAST.get(method, {}) | required(method, x.dtype) | {"target": TARGET[: len(x)]} | settings
    return attrbox.explain(net, x, method, progress=False, **options).values


def plain(net: nn.Module, x: Tensor, method: str) -> Tensor:
    """The maps that all others must equal."""
    return maps(net, x.contiguous(), method, channels_last=False)


def assert_close(values: Tensor, wanted: Tensor, what: str) -> None:
    assert values.dtype == wanted.dtype, what
    scale = wanted.double().flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    assert wanted.isfinite().all()
    assert (scale > 0).all(), f"{what}: an empty map shows nothing"
    error = float(((values.double() - wanted.double()).abs() / scale).max())
    assert error <= TOLERANCE[values.dtype], f"{what}: {error:.1e} of the largest value away"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("method", METHODS)
def test_layouts_and_chunks(method: str, dtype: torch.dtype) -> None:
    net = model(method, dtype)
    for layout, lay in LAYOUTS.items():
        x = lay(images(3, 3, SIDE, SIDE, dtype=dtype))
        wanted = plain(net, x, method)
        for count, chunk in CHUNKS:
            what = f"{method}, {layout}, {count} images by {chunk}"
            assert_close(maps(net, x[:count], method, batch_size=chunk), wanted[:count], what)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("method", METHODS)
def test_weights_in_channels_last(method: str, dtype: torch.dtype) -> None:
    net = model(method, dtype)
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    x = images(3, 3, SIDE, SIDE, dtype=dtype)
    wanted = plain(net, x, method)
    for layout in ("contiguous", "channels_last"):
        assert_close(maps(other, LAYOUTS[layout](x), method, batch_size=2), wanted, f"{method}, {layout}")
