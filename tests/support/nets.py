"""Small nets with seeded weights, and random-weight torchvision models whose signals do not vanish.

Every function returns a model in evaluation mode, float64 unless asked otherwise, and leaves the global random state
alone. Nets that end in `_net` take `images(*shape)` of the shape that their docstring names.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(build: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module that `build` makes, with weights that depend on the seed alone and keep the signal's size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.3)
    return model.to(dtype).eval()


def calibrate(
    model: nn.Module, size: int = 64, dtype: torch.dtype = torch.float64, samples: int = 8, seed: int = 0
) -> nn.Module:
    """Give the batch-norms of a random-weight model the statistics of random images of size x size.

    Without, signals shrink from layer to layer until relative gaps measure nothing. Only the batch-norms run in
    training mode: dropout and stochastic depth stay off.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.to(torch.float32).eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the statistics of the one pass, not an average with those before
        norm.training = True
    try:
        with torch.no_grad():
            model(images(samples, 3, size, size, seed=seed, dtype=torch.float32))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.training = False
    return model.to(dtype)


# ----------------------------------------------------------------------------------------- one net, five spellings


class _Layers(nn.Module):
    """conv, relu, conv, relu, max-pool, conv, relu, mean, linear, relu, linear; subclasses spell the relu."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.fc1 = nn.Linear(8, 10)
        self.fc2 = nn.Linear(10, 5)

    def relu(self, x: Tensor, index: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x), 0)
        x = F.max_pool2d(self.relu(self.conv2(x), 1), 2)
        x = self.relu(self.conv3(x), 2).mean((2, 3))
        return self.fc2(self.relu(self.fc1(x), 3))


class _Modules(_Layers):
    def __init__(self) -> None:
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(4))

    def relu(self, x: Tensor, index: int) -> Tensor:
        return self.relus[index](x)


class _Functional(_Layers):
    def relu(self, x: Tensor, index: int) -> Tensor:
        return F.relu(x)


class _InPlace(_Layers):
    def __init__(self) -> None:
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU(inplace=True) for _ in range(4))

    def relu(self, x: Tensor, index: int) -> Tensor:
        return self.relus[index](x)


class _Reused(_Layers):
    def __init__(self) -> None:
        super().__init__()
        self.the_relu = nn.ReLU()

    def relu(self, x: Tensor, index: int) -> Tensor:
        return self.the_relu(x)


class _Underscore(_Layers):
    def relu(self, x: Tensor, index: int) -> Tensor:
        torch.relu_(x)  # the result is dropped: what was written in place must count
        return x


def five_ways(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, nn.Module]:
    """One function of [N, 3, 12, 12] (any size from 6) to 5 scores, written five ways."""
    spellings = {
        "modules": _Modules,
        "functional": _Functional,
        "in place": _InPlace,
        "reused": _Reused,
        "torch.relu_": _Underscore,
    }
    return {name: seeded(build, seed, dtype) for name, build in spellings.items()}


# ------------------------------------------------------------------------------------------------------- small nets


def relu_net(bias: bool = True, pool: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """[N, 3, 8, 8] -> 4 scores: convolutions, linear layers and ReLU modules, each used once."""

    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, stride=1 if pool else 2, bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(2) if pool else nn.Identity(),
            nn.Flatten(),
            nn.Linear(6 * 16, 12, bias=bias),
            nn.ReLU(),
            nn.Linear(12, 4, bias=bias),
        )

    model = seeded(build, seed, dtype)
    assert isinstance(model, nn.Sequential)
    return model


class _SqueezeExcitation(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.down, self.up = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.gate = gate
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        scale = self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head((scale * x).mean((2, 3)).tanh())


def squeeze_excitation_net(gate: str = "sigmoid", seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """[N, 3, 8, 8] -> 4 scores: channels scaled by a gate, "sigmoid" or "hardsigmoid"."""
    gates = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}
    return seeded(lambda: _SqueezeExcitation(gates[gate]()), seed, dtype)


def overlapping_pool_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """[N, 3, 13, 13] -> 4 scores: max-pools whose windows overlap and reach over the border."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.MaxPool2d(3, 1, ceil_mode=True),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 25, 4),
        ),
        seed,
        dtype,
    )


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for _ in range(2):  # the block, its ReLU and its weights are used twice
            y = self.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(y))
            y += x
            x = self.relu(y)
        return self.head(x.mean((2, 3)))


def residual_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """[N, 3, 8, 8] -> 4 scores: residual sums in place, batch-norm, one in-place ReLU module for all."""
    return calibrate(seeded(_Residual, seed), 8, dtype, seed=seed)


def smooth_net(activation: str = "GELU", seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """[N, 3, 8, 8] -> 4 scores, with any activation module of torch.nn by name: "GELU", "SiLU", "Hardswish", ..."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            getattr(nn, activation)(),
            nn.Conv2d(6, 6, 3, stride=2),
            getattr(nn, activation)(),
            nn.Flatten(),
            nn.Linear(6 * 9, 4),
        ),
        seed,
        dtype,
    )


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, 2)
        self.weight, self.value = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.embed(x))
        weights = self.weight(x).flatten(2).softmax(-1)
        return self.head((weights * self.value(x).flatten(2)).sum(-1))


def attention_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """[N, 3, 8, 8] -> 4 scores: positions weighted by a softmax, so a product of two activations."""
    return seeded(_Attention, seed, dtype)


def vector_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """[N, 7] -> 4 scores."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)), seed, dtype
    )


def sequence_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """[N, 3, 16] -> 4 scores."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.MaxPool1d(3, 2),
            nn.Conv1d(6, 6, 3),
            nn.ReLU(),
            nn.AdaptiveMaxPool1d(3),
            nn.Flatten(),
            nn.Linear(18, 4),
        ),
        seed,
        dtype,
    )


def volume_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """[N, 2, 6, 6, 6] -> 4 scores."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool3d(3, 2, 1),
            nn.Conv3d(4, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 8, 4),
        ),
        seed,
        dtype,
    )


# Every small net by name, with the shape of one input: for tests that hold for all models.
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (relu_net, (3, 8, 8)),
    "relu, pool": (lambda: relu_net(pool=True), (3, 8, 8)),
    "sigmoid gate": (squeeze_excitation_net, (3, 8, 8)),
    "hardsigmoid gate": (lambda: squeeze_excitation_net("hardsigmoid"), (3, 8, 8)),
    "overlapping pools": (overlapping_pool_net, (3, 13, 13)),
    "residual": (residual_net, (3, 8, 8)),
    "GELU": (smooth_net, (3, 8, 8)),
    "SiLU": (lambda: smooth_net("SiLU"), (3, 8, 8)),
    "attention": (attention_net, (3, 8, 8)),
    "vectors": (vector_net, (7,)),
    "sequences": (sequence_net, (3, 16)),
    "volumes": (volume_net, (2, 6, 6, 6)),
}

# ---------------------------------------------------------------------------------------------------- transformers


def _vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 12, 24, num_classes=4)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at 0
    nn.init.normal_(model.class_token)
    return model


def _swin(**options: object) -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 12, [2, 2], [2, 2], [4, 4], num_classes=4, **options)


def _swin_v2() -> nn.Module:
    swin = torchvision.models.swin_transformer
    return _swin(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)


def _maxvit() -> nn.Module:
    return torchvision.models.MaxVit((16, 16), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=4)


def _convnext() -> nn.Module:
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt(
        [setting(8, 16, 1), setting(16, None, 1)], stochastic_depth_prob=0.0, layer_scale=0.5, num_classes=4
    )


# Small versions of torchvision's transformers, and ConvNeXt; [N, 3, 16, 16] -> 4 scores.
TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: seeded(_vit),
    "swin": lambda: seeded(_swin),
    "swin_v2": lambda: seeded(_swin_v2),
    "maxvit": lambda: calibrate(seeded(_maxvit), 16),
    "convnext": lambda: seeded(_convnext),
}

# Options with which every method is quick on small images. Logits where a probability is the default: they can be
# compared with those that a target function picks.
FAST: dict[str, dict[str, object]] = (
    {"integrated_gradients": {"steps": 5}}
    | {name: {"n_samples": 4} for name in ("smoothgrad", "squared_smoothgrad", "vargrad")}
    | {name: {"iterations": 3} for name in ("learned", "learned_rank", "learned_clean")}
    | {"mask": {"iterations": 2, "step": 2, "score": "logit", "initial": "random"}}
    | {"smask": {"iterations": 2, "step": 4, "sigma": 6.0, "area_fractions": (0.1, 0.3), "levels": 3, "jitter": True}}
    | {"occlusion": {"window": 3, "stride": 3}}
    | {"rise": {"n_samples": 6, "grid": 3, "score": "logit"}}
    | {"lime": {"n_samples": 12, "segments": 2, "score": "logit"}}
    | {"kernel_shap": {"n_samples": 16, "segments": 3}}
)
