"""Maps of DeepLIFT sum to the difference of scores."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from nets import SMALL, images, seeded
from rule_cases import ALL, CASES, ELEMENTWISE, replayed, sandwich
from torch import Tensor, nn

import attrbox
from attrbox.core.model_state import untouched
from attrbox.engine.tape import record
from attrbox.errors import UnsupportedModelError
from attrbox.rules.deeplift import DeepLift


def assert_complete(model: nn.Module, x: Tensor, x0: Tensor, tolerance: float = 1e-9) -> Tensor:
    """Assert that DeepLIFT sums to the differences of all outputs, up to rounding of what is summed; return it."""
    with untouched(model):
        seed = images(len(x), model(x).shape[1], seed=7, dtype=x.dtype)
        attributions = (x - x0) * replayed(model, x, seed, DeepLift(), x0)
        assert attributions.isfinite().all()
        got = attributions.flatten(1).sum(1)
        terms = torch.cat([model(x) * seed, model(x0) * seed, attributions.flatten(1)], 1)
        expected = (model(x) * seed).sum(1) - (model(x0) * seed).sum(1)
        gap = (got - expected).abs() / terms.abs().sum(1)
    assert gap.max() < tolerance
    return attributions


@pytest.mark.parametrize("per_sample", [False, True], ids=["one reference", "per sample"])
@pytest.mark.parametrize("name", CASES)
def test_deeplift_is_complete_at_every_operation(name, per_sample):
    case = CASES[name]
    model = sandwich(case.operation, case.shape, case.conv)
    assert_complete(model, 2 * images(4, 5, seed=41), 2 * images(4 if per_sample else 1, 5, seed=42), 1e-13)


@pytest.mark.parametrize("baseline", ["zeros", "shared", "per sample"])
@pytest.mark.parametrize("name", SMALL)
def test_deeplift_is_complete_on_small_nets_and_says_so(name, baseline):
    build, shape = SMALL[name]
    x0 = {"zeros": 0.0, "shared": images(*shape, seed=1), "per sample": images(3, *shape, seed=2)}[baseline]
    model, x = build(), images(3, *shape)
    maps = attrbox.explain(model, x, "deeplift", target=1, baseline=x0)
    start = model(torch.as_tensor(x0, dtype=x.dtype).expand_as(x))
    expected = (model(x) - start)[:, 1].detach()
    torch.testing.assert_close(maps.gap, maps.values.flatten(1).sum(1) - expected, rtol=0, atol=1e-12)
    assert maps.gap.abs().max() < 1e-12 * maps.values.abs().flatten(1).sum(1).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("change", [1e-12, 1e-7, 200.0, 1000.0])
@pytest.mark.parametrize("name", CASES)
def test_deeplift_is_finite_and_complete_for_tiny_and_huge_changes(name, change, dtype):
    case = CASES[name]
    if change > 1 and not case.everywhere:
        pytest.skip("not defined there")

    class Bare(nn.Module):
        def forward(self, z):
            return case.operation(z.view(-1, *case.shape) + 0).flatten(1)

    size = torch.Size(case.shape).numel()
    centre = images(2, size, seed=51, dtype=dtype)
    step = change / 2 * images(2, size, seed=52).sign().to(dtype)
    tolerance = 1e-9 if dtype is torch.float64 else 1e-3
    assert_complete(Bare().eval(), centre + step, centre - step, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("size", [50.0, 200.0, 5000.0])
def test_deeplift_at_a_softmax_with_extreme_logits(size, dim, dtype):
    class Softmax(nn.Module):
        def forward(self, x):
            return x.softmax(dim).flatten(1)

    x = size * torch.tensor([[[1, -1, 0.5, 0], [-1, 1, 1, -0.5]], [[0, 0, 0, 0], [1, 1, -1, -1]]], dtype=dtype)
    x0 = size * torch.tensor([[[-1, 1, 0.5, 0], [1, -1, -1, 1]], [[1, -1, 0, 0], [0, 0, 0, 0]]], dtype=dtype)
    for one, other in ((x, x0), (x0, x), (x, 0 * x), (0 * x, x), (x, x)):
        assert_complete(Softmax().eval(), one, other, 10 * size * torch.finfo(dtype).eps)  # rounding of the logits


@pytest.mark.parametrize("change", [0.0, 1e-15, 1e-10, 1e-8, 1e-7])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_deeplift_is_the_derivative_where_next_to_nothing_changed(name, change):
    # A quotient of rounded differences would be off by up to 1e-16 / change: noise for the smaller ones.
    case = CASES[name]
    model = sandwich(case.operation, case.shape, case.conv)
    x, seed = images(3, 5, seed=61), images(3, 3, seed=62)
    got = replayed(model, x, seed, DeepLift(), x - change)
    torch.testing.assert_close(got, replayed(model, x, seed, None), rtol=1e-6, atol=1e-6)


def test_deeplift_of_pools_where_nothing_changed_is_finite():
    for name, case in CASES.items():
        if case.kind == "max_pool":
            model, x = sandwich(case.operation, case.shape), images(3, 5, seed=61)
            got = replayed(model, x, images(3, 3, seed=62), DeepLift(), x)
            assert got.isfinite().all(), name


class Fractional(nn.Module):
    """Pools with windows drawn at each pass, or drawn once: one row for all images, or rows that differ."""

    def __init__(self, draws: str) -> None:
        super().__init__()
        self.inside, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 25, 3)
        rows = 1 if draws == "shared" else 3
        samples = torch.rand(rows, 4, 2, generator=torch.Generator().manual_seed(0))
        self.register_buffer("samples", None if draws == "anew" else samples)

    def forward(self, x: Tensor) -> Tensor:
        rows = None if self.samples is None else self.samples.expand(max(len(x), len(self.samples)), -1, -1)[: len(x)]
        pooled = F.fractional_max_pool2d(self.inside(x), 2, output_size=5, _random_samples=rows)
        return self.head(pooled.relu().flatten(1))


@pytest.mark.parametrize("draws", ["shared", "differ"])
def test_fractional_max_pools_have_the_windows_of_the_images_in_the_reference(draws):
    model, x = seeded(lambda: Fractional(draws)), images(3, 3, 8, 8)
    for baseline in (0.0, images(3, 8, 8, seed=4), images(3, 3, 8, 8, seed=5)):
        maps = attrbox.explain(model, x, "deeplift", target=1, baseline=baseline, batch_size=3)
        assert maps.relative_gap.max() < 1e-9
        start = torch.as_tensor(baseline, dtype=x.dtype).expand_as(x)
        each = attrbox.explain(model, x, "deeplift", target=1, baseline=start.clone(), batch_size=3)
        torch.testing.assert_close(maps.values, each.values)
        torch.testing.assert_close(maps.values.flatten(1).sum(1), (model(x) - model(start))[:, 1].detach())
    assert [site.operation for site in maps.coverage.rule] == ["max_pool", "relu"]
    assert maps.coverage.complete
    expected = attrbox.explain(model, x, "gradient_x_input", target=1, batch_size=3).values
    lrp = attrbox.explain(model, x, "lrp_epsilon", epsilon=1e-12, target=1, batch_size=3).values
    torch.testing.assert_close(lrp, expected)


def test_fractional_max_pools_that_draw_their_windows_anew_are_refused():
    model, x = seeded(lambda: Fractional("anew")), images(2, 3, 8, 8)
    for method in ("deeplift", "lrp_epsilon", "guided_backprop"):
        with pytest.raises(UnsupportedModelError, match="draws its windows anew"):
            attrbox.explain(model, x, method)
    assert attrbox.explain(model, x, "saliency").values.isfinite().all()


@pytest.mark.parametrize("pool", [name for name, case in CASES.items() if case.kind == "max_pool"])
def test_deeplift_at_max_pools_with_ties(pool):
    # Constant references and integer inputs tie all the time.
    case = CASES[pool]

    class Bare(nn.Module):
        def forward(self, z):
            return case.operation(z).flatten(1)

    x = images(4, *case.shape, seed=71).mul(1.5).round()
    for x0 in (torch.zeros_like(x[:1]), torch.ones_like(x[:1]), x.flip(0), x + 1):
        assert_complete(Bare().eval(), x, x0, 1e-13)


_LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_": torch.relu_,
    "gelu": F.gelu,
    "silu in place": lambda z: F.silu(z, inplace=True),
    "hardswish": F.hardswish,
    "elu": F.elu,
    "softplus": F.softplus,
    "tanh_": torch.tanh_,
    "hardtanh": F.hardtanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(1) * 3,
    "pool": lambda z: F.max_pool1d(z[:, None], 3, 1, 1)[:, 0],
    "adaptive pool": lambda z: F.adaptive_max_pool1d(z[:, None], 8)[:, 0],
    "square": lambda z: z * z / 3,
    "gate": lambda z: z * torch.sigmoid(z.flip(1)),
    "gate in place": lambda z: (z + 0).mul_(z.mean(1, keepdim=True).sigmoid()),
    "residual": lambda z: F.relu(z - 0.3) + z,
    "residual in place": lambda z: F.leaky_relu(z, 0.1).add_(z),
    "concatenation": lambda z: torch.cat([z[:, :4].relu(), z[:, 4:].tanh()], 1),
}


class Chain(nn.Module):
    """[N, 8] -> any of `_LAYERS` with linear layers between them -> [N, 3]."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.linear = nn.ModuleList(nn.Linear(8, 8) for _ in names)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for name, linear in zip(self.names, self.linear, strict=True):
            x = _LAYERS[name](linear(x))
        return self.head(x)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(sorted(_LAYERS)), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    per_sample=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_deeplift_is_complete_on_random_nets(names, seed, per_sample, scale):
    model = seeded(lambda: Chain(names), seed)
    x = scale * images(3, 8, seed=seed)
    assert_complete(model, x, scale * images(3 if per_sample else 1, 8, seed=seed + 1), 1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(names=st.lists(st.sampled_from(sorted(_LAYERS)), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_random_nets_keep_outputs_and_gradients(names, seed):
    model = seeded(lambda: Chain(names), seed).requires_grad_(False)
    x = images(3, 8, seed=seed)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    (gradient,) = torch.autograd.grad(output[:, 0].sum(), leaf)
    tape = record(model, x, ALL)
    assert torch.equal(tape.output, output)
    assert torch.equal(tape.replay(tape.output[:, 0], [tape.images])[0], gradient)


@pytest.mark.parametrize("method", ["deeplift", "lrp_epsilon", "guided_backprop", "excitation_backprop"])
def test_a_pool_takes_the_batch_for_channels(method):
    """Of [n, h, w] torch pools each image as a channel of one."""

    class Pooled(nn.Module):
        def __init__(self, alone: bool) -> None:
            super().__init__()
            self.alone, self.head = alone, nn.Linear(2, 2)

        def forward(self, x):
            x = (2 * x).relu()
            x = F.max_pool2d(x, 2) if self.alone else F.max_pool2d(x[:, None], 2)[:, 0]
            return self.head(x.mean(1))

    x = images(3, 6, 5)
    found, wanted = (
        attrbox.explain(seeded(lambda a=a: Pooled(a)), x, method, target=1, progress=False) for a in (True, False)
    )
    torch.testing.assert_close(found.values, wanted.values)
    assert not found.coverage.unknown
