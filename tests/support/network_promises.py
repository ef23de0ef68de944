"""What must hold of any network of known operations, in float64."""

import inspect
import random
from dataclasses import dataclass, field

import hypothesis.strategies as st
import torch
from hypothesis import reject
from network_blocks import BLOCKS, CONSTANTS, ONE_BRANCH, STEPS
from random_networks import SPELLINGS, Network, Step, weighted
from torch import Tensor, nn

import attrbox
from attrbox.errors import AttrboxError, OptionError

PROPAGATION: list[tuple[str, dict[str, object]]] = [
    ("saliency", {"absolute": False}),
    ("gradient_x_input", {}),
    ("guided_backprop", {}),
    ("deconvnet", {}),
    ("deeplift", {}),
    ("lrp_epsilon", {}),
    ("lrp", {}),
    ("epsilon_plus", {}),
    ("epsilon_alpha2_beta1", {}),
    ("epsilon_gamma_box", {}),
    ("deep_taylor", {"first": "w_square"}),
    ("excitation_backprop", {}),
    ("attn_lrp", {"gamma_convolution": 0.25}),
]
_OPTIONS = {name: {option.name for option in attrbox.method_registry[name].options} for name, _ in PROPAGATION}
AUDITED = [name for name, options in _OPTIONS.items() if "audit" in options]
ROUNDING = 1e-8
# What networks are mostly made of comes more often than the rest.
FREQUENT = set("conv linear batch_norm max_pool avg_pool tokens attention multihead transformer gru lstm again".split())


class BrokenError(AssertionError):
    """A promise that a network shows not to hold, with code that shows it."""


@dataclass
class Case:
    """A network, and which of its spellings and of the methods' options are tried."""

    network: Network
    spelling: str = "functional"
    baseline: str = "one number"
    audited: str = "epsilon_plus"
    models: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.models = {spelling: self.network.model(spelling) for spelling in ("modules", self.spelling)}

    @property
    def start(self) -> "float | Tensor":
        x = self.network.images
        return {
            "one number": 0.0,
            "another number": 0.5,
            "for all": x[:1].flip(-1)[0],
            "for each": x.flip(0),
            "half of the image": torch.where(torch.arange(x.shape[-1]) % 2 > 0, x, 0.0),
        }[self.baseline]

    def broken(self, claim: str, call: str, spelling: str = "modules") -> BrokenError:
        """The failure as a program of its own."""
        lines = ["import torch", "import torch.nn.functional as F", "from torch import nn", "", "import attrbox"]
        lines += ["", "", self.network.code(spelling), "", "", inspect.getsource(weighted), ""]
        lines += [f"model = weighted(Net(), {self.network.seed})"]
        shape, seed = self.network.shape, self.network.seed
        lines += [f"generator = torch.Generator().manual_seed({seed})"]
        lines += [f"images = torch.randn(2, *{shape}, dtype=torch.float64, generator=generator)", call]
        return BrokenError(f"{claim}\n\n# {self.network!r}\n" + "\n".join(lines))


BASELINES = ("one number", "another number", "for all", "for each", "half of the image")


# What networks are mostly made of comes more often than the rest. "" is no step: failures shrink to few steps.
PLAIN = ["", *STEPS, *[name for name in STEPS if name.split()[0].strip(",") in FREQUENT] * 2]
SHAPES = ((3, 6, 5), (2, 8, 8), (4, 7), (3, 5, 6), (2, 4, 3, 4), (6,))


def _steps(draw: random.Random, least: int, most: int, depth: int) -> tuple[Step, ...]:
    return tuple(_step(draw, depth) for _ in range(draw.randint(least, most)))


def _step(draw: random.Random, depth: int) -> Step:
    if depth == 0 or draw.randrange(4) < 3:
        return PLAIN[draw.randrange(len(PLAIN))]
    name = list(BLOCKS)[draw.randrange(len(BLOCKS))]
    return (name, *(_steps(draw, 1, 3, depth - 1) for _ in range(1 if name in ONE_BRANCH else 2)))


def cases(most: int = 9) -> st.SearchStrategy[Case]:
    # Steps by hypothesis' own random numbers, which spread more evenly than its lists, and shrink as well.
    steps = st.randoms(use_true_random=False).map(lambda draw: _steps(draw, 2, most, 2))
    networks = st.builds(Network, st.sampled_from(SHAPES), steps, st.integers(0, 999))
    return st.builds(
        Case, networks, st.sampled_from(SPELLINGS[1:]), st.sampled_from(BASELINES), st.sampled_from(AUDITED)
    )


def check(case: Case) -> None:
    """Raise `BrokenError` where a promise does not hold."""
    network, x = case.network, case.network.images
    model, other = case.models["modules"], case.models[case.spelling]
    leaf = x.clone().requires_grad_()
    scores = model(leaf)
    (gradient,) = torch.autograd.grad(scores[:, 1].sum(), leaf)
    if not bool(gradient.isfinite().all()) or not float(scores.detach().abs().max()) < 1e4:
        reject()  # roots of 0; signals that explode, which say nothing about rounding
    same = torch.allclose(other(x.clone()), scores, rtol=1e-10, atol=1e-10)
    assert same, f"the spelling {case.spelling!r} of {network} is another function"
    try:
        found = attrbox.compare(model, x, PROPAGATION, target=1, progress=False, strict=True)
    except AttrboxError as error:
        raise case.broken(
            f"refused: {error}", "print(attrbox.explain(model, images, 'deeplift', strict=True))"
        ) from error
    _equal(case, found["saliency"].values, gradient, "saliency is not autograd's gradient", "saliency")
    alone = attrbox.compare(model, x, PROPAGATION, target=1, progress=False, batch_size=1)
    for method, _ in PROPAGATION:
        claim = f"{method} is another map alone than in the batch"
        _equal(case, alone[method].values, found[method].values, claim, method)
    _same_in_another_spelling(case, found)
    _complete(case)
    if network.used:
        _conserved(case)


def _equal(case: Case, values: Tensor, wanted: Tensor, claim: str, method: str, spelling: str = "modules") -> None:
    error = _apart(values, wanted)
    if error <= ROUNDING or error <= 100 * _apart(_rounded(case, method), wanted):
        return  # equal, or near a kink or a root of 0, where rounding alone moves the map as much
    call = f"print(attrbox.explain(model, images, {method!r}, target=1{_written(dict(PROPAGATION)[method])}).values)"
    raise case.broken(f"{claim}: {error:.1e} of the largest value", call, spelling)


def _apart(values: Tensor, wanted: Tensor) -> float:
    scale = torch.maximum(wanted.abs().amax(), values.abs().amax()).clamp(min=1e-12)
    return float((values - wanted).abs().max() / scale)


def _rounded(case: Case, method: str) -> Tensor:
    """The map of the images with other last digits."""
    x = case.network.images
    options = dict(PROPAGATION)[method]
    x = x * (1 + 1e-15 * torch.sign(x.flip(-1)))
    return attrbox.explain(case.models["modules"], x, method, target=1, progress=False, **options).values


def _written(options: dict[str, object]) -> str:
    return "".join(f", {name}={value!r}" for name, value in options.items())


def _same_in_another_spelling(case: Case, found: attrbox.Comparison) -> None:
    try:
        others = attrbox.compare(
            case.models[case.spelling], case.network.images, PROPAGATION, target=1, progress=False, strict=True
        )
    except AttrboxError as error:
        call = "print(attrbox.explain(model, images, 'deeplift', strict=True))"
        raise case.broken(f"refused in the spelling {case.spelling!r}: {error}", call, case.spelling) from error
    for method, _ in PROPAGATION:
        claim = f"{method} of the spelling {case.spelling!r} is not that of\n\n{case.network.code()}\n\nbut away by"
        _equal(case, others[method].values, found[method].values, claim, method, case.spelling)


def _complete(case: Case) -> None:
    """The maps of DeepLIFT sum to the difference of the scores."""
    x, start = case.network.images, case.start
    model = case.models["modules"]
    with torch.no_grad():
        there = model(start.expand_as(x).clone() if isinstance(start, Tensor) else torch.full_like(x, start))
        wanted = model(x)[:, 1] - there[:, 1]
    for reveal_cancel in ("none", "all"):
        try:
            maps = attrbox.explain(
                model, x, "deeplift", target=1, baseline=start, reveal_cancel=reveal_cancel, progress=False
            )
        except OptionError:
            continue  # no place for RevealCancel
        values = maps.values.flatten(1)
        rounding = 1e-14 * there.abs().amax(1)  # of the scores themselves
        scale = values.abs().sum(1) + wanted.abs() + rounding / ROUNDING
        gap = float(((values.sum(1) - wanted).abs() / scale.clamp(min=1e-300)).max())
        if not gap <= ROUNDING:
            call = f"# baseline: {case.baseline}\nmaps = attrbox.explain(model, images, 'deeplift', target=1, "
            call += f"baseline={start if isinstance(start, float) else 'images.flip(0)'}, "
            call += f"reveal_cancel={reveal_cancel!r})\nprint(maps.gap)"
            raise case.broken(f"deeplift misses {gap:.1e} of its map", call)


def _conserved(case: Case) -> None:
    """Layers account for all relevance that they keep; between sites it is only added constants that keep any."""
    method = case.audited
    options = {**dict(PROPAGATION)[method], "audit": True}
    maps = attrbox.explain(case.models["modules"], case.network.images, method, target=1, progress=False, **options)
    audit = maps.coverage.conservation
    layers = [
        place for place, site in enumerate(audit.sites) if site.operation in ("convolution", "linear", "batch_norm")
    ]
    scale = torch.maximum(audit.arriving.abs().amax(2), audit.leaving.abs().amax(2)) + maps.score[:, None].abs()
    kept = audit.bias + audit.stabiliser + audit.clamp
    off = ((kept - audit.absorbed)[..., layers].abs().sum(2) / scale).max()
    call = f"maps = attrbox.explain(model, images, {method!r}, target=1{_written(options)})\n"
    call += "print(maps.coverage.conservation.table())"
    if not off <= ROUNDING:
        raise case.broken(f"layers under {method} do not account for {off:.1e} of the relevance", call)
    used = case.network.used
    # A first layer that divides by its inputs loses what it gives to those that the steps before it set to 0.
    divides = method in ("epsilon_gamma_box", "deep_taylor") and not used[0].startswith(("conv", "linear"))
    lost = (audit.constants.abs() / scale).max()
    if not lost <= ROUNDING and not divides and not CONSTANTS & set(used):
        raise case.broken(f"{lost:.1e} of the relevance is lost between the sites under {method}", call)
