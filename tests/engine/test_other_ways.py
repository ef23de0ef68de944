"""Models that torch runs in other ways than they read: hooks on gradients, masked tokens, crops, complex numbers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import images, seeded
from torch import Tensor, nn

import attrbox

X = images(3, 3, 8, 8)


class Hooked(nn.Module):
    """A convolution and its batch-norm, with a hook on the gradient between them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        if how == "module":
            self.conv.register_full_backward_hook(lambda module, given, out: (3 * given[0],))
        elif how == "module, before":
            self.norm.register_full_backward_pre_hook(lambda module, out: (out[0] ** 3,))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "tensor" and x.requires_grad:
            x.register_hook(lambda gradient: gradient.clamp(min=0))
        elif self.how == "graph" and x.grad_fn is not None:
            x.register_hook(lambda gradient: gradient.abs())
        return self.head(self.norm(x).tanh().mean((2, 3)))


@pytest.mark.parametrize("beside", [[], ["epsilon_plus", "deeplift"]])
@pytest.mark.parametrize("how", ["tensor", "module", "module, before", "graph", "none"])
def test_hooks_on_gradients_are_heeded_by_every_method(how: str, beside: list[str]) -> None:
    model = seeded(lambda: Hooked(how))
    wanted = {}
    for name, shares in (("saliency", [1.0]), ("integrated_gradients", [0.125, 0.375, 0.625, 0.875])):
        total = torch.zeros_like(X)
        for share in shares:
            x = (share * X).requires_grad_()
            total += torch.autograd.grad(model(x)[:, 1].sum(), x)[0] / len(shares)
        wanted[name] = total.abs() if name == "saliency" else X * total
    methods = ["saliency", ("integrated_gradients", {"steps": 4, "quadrature": "midpoint"}), *beside]
    maps = attrbox.compare(model, X, methods, target=1, progress=False)
    for name, values in wanted.items():
        torch.testing.assert_close(maps[name].values, values)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.embed, self.head = nn.Linear(12, 8), nn.Linear(8, 5)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(F.unfold(x, 2, stride=2).mT)
        padding = (torch.arange(tokens.shape[1]) > 9).expand(len(x), -1)
        return self.head(self.encoder(tokens, src_key_padding_mask=padding).mean(1))


def test_scores_are_the_same_with_and_without_gradients() -> None:
    """torch's fast path of encoders, which runs without gradients only, gives masked tokens other values."""
    model = seeded(Encoder)
    wanted = model(X.clone().requires_grad_())[:, 1]
    before = torch.backends.mha.get_fastpath_enabled()
    for method in ("saliency", "deeplift", "occlusion", "integrated_gradients", "random"):
        options = {"window": 4, "stride": 4} if method == "occlusion" else {}
        found = attrbox.explain(model.requires_grad_(False), X, method, target=1, progress=False, **options)
        torch.testing.assert_close(found.score, wanted.detach())
    assert torch.backends.mha.get_fastpath_enabled() == before


class Masked(nn.Module):
    """Attention in which some tokens may look at nothing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head, self.kind = nn.Linear(12, 24), nn.Linear(8, 5), kind

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.embed(F.unfold(x, 2, stride=2).mT).chunk(3, -1)
        mask = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril(-1)  # nothing for the first
        if self.kind == "float":
            mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -torch.inf)
        return self.head(F.scaled_dot_product_attention(query, key, value, mask).mean(1))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("method", ["deeplift", "lrp_epsilon", "attn_lrp", "epsilon_plus", "deep_taylor"])
def test_rows_that_are_masked_out(kind: str, method: str) -> None:
    model = seeded(lambda: Masked(kind))
    maps = attrbox.explain(model, X, method, target=1, progress=False)
    assert maps.values.isfinite().all()
    torch.testing.assert_close(maps.score, model(X)[:, 1].detach())
    if method == "deeplift":
        torch.testing.assert_close(maps.values.sum((1, 2, 3)), (model(X) - model(0 * X))[:, 1].detach())


PADS: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda x: F.pad(x, (-1, -1, -2, -1)),
    "crop and pad": lambda x: F.pad(x, (1, -1, -2, 2)),
    "pad, then crop": lambda x: F.pad(F.pad(x, (2, 2, 2, 2)), (-1, -1, -1, -1)),
}


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad", "saliency", "deeplift"])
@pytest.mark.parametrize("name", PADS)
def test_pads_that_crop_before_the_first_convolution(name: str, method: str) -> None:
    torch.manual_seed(0)
    rest = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()

    class Padded(nn.Module):
        def __init__(self, shown: bool) -> None:
            super().__init__()
            self.rest, self.shown = rest, shown

        def forward(self, x: Tensor) -> Tensor:
            x = PADS[name](x if self.shown else 1 * x)  # of a product no first convolution is found
            return self.rest(x)

    found, wanted = (
        attrbox.explain(Padded(shown).eval(), X, method, target=1, progress=False).values for shown in (True, False)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "spelt", [torch.abs, Tensor.abs, torch.absolute, lambda z: z.real.square().add(z.imag.square()).sqrt()]
)
def test_magnitudes_of_complex_numbers(spelt: Callable[[Tensor], Tensor]) -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spelt(torch.fft.fft2(x)).mean((2, 3))

    maps = attrbox.explain(Spectrum().eval(), X, "deeplift", target=1, progress=False, strict=True)
    assert maps.relative_gap is not None
    assert maps.relative_gap.max() < 1e-9
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.fft.fft2(x).abs().mean((2, 3))[:, 1].sum(), x)
    torch.testing.assert_close(
        attrbox.explain(Spectrum().eval(), X, "saliency", target=1, progress=False).values, gradient.abs()
    )
