"""A linear layer gets the same map however its product with the weight is written."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrbox

METHODS = (
    "deep_taylor",
    "excitation_backprop",
    "epsilon_plus",
    "epsilon_alpha2_beta1",
    "epsilon_gamma_box",
    "attn_lrp",
)
Product = Callable[[Tensor, Tensor], Tensor]  # of features [N, inputs] and a weight [outputs, inputs]


def rows(weight: Tensor, count: int) -> Tensor:
    return weight[None].expand(count, -1, -1)


SPELLINGS: dict[str, Product] = {
    "operator": lambda z, w: z @ w.T,
    "operator, from the left": lambda z, w: (w @ z.T).T,
    "operator, columns": lambda z, w: (w @ z[:, :, None])[..., 0],
    "reflected operator": lambda z, w: w.T.__rmatmul__(z),
    "mm": lambda z, w: z.mm(w.T),
    "mm by keyword": lambda z, w: torch.mm(z, mat2=w.T),
    "linalg": lambda z, w: torch.linalg.matmul(z, w.T),
    "a row at a time": lambda z, w: torch.stack([w @ row for row in z]),
    "mv": lambda z, w: torch.stack([torch.mv(w, row) for row in z]),
    "addmv": lambda z, w: torch.stack([torch.addmv(torch.zeros(len(w)).to(z), w, row) for row in z]),
    "bmm": lambda z, w: torch.bmm(z[:, None], rows(w.T, len(z)))[:, 0],
    "bmm, from the left": lambda z, w: torch.bmm(rows(w, len(z)), z[:, :, None])[..., 0],
    "baddbmm": lambda z, w: torch.baddbmm(torch.zeros(1, 1, len(w)).to(z), z[:, None], rows(w.T, len(z)))[:, 0],
    "einsum": lambda z, w: torch.einsum("nc,kc->nk", z, w),
    "einsum, implicit": lambda z, w: torch.einsum("ac,ck", z, w.T),
    "einsum, the weight first": lambda z, w: torch.einsum("kc,nc->kn", w, z).T,
    "einsum, ellipsis": lambda z, w: torch.einsum("...c,kc->...k", z, w),
    "einsum, a list": lambda z, w: torch.einsum("nc,kc->nk", [z, w]),
    "einsum, two axes": lambda z, w: torch.einsum("nab,kab->nk", z.unflatten(1, (2, -1)), w.unflatten(1, (2, -1))),
    "tensordot": lambda z, w: torch.tensordot(z, w, dims=([1], [1])),
    "tensordot, a number": lambda z, w: torch.tensordot(z, w.T, 1),
    "tensordot, the weight first": lambda z, w: torch.tensordot(w, z, dims=([1], [1])).T,
    "tensordot, two axes": lambda z, w: torch.tensordot(z.unflatten(1, (2, -1)), w.T.unflatten(0, (2, -1))),
}


class Classifier(nn.Module):
    """A convolution, a linear layer without a bias written in some way, and a head."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product
        self.features, self.middle, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 6, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.relu(self.features(x)).mean((2, 3))
        return self.head(F.relu(self.product(pooled, self.middle.weight)))


def explained(product: Product, images: Tensor, method: str, **options: object) -> attrbox.Attribution:
    torch.manual_seed(3)
    model = Classifier(product).to(images.dtype).eval()
    return attrbox.explain(model, images, method, target=1, progress=False, **options)


@pytest.mark.parametrize("method", [*METHODS, "learned", "learned_rank"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_maps_do_not_depend_on_how_a_linear_layer_is_written(spelling: str, method: str) -> None:
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"iterations": 2} if method.startswith("learned") else {}
    expected = explained(F.linear, images, method, **options)
    found = explained(SPELLINGS[spelling], images, method, **options)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_positions_keep_their_axes(method: str) -> None:
    """A product on every position of a map: the channels may lie in the middle."""

    class Mixed(nn.Module):
        def __init__(self, product: Product) -> None:
            super().__init__()
            self.product = product
            self.features, self.middle = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.product(F.relu(self.features(x)), self.middle.weight[:, :, 0, 0])).mean((2, 3))

    images = torch.rand(2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps = []
    for product in (
        lambda z, w: F.linear(z.movedim(1, -1), w).movedim(-1, 1),
        lambda z, w: torch.einsum("nchw,kc->nkhw", z, w),
        lambda z, w: (w @ z.flatten(2)).unflatten(2, z.shape[2:]),
        lambda z, w: torch.tensordot(z, w, dims=([1], [1])).movedim(-1, 1),
    ):
        torch.manual_seed(4)
        maps.append(attrbox.explain(Mixed(product).double().eval(), images, method, target=1, progress=False).values)
    for values in maps[1:]:
        torch.testing.assert_close(values, maps[0], rtol=1e-6, atol=1e-9)


MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).double()[:, None, None], torch.tensor([0.2, 0.3, 0.4]).double()[:, None, None]
NORMALIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "operators": lambda x: (x - MEAN) / STD,
    "in place": lambda x: x.sub_(MEAN).div_(STD),
    "product": lambda x: x * (1 / STD) + -MEAN / STD,
    "negated": lambda x: -(MEAN - x) / STD,
    "flipped": lambda x: (x.flip(1) - MEAN) / STD,
    "picked": lambda x: (x[:, [2, 0, 1]] - MEAN) / STD,
}


@pytest.mark.parametrize("method", ["deep_taylor", "epsilon_gamma_box"])
@pytest.mark.parametrize("name", NORMALIZED)
def test_a_normalization_inside_of_the_model(name: str, method: str) -> None:
    """The map of normalized pixels, at their places."""

    class Normalizing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(NORMALIZED[name](x))

    torch.manual_seed(3)
    inner = Classifier(F.linear).double().eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[0, :, :2] = MEAN  # which the first layer gets as zeros
    normalized = NORMALIZED[name](x.clone())
    wanted = attrbox.explain(inner, normalized, method, target=1, progress=False).values
    back = {"flipped": [2, 1, 0], "picked": [1, 2, 0]}.get(name, [0, 1, 2])
    for audit in (False, True):
        found = attrbox.explain(Normalizing(inner).eval(), x, method, target=1, audit=audit, progress=False)
        torch.testing.assert_close(found.values, wanted[:, back])
