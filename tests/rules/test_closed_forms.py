"""Every method on functions whose maps can be derived by hand. Derivations stand next to the numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import attention_net, images, overlapping_pool_net, relu_net, residual_net, seeded, sequence_net, volume_net
from torch import Tensor, nn

import attrbox

QUADRATURES = ("gauss_legendre", "midpoint", "right", "trapezoid")
GRADIENT_FAMILY = (
    "saliency",
    "gradient_x_input",
    "guided_backprop",
    "deconvnet",
    "deeplift",
    "lrp_epsilon",
    "integrated_gradients",
    "smoothgrad",
    "squared_smoothgrad",
    "vargrad",
)


class Formula(nn.Module):
    """A function of a batch as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x):
        return self.function(x)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def values(function, x, method, target=0, **options):
    """The maps of one method for rows `x` of a scalar function [N, ...] -> [N] (or a module)."""
    model = function if isinstance(function, nn.Module) else Formula(function)
    return attrbox.explain(model, tensor(x), method, target=target, **options).values


def close(actual, expected, rtol=1e-9, atol=1e-12):
    expected = tensor(expected)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------ 1, 2. linear: w.x + b

W = tensor([4.0, 3.0, -2.0, 0.5])
X = tensor([[1.0, -1.0, 2.0, 3.0], [0.0, 5.0, -1.0, 2.0]])
START = tensor([0.5, 1.0, -2.0, 0.0])


def linear(x):
    return x @ W + 0.5


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("saliency", {}, W.abs().expand(2, 4)),
        ("saliency", {"absolute": False}, W.expand(2, 4)),
        ("gradient_x_input", {}, W * X),
        ("guided_backprop", {}, W.expand(2, 4)),  # nothing to guide
        ("deconvnet", {}, W.expand(2, 4)),
        ("deconvnet", {"times_input": True}, W * X),
        ("deeplift", {}, W * X),
        ("deeplift", {"baseline": START}, W * (X - START)),
        ("deeplift", {"baseline": X.flip(0)}, W * (X - X.flip(0))),
        ("lrp_epsilon", {}, W * X),  # no non-linearity follows: no stabiliser, the bias keeps its share
        ("smoothgrad", {}, W.expand(2, 4)),
        ("smoothgrad", {"times_input": True, "absolute": True}, (W * X).abs()),
        ("squared_smoothgrad", {}, (W**2).expand(2, 4)),
        ("vargrad", {}, torch.zeros(2, 4)),
    ],
)
def test_a_linear_function(method, options, expected):
    close(values(linear, X, method, **options), expected)


@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("baseline", [0.0, -1.5, START, X.flip(0)], ids=["0", "number", "shared", "per sample"])
def test_integrated_gradients_of_a_linear_function_are_exact_for_any_number_of_steps(quadrature, steps, baseline):
    # The weights of every quadrature sum to 1; captum's trapezoid sums to .98 at 50 steps.
    got = values(linear, X, "integrated_gradients", quadrature=quadrature, steps=steps, baseline=baseline)
    close(got, W * (X - baseline))


@pytest.mark.parametrize(
    "shape", [(7,), (2, 9), (3, 6, 5), (2, 3, 4, 3)], ids=["vector", "sequence", "image", "volume"]
)
def test_a_linear_function_of_any_rank(shape):
    weight, x = images(*shape, seed=1), images(3, *shape)

    def function(x):
        return (x * weight).flatten(1).sum(1)

    for method in ("gradient_x_input", "deeplift", "lrp_epsilon", "integrated_gradients"):
        close(values(function, x, method), weight * x)
    close(values(function, x, "smoothgrad"), weight.expand_as(x))


@pytest.mark.parametrize(
    ("quadrature", "expected"),
    # f = x1 x2, gradient at a (2, 3) is a (3, 2): IG_i = 6 sum_k w_k a_k. The right Riemann sum: 6 * 51/100.
    [("gauss_legendre", 3.0), ("midpoint", 3.0), ("trapezoid", 3.0), ("right", 3.06)],
)
def test_integrated_gradients_of_a_product(quadrature, expected):
    got = values(lambda x: x[:, 0] * x[:, 1], [[2.0, 3.0]], "integrated_gradients", quadrature=quadrature)
    close(got, [[expected, expected]])


@pytest.mark.parametrize(
    ("baseline", "expected"),
    # d(ab) = da (b + b0) / 2 + db (a + a0) / 2: (2 * 1.5, 3 * 1); from (1, 5): (1 * 4, -2 * 1.5), sum 6 - 5.
    [([0.0, 0.0], [3.0, 3.0]), ([1.0, 5.0], [4.0, -3.0])],
)
def test_deeplift_of_a_product(baseline, expected):
    got = values(lambda x: x[:, 0] * x[:, 1], [[2.0, 3.0]], "deeplift", baseline=tensor(baseline))
    close(got, [expected])


# ------------------------------------------------------------------------------------------------------ 3. saturation


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("saliency", {}, 0.0),
        ("gradient_x_input", {}, 0.0),
        ("guided_backprop", {}, 0.0),
        ("deconvnet", {}, 0.0),  # the signal into the ReLU is -1
        ("lrp_epsilon", {}, 0.0),
        ("deeplift", {}, 1.0),  # f(2) - f(0) = 1 - 0
        ("integrated_gradients", {}, 1.0),
        ("integrated_gradients", {"quadrature": "midpoint"}, 1.0),  # 25 of 50 nodes before the kink at 1/2
        ("integrated_gradients", {"quadrature": "right"}, 0.96),  # 24 of 50: the 25th is on the kink
    ],
)
def test_saturation(method, options, expected):
    close(values(lambda x: 1 - torch.relu(1 - x[:, 0]), [[2.0]], method, **options), [[expected]])


# ------------------------------------------------------------------------------------------------------ 4. the minimum


def minimum(x):
    return x[:, 0] - F.relu(x[:, 0] - x[:, 1])


@pytest.mark.parametrize("method", ["deeplift", "integrated_gradients", "gradient_x_input", "lrp_epsilon"])
def test_the_minimum_belongs_to_the_smaller_input(method):
    # The ReLU is on (3 - 1 = 2, reference 0) all along the path, so f = x2 there. RevealCancel would say (.5, .5).
    options = {"epsilon": 1e-13} if method == "lrp_epsilon" else {}
    close(values(minimum, [[3.0, 1.0]], method, **options), [[0.0, 1.0]], atol=1e-12)


def test_the_minimum_from_the_other_side():
    # From (0, 4) to (3, 1) the ReLU's input goes from -4 to 2, its output from 0 to 2: m = 1/3.
    # (3 - 0) (1 - 1/3) = 2 and (1 - 4) / 3 = -1: the sum is min(3, 1) - min(0, 4) = 1.
    close(values(minimum, [[3.0, 1.0]], "deeplift", baseline=tensor([0.0, 4.0])), [[2.0, -1.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_deeplift_of_a_difference_that_changes_by_rounding_only(dtype):
    # f = relu(x1 - x2 + 1), both inputs moved by c: the ReLU is on, its input the same up to a few units in the last
    # place. The slope must stay 1 for each of them: (c, -c).
    start, shift = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0), dtype=dtype).split([2, 1], 1)
    model = Formula(lambda x: F.relu(x[:, 0] - x[:, 1] + 1))
    got = attrbox.explain(model, start + shift, "deeplift", target=0, baseline=start).values
    torch.testing.assert_close(got, shift * torch.tensor([1.0, -1.0], dtype=dtype), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ 5. max-pool


def pooled(size, stride):
    return lambda x: F.max_pool1d(x, size, stride).sum((1, 2))


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ([0.0, 2.0], [1.0, 0.0]),  # 3 >= 2: the winner of the input gets 3 - 2
        ([0.0, 5.0], [0.0, -2.0]),  # 3 < 5: the winner of the reference gets 3 - 5
        ([0.0, 0.0], [3.0, 0.0]),
        ([3.0, 1.0], [0.0, 0.0]),  # nothing changed
    ],
)
def test_deeplift_at_a_max_pool(baseline, expected):
    close(values(pooled(2, 2), [[[3.0, 1.0]]], "deeplift", baseline=tensor([baseline])), [[expected]])


def test_deeplift_at_overlapping_windows_adds_up():
    close(values(pooled(2, 1), [[[1.0, 5.0, 2.0]]], "deeplift"), [[[0.0, 10.0, 0.0]]])  # both windows won by the 5


# ------------------------------------------------------------------------------------------------------ 6. softmax


def test_deeplift_at_a_softmax_where_one_input_changes():
    # p goes from 1/2 to 3/4, and only x1 has moved.
    got = values(lambda x: x.softmax(1)[:, 0], [[math.log(3), 0.0]], "deeplift")
    close(got, [[0.25, 0.0]])


def test_deeplift_at_a_softmax_where_both_inputs_change():
    # From (0, 0) to (ln 3, ln 2): p1 from 1/2 to 3/5, L = log sum exp from ln 2 to ln 5.
    # m = (3/5 - 1/2) / (ln 3/5 - ln 1/2); of dL, x1 gets the share of its growth in the sum: (3 - 1) / (5 - 2).
    change = math.log(5 / 2)
    slope = 0.1 / math.log(6 / 5)
    expected = [slope * (math.log(3) - change * 2 / 3), -slope * change / 3]
    assert sum(expected) == pytest.approx(0.1)
    close(values(lambda x: x.softmax(1)[:, 0], [[math.log(3), math.log(2)]], "deeplift"), [expected])


@pytest.mark.parametrize("baseline", [0.0, images(3, 4, seed=5)], ids=["shared", "per sample"])
def test_deeplift_at_a_softmax_is_the_same_alone_and_in_a_batch(baseline):
    # captum subtracts a mean over the whole batch there.
    x = images(3, 4, seed=4)
    together = values(lambda x: x.softmax(1), x, "deeplift", target=1, baseline=baseline)
    for i in range(3):
        own = baseline[i] if isinstance(baseline, Tensor) else baseline
        alone = values(lambda x: x.softmax(1), x[i : i + 1], "deeplift", target=1, baseline=own)
        close(alone[0], together[i], rtol=1e-12)


# ------------------------------------------------------------------------------------------------------ 7. ReLU rules


@pytest.mark.parametrize(
    ("x", "upstream", "method", "expected"),
    [
        ((1.0, -1.0), (2.0, 3.0), "saliency", (2.0, 0.0)),
        ((1.0, -1.0), (2.0, 3.0), "deconvnet", (2.0, 3.0)),
        ((1.0, -1.0), (2.0, 3.0), "guided_backprop", (2.0, 0.0)),
        ((1.0, 1.0), (-2.0, 3.0), "saliency", (-2.0, 3.0)),
        ((1.0, 1.0), (-2.0, 3.0), "deconvnet", (0.0, 3.0)),
        ((1.0, 1.0), (-2.0, 3.0), "guided_backprop", (0.0, 3.0)),
        # An input of exactly 0 is off, as in torch (and captum, zennit; TorchRay lets it pass).
        ((0.0, 1.0), (2.0, 3.0), "saliency", (0.0, 3.0)),
        ((0.0, 1.0), (2.0, 3.0), "guided_backprop", (0.0, 3.0)),
        ((0.0, 1.0), (2.0, 3.0), "deconvnet", (2.0, 3.0)),
    ],
)
def test_rules_at_a_relu(x, upstream, method, expected):
    options = {"absolute": False} if method == "saliency" else {}
    close(values(lambda x: (x.relu() * tensor(upstream)).sum(1), [x], method, **options), [expected])


# ------------------------------------------------------------------------------------------------------ 8. LRP-epsilon

# attrbox applies the stabiliser where a non-linearity follows, so one follows here: a hardtanh with bounds that are
# never met, f(z) = z. The score is scaled such that the relevance R of the layer's output is 1.


@pytest.mark.parametrize(
    ("weight", "bias", "epsilon", "expected"),
    [
        ((2.0, -1.0), 0.0, 1e-14, (2.0, -1.0)),  # LRP-0: x_i w_i / z R
        ((2.0, -1.0), 0.0, 0.25, (1.6, -0.8)),  # 2 / 1.25, -1 / 1.25
        ((-2.0, 1.0), 0.0, 0.25, (1.6, -0.8)),  # z = -1: the stabiliser takes its sign, -2 / -1.25
        ((2.0, -1.0), 1.0, 1e-14, (1.0, -0.5)),  # z = 2 includes the bias, which absorbs 1/2
        ((2.0, -1.0), 1.0, 0.5, (0.8, -0.4)),  # 2 / 2.5
    ],
)
def test_lrp_epsilon_of_one_layer(weight, bias, epsilon, expected):
    weight = tensor(weight)
    z = float(weight.sum()) + bias  # at x = (1, 1)
    got = values(lambda x: F.hardtanh(x @ weight + bias, -9.0, 9.0) / z, [[1.0, 1.0]], "lrp_epsilon", epsilon=epsilon)
    close(got, [expected])


def test_lrp_epsilon_of_one_layer_and_a_relu():
    # Behind a ReLU the same numbers, where z > 0; where z <= 0 there is no relevance.
    def function(x):
        return F.relu(x @ tensor([2.0, -1.0]))

    close(
        values(function, [[1.0, 1.0], [1.0, 3.0], [1.0, 2.0]], "lrp_epsilon", epsilon=0.25),
        [[1.6, -0.8], [0, 0], [0, 0]],
    )


def test_lrp_epsilon_of_zero_is_refused():
    with pytest.raises(attrbox.errors.OptionError, match="epsilon to be a number > 0"):
        values(linear, X, "lrp_epsilon", epsilon=0.0)


def test_lrp_epsilon_at_products_passes_each_relevance_once():
    # f = a b: half each. With a sigmoid's gate, all goes to the signal: relevance 3 sigmoid(2) at x1, none at x2.
    x = [[3.0, 2.0]]
    close(values(lambda x: x[:, 0] * x[:, 1], x, "lrp_epsilon"), [[3.0, 3.0]])
    gated = [[3 / (1 + math.exp(-2)), 0.0]]
    close(values(lambda x: x[:, 0] * x[:, 1].sigmoid(), x, "lrp_epsilon"), gated)
    close(values(lambda x: torch.sigmoid(x[:, 1]).mul(x[:, 0]), x, "lrp_epsilon"), gated)


# ------------------------------------------------------------------------------------------------------ 9. equivalences


def same_up_to_rounding(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (relu_net, (3, 8, 8)),
        (lambda: relu_net(pool=True), (3, 8, 8)),
        (overlapping_pool_net, (3, 13, 13)),
        (residual_net, (3, 8, 8)),
        (volume_net, (2, 6, 6, 6)),
        (sequence_net, (3, 16)),  # leaky ReLU: f(z) / z = f'(z) as well
    ],
    ids=["relu", "pool", "overlapping pools", "residual", "volume", "sequence"],
)
def test_lrp_with_a_vanishing_epsilon_is_gradient_x_input_on_piecewise_linear_nets(build, shape):
    model, x = build(), images(2, *shape)
    lrp = attrbox.explain(model, x, "lrp_epsilon", target=1, epsilon=1e-12).values
    same_up_to_rounding(lrp, attrbox.explain(model, x, "gradient_x_input", target=1).values)


def test_lrp_with_a_vanishing_epsilon_is_not_gradient_x_input_elsewhere():
    model, x = attention_net(), images(2, 3, 8, 8)
    lrp = attrbox.explain(model, x, "lrp_epsilon", target=1, epsilon=1e-12).values
    gradient = attrbox.explain(model, x, "gradient_x_input", target=1).values
    assert (lrp - gradient).abs().max() > 0.1 * gradient.abs().max()


@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
def test_without_biases_deeplift_lrp_and_integrated_gradients_agree_on_relu_nets(pool):
    # f(a x) = a f(x): gradient x input = score share along the whole ray, f(z) / z = f'(z) = slope from 0.
    model, x = relu_net(bias=False, pool=pool), images(2, 3, 8, 8)
    expected = attrbox.explain(model, x, "gradient_x_input", target=2)
    for method, options in (
        ("deeplift", {}),
        ("lrp_epsilon", {"epsilon": 1e-12}),
        ("integrated_gradients", {"quadrature": "midpoint"}),
        ("integrated_gradients", {}),
    ):
        got = attrbox.explain(model, x, method, target=2, **options)
        same_up_to_rounding(got.values, expected.values)
        assert got.relative_gap.max() < 1e-9
    close(expected.values.flatten(1).sum(1), expected.score)


def test_without_biases_deeplift_is_lrp_on_tanh_nets():
    # tanh(0) = 0: the slope from the reference 0 is tanh(z) / z.
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(180, 6, bias=False),
            nn.Tanh(),
            nn.Linear(6, 3, bias=False),
        )
    )
    x = images(2, 3, 8, 8)
    lrp = attrbox.explain(model, x, "lrp_epsilon", target=1, epsilon=1e-13).values
    same_up_to_rounding(lrp, attrbox.explain(model, x, "deeplift", target=1).values)


# ------------------------------------------------------------------------------------------------ 11. SmoothGrad family


def squares(x):
    return (x**2).flatten(1).sum(1)


def test_the_smoothgrad_family_on_a_sum_of_squares():
    # g = 2 (x + n), n ~ N(0, sd^2), sd = .5 * (1 - 0): E g = 2 x, E g^2 = 4 (x^2 + .25), Var g = 1.
    # Mean over 200 pixels of each value and 500 samples: 1e5 draws. Standard errors: 1 / sqrt(1e5) = .003 for the mean,
    # 4 sqrt(4 sd^2 x^2 + 2 sd^4) / sqrt(1e5) <= .014 for the square and for the variance. Tolerance: 4 of them.
    x = tensor([[1.0, 0.0]]).repeat(1, 200)
    result = attrbox.compare(
        Formula(squares),
        x,
        [(name, {"n_samples": 500, "noise_fraction": 0.5}) for name in ("smoothgrad", "squared_smoothgrad", "vargrad")],
        target=0,
    )
    means = {name: maps.values.view(200, 2).mean(0) for name, maps in result.items()}
    close(means["smoothgrad"], [2.0, 0.0], atol=0.013)
    close(means["squared_smoothgrad"], [5.0, 1.0], atol=0.055)
    close(means["vargrad"], [1.0, 1.0], atol=0.055)
    second = result["vargrad"].values + result["smoothgrad"].values ** 2
    close(result["squared_smoothgrad"].values, second)


def test_the_noise_scales_with_the_range_of_each_image():
    # Var g = 4 (noise * range)^2 v, v the sample variance of the same standard normal numbers in every case.
    x = tensor([[1.0, 0.0, 0.5], [10.0, 0.0, 5.0], [7.0, 7.0, 7.0]])
    first, second, constant = values(squares, x, "vargrad", noise_fraction=0.1, seed=[0, 0, 0])
    close(second, 100 * first, rtol=1e-8)
    close(constant, 0.0, atol=1e-20)
    close(values(squares, x, "vargrad", noise_fraction=0.3, seed=[0, 1, 2])[0], 9 * first, rtol=1e-8)
    close(values(squares, x, "smoothgrad")[2], 14.0)  # no range, no noise: the gradient


def test_vargrad_divides_by_the_number_of_samples():
    # One sample has no variance; of two, the variance is (g1 - g2)^2 / 4, the mean (g1 + g2) / 2 and g1 the one sample.
    x = tensor([[1.0, 0.0]])
    close(values(squares, x, "vargrad", n_samples=1), 0.0)
    g1 = values(squares, x, "smoothgrad", n_samples=1)
    g2 = 2 * values(squares, x, "smoothgrad", n_samples=2) - g1
    close(values(squares, x, "vargrad", n_samples=2), (g1 - g2) ** 2 / 4)
    close(values(squares, x, "squared_smoothgrad", n_samples=2), (g1**2 + g2**2) / 2)


def test_without_noise_smoothgrad_is_the_gradient():
    model, x = relu_net(), images(2, 3, 8, 8)
    gradient = attrbox.explain(model, x, "saliency", absolute=False, target=1).values
    close(attrbox.explain(model, x, "smoothgrad", noise_fraction=0.0, n_samples=3, target=1).values, gradient)
    close(
        attrbox.explain(model, x, "squared_smoothgrad", noise_fraction=0.0, n_samples=3, target=1).values, gradient**2
    )
    close(attrbox.explain(model, x, "vargrad", noise_fraction=0.0, n_samples=3, target=1).values, 0.0, atol=1e-25)


# ------------------------------------------------------------------------------------------------------ 12. Grad-CAM

PIXELS = tensor([[[[1.0, 2.0], [0.0, 3.0]]]])


class TwoMaps(nn.Module):
    """A = (x, 2 x) by a 1 x 1 convolution; the score weighs the two means."""

    def __init__(self, signs=(1.0, 1.0), behind=None):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False).double()
        self.conv.weight.data[:] = tensor([1.0, 2.0]).view(2, 1, 1, 1)
        self.behind = behind
        self.signs = tensor(signs)
        self.eval()

    def forward(self, x):
        features = self.conv(x)
        if self.behind is not None:
            features = self.behind(features)
        return (features.mean((2, 3)) * self.signs).sum(1)


@pytest.mark.parametrize("layer", [None, "conv"])
@pytest.mark.parametrize(
    ("signs", "relu", "expected"),
    [
        # w = 1/4 for both: (x + 2 x) / 4.
        ((1.0, 1.0), True, 0.75 * PIXELS),
        # w = (1/4, -1/4): (x - 2 x) / 4 <= 0.
        ((1.0, -1.0), True, 0 * PIXELS),
        ((1.0, -1.0), False, -0.25 * PIXELS),
    ],
)
def test_grad_cam_by_hand(layer, signs, relu, expected):
    close(values(TwoMaps(signs), PIXELS, "grad_cam", layer=layer, relu=relu), expected)


def test_grad_cam_upsamples():
    # The map on a 1 x 2 grid is .5 * 3 * (1, 2), as w = 1/2 there. Bilinear, pixel centres: quarters between the two.
    class Halved(TwoMaps):
        def forward(self, x):
            return super().forward(F.avg_pool2d(x, (1, 2)))

    x = tensor([[[[1.0, 1.0, 2.0, 2.0]]]])
    close(values(Halved(), x, "grad_cam"), [[[[1.5, 1.875, 2.625, 3.0]]]])
    close(values(Halved(), x, "grad_cam", interpolation="nearest"), [[[[1.5, 1.5, 3.0, 3.0]]]])


def test_grad_cam_of_a_layer_that_an_in_place_relu_writes_over():
    # x < 0 at one pixel: the ReLU cuts it. At "conv": A = (x, 2 x) before the ReLU, g = 1/4 where A > 0, so
    # w = 3/16 for both maps and the sum 9/16 x, negative pixel dropped. Behind the ReLU: w = 1/4, 3/4 relu(x).
    x = tensor([[[[1.0, 2.0], [-1.0, 3.0]]]])
    for behind in (nn.ReLU(inplace=True), nn.ReLU(), torch.relu_):
        model = TwoMaps(behind=behind)
        close(values(model, x, "grad_cam", layer="conv"), 9 / 16 * x.relu())
        close(values(model, x, "grad_cam", layer="conv", relu=False), 9 / 16 * x)
        close(values(model, x, "grad_cam"), 0.75 * x.relu())


# ------------------------------------------------------------------------------------------------ 26. Guided Grad-CAM


def test_guided_grad_cam_by_hand():
    # Score: mean(relu(A1)) + mean(relu(A2)), A = (x, 2 x). Guided: (1 + 2) / 4 where x > 0. CAM behind the ReLU:
    # 3/4 relu(x). Product 9/16 relu(x).
    x = tensor([[[[1.0, 2.0], [-1.0, 3.0]]]])
    close(values(TwoMaps(behind=nn.ReLU()), x, "guided_grad_cam"), 9 / 16 * x.relu())


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_guided_grad_cam_is_the_product_of_its_parts(interpolation):
    model, x = relu_net(), images(3, 3, 8, 8)
    options = {"layer": "2", "interpolation": interpolation}
    guided = attrbox.explain(model, x, "guided_backprop", target=1).values
    cam = attrbox.explain(model, x, "grad_cam", target=1, **options).values
    product = attrbox.explain(model, x, "guided_grad_cam", target=1, **options).values
    close(product, guided * cam)
    assert (cam == 0).any(), "choose another seed: the ReLU of the map is not tested"
    assert (cam > 0).any()
    assert product.shape == x.shape


# ------------------------------------------------------------------------------------------------ 27. nothing is left


@pytest.mark.parametrize("before", GRADIENT_FAMILY)
def test_a_method_leaves_nothing_behind_for_the_next(before):
    # A leaf that feeds a ReLU directly: after captum's guided backprop its plain gradient is (2, 3), not (2, 0).
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 1, bias=False)).double().eval()
    model[1].weight.data[:] = tensor([[2.0, 3.0]])
    x = tensor([[1.0, -1.0]]).requires_grad_()
    attrbox.explain(model, x, before, target=0)
    assert x.grad is None
    assert x.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    close(gradient, [[2.0, 0.0]])
    for method in GRADIENT_FAMILY:
        fresh = attrbox.explain(model, x.detach().clone(), method, target=0).values
        assert torch.equal(attrbox.explain(model, x, method, target=0).values, fresh)


# ------------------------------------------------------------------------------------------------ DeepExplain's net


class DeepExplainNet(nn.Module):
    """f = relu(relu(x1 - 1) - relu(x2))."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.reused = nn.ReLU(inplace=True)

    def relu(self, x, index):
        match self.spelling:
            case "modules":
                return self.relus[index](x)
            case "reused":
                return self.reused(x)
            case "in place":
                return F.relu(x, inplace=True)
            case "method":
                return x.relu()
            case _:
                return x.clamp(min=0)

    def forward(self, x):
        first = self.relu(x[:, 0] - 1, 0)
        second = self.relu(x[:, 1] + 0, 1)
        return self.relu(first - second, 2)


POINTS = tensor([[3.0, 1.0], [-10.0, -5.0], [3.0, -1.0], [5.0, 2.0], [2.0, 3.0], [1.0, 0.0]])
DEEP_EXPLAIN = {
    # On where both outer and first ReLU are: gradient (1, -1[x2 > 0]).
    ("gradient_x_input", ()): [[3, -1], [0, 0], [3, 0], [5, -2], [0, 0], [0, 0]],
    ("lrp_epsilon", (("epsilon", 1e-13),)): [[3, -1], [0, 0], [3, 0], [5, -2], [0, 0], [0, 0]],
    # From 0: the first ReLU's slope is (x1 - 1) / x1, as its input starts at -1; the others' are 1 or 0.
    ("deeplift", ()): [[2, -1], [0, 0], [2, 0], [4, -2], [0, 0], [0, 0]],
    # From (0, 3): the last ReLU's input starts at -3. At (3, 1): slopes 2/3, 1, 1/4: 3 * 2/3 / 4 and (-2) (-1) / 4.
    # At (3, -1): slopes 2/3, 3/4 (from 3 to 0 over -4), 2/5: 3 * 2/3 * 2/5 and 4 * 3/4 * 2/5.
    # At (5, 2): 4/5, 1, 2/5: 5 * 4/5 * 2/5 and 1 * 2/5. Where f = 0 = f(0, 3), nothing.
    ("deeplift", (("baseline", tensor([0.0, 3.0])),)): [[0.5, 0.5], [0, 0], [0.8, 1.2], [1.6, 0.4], [0, 0], [0, 0]],
    # Along a x: on for a > 1 / (x1 - max(x2, 0)), so for a half, for 2/3 at the others. Midpoints with 54 steps meet
    # neither kink.
    ("integrated_gradients", (("quadrature", "midpoint"), ("steps", 54))): [
        [1.5, -0.5],
        [0, 0],
        [2, 0],
        [10 / 3, -4 / 3],
        [0, 0],
        [0, 0],
    ],
    # The signal into the second ReLU is -1 or 0, so x2 gets nothing.
    ("guided_backprop", ()): [[1, 0], [0, 0], [1, 0], [1, 0], [0, 0], [0, 0]],
    # The deconvnet ignores what was on.
    ("deconvnet", ()): [[1, 0]] * 6,
}


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("spelling", ["modules", "reused", "in place", "method", "clamp"])
@pytest.mark.parametrize(("method", "options"), DEEP_EXPLAIN, ids=lambda part: part if isinstance(part, str) else "")
def test_the_net_of_deep_explain(method, options, spelling, batch_size):
    model = DeepExplainNet(spelling).eval()
    got = values(model, POINTS, method, batch_size=batch_size, **dict(options))
    close(got, DEEP_EXPLAIN[method, options], atol=1e-11)


@pytest.mark.parametrize("method", ["deeplift", "integrated_gradients"])
def test_the_net_of_deep_explain_from_where_it_is_on(method):
    # From (1, 0) to (3, 1) the gradient is (1, -1) all along: (2, -1).
    got = values(DeepExplainNet("method").eval(), [[3.0, 1.0]], method, baseline=tensor([1.0, 0.0]))
    close(got, [[2.0, -1.0]])


# ------------------------------------------------------------------------------------------------ targets, random


@pytest.mark.parametrize("method", [*GRADIENT_FAMILY, "grad_cam", "guided_grad_cam"])
def test_a_class_is_the_same_as_a_weighted_sum_that_picks_it(method):
    model, x = relu_net(), images(2, 3, 8, 8)
    picked = attrbox.explain(model, x, method, target=lambda out: (out * tensor([0.0, 0.0, 1.0, 0.0])).sum(1))
    same_up_to_rounding(picked.values, attrbox.explain(model, x, method, target=2).values, 1e-12)


@pytest.mark.parametrize("method", ["gradient_x_input", "deeplift", "integrated_gradients"])
def test_linear_methods_add_up_over_targets(method):
    # The gradient, DeepLIFT and IG are linear in the score: the map of 2 a - b is 2 map(a) - map(b).
    model, x = relu_net(), images(2, 3, 8, 8)
    a, b = (attrbox.explain(model, x, method, target=k).values for k in (0, 3))
    both = attrbox.explain(model, x, method, target=lambda out: 2 * out[:, 0] - out[:, 3]).values
    same_up_to_rounding(both, 2 * a - b, 1e-12)


def test_random_maps_are_standard_normal_and_seeded():
    x = images(2, 3, 50, 50)
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(7500, 2)))
    maps = values(model, x, "random", seed=[1, 2])
    # 7500 numbers: standard errors .0115 of the mean, .0082 of the deviation; tolerance 4 of them.
    for one in maps:
        assert abs(float(one.mean())) < 0.046
        assert abs(float(one.std()) - 1) < 0.033
    assert abs(float((maps[0] * maps[1]).mean())) < 0.046, "the seeds 1 and 2 give correlated maps"
    assert torch.equal(values(model, x, "random", seed=[1, 2], batch_size=1), maps)
    assert torch.equal(values(model, x[1:], "random", seed=[2])[0], maps[1])
    assert not torch.equal(values(model, x, "random", seed=3)[0], maps[0])
