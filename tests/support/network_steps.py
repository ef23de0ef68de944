"""The steps of random networks on one activation: layers, activations, functions, pools."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from random_networks import Writer

STEPS: dict[str, Callable[..., None]] = {}


def step(name: str) -> Callable[[Any], Any]:
    def enter(write: Callable[..., None]) -> Callable[..., None]:
        STEPS[name] = write
        return write

    return enter


# ---------------------------------------------------------------------------------------------------------- layers


def convolution(w: Writer, out: int = 4, kernel: int = 3, groups: str = "", bias: bool = True, **options: Any) -> None:
    w.need(1 <= w.spatial <= 3)
    count = {"": 1, "two": 2, "each": w.channels}[groups]
    out = 2 * w.channels if groups == "each" else out
    w.need(w.channels % count == 0 and out % count == 0)
    options = {"padding": kernel // 2, **options, "groups": count} if count > 1 else {"padding": kernel // 2, **options}
    written = "".join(f", {name}={value!r}" for name, value in options.items())
    call = f"F.conv{w.spatial}d({{x}}, {{m}}.weight, {{m}}.bias{written})"
    module = f"nn.Conv{w.spatial}d({w.channels}, {out}, {kernel}{written}{'' if bias else ', bias=False'})"
    w.module(module, *([] if "padding_mode" in options else [call]), saved=False)


STEPS |= {
    "conv": convolution,
    "conv 1x1": partial(convolution, kernel=1),
    "conv wide, no bias": partial(convolution, out=6, bias=False),
    "conv strided": partial(convolution, stride=2),
    "conv depthwise": partial(convolution, groups="each"),
    "conv grouped": partial(convolution, groups="two", kernel=2, padding=0),
    "conv dilated": partial(convolution, dilation=2, padding="same"),
    "conv circular": partial(convolution, padding_mode="circular"),
}


def transposed(w: Writer, stride: int = 2, groups: int = 1) -> None:
    w.need(1 <= w.spatial <= 3 and w.channels % groups == 0)
    rest = f", stride={stride}, padding=1, groups={groups}"
    w.module(
        f"nn.ConvTranspose{w.spatial}d({w.channels}, 4, 3{rest})",
        f"F.conv_transpose{w.spatial}d({{x}}, {{m}}.weight, {{m}}.bias{rest})",
        saved=False,
    )


STEPS |= {"conv transposed": transposed, "conv transposed, grouped": partial(transposed, stride=1, groups=2)}


@step("linear")
def linear(w: Writer, out: int = 5, bias: bool = True) -> None:
    size = w.shape[-1]
    spelt = ["F.linear({x}, {m}.weight, {m}.bias)"]  # a bias that is added apart is a constant to LRP
    if len(w.shape) == 1:
        spelt.append("torch.addmm({m}.bias, {x}, {m}.weight.T)")
    if not bias:
        spelt = ["F.linear({x}, {m}.weight)", "{x} @ {m}.weight.T", "torch.matmul({x}, {m}.weight.t())"]
    w.module(f"nn.Linear({size}, {out}{'' if bias else ', bias=False'})", *spelt, saved=False)


STEPS["linear, no bias"] = partial(linear, out=6, bias=False)


@step("batch_norm")
def batch_norm(w: Writer, affine: bool = True) -> None:
    w.need(w.spatial <= 3)
    w.module(
        f"nn.BatchNorm{max(w.spatial, 1)}d({w.channels}{'' if affine else ', affine=False'})",
        "F.batch_norm({x}, {m}.running_mean, {m}.running_var, {m}.weight, {m}.bias, eps={m}.eps)",
        saved=False,
    )


STEPS["batch_norm, not affine"] = partial(batch_norm, affine=False)


@step("layer_norm")
def layer_norm(w: Writer) -> None:
    spelt = "F.layer_norm({x}, {m}.normalized_shape, {m}.weight, {m}.bias, {m}.eps)"
    w.module(f"nn.LayerNorm({w.shape[-1]})", spelt, saved=False)


@step("layer_norm, all axes")
def layer_norm_all(w: Writer) -> None:
    spelt = "F.layer_norm({x}, {m}.normalized_shape, {m}.weight, {m}.bias)"
    w.module(f"nn.LayerNorm({list(w.shape)})", spelt, saved=False)


@step("rms_norm")
def rms_norm(w: Writer) -> None:
    w.module(f"nn.RMSNorm({w.shape[-1]})", "F.rms_norm({x}, {m}.normalized_shape, {m}.weight)", saved=False)


@step("group_norm")
def group_norm(w: Writer) -> None:
    w.need(not w.state.channels_last and w.channels % 2 == 0 and math.prod(w.shape) > 2)
    w.module(f"nn.GroupNorm(2, {w.channels})", "F.group_norm({x}, 2, {m}.weight, {m}.bias)", saved=False)


@step("instance_norm")
def instance_norm(w: Writer) -> None:
    w.need(1 <= w.spatial <= 3)
    spelt = "F.instance_norm({x}, weight={m}.weight, bias={m}.bias)"
    w.module(f"nn.InstanceNorm{w.spatial}d({w.channels}, affine=True)", spelt, saved=False)


# ----------------------------------------------------------------------------------------------------- activations

# name -> module, functional spellings, spellings in place
ACTIVATIONS: dict[str, tuple[str, str, str]] = {
    "relu": (
        "nn.ReLU()",
        "F.relu({x}) | torch.relu({x}) | {x}.relu() | {x}.clamp(min=0) | F.threshold({x}, 0.0, 0.0)",
        "torch.relu_({x}) | {x}.relu_() | F.relu({x}, inplace=True) | nn.ReLU(inplace=True) | {x}.clamp_(min=0)",
    ),
    "relu6": (
        "nn.ReLU6()",
        "F.relu6({x}) | F.hardtanh({x}, 0.0, 6.0) | {x}.clamp(0, 6)",
        "F.relu6({x}, inplace=True) | nn.ReLU6(inplace=True) | F.hardtanh_({x}, 0.0, 6.0)",
    ),
    "leaky_relu": (
        "nn.LeakyReLU(0.2)",
        "F.leaky_relu({x}, 0.2) | F.leaky_relu({x}, negative_slope=0.2)",
        "F.leaky_relu_({x}, 0.2) | nn.LeakyReLU(0.2, inplace=True)",
    ),
    "prelu": ("nn.PReLU()", "F.prelu({x}, {m}.weight)", ""),
    "elu": ("nn.ELU()", "F.elu({x})", "F.elu_({x}) | nn.ELU(inplace=True)"),
    "selu": ("nn.SELU()", "F.selu({x}) | torch.selu({x})", "torch.selu_({x}) | nn.SELU(inplace=True)"),
    "celu": ("nn.CELU(0.5)", "F.celu({x}, 0.5)", "torch.celu_({x}, 0.5) | nn.CELU(0.5, inplace=True)"),
    "softplus": ("nn.Softplus()", "F.softplus({x})", ""),
    "gelu": ("nn.GELU()", "F.gelu({x})", ""),
    "gelu, tanh": ("nn.GELU('tanh')", "F.gelu({x}, approximate='tanh')", ""),
    "silu": ("nn.SiLU()", "F.silu({x})", "F.silu({x}, inplace=True) | nn.SiLU(inplace=True)"),
    "mish": ("nn.Mish()", "F.mish({x})", "F.mish({x}, inplace=True) | nn.Mish(inplace=True)"),
    "hardswish": ("nn.Hardswish()", "F.hardswish({x})", "F.hardswish({x}, inplace=True) | nn.Hardswish(inplace=True)"),
    "hardsigmoid": ("nn.Hardsigmoid()", "F.hardsigmoid({x})", "F.hardsigmoid({x}, inplace=True)"),
    "hardtanh": (
        "nn.Hardtanh()",
        "F.hardtanh({x}) | {x}.clamp(-1, 1) | torch.clip({x}, -1, 1)",
        "{x}.clamp_(-1, 1) | nn.Hardtanh(inplace=True)",
    ),
    "sigmoid": ("nn.Sigmoid()", "{x}.sigmoid() | F.sigmoid({x}) | torch.special.expit({x})", "{x}.sigmoid_()"),
    "tanh": ("nn.Tanh()", "{x}.tanh() | torch.tanh({x})", "{x}.tanh_() | torch.tanh_({x})"),
    "logsigmoid": ("nn.LogSigmoid()", "F.logsigmoid({x})", ""),
    "softsign": ("nn.Softsign()", "F.softsign({x})", ""),
    "tanhshrink": ("nn.Tanhshrink()", "F.tanhshrink({x}) | {x} - {x}.tanh()", ""),
    "softshrink": ("nn.Softshrink(0.3)", "F.softshrink({x}, 0.3)", ""),
    "hardshrink": ("nn.Hardshrink(0.3)", "F.hardshrink({x}, 0.3)", ""),
    "threshold": ("nn.Threshold(0.2, -0.4)", "F.threshold({x}, 0.2, -0.4)", "F.threshold_({x}, 0.2, -0.4)"),
    "rrelu": ("nn.RReLU()", "F.rrelu({x})", "nn.RReLU(inplace=True)"),
    "softmax": ("nn.Softmax(1)", "{x}.softmax(1) | F.softmax({x}, dim=1) | torch.softmax({x}, 1)", ""),
    "softmin": ("nn.Softmin(-1)", "F.softmin({x}, -1)", ""),
    "log_softmax": ("nn.LogSoftmax(-1)", "{x}.log_softmax(-1) | F.log_softmax({x}, -1)", ""),
    "glu": ("nn.GLU(1)", "F.glu({x}, 1)", ""),
}


def activation(w: Writer, name: str) -> None:
    module, functional, in_place = ACTIVATIONS[name]
    w.module(module, *functional.split(" | "), in_place=in_place.split(" | ") if in_place else ())


STEPS |= {name: partial(activation, name=name) for name in ACTIVATIONS}

# Of one activation, without a module: name -> spellings, spellings in place, whether the result is saved.
FUNCTIONS: dict[str, tuple[str, str, bool]] = {
    "abs": ("{x}.abs() | torch.abs({x}) | abs({x})", "{x}.abs_()", False),
    "square": ("{x} ** 2 | {x}.square() | torch.pow({x}, 2) | {x}.pow(2)", "{x}.square_()", False),
    "cube": ("{x} ** 3 | {x}.pow(3)", "{x}.pow_(3)", False),
    "root": ("({x} ** 2 + 0.1).sqrt() | torch.sqrt(0.1 + {x}.square()) | ({x}.pow(2) + 0.1) ** 0.5", "", True),
    "reciprocal": ("1 / (1 + {x} ** 2) | ({x}.square() + 1).reciprocal() | ({x}.square() + 1) ** -1", "", True),
    "exp": ("(-{x}).exp() | torch.exp(-{x})", "", True),
    "exp2": ("2 ** {x} | torch.exp2({x})", "", True),
    "log": ("(1 + {x}.abs()).log() | torch.log({x}.abs() + 1)", "", True),
    "log1p": ("{x}.square().log1p() | torch.log1p({x} ** 2)", "", True),
    "sin": ("{x}.sin() | torch.sin({x})", "{x}.sin_()", False),
    "cos": ("{x}.cos()", "{x}.cos_()", False),
    "erf": ("{x}.erf() | torch.special.erf({x})", "{x}.erf_()", False),
    "self product": ("{x} * {x} | torch.mul({x}, {x})", "", False),
    "self gate": ("{x} * {x}.sigmoid() | torch.sigmoid({x}) * {x}", "", False),
    "self quotient": ("{x} / (1 + {x}.abs())", "", False),
    "scaled": ("{x} * 0.7 | 0.7 * {x} | torch.mul({x}, 0.7) | {x} / (1 / 0.7)", "{x} *= 0.7 | {x}.mul_(0.7)", False),
    "negated": ("-{x} | {x}.neg() | 0 - {x} | {x} * -1", "{x}.neg_()", False),
    "shifted": ("{x} - 0.3 | {x}.sub(0.3) | torch.add({x}, -0.3)", "{x} -= 0.3 | {x}.add_(-0.3)", False),
    "complement": ("1 - {x} | torch.rsub({x}, 1)", "", False),
    "amax": ("{x}.amax(-1) | torch.amax({x}, dim=-1)", "", True),  # among equal values it shares, unlike max
    "amin": ("{x}.amin(-1) | torch.amin({x}, dim=-1)", "", True),
    "max": ("{x}.max(-1).values | torch.max({x}, -1)[0] | {x}.max(dim=-1)[0]", "", True),
    "min": ("{x}.min(-1).values | torch.min({x}, dim=-1)[0]", "", True),
    "logsumexp": ("{x}.logsumexp(-1) | torch.logsumexp({x}, dim=-1)", "", True),
    "mean": ("{x}.mean(-1) | torch.mean({x}, dim=-1)", "", False),
    "sum": ("{x}.sum(-1) | {x}.sum(dim=-1)", "", False),
    "std": ("{x}.std(-1) | torch.std({x}, dim=-1)", "", True),
    "var": ("{x}.var(-1, keepdim=True) | {x}.var(-1).unsqueeze(-1)", "", False),
    "length": ("{x}.norm(dim=-1) | torch.linalg.vector_norm({x}, dim=-1)", "", True),
    "normalize": ("F.normalize({x}, dim=1)", "", True),
    "prod": ("{x}.prod(-1) | torch.prod({x}, -1)", "", True),
    "cumsum": ("{x}.cumsum(-1) | torch.cumsum({x}, dim=-1)", "", False),
    "cumprod": ("{x}.cumprod(-1)", "", True),
    "standardized": ("({x} - {x}.mean(-1, keepdim=True)) / (1 + {x}.std(-1, keepdim=True))", "", False),
    "flip": ("{x}.flip(-1) | torch.flip({x}, [-1])", "", False),
    "roll": ("{x}.roll(1, -1) | torch.roll({x}, 1, -1)", "", False),
    "swapped halves": ("torch.cat({x}.chunk(2, 1)[::-1], 1)", "", False),
    "dropped column": ("{x}[..., 1:] | {x}.narrow(-1, 1, {x}.shape[-1] - 1)", "", False),
    "strided columns": ("{x}[..., ::2]", "", False),
    "repeated": ("torch.cat([{x}, {x}], 1) | {x}.repeat(1, 2, *[1] * ({x}.dim() - 2))", "", False),
    "padded": ("F.pad({x}, (1, 1))", "", False),
    "padded by ones": ("F.pad({x}, (0, 1), value=1.0)", "", False),
    "clamped": ("{x}.clamp(-0.5, 0.8) | torch.clamp({x}, min=-0.5, max=0.8)", "{x}.clamp_(-0.5, 0.8)", False),
    "clamped above": ("{x}.clamp(max=0.4) | torch.clamp_max({x}, 0.4)", "{x}.clamp_max_(0.4)", False),
    "at least 0.1": ("torch.maximum({x}, torch.full_like({x}, 0.1))", "", False),
}


REDUCING = set("amax amin max min logsumexp mean sum std length prod".split())  # the last axis
SEVERAL = set("std var standardized".split()) | {"dropped column", "strided columns"}  # need more than one column


def function(w: Writer, name: str) -> None:
    codes, in_place, saved = FUNCTIONS[name]
    w.need(len(w.shape) > 1 or name not in REDUCING)
    w.need(w.shape[-1] > 1 or name not in SEVERAL)
    w.need(w.shape[0] % 2 == 0 or name != "swapped halves")
    last = w.state.channels_last and name not in REDUCING
    w.run(*codes.split(" | "), in_place=in_place.split(" | ") if in_place else (), saved=saved, channels_last=last)


STEPS |= {name: partial(function, name=name) for name in FUNCTIONS}

# ----------------------------------------------------------------------------------------------------------- pools


def pool(w: Writer, module: str, function: str, arguments: str, saved: bool = False) -> None:
    w.need(1 <= w.spatial <= 3)
    dims = f"{w.spatial}d"
    w.module(f"nn.{module}{dims}({arguments})", f"F.{function}{dims}({{x}}, {arguments})", saved=saved)


maximum, average = (
    partial(pool, module="MaxPool", function="max_pool"),
    partial(pool, module="AvgPool", function="avg_pool"),
)
adaptive_average = partial(pool, module="AdaptiveAvgPool", function="adaptive_avg_pool")
STEPS |= {
    "max_pool": partial(maximum, arguments="2"),
    "max_pool overlapping": partial(maximum, arguments="3, 2, 1"),
    "max_pool ceil": partial(maximum, arguments="2, 2, ceil_mode=True"),
    "max_pool dilated": partial(maximum, arguments="2, 1, dilation=2"),
    "avg_pool": partial(average, arguments="2"),
    "avg_pool padded": partial(average, arguments="3, 2, 1, count_include_pad=False"),
    "adaptive_avg_pool": partial(adaptive_average, arguments="2"),
    "global_avg_pool": partial(adaptive_average, arguments="1"),
    "adaptive_max_pool": partial(pool, module="AdaptiveMaxPool", function="adaptive_max_pool", arguments="3"),
    "lp_pool": partial(pool, module="LPPool", function="lp_pool", arguments="2, 2", saved=True),
}


@step("upsample")
def upsample(w: Writer) -> None:
    w.need(1 <= w.spatial <= 3)
    w.module("nn.Upsample(scale_factor=2)", "F.interpolate({x}, scale_factor=2)", saved=False)


@step("upsample bilinear")
def bilinear(w: Writer) -> None:
    w.need(w.spatial == 2)
    spelt = "F.interpolate({x}, scale_factor=2, mode='bilinear', align_corners=False)"
    w.module("nn.Upsample(scale_factor=2, mode='bilinear')", spelt, saved=False)


@step("pixel_shuffle")
def pixel_shuffle(w: Writer) -> None:
    w.need(w.spatial == 2 and w.channels % 4 == 0)
    w.module("nn.PixelShuffle(2)", "F.pixel_shuffle({x}, 2)", saved=False)


@step("pixel_unshuffle")
def pixel_unshuffle(w: Writer) -> None:
    w.need(w.spatial == 2)
    w.module("nn.PixelUnshuffle(2)", "F.pixel_unshuffle({x}, 2)", saved=False)


@step("reflected")
def reflected(w: Writer) -> None:
    w.need(1 <= w.spatial <= 3)
    sides = [1] * 2 * w.spatial
    w.module(f"nn.ReflectionPad{w.spatial}d(1)", f"F.pad({{x}}, {sides}, mode='reflect')", saved=False)


@step("unfold")
def unfold(w: Writer) -> None:
    w.need(w.spatial == 2)
    w.module("nn.Unfold(2, stride=2)", "F.unfold({x}, 2, stride=2)", saved=False)


@step("local_response_norm")
def local_response_norm(w: Writer) -> None:
    w.need(w.spatial >= 1)
    w.module("nn.LocalResponseNorm(3, alpha=0.5)", "F.local_response_norm({x}, 3, alpha=0.5)")


@step("dropout")
def dropout(w: Writer) -> None:
    w.module("nn.Dropout(0.5)", "F.dropout({x}, 0.5, training=False)", fresh=False)


@step("flatten")
def flatten(w: Writer) -> None:
    w.need(len(w.shape) > 1)
    w.module(
        "nn.Flatten()",
        "{x}.flatten(1)",
        "torch.flatten({x}, 1)",
        "{x}.reshape(len({x}), -1)",
        fresh=False,
        channels_last=False,
    )


@step("tokens")
def tokens(w: Writer) -> None:
    w.need(w.spatial >= 1)
    w.run(
        "{x}.flatten(2).transpose(1, 2)",
        "{x}.flatten(2).mT",
        "{x}.flatten(2).permute(0, 2, 1)",
        fresh=False,
        channels_last=True,
    )


@step("channels last")
def channels_last(w: Writer) -> None:
    w.need(w.spatial >= 1)
    w.run("{x}.movedim(1, -1)", fresh=False, channels_last=True)


@step("channels first")
def channels_first(w: Writer) -> None:
    w.need(w.state.channels_last)
    w.run("{x}.movedim(-1, 1)", fresh=False, channels_last=False)


@step("transposed")
def transpose(w: Writer) -> None:
    w.need(len(w.shape) >= 2)
    w.run("{x}.transpose(-1, -2)", "{x}.mT", "torch.swapaxes({x}, -1, -2)", fresh=False, channels_last=False)
