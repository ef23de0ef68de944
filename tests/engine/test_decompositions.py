"""Functions made of several operations: the same outputs and gradients, their parts as sites, complete DeepLIFT."""

import pytest
import torch
import torch.nn.functional as F
from nets import images, seeded
from torch import Tensor, nn

import attrbox
from attrbox.core.model_state import untouched
from attrbox.engine.tape import record
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.guided import GuidedBackprop
from attrbox.rules.lrp.activations import LRPEpsilon

X = images(3, 4, 6)


class Whole(nn.Module):
    """[N, 4, 6] -> linear -> a function -> sums of what it returns, weighted."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function = function
        self.before = nn.Linear(6, 8)
        self.inner = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        result = self.function(self.before(x), *self.inner)
        weights = torch.linspace(-1, 2, 2 * result[0].numel(), dtype=x.dtype).view(2, -1)
        return F.linear(result.flatten(1), weights)


class Masked(nn.Module):
    """Attention with masks of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)

    def forward(self, z):
        padding = torch.zeros(len(z), 4, dtype=torch.bool)
        padding[:, -1] = True
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        return self.attention(z, z, z, key_padding_mask=padding, attn_mask=mask)[0]


def attention(**options):
    return lambda z, m: m(z, z, z, **options)[0]


def heads(z: Tensor) -> Tensor:
    return z.unflatten(2, (2, 4)).transpose(1, 2)


def sdpa(**options):
    return lambda z: F.scaled_dot_product_attention(heads(z), heads(z.flip(1)), heads(z * 2), **options)


MASK = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
KEPT = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
# name -> (function, modules that it calls, kinds of its sites)
CASES = {
    "attention": (
        attention(need_weights=False),
        lambda: [nn.MultiheadAttention(8, 2, batch_first=True)],
        "matmul softmax",
    ),
    "attention with weights": (attention(), lambda: [nn.MultiheadAttention(8, 4, batch_first=True)], "matmul softmax"),
    "attention of other widths": (
        lambda z, m: m(z, z[..., :3], z[..., 3:5])[0],
        lambda: [nn.MultiheadAttention(8, 2, kdim=3, vdim=2, batch_first=True)],
        "matmul softmax",
    ),
    "attention, batch second": (
        lambda z, m: m(z.transpose(0, 1), z.transpose(0, 1), z.transpose(0, 1))[0].transpose(0, 1),
        lambda: [nn.MultiheadAttention(8, 2)],
        "matmul softmax",
    ),
    "attention, masked": (lambda z, m: m(z), lambda: [Masked()], "matmul softmax"),
    "sdpa": (sdpa(), list, "matmul softmax"),
    "sdpa, causal": (sdpa(is_causal=True), list, "matmul softmax"),
    "sdpa, masked": (sdpa(attn_mask=MASK, scale=0.3), list, "matmul softmax"),
    "sdpa, biased": (sdpa(attn_mask=images(4, 4, seed=3)), list, "matmul softmax"),
    "sdpa, grouped": (
        lambda z: F.scaled_dot_product_attention(heads(z), heads(z)[:, :1], heads(z)[:, 1:], enable_gqa=True),
        list,
        "matmul softmax",
    ),
    "encoder layer": (
        lambda z, m: m(z),
        lambda: [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")],
        "gelu matmul norm softmax",
    ),
    "normalize": (lambda z: F.normalize(z, dim=1), list, "hardtanh quotient vector_norm"),
    "cosine similarity": (
        lambda z: F.cosine_similarity(z, z.flip(1), dim=2),
        list,
        "hardtanh product quotient vector_norm",
    ),
    "local response norm": (lambda z: F.local_response_norm(z, 3, 0.5, 0.75, 1.0), list, "power product quotient"),
    "lp pool": (lambda z: F.lp_pool1d(z.square() + 1, 3, 2), list, "power"),
    "glu": (lambda z: F.glu(z, 1), list, "product sigmoid"),
    "nn.GLU": (lambda z, m: m(z), lambda: [nn.GLU()], "product sigmoid"),
    "swiglu": (lambda z: F.silu(z[..., :4]) * z[..., 4:], list, "product silu"),
    "softmin": (lambda z: F.softmin(z, 1), list, "softmax"),
    "softsign": (F.softsign, list, "abs quotient"),
    "tanhshrink": (F.tanhshrink, list, "tanh"),
    "var": (lambda z: z.var(1), list, "power"),
    "var, all axes but the batch": (lambda z: torch.var(z, (1, 2), correction=0, keepdim=True), list, "power"),
    "std": (lambda z: z.std(2, unbiased=False), list, "power"),
    # Windows of zeros, and lines of one value: the slope of the root is infinite there, and torch's gradient is 0.
    "lp pool at 0": (lambda z: F.lp_pool1d(z * KEPT, 2, 2), list, "power"),
    "lp pool at 0, third power": (lambda z: F.lp_pool1d(z.relu() * KEPT, 3.0, 2), list, "power relu"),
    "lp pool, largest": (lambda z: F.lp_pool1d(z.relu(), torch.inf, 2), list, "abs max_pool relu"),
    "lp pool, smallest": (lambda z: F.lp_pool1d(z, -torch.inf, 2), list, "abs max_pool"),
    "std at 0": (lambda z: (z * KEPT).unflatten(2, (4, 2)).std(3), list, "power"),
    "max-pool of [C, H, W]": (lambda z: F.max_pool2d(z, 2), list, "max_pool"),
    "max-pool of [C, L]": (lambda z: F.max_pool1d(z.flatten(1), 3, 2, 1), list, "max_pool"),
    "adaptive max-pool of [C, H, W]": (lambda z: F.adaptive_max_pool2d(z, 3), list, "max_pool"),
    "prod": (lambda z: z.prod(1), list, "product"),
    "prod, keepdim": (lambda z: torch.prod(z, 2, keepdim=True), list, "product"),
    "cumprod": (lambda z: z.cumprod(2), list, "product"),
    "LSTM cell": (
        lambda z, m: torch.cat(m(z[:, 1], m(z[:, 0])), 1),
        lambda: [nn.LSTMCell(8, 3)],
        "product sigmoid tanh",
    ),
    "GRU cell": (lambda z, m: m(z[:, 1], m(z[:, 0])), lambda: [nn.GRUCell(8, 3, bias=False)], "product sigmoid tanh"),
    "RNN cell": (lambda z, m: m(z[:, 1], m(z[:, 0])), lambda: [nn.RNNCell(8, 3)], "tanh"),
    "ReLU cell": (lambda z, m: m(z[:, 1], m(z[:, 0])), lambda: [nn.RNNCell(8, 3, nonlinearity="relu")], "relu"),
    "LSTM": (
        lambda z, m: torch.cat([m(z)[0].flatten(1), *(s.transpose(0, 1).flatten(1) for s in m(z)[1])], 1),
        lambda: [nn.LSTM(8, 3, 2, batch_first=True, bidirectional=True)],
        "product sigmoid tanh",
    ),
    "GRU": (lambda z, m: m(z.transpose(0, 1))[0].transpose(0, 1), lambda: [nn.GRU(8, 3)], "product sigmoid tanh"),
    "RNN": (lambda z, m: m(z)[1][0], lambda: [nn.RNN(8, 3, 2, batch_first=True, bias=False)], "tanh"),
    "ReLU RNN": (lambda z, m: m(z)[0], lambda: [nn.RNN(8, 3, nonlinearity="relu", batch_first=True)], "relu"),
}


def build(name: str) -> Whole:
    function, modules, _ = CASES[name]
    model = seeded(lambda: Whole(function, *modules()), seed=5)
    assert isinstance(model, Whole)
    return model


@pytest.mark.parametrize("rules", [[DeepLift(), LRPEpsilon()], [GuidedBackprop()]], ids=["deeplift", "guided"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_stay_and_nothing_is_unknown(name, rules):
    model = build(name)
    leaf = X.clone().requires_grad_()
    output = model(leaf)
    (gradient,) = torch.autograd.grad(output[:, 1].sum(), leaf)
    with untouched(model):
        tape = record(model, X, rules)
        torch.testing.assert_close(tape.output, output)
        torch.testing.assert_close(tape.replay(tape.output[:, 1], [tape.images])[0], gradient)
    assert not tape.unknown
    if isinstance(rules[0], DeepLift):
        assert {site.kind for site in tape.sites} == set(CASES[name][2].split())


@pytest.mark.parametrize("baseline", [0.0, images(4, 6, seed=8), images(3, 4, 6, seed=9)], ids=["0", "one", "each"])
@pytest.mark.parametrize("name", CASES)
def test_deeplift_is_complete(name, baseline):
    maps = attrbox.explain(build(name), X, "deeplift", target=1, baseline=baseline)
    assert maps.values.isfinite().all()
    assert (maps.gap.abs() / maps.values.abs().flatten(1).sum(1).clamp_min(1e-3)).max() < 1e-11


@pytest.mark.parametrize("method", ["deeplift", "lrp_epsilon", "guided_backprop"])
@pytest.mark.parametrize("name", CASES)
def test_a_map_does_not_depend_on_batch_mates(name, method):
    model = build(name)
    whole = attrbox.explain(model, X, method, target=1).values
    assert whole.isfinite().all()
    for row in range(len(X)):
        alone = attrbox.explain(model, X[row : row + 1], method, target=1).values
        torch.testing.assert_close(alone, whole[row : row + 1])


def test_one_reference_where_the_model_lays_batch_and_windows_together():
    # As Swin does: a shared reference cannot stand for the sites' batches, in whatever order windows are counted.
    def windows(first):
        def forward(z):
            z = z.unflatten(2, (2, 4)).transpose(1, 2)  # [N, 2 windows, 4, 4]
            z = z.flatten(0, 1) if first else z.transpose(0, 1).flatten(0, 1)
            z = F.layer_norm((z @ z.mT).softmax(-1), (4,))
            return z.unflatten(0, (-1, 2)) if first else z.unflatten(0, (2, -1)).transpose(0, 1)

        return forward

    for first in (True, False):
        model = seeded(lambda first=first: Whole(windows(first)))
        one = images(4, 6, seed=8)
        maps = attrbox.explain(model, X, "deeplift", target=1, baseline=one)
        assert maps.relative_gap.max() < 1e-11
        torch.testing.assert_close(
            maps.values, attrbox.explain(model, X, "deeplift", target=1, baseline=one.expand(3, 4, 6)).values
        )


def test_attention_halves_the_relevance_of_its_products_and_conserves_it():
    # AttnLRP: without biases, in a linear network behind and before, the relevance of softmax(q k) v halves at each
    # product: that of v is half of the output's.
    weights = images(1, 4, 4, seed=1).softmax(-1)

    class Fixed(nn.Module):
        def forward(self, x):
            return ((x[:, :, :4] * 0 + weights) @ x[:, :, 2:]).flatten(1)

    x = X
    values = attrbox.explain(Fixed().eval(), x, "lrp_epsilon", target=5).values
    score = Fixed()(x)[:, 5]
    torch.testing.assert_close(values.flatten(1).sum(1), score / 2)
